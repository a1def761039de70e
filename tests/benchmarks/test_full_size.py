from __future__ import annotations

import json
import sys

import component_run
import full_size
import numpy as np
import pytest
import random_checkpoint
import sparse_checkpoint
from safetensors import safe_open
from synthetic_statistics import TOP, synthetic

from zimgkit.engines.bundle import Bundle, TensorSpec
from zimgkit.export.quantization.statistics import Statistics

ARRAY = "import numpy; a = numpy.ones(1 << 25); "  # 256 MiB
EVENT = """
import json, time
def tell(event, **facts):
    print(json.dumps({"event": event, "time": time.monotonic(), "cpu": 0} | facts), flush=True)
"""


def child(code):
    return [sys.executable, "-c", EVENT + code]


@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
def test_components_of_a_tiny_bundle(backend, bundle_of):
    bundle = bundle_of("qwen-image", "bf16")
    found = full_size.cases(bundle, ["auto", backend], [64], ["denoiser"])
    assert [case["backend"] for case in found] == list(dict.fromkeys(["onnxruntime", backend]))
    assert found[0]["auto"]
    entry = full_size.measure(bundle, found[-1], 2, None)
    assert entry["outcome"] == "ran"
    assert entry["finite"]
    assert len(entry["opening"]["seconds"]) == 1
    assert len(entry["running"]["seconds"]) == 2
    for phase in ("opening", "running"):
        peak = entry[phase]["peak"]
        assert peak["resident"] == sum(bytes_ for kind, bytes_ in peak.items() if kind != "resident")
        assert 10e6 < peak["anonymous"] <= entry[phase]["anonymous_peak"] < 2e9


def test_a_picture_of_a_tiny_bundle(bundle_of):
    (case,) = full_size.cases(bundle := bundle_of("z-image", "bf16"), ["auto"], [64], ["picture"])
    assert case["backend"] == "auto"
    assert case["stored_bytes"] == sum(part.weight_bytes for part in Bundle.open(bundle).manifest.components.values())
    entry = full_size.measure(bundle, case, 2, None)
    assert (entry["outcome"], entry["took"], entry["finite"]) == ("ran", "onnxruntime", True)
    assert len(entry["running"]["seconds"]) == 1


def test_a_picture_that_cannot_be_drawn_is_told(bundle_of, capsys, monkeypatch):
    arguments = ["", str(bundle_of("z-image")), "picture", "--backend=onnxruntime", "--size=100"]
    monkeypatch.setattr(sys, "argv", arguments)
    assert component_run.main() == 1
    assert "100" in json.loads(capsys.readouterr().out.splitlines()[-1])["error"]


@pytest.mark.parametrize("family", ["z-image", "qwen-image"])
def test_feeds_fit_every_component(family, bundle_of, capsys, monkeypatch):
    for component in full_size.COMPONENTS:
        monkeypatch.setattr(sys, "argv", ["", str(bundle_of(family)), component, "--backend=onnxruntime", "--size=64"])
        assert component_run.main() == 0
        events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [event["event"] for event in events] == ["start", "opened", "ran"]
        assert events[-1]["finite"]


def test_feeds_are_one_turn_and_unpadded():
    inputs = {
        "cos": TensorSpec("float32", ("a", 4)),
        "sin": TensorSpec("float32", ("a", 4)),
        "pad": TensorSpec("bool", ("a",)),
    }
    feeds = component_run.random_feeds(inputs, {"a": 3})
    np.testing.assert_allclose(feeds["cos"] ** 2 + feeds["sin"] ** 2, np.ones((3, 4)), rtol=1e-6)
    assert feeds["pad"].shape == (3,)
    assert not feeds["pad"].any()


def test_memory_is_that_of_its_phase(tmp_path):
    opening = f"tell('start'); time.sleep(.2); {ARRAY} time.sleep(.2); tell('opened'); time.sleep(.2)"
    code = f"{opening}; del a; tell('ran', finite=True); time.sleep(.1)"
    found = full_size.summary(*full_size.watch(child(code), tmp_path / "log"))
    assert found["outcome"] == "ran"
    assert 256 << 20 < found["running"]["anonymous_peak"] < 400 << 20
    assert found["held"]["anonymous"] > 256 << 20
    assert found["opening"]["seconds"][0] > 0.2


@pytest.mark.parametrize(
    ("code", "outcome"),
    [
        ("import os, signal; tell('start'); os.kill(os.getpid(), signal.SIGKILL)", "killed with signal 9 after start"),
        ("tell('start'); tell('failed', error='no room'); raise SystemExit(1)", "no room"),
        ("tell('start'); raise SystemExit(3)", "ended with 3"),
    ],
)
def test_what_did_not_run_is_told(code, outcome, tmp_path, capsys):
    found = full_size.summary(*full_size.watch(child(code), tmp_path / "log"))
    assert found["outcome"] == outcome
    assert full_size.report(result_of(found)) == 1
    assert outcome in capsys.readouterr().out


def test_what_printed_nothing_is_an_error(tmp_path):
    with pytest.raises(SystemExit, match="no such thing"):
        full_size.watch(child("raise SystemExit('no such thing')"), tmp_path / "log")


@pytest.mark.parametrize(("gib", "code"), [(2.2, 0), (2.4, 1)])
def test_opening_has_a_bound(gib, code):
    phase = {"peak": {"resident": 5 * 2**30}, "anonymous_peak": gib * 2**30, "seconds": [1.0], "cpu_seconds": [1.0]}
    run = {"outcome": "ran", "finite": True, "opening": phase, "held": {"anonymous": 1}, "running": phase}
    assert full_size.report(result_of(run)) == code


def result_of(run):
    case = {"component": "denoiser", "backend": "torch", "size": 512, "stored_bytes": 1 << 30}
    bundle = {"precision": "int8", "calibration": {"scales": "synthetic"}, "runs": [case | run]}
    bundle["build"] = {"seconds": 1.0, "peak_bytes": 1, "bytes": 1}
    return {"family": "z-image", "checkpoint": {"bytes": 1, "weights": "zero"}, "bundles": [bundle]}


def test_checkpoint_is_filled(tmp_path, monkeypatch):
    monkeypatch.setattr(random_checkpoint, "BLOCK", 1009)
    shapes = {"w.weight": (64, 100), "norm.weight": (1000,), "norm.gamma": (1000, 1, 1), "w.bias": (5,)}
    sparse_checkpoint.write_holes(tmp_path / "a.safetensors", "bfloat16", shapes, 2)
    random_checkpoint.fill(tmp_path)
    found = {}
    for file in tmp_path.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name).float().numpy() for name in opened.keys()}  # noqa: SIM118
    assert {name: value.shape for name, value in found.items()} == shapes
    assert found["w.weight"].std() == pytest.approx(0.1, rel=0.1)
    np.testing.assert_array_equal(found["w.weight"].reshape(-1)[:1009], found["w.weight"].reshape(-1)[1009:2018])
    assert found["norm.weight"].mean() == pytest.approx(1, rel=0.01)
    assert found["norm.gamma"].mean() == pytest.approx(1, rel=0.01)


def test_synthetic_statistics_cover_what_a_calibration_does(bundle_of, quantized_of):
    real = Statistics.load(quantized_of("qwen-image", "int8").parent / "statistics.calibration.safetensors")
    found = synthetic(Bundle.open(bundle_of("qwen-image", "bf16")))
    for component, inputs in real.inputs.items():
        assert found.readers[component] == real.readers[component]
        synthetic_inputs = found.inputs[component]
        # What a calibration never meets, as nothing depends on it, is among the synthetic ones too.
        assert synthetic_inputs.keys() >= inputs.keys()
        assert all(synthetic_inputs[name].channels.shape == entry.channels.shape for name, entry in inputs.items())
        assert all((entry.channels == TOP).all() for entry in synthetic_inputs.values())
