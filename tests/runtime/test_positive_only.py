"""LoRAs for the branch of the prompt alone: pictures against what DiffSynth gave (``tests/references``); bundles."""

from __future__ import annotations

import json
import re
from pathlib import Path

import msgspec
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.commands import invoke
from tests.references import recordings
from zimgkit.engines.bundle import POSITIVE, Bundle, CompiledEngine, FileRecord, sha256, write_manifest
from zimgkit.engines.errors import LoraError, OutputError
from zimgkit.export.build import build
from zimgkit.export.cli.main import main
from zimgkit.export.compilers.shape_profiles import RECOMMENDED, shape_profiles
from zimgkit.export.i2l.make import make_lora
from zimgkit.export.lora import positive
from zimgkit.export.lora.swap import swap
from zimgkit.export.quality.verify import verify
from zimgkit.runtime import Pipeline
from zimgkit.runtime.commands.inspect import bundle_summary, bundle_text
from zimgkit.runtime.memory.fitting import Picture, needs_in
from zimgkit.runtime.request import check

BOUND = 1e-4
"""On pixels from 0 to 1."""


def lora_of(name, folder):
    """The file of what DiffSynth made for a recording."""
    arrays = recordings.read(name).arrays
    file = folder / f"{name}.safetensors"
    if not file.exists():
        save_file({key.removeprefix("lora."): array for key, array in arrays.items() if key.startswith("lora.")}, file)
    return file


def draw(bundle, call, **more):
    """Its pixels, and the denoisers and conditioners that were opened."""
    call = {key: value for key, value in call.items() if key != "pictures"}
    with Pipeline.open(bundle, backend="onnxruntime") as pipeline:
        (found,) = pipeline(**call | more, output_type="np").images
        opened = {name for name in pipeline.session.engines.opened if name.startswith(("denoiser", "conditioner"))}
    return found, opened


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return tmp_path_factory.mktemp("loras")


@pytest.fixture(scope="module")
def checkpoint(recorded_checkpoint_of):
    return str(recorded_checkpoint_of("z-image"))


@pytest.fixture(scope="module")
def bundle(checkpoint, files, tmp_path_factory):
    out = tmp_path_factory.mktemp("bundles") / "positive"
    lora = lora_of("z-image-i2l.positive", files)
    return build(checkpoint, out, precision="fp32", positive_only_loras=[str(lora)]).root


def test_guided(bundle):
    recorded = recordings.read("z-image-i2l.positive")
    found, opened = draw(bundle, recorded.call)
    assert np.abs(found - recorded.pixels).max() < BOUND
    assert opened == {"denoiser", "denoiser.positive", "conditioner", "conditioner.positive"}


def test_it_is_not_what_both_branches_would_give(bundle, files, recorded_bundle_of, tmp_path):
    """The one that is merged, and none, are other pictures; and the LoRA of the pictures themselves is it."""
    recorded = recordings.read("z-image-i2l.positive")
    plain, _ = draw(recorded_bundle_of("z-image"), recorded.call)
    merged = swap(recorded_bundle_of("z-image"), [str(lora_of("z-image-i2l.positive", files))], out=tmp_path / "both")
    fused, _ = draw(merged.bundle.root, recorded.call)
    assert min(np.abs(other - recorded.pixels).max() for other in (plain, fused)) > 0.01


def test_without_guidance_the_positive_one_alone_is_opened(recorded_bundle_of, recorded_i2l_of, checkpoint, tmp_path):
    """From the pictures to the picture, by way of a swap."""
    recorded, nets = recordings.read("z-image-i2l.unguided"), recorded_i2l_of("z-image")
    named = {"generator": nets / "i2l", "siglip": nets / "siglip", "dinov3": nets / "dinov3"}
    out = tmp_path / "style.safetensors"
    make_lora(checkpoint, recorded.call["pictures"], out, **{key: str(value) for key, value in named.items()})
    swapped = swap(recorded_bundle_of("z-image"), [], positive_only_loras=[str(out)], out=tmp_path / "swapped")
    found, opened = draw(swapped.bundle.root, recorded.call)
    assert np.abs(found - recorded.pixels).max() < BOUND
    assert opened == {"denoiser.positive", "conditioner.positive"}


def test_in_both_branches(recorded_bundle_of, files, tmp_path):
    recorded = recordings.read("z-image-i2l.both")
    swapped = swap(recorded_bundle_of("z-image"), [str(lora_of("z-image-i2l.both", files))], out=tmp_path / "swapped")
    found, opened = draw(swapped.bundle.root, recorded.call)
    assert np.abs(found - recorded.pixels).max() < BOUND
    assert opened == {"denoiser", "conditioner"}


def test_the_bundle(bundle, checkpoint, recorded_bundle_of):
    """What they do not touch is there once; the plain components are those of a bundle without them."""
    own, plain = Bundle.open(bundle).manifest, Bundle.open(recorded_bundle_of("z-image")).manifest
    (lora,) = own.positive_loras
    assert own.loras == ()
    assert own.for_both().components == plain.components
    assert {name: record.sha256 for name, record in own.for_both().files.items()} == {
        name: record.sha256 for name, record in plain.files.items()
    }
    for name in ("denoiser", "conditioner"):
        entry, base = own.components[name + POSITIVE], own.components[name]
        assert entry.variant_of == name
        assert entry.weights == (*base.weights, f"{name}.positive.safetensors")
        assert (entry.inputs, entry.outputs, entry.weight_bytes) == (base.inputs, base.outputs, base.weight_bytes)
    touched = load_file(bundle / "denoiser.positive.safetensors").keys()
    assert all(re.search(r"attention\.to_|feed_forward\.w", key) for key in touched)
    summary = bundle_summary(bundle)
    assert summary["positive_loras"][0]["sha256"] == lora.sha256
    assert f"{lora.source} at 1, for the prompt alone" in bundle_text(summary)
    profiles = shape_profiles(own, RECOMMENDED)
    assert profiles["denoiser.positive"] == profiles["denoiser"]
    result = verify(bundle, checkpoint)
    assert result["passed"]
    assert result["components"]["denoiser.positive"]["different"] == 0
    assert result["components"]["conditioner.positive"]["relative_max_error"] < 1e-4


def test_a_changed_file_is_found(bundle, tmp_path):
    copy = swap(bundle, [], out=tmp_path / "plain").bundle
    assert not [name for name in copy.manifest.files if POSITIVE in name]
    assert copy.manifest == Bundle.open(bundle).manifest.for_both()


def test_swaps(bundle, checkpoint, files, tmp_path):
    """In place: to another set, which is what a build with it is, byte by byte of its tensors, and to none."""
    first, second = lora_of("z-image-i2l.positive", files), lora_of("z-image-i2l.both", files)
    both, own = [f"{second}:0.5"], [f"{first}:-0.7"]
    built = build(checkpoint, tmp_path / "built", precision="fp32", loras=both, positive_only_loras=own)
    plain = build(checkpoint, tmp_path / "swapped", precision="fp32")
    words = ("--lora", both[0], "--positive-only-lora", own[0], "--json", "--quiet")
    result = invoke(main, "swap-lora", plain.root, *words)
    assert result.code == 0, result
    assert json.loads(result.out)["positive_loras"] == [{"source": str(first), "scale": -0.7}]
    swapped = Bundle.open(plain.root)
    assert swapped.manifest.positive_loras == built.manifest.positive_loras
    for name in ("denoiser", "denoiser.positive", "conditioner.positive"):
        ours, theirs = swapped.tensors(name), built.tensors(name)
        for key, info in theirs.items():
            mine = ours[key]
            assert (
                mine.file.read_bytes()[mine.offset :][: mine.nbytes]
                == (info.file.read_bytes()[info.offset :][: info.nbytes])
            )
    assert verify(plain.root, checkpoint)["passed"]
    before = plain.manifest
    assert invoke(main, "swap-lora", plain.root).code == 0
    after = Bundle.open(plain.root).manifest
    assert after.components.keys() == before.components.keys()
    assert not [path for path in plain.root.iterdir() if POSITIVE in path.name]


def test_a_swap_that_fails_leaves_the_bundle_as_it_was(bundle, files, tmp_path, monkeypatch):
    """Before its last step, and with an engine of the branch; then it succeeds, and the engine is stale."""
    root = swap(
        bundle, [], positive_only_loras=[str(lora_of("z-image-i2l.both", files))], out=tmp_path / "own"
    ).bundle.root
    manifest, plan = Bundle.open(root).manifest, "engines/denoiser.positive.plan"
    (root / "engines").mkdir()
    (root / plan).write_bytes(b"plan")
    source = Bundle.open(root).source_hash("denoiser.positive")
    engine = CompiledEngine("denoiser.positive", plan, "tensorrt", "tensorrt", "11", "sm90", source, ())
    records = manifest.files | {plan: FileRecord(4, sha256(root / plan))}
    write_manifest(root, msgspec.structs.replace(manifest, engines=(engine,), files=records))
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    lora = str(lora_of("z-image-i2l.positive", files))
    with monkeypatch.context() as patch, pytest.raises(OutputError, match="the bundle is as it was"):
        patch.setattr(positive, "sha256", lambda path: (_ for _ in ()).throw(OSError(28, "disk full")))
        swap(root, [], positive_only_loras=[lora])
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before
    swapped = swap(root, [], positive_only_loras=[lora])
    assert swapped.stale == (engine,)
    assert swapped.bundle.manifest.engines == ()
    assert len([path for path in root.iterdir() if path.name.startswith("denoiser.positive")]) == 3


@pytest.mark.parametrize("precision", ["int8-weights", "int4-weights"])
def test_quantized(precision, checkpoint, files, tmp_path):
    lora = str(lora_of("z-image-i2l.positive", files))
    built = build(checkpoint, tmp_path / "built", precision=precision, positive_only_loras=[lora])
    assert verify(built.root, checkpoint)["passed"]
    recorded = recordings.read("z-image-i2l.positive")
    found, _ = draw(built.root, recorded.call)
    plain = swap(built.root, [], out=tmp_path / "plain").bundle.root
    without, _ = draw(plain, recorded.call)
    assert np.abs(found - recorded.pixels).mean() < 0.5 * np.abs(without - recorded.pixels).mean()
    again = swap(plain, [], positive_only_loras=[lora], out=tmp_path / "again").bundle.root
    assert np.array_equal(draw(again, recorded.call)[0], found)


def test_memory(bundle, recorded_bundle_of):
    """Both are open at once: what engines hold of their own counts twice."""
    held = []
    for path in (bundle, recorded_bundle_of("z-image")):
        with Pipeline.open(path, backend="onnxruntime") as pipeline:
            session = pipeline.session
            request = check(session.bundle.manifest, session.family, prompt="a cup", width=64, height=64)
            held.append(needs_in(session._setting(request), Picture(64, 64, 20))["denoiser"])
    assert held[0].held == 2 * held[1].held > 0
    assert 0 < held[0].mapped - held[1].mapped < (bundle / "denoiser.positive.safetensors").stat().st_size + 1


class TestBadInput:
    def refuse(self, checkpoint, lora, message, tmp_path):
        with pytest.raises(LoraError, match=message):
            build(checkpoint, tmp_path / "out", precision="fp32", positive_only_loras=[str(lora)])
        assert not (tmp_path / "out").exists()

    def test_of_the_text_encoder(self, checkpoint, tmp_path):
        name = "text_encoder.model.layers.0.self_attn.q_proj"
        config = json.loads(Path(checkpoint, "text_encoder/config.json").read_text())
        width, out = config["hidden_size"], config["num_attention_heads"] * config["head_dim"]
        matrices = {"lora_A": np.ones((2, width), np.float32), "lora_B": np.ones((out, 2), np.float32)}
        save_file({f"{name}.{key}.weight": value for key, value in matrices.items()}, tmp_path / "text.safetensors")
        self.refuse(checkpoint, tmp_path / "text.safetensors", "which has no branches", tmp_path)

    def test_nan(self, checkpoint, files, tmp_path):
        tensors = load_file(lora_of("z-image-i2l.positive", files))
        tensors["layers.0.attention.to_q.lora_A.default.weight"][0, 0] = np.nan
        save_file(tensors, tmp_path / "nan.safetensors")
        self.refuse(checkpoint, tmp_path / "nan.safetensors", "NaN", tmp_path)

    def test_none(self, checkpoint, tmp_path):
        self.refuse(checkpoint, tmp_path / "none.safetensors", "there is no LoRA", tmp_path)

    def test_of_another_family(self, recorded_checkpoint_of, files, tmp_path):
        lora = lora_of("z-image-i2l.positive", files)
        self.refuse(str(recorded_checkpoint_of("qwen-image")), lora, "", tmp_path)
