from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from zimg.training.accuracy import Case, accuracy, held_out_scenes, share
from zimg.training.judge import Present, Related, judge
from zimg.training.world.claims import claims
from zimg.training.world.drawing import draw
from zimg.training.world.sampling import held_out


@pytest.mark.parametrize("things", [1, 2])
def test_scenes_were_held_out_and_the_judge_finds_all_in_true_pictures(things: int) -> None:
    scenes = held_out_scenes(40, things)
    assert len({repr(scene) for scene in scenes}) == 40
    for scene in scenes:
        assert held_out(scene)
        told = [claim for claim in claims(scene) if isinstance(claim, Present | Related)]
        assert len(told) == things + things // 2
        assert judge(draw(scene), told).right


def test_shares() -> None:
    cases = [
        Case("", things, right, "", 0) for things, right in [(1, True), (1, False), (2, True), (2, True), (1, True)]
    ]
    assert share(cases, 1) == pytest.approx(2 / 3)
    assert share(cases, 2) == 1
    assert share(cases, 3) == 0


def test_a_bundle_of_no_use_and_the_command(bundle_of: Callable[..., Path]) -> None:
    """Random weights draw nothing that the judge takes for what was asked for."""
    bundle = bundle_of("z-image")
    cases = accuracy(bundle, captions=3, num_inference_steps=1, guidance_scale=0.0)
    assert [case.things for case in cases] == [1, 2, 1]
    assert not any(case.right for case in cases)
    command = [sys.executable, "-m", "zimg.training", "judge", str(bundle), "--captions"]
    own = ["2", "--num-inference-steps", "1", "--cfg-scale", "1", "--json"]
    done = subprocess.run([*command, *own], capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    assert [case["things"] for case in result["cases"]] == [1, 2]
    assert result["shares"] == {"one": 0.0, "two": 0.0}
    refused = subprocess.run([*command, "0"], capture_output=True, text=True, check=False)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
