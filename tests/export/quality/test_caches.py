"""Masks that are chosen for a bundle: the errors they follow from against cached runs, and the command."""

from __future__ import annotations

import itertools
import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest

from tests.commands import invoke
from zimgkit.engines.bundle import Bundle, CacheMask, write_manifest
from zimgkit.engines.bundle.locks import only_writer_of
from zimgkit.engines.errors import BackendError, OutputError, UsageError
from zimgkit.export.cli.main import main
from zimgkit.export.quality import caches
from zimgkit.export.quality.caches import Aim, calibrate_cache, reckoned_speed
from zimgkit.export.quality.runs import Trial
from zimgkit.export.quality.step_errors import picture, step_errors
from zimgkit.runtime import demo_models
from zimgkit.runtime.commands.cli import main as run
from zimgkit.runtime.diffusion.caching import pattern
from zimgkit.runtime.pipeline import Pipeline

DEPTH = {"z-image": {"n_layers": 4}, "qwen-image": {"num_layers": 4}}
TRIAL = Trial(("a green ball",), 48, 32, 5, negative_prompt="b")
GUIDED = {"z-image": 1.5, "qwen-image": 3.0}
STEPS = 14
OPTIONS = ("--num-inference-steps", STEPS, "--size", "48x32", "--judge", 0, "--quiet")


@pytest.fixture
def cut_bundle(bundle_of):
    return lambda family: bundle_of(family, cut=True, transformer=DEPTH[family])


@pytest.fixture
def copy(cut_bundle, tmp_path):
    """One that may be changed."""
    return Path(shutil.copytree(cut_bundle("qwen-image"), tmp_path / "b"))


def latents_of(bundle, trial, **call):
    """The latents after each step."""
    found = []

    def look(_, step, time, tensors):
        found.append(tensors["latents"].astype(np.float64))

    with Pipeline(bundle) as pipeline:
        pipeline(**picture(trial, 0), **call, output_type="latent", callback_on_step_end=look)
    return found


def size(values):
    return float(np.sqrt(np.mean(np.square(values))))


@pytest.mark.parametrize(("family", "order"), [("z-image", 1), ("qwen-image", 1), ("qwen-image", 0)])
def test_errors_are_those_of_a_step_left_out(family, order, cut_bundle):
    """The runtime's own cached step, from latents that are those of the full run until then."""
    bundle = Bundle.open(cut_bundle(family))
    trial = replace(TRIAL, guidance_scale=GUIDED[family]).filled(bundle.manifest)
    found = step_errors(bundle, trial, order, backend="onnxruntime")
    full = latents_of(bundle, trial)
    for step in (1, 3) if order else (3,):
        mask = "".join("0" if index == step else "1" for index in range(5))
        for reused in found.errors:
            cached = latents_of(bundle, trial, cache=mask, cache_order=order, cache_reuse=reused)
            older = step - 2 if order and step > 1 else None
            expected = size(cached[step] - full[step]) / size(full[-1])
            assert found.errors[reused][(step - 1, older), step] == pytest.approx(expected, rel=1e-3)
            assert expected > 1e-4
    assert found.errors.keys() == {"residual", "velocity"}
    assert (len(found.change), found.change[0]) == (5, 0)
    assert min(found.change[1:]) > 0


def test_the_command(copy, tmp_path):
    (tmp_path / "prompts.txt").write_text("a green ball\n")
    asked = ("--prompts", tmp_path / "prompts.txt", "--name", "mine", "--target-speed", 1.5)
    result = invoke(main, "calibrate-cache", copy, *OPTIONS, *asked, "--json")
    assert result.code == 0, result
    given = json.loads(result.out)["caches"]
    manifest = Bundle.open(copy).manifest
    assert msgspec.convert(given, dict[str, CacheMask]) == manifest.caches
    assert list(given) == ["balanced", "fast", "mine"]
    mine = manifest.caches["mine"]
    assert (len(mine.steps), mine.order, len(mine.change)) == (STEPS, 1, STEPS)
    full = mine.steps.count("1")
    assert (
        reckoned_speed(manifest, STEPS, full, mine.reuse) >= 1.5 > reckoned_speed(manifest, STEPS, full + 1, mine.reuse)
    )
    for name, (first, one_of) in {"balanced": (8, 3), "fast": (4, 4)}.items():
        assert [digit == "1" for digit in manifest.caches[name].steps] == [*pattern(first, one_of, STEPS)]
    # What it costs is what pictures show.
    cost, trial = mine.cost, Trial(("a green ball",), 48, 32, STEPS).filled(manifest)
    assert (cost.prompts, cost.width, cost.height, cost.backend) == (trial.prompts, 48, 32, "onnxruntime")
    with Pipeline.open(copy) as pipeline:
        call = picture(trial, 0) | {"output_type": "np"}
        own, other = (pipeline(**call, cache=cache).images[0].astype(np.float64) for cache in ("off", "mine"))
    assert cost.psnr == pytest.approx(-10 * np.log10(np.mean((own - other) ** 2)), abs=0.01)
    assert cost.speed > 0 and 0 < cost.ssim <= 1
    shown = invoke(run, "inspect", copy).out
    assert f"mine: {full} of {STEPS} steps in full, order 1, of the {mine.reuse}" in shown
    assert f"PSNR {cost.psnr:.1f} dB" in shown


def test_a_target_error(copy):
    aim = Aim(error=30.0)
    trial = Trial(("a",), 48, 32, 9)
    masks = calibrate_cache(copy, trial, aim, order=0, captions=0)
    (found,) = masks.values()  # Patterns leave nothing out of nine steps.
    assert found.cost.psnr >= 30
    assert found.steps.count("1") < 9
    with pytest.raises(UsageError, match=r"no mask of 9 steps keeps 200 dB; [\d.]+ dB is the most"):
        calibrate_cache(copy, trial, Aim(error=200.0), order=0, captions=0)


def test_the_judge(copy, monkeypatch):
    asked = []

    def judge(bundle, captions, backend, report, **call):
        asked.append((captions, call.pop("cache"), call.pop("cache_reuse"), call))
        return {"one": 0.5 if asked[-1][1] == "off" else 0.25}

    monkeypatch.setattr(caches, "accuracy", judge)
    masks = calibrate_cache(copy, Trial(("a",), 32, 32, STEPS), captions=7)
    assert [(entry[0], entry[3]) for entry in asked] == [(7, {"num_inference_steps": STEPS, "cache_order": 1})] * 4
    assert {entry[1:3] for entry in asked} == {("off", None), *((mask.steps, mask.reuse) for mask in masks.values())}
    costs = [mask.cost for mask in masks.values()]
    assert {cost.captions for cost in costs} == {7}
    assert [cost.accuracy for cost in costs] == [{"one": 0.25}] * 3
    assert [cost.uncached_accuracy for cost in costs] == [{"one": 0.5}] * 3
    assert "right   25.0% of one thing (50.0%): of 7 captions" in invoke(run, "inspect", copy).out


def test_nothing_is_written_where_it_ends_early(copy, monkeypatch):
    before = (copy / "bundle.json").read_bytes()

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(caches, "step_errors", stop)
    with pytest.raises(KeyboardInterrupt):
        calibrate_cache(copy, TRIAL, Aim(2.0), captions=0)
    monkeypatch.setattr(caches, "step_errors", lambda *_, **__: (_ for _ in ()).throw(BackendError("broken")))
    invoke(main, "calibrate-cache", copy, *OPTIONS).assert_refused("broken", 1)
    assert (copy / "bundle.json").read_bytes() == before
    assert [path.name for path in copy.parent.iterdir()] == ["b"]


KILLED = """
import os, signal, sys
from pathlib import Path
from zimgkit.export.quality.caches import Aim, calibrate_cache
from zimgkit.export.quality.runs import Trial

root, last, count = sys.argv[1], int(sys.argv[2]), 0

def watch(event, details):
    global count
    if event in ("open", "os.rename", "os.remove", "os.link", "os.mkdir") and str(details[0]).startswith(root):
        count += event != "open" or bool((details[2] or 0) & (os.O_WRONLY | os.O_RDWR))
        if count == last:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(watch)
calibrate_cache(Path(root), Trial(("a",), 32, 32, 4), Aim(1.2), name="new", captions=0)
"""


def test_a_kill_at_any_point_leaves_a_whole_bundle(cut_bundle, tmp_path):
    """Killed when it does its n-th thing to a file of the bundle, until it comes to its end."""
    changed = []
    for number in itertools.count(1, 3):
        bundle = Path(shutil.copytree(cut_bundle("qwen-image"), tmp_path / str(number)))
        done = subprocess.run([sys.executable, "-c", KILLED, bundle, str(number)], capture_output=True, check=False)
        opened = Bundle.open(bundle)
        opened.verify(afresh=True)
        changed.append(bool(opened.manifest.caches))
        if done.returncode != -signal.SIGKILL:
            break
    assert done.returncode == 0, done.stderr
    assert len(changed) > 1 and changed == sorted(changed)
    # What was left is no hindrance.
    calibrate_cache(tmp_path / "1", Trial(("a",), 32, 32, 4), Aim(1.2), name="new", captions=0)
    assert [*Bundle.open(tmp_path / "1").manifest.caches] == ["new"]


def test_two_at_once(copy):
    with only_writer_of(copy), pytest.raises(OutputError, match="another process is writing"):
        calibrate_cache(copy, TRIAL, captions=0)


def test_what_other_weights_cost_is_unknown(copy):
    manifest = Bundle.open(copy).manifest
    mask = CacheMask("101", change=(0.0, 0.1, 0.1), cost=SimpleNamespace())
    kept = msgspec.structs.replace(manifest, caches={"mine": mask}).unmeasured_caches
    assert kept == {"mine": CacheMask("101", change=(0.0, 0.1, 0.1))}


@pytest.mark.parametrize(
    ("options", "said", "code"),
    [
        (("--name", "off"), "no mask can be called 'off'", 2),
        (("--name", "A b"), "no mask can be called 'A b'", 2),
        (("--target-speed", "1"), "--target-speed is 1; give a number above 1", 2),
        (("--target-speed", "nan"), "--target-speed is nan", 2),
        (("--target-speed", "50"), "no mask of 14 steps makes them 50 times as fast; ", 2),
        (("--target-error", "-3"), "--target-error is -3", 2),
        (("--target-error", "40", "--target-speed", "2"), "name two aims", 2),
        (("--num-inference-steps", "2"), "of 2 steps none can be left out", 2),
        (("--num-inference-steps", "12"), "give a --target-speed or a --target-error", 2),
        (("--size", "10"), "'10' is no size", 2),
        (("--prompts", "no.txt"), "cannot be read", 2),
        (("--num-inference-steps", "x"), "'x' is not a valid integer", 2),
    ],
)
def test_bad_input(options, said, code, cut_bundle):
    before = (cut_bundle("qwen-image") / "bundle.json").read_bytes()
    invoke(main, "calibrate-cache", cut_bundle("qwen-image"), *OPTIONS, *options).assert_refused(said, code)
    assert (cut_bundle("qwen-image") / "bundle.json").read_bytes() == before


def test_bundles_that_are_refused(copy):
    invoke(main, "calibrate-cache", "nowhere", "--quiet").assert_refused("nowhere is not a bundle", 1)
    carried = demo_models.NAMES[0]
    invoke(main, "calibrate-cache", carried, "--quiet").assert_refused("comes with zimgkit and stays as it is", 2)
    broken = json.loads((copy / "bundle.json").read_text())
    broken["caches"] = {"mine": {"steps": "011"}}
    (copy / "bundle.json").write_text(json.dumps(broken))
    invoke(main, "calibrate-cache", copy, *OPTIONS).assert_refused("is not a manifest zimgkit can read", 1)


def test_masks_that_are_there_stay(copy):
    bundle = Bundle.open(copy)
    write_manifest(copy, msgspec.structs.replace(bundle.manifest, caches={"old": CacheMask("10101")}))
    calibrate_cache(copy, Trial(("a",), 32, 32, 4), Aim(1.2), name="new", captions=0)
    assert list(Bundle.open(copy).manifest.caches) == ["old", "new"]


def test_a_denoiser_that_is_not_cut(bundle_of, tmp_path):
    whole = Path(shutil.copytree(bundle_of("z-image"), tmp_path / "whole"))
    (found,) = calibrate_cache(whole, Trial(("a",), 32, 32, 4), Aim(1.9), captions=0).values()
    assert (found.steps.count("1"), found.reuse, found.change) == (2, "velocity", ())
