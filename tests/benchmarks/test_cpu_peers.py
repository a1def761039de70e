from __future__ import annotations

import json
import math
import os

import cpu_peers as benchmark
import families
import pytest

from zimgkit.engines.tensors import safetensors
from zimgkit.runtime import engine_pool
from zimgkit.runtime.families import family as host_of

NAMES = ("diffusers fp32", "diffusers bf16", "zimg fp32 onnxruntime", "zimg bf16 torch")


@pytest.mark.parametrize("family", ["z-image", "qwen-image"])
def test_tiny_models_race(family, checkpoint_of, bundle_of, capsys):
    host = host_of(family)
    before = engine_pool.open_engine, host.schedule_inputs, os.environ.get("ZIMG_CACHE_LIMIT")
    bundles = {precision: bundle_of(family, precision) for precision in ("fp32", "bf16")}
    result = benchmark.race(family, checkpoint_of(family), bundles, NAMES, size=64, steps=2, repeats=2)
    assert (engine_pool.open_engine, host.schedule_inputs, os.environ.get("ZIMG_CACHE_LIMIT")) == before
    assert tuple(result["seconds"]) == tuple(result["cpu_seconds"]) == NAMES
    assert result["difference"]["diffusers fp32"] == 0
    assert 0 < result["difference"]["zimg fp32 onnxruntime"] < 1e-3
    assert 1e-3 < result["difference"]["zimg bf16 torch"] < 0.5
    for times in (*result["seconds"].values(), *result["cpu_seconds"].values()):
        assert all(len(turns) == 2 and min(turns) > 0 for turns in times.values())
        for turn, whole in enumerate(times[benchmark.WHOLE]):
            counts = {"text encoder": 1, benchmark.STEP: 2, "VAE decoder": 1}
            assert sum(counts[name] * times[name][turn] for name in benchmark.COMPONENTS) < whole
    benchmark.report({"parameters": 1_000_000} | result)
    printed = capsys.readouterr().out
    assert "cpu_seconds, median (times as fast as zimg fp32 onnxruntime)" in printed
    assert all(component in printed for component in (*benchmark.COMPONENTS, benchmark.WHOLE))


def test_contestants_are_chosen_by_words():
    assert benchmark.chosen(["zimg int8 onnxruntime", "torch.compile"]) == (
        "torch.compile fp32",
        "torch.compile bf16",
        "zimg int8 onnxruntime",
    )
    assert {"diffusers fp32", "zimg int4-weights torch"} <= set(benchmark.chosen([""]))
    with pytest.raises(SystemExit, match="zimg fp32 onnxruntime"):
        benchmark.chosen(["fp64"])


def test_a_compiler_that_fails_is_told():
    def fail():
        raise RuntimeError("no compiler\nis here")

    ready, images, failed = benchmark._warm_up({"torch.compile fp32": fail})
    assert (ready, images, failed) == ({}, {}, {"torch.compile fp32": "RuntimeError: no compiler is here"})
    with pytest.raises(RuntimeError):
        benchmark._warm_up({"zimg": fail})


@pytest.mark.parametrize("family", ["z-image", "qwen-image"])
def test_checkpoint_of_given_configs(family, tmp_path):
    vae = dict(families.family(family).mid_size["vae"])
    vae |= {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4} if family == "z-image" else {"base_dim": 4}
    parameters = benchmark.write_checkpoint(family, tmp_path, {"vae": vae})
    headers = [safetensors.read_header(file) for file in tmp_path.rglob("*.safetensors")]
    assert parameters == sum(math.prod(info.shape) for header in headers for info in header.values())
    assert json.loads((tmp_path / "vae" / "config.json").read_text())["latents_mean"] == vae["latents_mean"]


def test_clock_adds_up():
    clock = benchmark.Clock()
    assert clock.time("a", lambda x: x + 1)(1) == 2
    first = clock.spent["a"]
    clock.time("a", sum)(range(100_000))
    assert clock.spent["a"].seconds > first.seconds > 0
    assert clock.spent["a"].cpu_seconds > first.cpu_seconds >= 0
