from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys

import cpu_peers as benchmark
import families
import numpy as np
import peer_contestants
import pytest
from clock import COMPONENTS, READERS, STEP, WHOLE, Clock, Spent
from peer_contestants import Settings

from zimgkit.engines.tensors import safetensors
from zimgkit.runtime import engine_pool
from zimgkit.runtime.families import family as host_of

NAMES = ("diffusers fp32", "diffusers bf16", "zimg fp32 onnxruntime", "zimg bf16 torch")


@pytest.fixture
def settings_of(checkpoint_of, bundle_of, tmp_path):
    def settings(family):
        bundles = tmp_path / "bundles"
        bundles.mkdir()
        for precision in ("fp32", "bf16"):
            (bundles / precision).symlink_to(bundle_of(family, precision))
        return Settings(family, 64, 2, model=str(checkpoint_of(family)), bundles=str(bundles))

    return settings


@pytest.mark.parametrize("family", ["z-image", "qwen-image"])
def test_contestants_draw_the_same_picture(family, settings_of, tmp_path):
    host = host_of(family)
    before = engine_pool.open_engine, host.schedule_inputs, os.environ.get("ZIMG_CACHE_LIMIT")
    settings_of(family).save(tmp_path)
    for name in NAMES:
        answers = io.StringIO()
        peer_contestants.take_part(tmp_path, name, ["draw\n"], answers)
        first, turn = map(json.loads, answers.getvalue().splitlines())
        assert set(first) == {"opening_s", "first_picture_s"}
        for times in (turn[kind] for kind in Spent._fields):
            assert min(times.values()) > 0
            assert times["text encoder"] + 2 * times[STEP] + times["VAE decoder"] < times[WHOLE]
    assert (engine_pool.open_engine, host.schedule_inputs, os.environ.get("ZIMG_CACHE_LIMIT")) == before
    found = benchmark.differences(tmp_path, NAMES)
    assert found["diffusers fp32"] == 0
    assert 0 < found["zimg fp32 onnxruntime"] < 1e-3
    assert 1e-3 < found["zimg bf16 torch"] < 0.5
    assert benchmark.differences(tmp_path, NAMES[1:]) == {}


def test_contestants_edit_the_same_pictures(checkpoint_of, bundle_of, tmp_path):
    names = ("diffusers fp32", "zimg fp32 onnxruntime", "zimg fp32 openvino")
    (tmp_path / "fp32").symlink_to(bundle_of("qwen-image-edit-plus"))
    model = checkpoint_of("qwen-image-edit-plus")
    settings = Settings("qwen-image", 64, 2, pictures=2, model=str(model), bundles=str(tmp_path))
    settings.save(tmp_path)
    for name in names:
        answers = io.StringIO()
        peer_contestants.take_part(tmp_path, name, ["draw\n", "draw\n"], answers)
        for turn in map(json.loads, answers.getvalue().splitlines()[1:]):
            times = turn["seconds"]
            # New pictures are read in each turn.
            assert set(times) == {*READERS, *COMPONENTS, WHOLE}
            assert min(times.values()) > 0
            assert sum(times.values()) - times[WHOLE] + times[STEP] < times[WHOLE]
    found = benchmark.differences(tmp_path, names)
    assert all(0 < found[name] < 3e-5 for name in names[1:])


def test_pictures_are_edited_by_families_that_do(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cpu_peers.py", "--task", "edit", "--family", "z-image"])
    assert benchmark.main() == 0
    assert capsys.readouterr().out == "z-image does not edit\n"
    monkeypatch.setattr(sys, "argv", ["cpu_peers.py", "--pictures", "2"])
    with pytest.raises(SystemExit, match="2"):
        benchmark.main()


def test_a_race_of_processes(settings_of, tmp_path, capsys):
    names = ("zimg fp32 onnxruntime", "zimg int4-weights onnxruntime", "zimg bf16 onnxruntime")
    result = benchmark.race(settings_of("z-image"), tmp_path, names, 2, 2**33)
    ran = [names[0], names[2]]
    assert list(result["seconds"]) == list(result["cpu_seconds"]) == list(result["first"]) == ran
    for times in (result[kind][name] for kind in Spent._fields for name in ran):
        assert set(times) == {*COMPONENTS, WHOLE}
        assert all(len(turns) == 2 and min(turns) > 0 for turns in times.values())
    assert list(result["failed"]) == [names[1]]
    benchmark.report({"parameters": 1_000_000} | result)
    printed = capsys.readouterr().out
    assert "cpu_seconds, median (times as fast as zimg fp32 onnxruntime)" in printed
    assert all(component in printed for component in (*COMPONENTS, WHOLE, "first picture s"))
    assert f"{names[1]} did not run: BundleError" in printed


def test_a_contestant_ends_with_who_started_it(settings_of, tmp_path):
    settings_of("z-image").save(tmp_path)
    command = [sys.executable, benchmark.WORKER, tmp_path, "zimg fp32 onnxruntime"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert b"first_picture_s" in process.stdout.readline()
        process.stdin.close()
        assert process.wait(30) == 0


def test_where_none_ran_that_is_told(settings_of, tmp_path, capsys):
    result = benchmark.race(settings_of("z-image"), tmp_path, ["zimg int8 onnxruntime"], 1, 2**33)
    benchmark.report({"parameters": 1_000_000} | result)
    assert "zimg int8 onnxruntime did not run: BundleError" in capsys.readouterr().out


def test_a_contestant_that_fails_says_why(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("no compiler\nis here")

    monkeypatch.setattr(peer_contestants, "contestant", fail)
    answers = io.StringIO()
    peer_contestants.take_part(tmp_path, "torch.compile fp32", [], answers)
    assert json.loads(answers.getvalue()) == {"failed": "RuntimeError: no compiler is here"}


def test_a_picture_of_nan_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(peer_contestants, "contestant", lambda *_: (lambda: np.full((1, 2, 2, 3), np.nan), Clock()))
    answers = io.StringIO()
    peer_contestants.take_part(tmp_path, "zimg fp32 torch", [], answers)
    assert json.loads(answers.getvalue()) == {"failed": "ArithmeticError: the picture is not finite"}


def test_contestants_are_chosen_by_words(tmp_path):
    assert benchmark.chosen(["zimg int8 onnxruntime", "torch.compile"]) == (
        "torch.compile fp32",
        "torch.compile bf16",
        "zimg int8 onnxruntime",
    )
    assert {"diffusers fp32", "zimg int4-weights torch"} <= set(benchmark.chosen([""]))
    assert not any(name.startswith("stable") for name in benchmark.chosen([""]))
    assert benchmark.chosen(["q8_0"], tmp_path) == ("stable-diffusion.cpp q8_0",)
    with pytest.raises(SystemExit, match="zimg fp32 onnxruntime"):
        benchmark.chosen(["fp64"])


def test_a_program_that_is_not_there(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cpu_peers.py", "--stable-diffusion-cpp", str(tmp_path / "sd-cli")])
    with pytest.raises(SystemExit, match="2"):
        benchmark.main()
    assert capsys.readouterr().err == f"{tmp_path / 'sd-cli'} is no program\n"


@pytest.mark.parametrize("family", ["z-image", "qwen-image"])
def test_checkpoint_of_given_configs(family, tmp_path):
    vae = dict(families.family(family).mid_size["vae"])
    vae |= {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4} if family == "z-image" else {"base_dim": 4}
    Settings(family, configs={"vae": vae}).save(tmp_path)
    parameters = peer_contestants.prepare(tmp_path, [])
    headers = [safetensors.read_header(file) for file in tmp_path.rglob("*.safetensors")]
    assert parameters == sum(math.prod(info.shape) for header in headers for info in header.values())
    config = json.loads((tmp_path / "checkpoint" / "vae" / "config.json").read_text())
    assert config["latents_mean" if "latents_mean" in vae else "scaling_factor"] in vae.values()


def test_clock_adds_up():
    clock = Clock()
    assert clock.time("a", lambda x: x + 1)(1) == 2
    first = clock.spent["a"]
    clock.time("a", sum)(range(100_000))
    assert clock.spent["a"].seconds > first.seconds > 0
    assert clock.spent["a"].cpu_seconds > first.cpu_seconds >= 0
    outer = clock.spent["a"]
    clock.time("inner", sum, within="a")(range(100_000))
    left = clock.spent["a"].seconds + clock.spent["inner"].seconds
    assert left == pytest.approx(outer.seconds)
    clock.add("b", Spent(1, 2))
    clock.add("b", Spent(3, 4))
    assert clock.spent["b"] == Spent(4, 6)
