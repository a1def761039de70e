"""What a bundle is, as data and as text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests import handmade
from tests.commands import invoke
from zimgkit.engines.bundle import Bundle, CompiledEngine, Component, Refit, Source, TensorSpec, verified
from zimgkit.engines.choice import Choice
from zimgkit.engines.errors import BundleError
from zimgkit.runtime.commands import inspect
from zimgkit.runtime.commands.cli import main
from zimgkit.runtime.commands.inspect import bundle_summary, bundle_text

GRAPH = b"\x08\x0a"
"""The smallest graph: its version alone."""


def write(root: Path, **changes: Any) -> Path:
    components = {
        "denoiser": Component(
            weights=("linked.safetensors", "denoiser.safetensors"),
            graphs={"bfloat16": "denoiser.onnx", "float32": "denoiser.float32.onnx"},
            inputs={"hidden_states": TensorSpec("float32", (1, "tokens", 64)), "timestep": TensorSpec("float32", (1,))},
            outputs={"velocity": TensorSpec("float32", (1, "tokens", 64))},
            parameters=20_430_401_088,
            weight_bytes=40_860_802_176,
        ),
        "modulation": Component(("linked.safetensors",), tensors=("a", "b"), parameters=12, weight_bytes=24),
    }
    files = {
        "linked.safetensors": bytes(1000), "denoiser.safetensors": bytes(500), "denoiser.onnx": GRAPH,
        "denoiser.float32.onnx": GRAPH, "tokenizer/tokenizer.json": b"{}",
    }  # fmt: skip
    changes = {
        "components": components,
        "precision": "bfloat16",
        "tools": {"torch": "2.13", "onnx-ir": "1.1"},
    } | changes
    return handmade.write_bundle(root, files, **changes)


def test_as_data(tmp_path):
    source = Source("Qwen/Qwen-Image", "abc123", {"vae/model.safetensors": 5})
    root = write(tmp_path / "bundle", family="qwen-image", sources={"checkpoint": source})
    found = bundle_summary(root)
    assert json.loads(json.dumps(found)) == found  # Goes through --json whole.
    assert found["path"] == str(root.resolve())
    assert (found["family"], found["precision"], found["name"]) == ("qwen-image", "bfloat16", "Handmade")
    assert found["source"] == {"model": "Qwen/Qwen-Image", "revision": "abc123", "files": {"vae/model.safetensors": 5}}
    assert found["defaults"] == {
        "num_inference_steps": 20, "guidance_scale": 4.0, "height": 1328, "width": 1664, "negative_prompt": " ",
    }  # fmt: skip
    assert found["bytes"] == 1000 + 500 + 2 + 2 + 2
    assert list(found["components"]) == ["denoiser", "modulation"]
    denoiser = found["components"]["denoiser"]
    assert denoiser["inputs"] == {"hidden_states": "float32[1, tokens, 64]", "timestep": "float32[1]"}
    assert denoiser["graphs"] == {"bfloat16": "denoiser.onnx", "float32": "denoiser.float32.onnx"}
    assert denoiser["weights"] == ["linked.safetensors", "denoiser.safetensors"]
    assert (denoiser["parameters"], denoiser["weight_bytes"]) == (20_430_401_088, 40_860_802_176)


def test_as_text(tmp_path, monkeypatch):
    monkeypatch.setattr(inspect, "choose_backend", lambda manifest: Choice("onnxruntime", "of the weather"))
    root = write(tmp_path / "bundle")
    assert (
        bundle_text(bundle_summary(root))
        == f"""\
Handmade  (z-image, bfloat16, 1.51 kB)
  path      {root.resolve()}
  source    somewhere/handmade
  built by  zimgkit 0.0.0, torch 2.13, onnx-ir 1.1
  is for    text-to-image
  defaults  768x1024, 9 steps, guidance scale 3.5, negative prompt None
  runs on   onnxruntime: of the weather
  denoiser
    weights  20,430,401,088 parameters, 40.9 GB
    in       linked.safetensors
    in       denoiser.safetensors
    graph    denoiser.onnx, computes in bfloat16
    graph    denoiser.float32.onnx, computes in float32
    input    hidden_states: float32[1, tokens, 64]
    input    timestep: float32[1]
    output   velocity: float32[1, tokens, 64]
  modulation
    weights  12 parameters, 24 B
    in       linked.safetensors"""
    )


def test_revision_and_tools_may_be_absent(tmp_path):
    made = write(tmp_path / "bundle", tools={}, sources={"checkpoint": Source("m", "main")})
    text = bundle_text(bundle_summary(made))
    assert "  source    m at main\n  built by  zimgkit 0.0.0\n" in text


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1512, "1.51 kB"), (999_400, "999 kB"), (999_700, "1 MB"),
        (12_345_678, "12.3 MB"), (999_999_999, "1 GB"), (41_000_000_000, "41 GB"), (999_400_000_000, "999 GB"),
    ],
)  # fmt: skip
def test_sizes(tmp_path, size, text):
    component = Component((), parameters=1, weight_bytes=size)
    root = handmade.write_bundle(tmp_path / "bundle", {}, components={"net": component})
    assert f"    weights  1 parameters, {text}" in bundle_text(bundle_summary(root)).splitlines()


def test_files_are_checked(tmp_path):
    root = write(tmp_path / "bundle")
    (root / "denoiser.onnx").write_bytes(b"\x08\x0b")
    with pytest.raises(BundleError, match=r"denoiser\.onnx was changed"):
        bundle_summary(root)
    shutil.rmtree(root)
    with pytest.raises(BundleError, match="is not a bundle"):
        bundle_summary(root)


def test_engines(tmp_path):
    profile = {"image_tokens": (4096, 4096, 4096), "text_tokens": (1, 128, 512)}
    engine = CompiledEngine(
        "denoiser",
        "engines/x.plan",
        "tensorrt",
        "tensorrt",
        "11.4.0",
        "sm90",
        "0",
        (profile, profile),
        attention=(59, 1),
    )
    files = {"engines/x.plan": b"x" * 2000, "denoiser.onnx": GRAPH}
    components = {"denoiser": Component((), {"float32": "denoiser.onnx"})}
    root = handmade.write_bundle(tmp_path / "bundle", files, components=components, engines=(engine,))
    found = bundle_summary(root)
    assert json.loads(json.dumps(found)) == found
    assert (found["engines"][0]["bytes"], found["engines"][0]["stale"]) == (2000, True)
    assert found["engines"][0]["profiles"] == [{"image_tokens": [4096] * 3, "text_tokens": [1, 128, 512]}] * 2
    lines = bundle_text(found).splitlines()
    assert lines[-6:] == [
        "  engine of denoiser, tensorrt 11.4.0, sm90, 2 kB",
        "    in       engines/x.plan",
        "    serves   image_tokens 4096, text_tokens 1…128…512",
        "    serves   image_tokens 4096, text_tokens 1…128…512",
        f"    stale    compiled from other weights; zimg-export compile {root} --backend tensorrt compiles it again",
        "    fused    59 of 60 attentions",
    ]
    now = Bundle.open(root).source_hash("denoiser")
    for fresh in (
        msgspec.structs.replace(engine, source=now),
        msgspec.structs.replace(engine, refit=Refit(now, ("w",))),
    ):
        handmade.write_bundle(root, files, components=components, engines=(fresh,))
        found = bundle_summary(root)
        assert found["engines"][0]["stale"] is False
        takes = "    takes    1 other weights whenever it is loaded" in bundle_text(found).splitlines()
        assert takes == (fresh.refit is not None)


class TestVerify:
    def test_every_byte_is_read_again(self, tmp_path):
        root = write(tmp_path / "bundle")
        result = invoke(main, "inspect", "--verify", root)
        assert (result.code, result.err) == (0, "")
        assert result.out == f"{root}: all 5 files (1.51 kB) are what the manifest says\n"

    def test_each_file_that_differs_is_named(self, tmp_path):
        root = write(tmp_path / "bundle")
        (root / "linked.safetensors").write_bytes(bytes(999) + b"x")
        (root / "tokenizer" / "tokenizer.json").unlink()
        (root / "denoiser.onnx").write_bytes(b"")
        result = invoke(main, "inspect", "--verify", "--json", root)
        errors = json.loads(result.out)["errors"]
        assert result.code == 1 and len(errors) == 3
        for name, why in {
            "linked.safetensors": "was changed: its hash is not the manifest's",
            "tokenizer.json": "is missing",
            "denoiser.onnx": "has 0 of 2 bytes",
        }.items():
            assert any(f"{name} {why}" in error for error in errors), name
        assert invoke(main, "inspect", "--verify", root).out == "\n".join(errors) + "\n"

    def test_what_was_noted_counts_for_nothing(self, tmp_path):
        root = write(tmp_path / "bundle")
        path = root / "linked.safetensors"
        digest = verified.sha256(path)
        path.write_bytes(bytes(999) + b"x")
        verified.remember(path, digest, verified.state(path))  # As if the change had left no trace.
        assert invoke(main, "inspect", root).code == 0
        assert "linked.safetensors was changed" in invoke(main, "inspect", "--verify", root).out

    def test_no_bundle(self, tmp_path):
        invoke(main, "inspect", "--verify", tmp_path).assert_refused("is not a bundle", 1)
