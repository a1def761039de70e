from __future__ import annotations

import json
import shutil
import sys
import time
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import device_memory
import diffusers
import flops
import gpu_steps
import numpy as np
import pytest
import random_checkpoint
import step_contestants
import torch
from filelock import FileLock
from safetensors import safe_open
from step_contestants import Settings
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from zimgkit.engines.errors import BackendError
from zimgkit.export import build

FAMILIES = ["z-image", "qwen-image"]


def transformer(config):
    kind = getattr(diffusers, config["_class_name"])
    return kind(**{key: value for key, value in config.items() if not key.startswith("_")}).eval()


def forward(network, config, height, width, latents, prompt_embeds):
    """The reference, called as its pipeline does."""
    if "dim" in config:
        return -network([latents[0][:, None]], torch.tensor([0.25]), [prompt_embeds]).sample[0][None, :, 0]
    shapes = [[(1, height // 16, width // 16)]]
    return network(latents, prompt_embeds[None], timestep=torch.tensor([0.75]), img_shapes=shapes).sample


def example(family, config, height, width, tokens):
    prompt = torch.randn(tokens, config.get("cap_feat_dim") or config["joint_attention_dim"])
    if family == "z-image":
        return torch.randn(1, config["in_channels"], height // 8, width // 8), prompt
    return torch.randn(1, (height // 16) * (width // 16), config["in_channels"]), prompt


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("height", "width", "tokens", "layers"), [(64, 64, 32, 1), (80, 112, 33, 3), (256, 128, 7, 2)])
def test_flops_are_what_torch_counts(family, height, width, tokens, layers):
    config = random_checkpoint.transformer_config(family, tiny=True, layers=layers)
    network, inputs = transformer(config), example(family, config, height, width, tokens)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.inference_mode():
        forward(network, config, height, width, *inputs)
    assert flops.of_step(family, config, height, width, tokens) == counter.get_total_flops()


@pytest.mark.parametrize(
    ("family", "side", "tokens", "tflop"),
    [
        ("z-image", 1024, 128, 56.580),
        ("z-image", 1024, 512, 62.506),
        ("qwen-image", 1024, 128, 70.577),
        ("qwen-image", 1328, 512, 140.991),
    ],
)
def test_flops_of_the_real_models(family, side, tokens, tflop):
    config = random_checkpoint.transformer_config(family)
    assert flops.of_step(family, config, side, side, tokens) / 1e12 == pytest.approx(tflop, abs=6e-4)


@pytest.fixture(scope="module", params=FAMILIES)
def prepared(request, shared_folder):
    """What ``prepare`` and ``build`` make, once for all workers; without the networks that no contestant runs."""

    def wanted(checkpoint, tasks=(), more=()):
        return {name: part for name, part in parts_of(checkpoint).items() if part.source != "text_encoder"}

    folder, parts_of = shared_folder / f"gpu-steps-{request.param}", build.parts_of
    with FileLock(f"{folder}.lock"), patch.object(build, "parts_of", wanted):
        if not (folder / "bf16" / "bundle.json").exists():
            folder.mkdir()
            Settings(request.param, 96, 80, 20, "cpu", tiny=True, warmup=1, repeats=3, steps=13).save(folder)
            step_contestants.prepare(folder)
            step_contestants.build_bundle(folder, "bf16")
    return folder


def test_reference_is_a_float32_run(prepared):
    settings = Settings.load(prepared)
    config, inputs = settings.config(), np.load(prepared / "inputs.npz")
    kind = getattr(diffusers, config["_class_name"])
    network = kind.from_pretrained(prepared / "checkpoint" / "transformer", torch_dtype=torch.float32).eval()
    with torch.inference_mode():
        tensors = [torch.from_numpy(inputs[name]) for name in ("latents", "prompt_embeds")]
        want = forward(network, config, settings.height, settings.width, *tensors).numpy()
    found = np.load(prepared / "reference.npy")
    np.testing.assert_allclose(found, want, atol=1e-5)
    assert 0.1 < found.std() < 10


@pytest.mark.parametrize(
    ("name", "what", "least", "most"),
    # On the CPU zimgkit computes in float32, with Qwen-Image's modulation table in bfloat16.
    [
        ("eager", "step", 1e-3, 2e-2),
        ("torch.compile", "step", 1e-3, 2e-2),
        ("bf16 onnxruntime", "step", 1e-9, 1e-3),
        ("bf16 onnxruntime", "cached", 1e-9, 1e-3),
        ("bf16 torch", "step", 1e-9, 1e-3),
    ],
)
@pytest.mark.usefixtures("torch_in_float32")
def test_contestants_agree_with_float32(prepared, name, what, least, most, monkeypatch):
    # Inductor needs a minute and a C++ compiler; the capture of the graph is the real one.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    found = step_contestants.take_part(prepared, name, what)
    assert least < found["relative_l2"] < most
    assert 0 < found["max_error"] < 20 * most
    assert len(found["seconds"]) == 3
    assert 0 < min(found["seconds"]) < found["first_step_s"]


def test_pictures(prepared):
    found = step_contestants.take_part(prepared, "bf16 onnxruntime", "picture")
    assert list(found["pictures"]) == ["off", "balanced", "fast"]
    assert all(seconds > 0 for seconds in found["pictures"].values())


def test_a_contestant_that_fails_is_told(prepared, monkeypatch):
    def fail(*_):
        raise BackendError("no such card\nis here", "buy one")

    monkeypatch.setitem(step_contestants.PEERS, "eager", fail)
    monkeypatch.setattr(sys, "argv", ["step_contestants.py", str(prepared), "step", "eager"])
    step_contestants.main()
    written = json.loads((prepared / "step eager.json").read_text())
    assert written == {"failed": "BackendError: no such card is here; buy one"}


@pytest.mark.parametrize("wrong", [np.full((1, 3), np.nan), np.full((1, 3), np.inf), np.ones((1, 4))])
def test_a_velocity_that_is_none(wrong):
    with pytest.raises(ArithmeticError, match=r"not finite|shape"):
        step_contestants.error(wrong.astype(np.float32), np.ones((1, 3), np.float32))


def test_error_is_relative_to_the_reference():
    reference = np.array([[3.0, 4.0]], np.float32)
    assert step_contestants.error(reference + np.float32([[0, 0.5]]), reference) == pytest.approx(
        {"relative_l2": 0.1, "max_error": 0.5}
    )


@pytest.mark.parametrize(
    ("script", "failed"),
    [
        ("import os; os.kill(os.getpid(), 11)", "ended by SIGSEGV"),
        ("raise MemoryError('no room')", "MemoryError: no room"),
        ("import sys; sys.exit(3)", "exit code 3"),
        ("pass", "exit code 0"),
    ],
)
def test_a_contestant_that_dies_is_told(script, failed, tmp_path, monkeypatch):
    worker = tmp_path / "worker.py"
    worker.write_text(script)
    monkeypatch.setattr(gpu_steps, "WORKER", worker)
    assert gpu_steps.run(tmp_path, "eager", "step", None, {}) == {"failed": failed}


def test_what_cannot_be_compiled_does_not_run(tmp_path):
    found = gpu_steps.measured(tmp_path, Settings("z-image"), "bf16 tensorrt", None, {})
    assert found["step"]["failed"].startswith("zimg-export compile: ")


def test_the_script(prepared, tmp_path, monkeypatch, capsys):
    def prepare(command, env):
        """Another process would build the bundle anew."""
        assert command == [sys.executable, gpu_steps.WORKER, command[2], "prepare"]
        assert Settings.load(command[2]) == replace(Settings.load(prepared), warmup=3, repeats=2)
        shutil.copytree(prepared, command[2], dirs_exist_ok=True, ignore=lambda *_: ["settings.json"])

    family, results, work = Settings.load(prepared).family, tmp_path / "results.json", tmp_path / "work"
    work.mkdir()
    monkeypatch.setattr(gpu_steps.common, "run", prepare)
    size = ["--tiny", "--device", "cpu", "--height", "96", "--width", "80", "--tokens", "20", "--repeats", "2"]
    size += ["--steps", "13"]
    rest = ["--contestants", "bf16 onnxruntime", "bf16 tensorrt", "--folder", str(work), "--json", str(results)]
    monkeypatch.setattr(sys, "argv", ["gpu_steps.py", "--family", family, *size, *rest])
    gpu_steps.main()
    printed = capsys.readouterr().out
    assert "bf16 tensorrt did not run: " in printed
    assert "pictures of 13 steps" in printed
    assert f"{family}, 80x96, 20 tokens on CPU" in printed
    written = json.loads(results.read_text())
    assert written["command"].startswith(f"python benchmarks/gpu_steps.py --family {family} --tiny")
    (result,) = written["results"]
    assert result["settings"]["height"] == 96
    assert list(result["contestants"]["bf16 onnxruntime"]) == ["step", "cached", "picture"]
    figures = result["contestants"]["bf16 onnxruntime"]["step"]
    assert figures["relative_l2"] < 1e-3
    assert figures["host_peak_bytes"] > 30e6
    assert figures["device_peak_bytes"] is None
    assert len(figures["seconds"]) == 2
    assert list(work.iterdir()) == []


def test_table_of_a_card():
    memory = {"device_peak_bytes": 13 << 30, "host_peak_bytes": 2 << 30}
    figures = memory | {"relative_l2": 0.01, "max_error": 0.1}
    pictures = memory | {"pictures": {"off": 10.0, "balanced": 5.0, "fast": 4.0}}
    result = {
        "settings": vars(Settings("z-image")),
        "card": {"card": "NVIDIA H100 80GB HBM3"},
        "flops": 56_580_000_000_000,
        "contestants": {
            "eager": {"step": figures | {"seconds": [0.2, 0.1, 0.09], "first_step_s": 20.0}},
            "bf16 tensorrt": {
                "step": figures | {"seconds": [0.08], "first_step_s": 5.0, "compile_s": 60.0},
                "cached": figures | {"seconds": [0.004], "first_step_s": 5.0},
                "picture": pictures,
            },
            "fp8 onnxruntime": {"step": {"failed": "no CUDA"}},
        },
    }
    lines = gpu_steps.report(result).splitlines()
    assert next(line for line in lines if line.startswith("eager")).split()[1:] == [
        "100.0", "90.0", "565.8", "57%", "13.00", "2.00", "20", "1.0e-02", "1.0e-01"
    ]  # fmt: skip
    step, cached, picture = [line.split()[2:] for line in lines if line.startswith("bf16 tensorrt")]
    assert step[6] == "65"
    assert cached[1:3] == ["4.0", "4.0"]
    assert picture == ["10.00", "5.00", "4.00", "2.00", "2.50", "13.00", "2.00"]
    assert lines[-1] == "fp8 onnxruntime did not run: no CUDA"
    result["card"] = {"card": "NVIDIA GeForce RTX 4090"}
    assert " 342% " in gpu_steps.report(result)
    result["card"] = {"card": "another card"}
    assert "%" not in gpu_steps.report(result)


def test_disk_that_is_too_small(tmp_path, monkeypatch, capsys):
    usage = type("Usage", (), {"free": 20_000_000_000})
    monkeypatch.setattr(gpu_steps.shutil, "disk_usage", lambda _: usage)
    gpu_steps.check_space(tmp_path, Settings("z-image"), ["eager"])
    assert "needs 13.4 GB" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"needs 38\.0 GB"):
        gpu_steps.check_space(tmp_path, Settings("z-image"), ["eager", "bf16 tensorrt"])
    with pytest.raises(SystemExit, match=r"needs 41\.9 GB"):
        gpu_steps.check_space(tmp_path, Settings("qwen-image"), ["eager"])
    gpu_steps.check_space(tmp_path, Settings("qwen-image", layers=20), ["eager"])


def test_no_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit, match="finds no device cuda"):
        step_contestants._card("cuda")


def read(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_weights(family, tmp_path, monkeypatch):
    monkeypatch.setattr(random_checkpoint, "PIECE", 1000)
    config = random_checkpoint.transformer_config(family, tiny=True, layers=3)
    for name, seed in {"a": 5, "again": 5, "other": 6}.items():
        random_checkpoint.write(family, tmp_path / name, config, seed=seed)
    a, again, other = (read(tmp_path / name / "transformer") for name in ("a", "again", "other"))
    shapes = {name: value.shape for name, value in transformer(config).state_dict().items()}
    assert {name: value.shape for name, value in a.items()} == shapes
    assert 2 * sum(value.numel() for value in a.values()) == random_checkpoint.weight_bytes(config)
    for name, value in a.items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, again[name])
        assert not torch.equal(value, other[name])
        if value.ndim > 1 and value.numel() > 500:
            scale = 1 if "pad_token" in name else value.shape[1] ** -0.5
            assert value.float().std() == pytest.approx(scale, rel=0.15)
            assert (value == 0).float().mean() < 0.01
        if value.ndim == 1:
            assert value.float().mean() == pytest.approx(float(name.endswith("weight")), abs=0.02)


class Driver:
    """NVML of a card whose memory fills up."""

    def __init__(self, known="GPU-1"):
        self.known, self.looks = known, 0

    def nvmlInit_v2(self):
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid, device):
        return 0 if uuid.decode() == self.known else 6

    def nvmlDeviceGetMemoryInfo(self, device, memory):
        self.looks += 1
        memory._obj.used = 500 + 100 * min(self.looks, 5) - 50 * (self.looks > 7)
        return 0


def test_device_memory_is_watched(monkeypatch):
    driver = Driver()
    monkeypatch.setattr(device_memory.ctypes, "CDLL", lambda _: driver)
    monkeypatch.setattr(device_memory, "INTERVAL", 0.001)
    with device_memory.watch("GPU-1") as peak:
        while driver.looks < 20:
            time.sleep(0.001)
    assert peak.beyond == 400
    looks = driver.looks
    time.sleep(0.01)
    assert driver.looks == looks


def test_device_memory_that_cannot_be_watched(monkeypatch, capsys):
    with device_memory.watch(None) as peak:
        pass
    assert (peak.beyond, capsys.readouterr().out) == (None, "")
    monkeypatch.setattr(device_memory.ctypes, "CDLL", lambda _: Driver())
    with device_memory.watch("GPU-2") as peak:
        pass
    assert peak.beyond is None
    assert "cannot find GPU-2: error 6" in capsys.readouterr().out
