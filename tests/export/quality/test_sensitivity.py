"""Linears quantized one by one: against the numbers of quantized bundles, and the recipe that follows."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from tests import quantized
from tests.commands import invoke
from zimgkit.engines.bundle import Bundle, FileRecord, sha256, write_manifest
from zimgkit.engines.errors import UsageError
from zimgkit.engines.tensors.dtypes import round_to
from zimgkit.engines.torch.engine import open_engine
from zimgkit.export.checkpoints.checkpoint import open_checkpoint
from zimgkit.export.cli.main import main
from zimgkit.export.components import parts_of
from zimgkit.export.quality import sensitivity
from zimgkit.export.quality.runs import Trial
from zimgkit.export.quality.sensitivity import Group, Sensitivity, VelocityError, proposed_recipe
from zimgkit.export.quantization.calibrate import statistics_path
from zimgkit.export.quantization.fake_quantization import rounded_input, rounded_weight, switch_quantization
from zimgkit.export.quantization.formats import FLOAT8, INT4, INT8, encode, scale_of, weight_scales
from zimgkit.export.quantization.quantize import QuantizationSettings, linear_weights
from zimgkit.export.quantization.recipe import Recipe, read_recipe
from zimgkit.export.quantization.statistics import Statistics

pytestmark = pytest.mark.usefixtures("torch_in_float32")

TRIAL = Trial(("a green ball",), 64, 64, 1)


@pytest.mark.parametrize("number_format", [INT8, FLOAT8, INT4])
@pytest.mark.parametrize("shape", [(3, 16), (40, 96), (7, 256)])
def test_weights_are_rounded_as_bundles_store_them(number_format, shape):
    rng = np.random.default_rng(shape[0])
    rows = (rng.standard_normal(shape) * rng.uniform(0.01, 10, (shape[0], 1))).astype(np.float32)
    rows[1] = 0
    scales = weight_scales(rows, number_format)
    stored = number_format.widen(encode(rows, scales, number_format)).reshape(*scales.shape, -1)
    expected = (stored * scales[..., None]).reshape(shape)
    np.testing.assert_array_equal(rounded_weight(torch.from_numpy(rows), number_format).numpy(), expected)


@pytest.mark.parametrize("number_format", [INT8, FLOAT8])
def test_inputs_are_rounded_as_graphs_round_them(number_format):
    """ONNX Runtime's own QuantizeLinear and DequantizeLinear, past the range as well."""
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper

    x = (3 * np.random.default_rng(0).standard_normal((5, 64))).astype(np.float32)
    scale = float(scale_of(np.array([4.0], np.float32), number_format)[0])
    kind = {INT8: TensorProto.INT8, FLOAT8: TensorProto.FLOAT8E4M3FN}[number_format]
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [5, 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [5, 64])],
        [helper.make_tensor("s", TensorProto.FLOAT, [], [scale]), helper.make_tensor("z", kind, [], [0])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {"x": x})
    np.testing.assert_array_equal(rounded_input(torch.from_numpy(x), scale, number_format).numpy(), expected)


@pytest.mark.parametrize("precision", ["fp8", "int8", "int4-weights"])
def test_all_switched_on_is_the_quantized_bundle(precision, bundle_of, quantized_of, tmp_path):
    """The graph of a bundle that was quantized, against a float bundle's with the same linears switched on."""
    other = Bundle.open(quantized_of("z-image", precision))
    active = {name.removesuffix(".scale") for name in other.tensors("denoiser") if name.endswith(".weight.scale")}
    assert len(active) > 5
    floating = _rounded_but(active, Path(shutil.copytree(bundle_of("z-image"), tmp_path / "b")))
    statistics = None
    if not precision.endswith("weights"):
        statistics = Statistics.load(other.root.parent / "statistics.calibration.safetensors")
    settings = QuantizationSettings(precision, Recipe(), statistics)
    runs = quantized.record(floating.root, "denoiser")[:2]
    engine = open_engine(floating, "denoiser", "cpu")
    switch_quantization(engine, floating, "denoiser", settings, set())
    for feeds, expected in runs:
        (found,) = engine.run(feeds).values()
        np.testing.assert_allclose(found, expected, atol=1e-4)
    engine = open_engine(floating, "denoiser", "cpu")
    switch_quantization(engine, floating, "denoiser", settings, active)
    replayed = quantized.replay(other.root, "denoiser", "torch", runs)
    differences = []
    for (feeds, expected), bundled in zip(runs, replayed, strict=True):
        (found,) = engine.run(feeds).values()
        differences.append(quantized.relative(found, bundled))
        cost = quantized.relative(bundled, expected)
        assert cost > 1e-3 and differences[-1] < cost / 2
    # As a CPU adds, an input in the middle between two integers becomes one or the other, in one of the runs at most.
    assert sorted(differences)[-2] < 1e-5


def _rounded_but(names, folder):
    """A float32 bundle whose denoiser has the values of bfloat16, as an unquantized weight has, except in some."""
    bundle = Bundle.open(folder)
    files = dict(bundle.manifest.files)
    for name, info in bundle.tensors("denoiser").items():
        if name not in names:
            values = np.memmap(info.file, np.float32, "r+", info.offset, info.shape)
            values[...] = round_to(values, "bfloat16")
    for file in bundle.manifest.components["denoiser"].weights:
        files[file] = FileRecord(files[file].size, sha256(folder / file))
    write_manifest(folder, msgspec.structs.replace(bundle.manifest, files=files))
    return Bundle.open(folder)


@pytest.mark.parametrize(
    ("family", "by", "wanted"),
    [
        ("z-image", "kind", "layers.*.attention.to_q.weight"),
        ("z-image", "block", "layers.0.*"),
        ("qwen-image", "kind", "transformer_blocks.*.attn.to_q.weight"),
    ],
)
def test_the_recipe_holds(family, by, wanted, bundle_of):
    bundle = Bundle.open(bundle_of(family))
    settings = QuantizationSettings("int4-weights", Recipe())
    seen: list[tuple[str, int, int]] = []
    found = sensitivity.sensitivity(bundle, settings, TRIAL, 0.9999, by=by, report=lambda *given: seen.append(given))
    assert {"quantize one by one", "find a recipe"} <= {stage for stage, _, _ in seen}
    cosines = [group.alone.cosine for group in found.groups]
    assert cosines == sorted(cosines)
    assert {group.component for group in found.groups} == {"text_encoder", "denoiser"}
    assert found.all_quantized.cosine < 0.9999 <= found.with_recipe.cosine
    assert 0 < found.unquantized <= len(found.groups)
    assert found.all_quantized.relative_l2_error > max(group.alone.relative_l2_error for group in found.groups[1:]) / 2
    patterns = [group.pattern for group in found.groups]
    assert wanted in patterns and len(set(zip(patterns, cosines, strict=True))) == len(patterns)
    # A low target needs no linear to stay unquantized.
    easy = replace(found, unquantized=0)
    assert "[[keep]]" not in proposed_recipe(easy)


def test_the_command(bundle_of, checkpoint_of, quantized_of, tmp_path):
    """Its recipe is one that ``build`` takes; the calibration beside the bundle serves."""
    folder = shutil.copytree(bundle_of("z-image", "bf16"), tmp_path / "b")
    statistics = quantized_of("z-image", "int8").parent / "statistics.calibration.safetensors"
    shutil.copy(statistics, statistics_path(folder))
    before = statistics_path(folder).read_bytes()
    options = ("--size", "64x64", "--steps", 1, "--device", "cpu", "--quiet", "--by", "block")
    result = invoke(
        main, "sensitivity", folder, "--precision", "int8", *options, "--json", "--out", tmp_path / "r.toml",
        "--target", 0.99999,
    )  # fmt: skip
    assert result.code == 0, result
    data = json.loads(result.out)
    unquantized = [group for group in data["groups"] if group["unquantized"]]
    recipe = read_recipe(tmp_path / "r.toml")
    assert [(rule.component, rule.tensors) for rule in recipe.keep] == [
        (group["component"], (group["tensors"],)) for group in unquantized
    ]
    assert recipe.bounds["int8"].cosine == 0.99999
    assert recipe.keep[0].reason == f"cosine {unquantized[0]['cosine']:.6f} when quantized alone"
    assert statistics_path(folder).read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"b", "r.toml", statistics_path(folder).name}
    names = {name for group in data["groups"] for name in group["weights"]}
    parts = parts_of(open_checkpoint(str(checkpoint_of("z-image"))))
    for component in ("text_encoder", "denoiser"):
        linears = linear_weights(parts[component])
        found = recipe.unquantized("int8", component, linears)
        assert sum(len(group["weights"]) for group in unquantized if group["component"] == component) == len(found)
    assert names <= Bundle.open(folder).tensors("denoiser").keys() | Bundle.open(folder).tensors("text_encoder").keys()


def test_text_and_recipe():
    groups = tuple(
        Group("denoiser", f"layers.{i}.*", (f"layers.{i}.a",), 10, VelocityError(0.1 / (i + 1), 0.99 + 0.002 * i))
        for i in range(3)
    )
    found = Sensitivity("Z", "fp8", 0.998, groups, VelocityError(0.2, 0.98), 2, VelocityError(0.01, 0.9985))
    text = sensitivity.sensitivity_text(found).splitlines()
    assert text[1].split() == ["layers.0.*", "denoiser", "10", "1.00e-01", "0.990000", "unquantized"]
    assert "unquantized" not in text[3]
    assert text[-1].startswith("2 of 3 unquantized, 66.7% of the weights: ")
    assert proposed_recipe(found).count("[[keep]]") == 2


@pytest.mark.parametrize(
    ("options", "said", "code"),
    [
        ((), "sensitivity takes a bundle or --model", 2),
        (("nowhere",), "nowhere is not a bundle", 1),
        (("--model", "nowhere"), "nowhere", 1),
        (("{}", "--target", "1.5"), "the target 1.5 is no cosine", 2),
        (("{}", "--calibration", "x.safetensors"), "--calibration is not for --precision int4-weights", 2),
        (("{}", "--out", "no/r.toml"), "does not exist; make it first", 1),
        (("{}", "--prompts", "no.txt"), "cannot be read", 2),
    ],
)
def test_bad_input(options, said, code, bundle_of, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = [option.format(bundle_of("z-image")) for option in options]
    invoke(main, "sensitivity", *given, "--precision", "int4-weights", "--quiet").assert_refused(said, code)
    assert not [*tmp_path.iterdir()]


def test_a_quantized_bundle_is_refused(quantized_of):
    bundle = Bundle.open(quantized_of("z-image", "int8-weights"))
    with pytest.raises(UsageError, match="is quantized; name a bundle of --precision bf16 or fp32"):
        sensitivity.sensitivity(bundle, QuantizationSettings("int8-weights", Recipe()), TRIAL, 0.99)
