"""Whole quantized bundles: their files, their graphs, and their networks' results on both backends."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from tests import quantized
from tests.commands import invoke
from zimgkit.engines.bundle import CPU_GRAPH, Bundle
from zimgkit.export.cli.main import main
from zimgkit.runtime.commands.cli import main as run
from zimgkit.runtime.families import family_of

COMPONENTS = ("text_encoder", "denoiser")
FAMILIES = ("z-image", "qwen-image")
TYPES = dict.fromkeys(("int8", "int8-dynamic", "int8-weights"), "int8")
TYPES |= {"fp8": "float8_e4m3fn", "int4-weights": "uint8"}
COSINE = {"fp8": 0.99, "int8": 0.99, "int8-dynamic": 0.995, "int8-weights": 0.9995, "int4-weights": 0.95}
"""Of tiny networks with random weights, whose rows of 48 numbers average less out than real ones."""

pytestmark = [pytest.mark.parametrize("family", FAMILIES), pytest.mark.usefixtures("torch_in_float32")]


@pytest.fixture(scope="module")
def recorded(bundle_of):
    found = {}

    def make(family, component):
        if (family, component) not in found:
            found[family, component] = quantized.record(bundle_of(family), component)
        return found[family, component]

    return make


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("precision", quantized.PRECISIONS)
def test_results_against_float32(family, component, precision, quantized_of, recorded):
    """On the very inputs of a picture's steps; on ONNX Runtime and PyTorch alike."""
    runs, folder = recorded(family, component), quantized_of(family, precision)
    results = {backend: quantized.replay(folder, component, backend, runs) for backend in ("onnxruntime", "torch")}
    for index, (_, expected) in enumerate(runs):
        found, other = results["onnxruntime"][index], results["torch"][index]
        assert quantized.cosine(found, expected) >= COSINE[precision]
        if precision == "int8-dynamic":
            # PyTorch rounds weights alone, which is what remains here.
            assert 1.05 * quantized.relative(found, expected) >= quantized.relative(other, expected)
            continue
        if precision in ("int8", "int4-weights"):
            # ONNX Runtime rounds each token by a scale of its own on CPUs, or each block of one, which is closer than
            # one scale for all, and little beside weights of 4 bits.
            assert quantized.relative(found, expected) <= 1.05 * quantized.relative(other, expected)
            continue
        # What lies just between two steps may be rounded to either; where inputs are not rounded, nothing does.
        same = 1e-4 if precision.endswith("weights") else 0.05
        assert quantized.relative(found, other) <= same
        assert quantized.relative(found, other) < quantized.relative(found, expected)


@pytest.mark.parametrize("precision", quantized.PRECISIONS)
def test_the_files(family, precision, quantized_of, bundle_of):
    bundle = Bundle.open(quantized_of(family, precision))
    original = Bundle.open(bundle_of(family, "bf16"))
    manifest = bundle.manifest
    assert manifest.precision == "bfloat16" and manifest.quantization.precision == precision
    for component in COMPONENTS:
        tensors, before = bundle.tensors(component), original.tensors(component)
        kept = manifest.quantization.unquantized.get(component, {})
        scaled = {name.removesuffix(".scale") for name in tensors if name.endswith(".scale")}
        assert scaled and not scaled & kept.keys()
        for name, info in before.items():
            assert tensors[name].dtype == (TYPES[precision] if name in scaled else "bfloat16")
            ratio = 1 if name not in scaled else 4 if precision == "int4-weights" else 2
            assert info.nbytes == ratio * tensors[name].nbytes
        extra = tensors.keys() - before.keys()
        assert {name.rpartition(".")[2] for name in extra} <= {"scale", "input_scale", "smooth"}
        assert any(name.endswith(".smooth") for name in extra) == (precision == "int8")
        assert bundle.component(component).parameters == original.component(component).parameters
        assert bundle.component(component).inputs == original.component(component).inputs
        assert bundle.source_hash(component) != original.source_hash(component)
    for component in original.manifest.components.keys() - {*COMPONENTS, "modulation"}:
        assert bundle.content_hash(component) == original.content_hash(component)


@pytest.mark.parametrize("precision", quantized.PRECISIONS)
def test_the_graphs(family, precision, quantized_of, tmp_path):
    """Sound to ONNX's own checks; every product of a quantized weight, and of no other, is with a quantized input."""
    # A copy, for other tests link these files, and the checks refuse what has several names.
    bundle = Bundle.open(shutil.copytree(quantized_of(family, precision), tmp_path / "bundle"))
    for component in COMPONENTS:
        for compute, name in bundle.component(component).graphs.items():
            path = bundle.file(name)
            onnx.checker.check_model(path, full_check=True)
            model = onnx.load(path, load_external_data=False)
            types = {entry.name: entry.data_type for entry in model.graph.initializer}
            used = {name for node in model.graph.node for name in node.input}
            assert types.keys() <= used
            # The graph for CPUs calls no functions.
            nodes = [node for part in (model.graph, *model.functions) for node in part.node]
            kinds = [node.op_type for node in nodes]
            assert path.stat().st_size < 200_000, compute
            if compute == CPU_GRAPH and precision.startswith("int8"):
                assert kinds.count("QGemm") > 0 and "DequantizeLinear" not in kinds
                continue
            if compute == CPU_GRAPH and precision == "int4-weights":
                assert kinds.count("MatMulNBits") > 0 and "DequantizeLinear" not in kinds
                continue
            # In float8 ONNX Runtime's graph dequantizes inputs alone.
            assert compute == CPU_GRAPH or kinds.count("DequantizeLinear") > 0
            assert ("QuantizeLinear" in kinds) == (precision in ("fp8", "int8"))


@pytest.mark.parametrize("precision", quantized.PRECISIONS)
def test_the_modulation_table(family, precision, quantized_of, bundle_of):
    bundles = [Bundle.open(folder) for folder in (quantized_of(family, precision), bundle_of(family))]
    if family == "z-image":
        assert "modulation" not in bundles[0].manifest.components
        return
    assert {info.dtype for info in bundles[0].tensors("modulation").values()} == {"int8", "bfloat16"}
    sigmas = np.array([1.0, 0.7, 0.2], np.float32)
    found, expected = (family_of(bundle.manifest).schedule_inputs(bundle, sigmas) for bundle in bundles)
    for step in range(3):
        assert quantized.relative(found(step)["modulation"], expected(step)["modulation"]) < 0.02


@pytest.mark.parametrize("precision", ["int8", "int8-dynamic", "int8-weights"])
def test_8_bits_are_multiplied_as_integers_on_the_cpu(family, precision, quantized_of, tmp_path):
    """One product for each weight, of which the kernel keeps a copy; no weight is widened or turned over."""
    import onnxruntime as ort

    bundle = Bundle.open(quantized_of(family, precision))
    for component in COMPONENTS:
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        options.log_severity_level = 4
        path = bundle.file(bundle.component(component).graphs[CPU_GRAPH])
        ort.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=["ConstantFolding"]
        )
        model = onnx.load(tmp_path / "optimized.onnx", load_external_data=False)
        kinds = [node.op_type for node in model.graph.node]
        scales = {name for name in bundle.tensors(component) if name.endswith(".weight.scale")}
        assert kinds.count("QGemm") == len(scales)
        assert "DequantizeLinear" not in kinds


def test_the_same_picture_on_both_backends(family, quantized_of, tmp_path):
    from PIL import Image

    pictures = []
    for backend in ("onnxruntime", "torch"):
        file = tmp_path / f"{backend}.png"
        result = invoke(
            run, "generate", "--bundle", quantized_of(family, "int8-weights"), "--prompt", "x", "--seed", 3,
            "--width", 64, "--height", 64, "--num-inference-steps", 2,
            "--backend", backend, "--device", "cpu", "--output", file, "--quiet",
        )  # fmt: skip
        assert result.code == 0, result
        pictures.append(np.asarray(Image.open(file)).astype(int))
    assert np.abs(pictures[0] - pictures[1]).max() <= 2


def test_inspect(family, quantized_of):
    text = invoke(run, "inspect", quantized_of(family, "int8")).out
    assert f"({family}, int8, " in text
    assert "quantized int8, ranges by max, SmoothQuant 0.5, calibrated on 4 prompts" in text
    assert "linears of denoiser in bfloat16" in text
    assert "quantized int8-weights\n" in invoke(run, "inspect", quantized_of(family, "int8-weights")).out


@pytest.mark.parametrize("precision", quantized.PRECISIONS)
def test_verify(family, precision, quantized_of, checkpoint_of):
    """Every weight and scale is made from the checkpoint again, and of another checkpoint none is."""
    folder = quantized_of(family, precision)
    result = invoke(main, "verify", folder, "--model", checkpoint_of(family), "--no-cost", "--quiet", "--json")
    assert result.code == 0, result
    entry = json.loads(result.out)["components"]["denoiser"]
    assert entry["different"] == 0 and "pictures" in entry["not_run"]
    scales = [name for name in Bundle.open(folder).tensors("denoiser") if name.endswith(".weight.scale")]
    assert entry["tensors"] > len(scales)
    if precision == "int8":
        other = invoke(main, "verify", folder, "--model", checkpoint_of(family, 1), "--quiet", "--json")
        assert other.code == 1
        assert json.loads(other.out)["components"]["denoiser"]["different"] > len(scales)


@pytest.mark.parametrize(
    ("options", "said", "code"),
    [
        (("--precision", "fp8", "--calibration", "no.txt"), "no.txt cannot be read", 2),
        (("--precision", "fp8", "--calibration", "few.txt"), "few.txt has 2 different prompts", 2),
        (("--precision", "fp8", "--calibration", "no.safetensors"), "no.safetensors does not exist", 1),
        (("--precision", "fp8", "--calibration", "broken.safetensors"), "is no safetensors file", 1),
        (("--precision", "fp8", "--from-bundle", "nowhere"), "nowhere is not a bundle", 1),
        (("--precision", "int8", "--range", "mse"), "add --smooth 0", 2),
        (("--precision", "int8", "--smooth", "2"), "alpha is 2", 2),
        (("--precision", "int8", "--calibration-size", "big"), "'big' is no size", 2),
        (("--precision", "int8-weights", "--recipe", "no.toml"), "the recipe no.toml cannot be read", 2),
        (("--precision", "int8-weights", "--recipe", "wrong.toml"), "has no such linear; the nearest are", 2),
        (("--precision", "int8-weights", "--smooth", "0.5"), "--smooth is not for --precision int8-weights", 2),
        (("--precision", "int4-weights", "--calibration", "few.txt"), "--calibration is not for --precision int4-w", 2),
        (("--precision", "bf16", "--recipe", "wrong.toml"), "--recipe is not for --precision bf16", 2),
        (
            ("--precision", "fp8", "--calibration", "broken.safetensors", "--from-bundle", "x"),
            "--from-bundle is for",
            2,
        ),
    ],
)
def test_bad_input(family, options, said, code, checkpoint_of, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("few.txt").write_text("a\nb\n")
    Path("broken.safetensors").write_bytes(b"x")
    Path("wrong.toml").write_text('[[keep]]\ncomponent = "denoiser"\ntensors = ["layer.*"]\nreason = "r"\n')
    before = sorted(tmp_path.iterdir())
    invoke(main, "build", "--model", checkpoint_of(family), "--out", "b", "--quiet", *options).assert_refused(
        said, code
    )
    assert sorted(tmp_path.iterdir()) == before
