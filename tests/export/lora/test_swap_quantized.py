"""Swapping the LoRAs of quantized bundles: what they touch is merged and quantized again, as a build does it."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import msgspec
import pytest
import torch
from safetensors.torch import load_file

from tests import quantized
from tests.commands import invoke
from tests.export.lora import lora_files
from tests.export.lora.swapping import contents, states, swap
from zimgkit.engines.bundle import Bundle, write_manifest
from zimgkit.export import build as builds
from zimgkit.export.build import Quantizing, build
from zimgkit.export.cli.main import main
from zimgkit.export.quality.verify import verify
from zimgkit.export.quantization import quantize as quantization
from zimgkit.export.quantization.statistics import Statistics

FAMILIES = ["z-image", "qwen-image"]


@pytest.fixture
def build_with(quantized_of, shared_folder, checkpoint_of, tmp_path, monkeypatch):
    """``build_with(family, precision, *loras)``: a bundle like the quantized one, built with LoRAs.

    Its statistics are the same. So are the factors that smooth inputs, which a build takes from the weights it merged.
    """

    def make(family, precision, *loras, graphs=True, **options):
        quantized_of(family, precision)
        statistics = Statistics.load(shared_folder / f"quantized-{family}" / "statistics.calibration.safetensors")
        original, component = quantization._columns, builds.write_component
        monkeypatch.setattr(quantization, "_columns", lambda want: original(replace(want, addends=())))
        if not graphs:

            def tensors_alone(name, part, *others, **options):
                plain = replace(part, network=None, shapes=part.parameters())
                return component(name, plain, *others[:-1])

            monkeypatch.setattr(builds, "write_component", tensors_alone)
        out = tmp_path / f"built-{precision}"
        quantizing = Quantizing(calibration=statistics)
        loras = [str(lora) for lora in loras]
        build(str(checkpoint_of(family)), out, precision=precision, quantization=quantizing, loras=loras, **options)
        return out

    return make


@pytest.mark.parametrize("precision", quantized.PRECISIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_swap_gives_what_a_build_gives(family, precision, quantized_of, build_with, loras_of, copy_of):
    plain = quantized_of(family, precision)
    bundle, before = copy_of(plain), contents(plain)
    first, second, third = loras_of(family)
    expected = contents(build_with(family, precision, f"{first}:0.7", f"{second}:-0.5", graphs=False))
    swap(bundle, f"{second}:-0.5", f"{first}:0.7")
    found = contents(bundle)
    assert found.keys() == expected.keys() == before.keys()
    assert [key for key in expected if found[key] != expected[key]] == []
    # Weights and their scales are others, and what was calibrated is as it was.
    changed = {tensor for _, tensor in before if found[_, tensor] != before[_, tensor]}
    assert any(tensor.endswith(".scale") for tensor in changed)
    assert not any(tensor.endswith((".input_scale", ".smooth")) for tensor in changed)
    manifest = Bundle.open(bundle).manifest
    components = {"text_encoder", "denoiser"} | ({"modulation"} if family == "qwen-image" else set())
    for component in components:
        stored, kept = Bundle.open(bundle).tensors(component), manifest.quantization.unquantized.get(component, {})
        assert {stored[t].dtype for c, t in before if c == component and t in kept} <= {"bfloat16"}
        assert {t for c, t in before if c == component and found[c, t] != before[c, t]}
    assert any(tensor in kept for kept in manifest.quantization.unquantized.values() for tensor in changed)
    swap(bundle, third)
    assert contents(bundle) not in (before, expected)
    swap(bundle)
    assert contents(bundle) == before
    old, new = Bundle.open(plain), Bundle.open(bundle)
    assert all(old.source_hash(n) == new.source_hash(n) for n, c in old.manifest.components.items() if c.graphs)
    assert {f.sha256 for f in old.manifest.files.values()} == {f.sha256 for f in new.manifest.files.values()}


def test_from_a_build_with_loras(quantized_of, build_with, loras_of, copy_of):
    """Its files hold no base weight of what LoRAs touch but those that were kept, and no checkpoint is needed then."""
    plain = quantized_of("z-image", "int4-weights")
    first, second, _ = loras_of("z-image")
    bundle = build_with("z-image", "int4-weights", f"{first}:0.7", keep_base=True)
    manifest = Bundle.open(bundle).manifest
    gone = msgspec.structs.replace(manifest.checkpoint, model="/gone")
    write_manifest(bundle, msgspec.structs.replace(manifest, sources={"checkpoint": gone}))
    swapped = copy_of(plain)
    for loras in ([second], [f"{first}:-2", second], []):
        assert swap(bundle, *loras).outgrown == swap(swapped, *loras, keep_base=True).outgrown
        assert contents(bundle) == contents(swapped)
    assert contents(bundle) == contents(plain)
    # What was kept without LoRAs is as the checkpoint has it, in its own element type.
    kept = Bundle.open(bundle).manifest.components["denoiser"].base
    assert all(tensor.dtype == torch.float32 for tensor in load_file(bundle / kept).values())


def test_verify(quantized_of, loras_of, checkpoint_of, copy_of):
    bundle = copy_of(quantized_of("qwen-image", "int8"))
    swap(bundle, loras_of("qwen-image")[0])
    result = verify(bundle, str(checkpoint_of("qwen-image")))
    assert result["passed"], result
    assert not any(entry["different"] for entry in result["components"].values())


@pytest.mark.parametrize(
    ("precision", "cost"),
    [("int8", "build with --lora, which calibrates anew"), ("int4-weights", "they are rounded as much more coarsely")],
)
def test_what_outgrows_its_range_is_said(precision, cost, quantized_of, checkpoint_of, copy_of, tmp_path):
    (file,) = (checkpoint_of("z-image") / "transformer").glob("*.safetensors")
    state = load_file(file)
    names = ["layers.0.attention.to_q", "layers.1.attention.to_v", "layers.1.feed_forward.w1"]
    pairs = {}
    for name, size in zip(names, (40.0, 8.0, 1e-4), strict=True):
        weight = state[f"{name}.weight"]
        up = torch.zeros(len(weight), 1)
        up[3] = size * weight[3].abs().max()  # One row alone.
        pairs[name] = torch.ones(1, weight.shape[1]), up
    lora = lora_files.write(tmp_path / "large.safetensors", lora_files.letters("transformer.")(pairs))
    bundle = copy_of(quantized_of("z-image", precision))
    smooth = Bundle.open(bundle).tensors("denoiser").keys() & {f"{name}.weight.smooth" for name in names}
    result = invoke(main, "swap-lora", bundle, "--lora", lora, "--quiet", "--json")
    found = {entry["tensor"]: entry["times"] for entry in json.loads(result.out)["outgrown"]}
    assert list(found) == [f"{name}.weight" for name in names[:2]]
    for name in names[:2]:
        down, up = pairs[name]
        weight = state[f"{name}.weight"]
        factors = torch.ones(weight.shape[1])
        if f"{name}.weight.smooth" in smooth:
            stored = load_file(next(bundle.glob("denoiser.safetensors")))[f"{name}.weight.smooth"]
            factors = 1 / stored.float()
        rows = [((w * factors)[3]).abs().max() for w in (weight + up @ down, weight)]
        assert math.isclose(found[f"{name}.weight"], rows[0] / rows[1], rel_tol=0.02)
    assert result.err.count("\n") == 1
    times = found[f"{names[0]}.weight"]
    assert f"rows of {names[0]}.weight and 1 more are up to {times:.1f} times as large as without" in result.err
    assert cost in result.err
    # Smaller, it fits.
    result = invoke(main, "swap-lora", bundle, "--lora", f"{lora}:0.001", "--quiet", "--json")
    assert (json.loads(result.out)["outgrown"], result.err) == ([], "")


def test_nan_leaves_the_bundle_alone(quantized_of, checkpoint_of, copy_of, tmp_path):
    """A weight that becomes infinite when it is merged."""
    (file,) = (checkpoint_of("z-image") / "transformer").glob("*.safetensors")
    name = "layers.0.attention.to_q"
    pairs = lora_files.pairs({name: load_file(file)[f"{name}.weight"]})
    huge = {name: (1e25 * pairs[name][0], 1e25 * pairs[name][1])}
    lora = lora_files.write(tmp_path / "huge.safetensors", lora_files.letters("transformer.")(huge))
    bundle = copy_of(quantized_of("z-image", "fp8"))
    before = states(bundle)
    result = invoke(main, "swap-lora", bundle, "--lora", lora, "--quiet")
    said = f"{lora}: transformer.{name} changes '{name}.weight' to 2,304 values that are NaN or infinite in float32"
    result.assert_refused(said, 1)
    assert states(bundle) == before


def test_the_pictures_engine_takes_it(quantized_of, loras_of, copy_of):
    bundle = copy_of(quantized_of("z-image", "int8"))
    before = quantized.record(bundle, "denoiser")
    swap(bundle, loras_of("z-image")[0])
    after = quantized.replay(bundle, "denoiser", "onnxruntime", before)
    assert quantized.relative(after[0], before[0][1]) > 1e-3
    swap(bundle)
    again = quantized.replay(bundle, "denoiser", "onnxruntime", before)
    assert all((found == expected).all() for found, (_, expected) in zip(again, before, strict=True))
