"""How often the denoiser runs, as it is counted beforehand, against the runs there are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from zimgkit.engines.base import open_engine
from zimgkit.engines.bundle import Bundle
from zimgkit.runtime.caching import cached_share
from zimgkit.runtime.request import check
from zimgkit.runtime.session import Session
from zimgkit.runtime.work import denoiser_runs

MASK = "110100101000"
CALL: dict[str, Any] = {"prompt": "a cat", "height": 32, "width": 32, "num_inference_steps": 12, "cfg_scale": 3.0}


@pytest.fixture(scope="module")
def counted(bundle_of: Callable[..., Path]) -> tuple[Session, Counter[str]]:
    """A session with a denoiser that is cut, and how often each of its graphs was run."""
    runs: Counter[str] = Counter()

    def opened(bundle: Bundle, component: str, backend: str, device: str | None) -> Any:
        engine: Any = open_engine(bundle, component, backend, device)
        run = engine.run

        def counting(*given: Any) -> Any:
            runs[component] += 1
            return run(*given)

        engine.run = counting
        return engine

    return Session(
        Bundle.open(bundle_of("z-image", cut=True, transformer={"n_layers": 4})), opener=opened, warn=lambda _: None
    ), runs


@pytest.mark.parametrize(
    "call",
    [
        {},
        {"cfg_scale": 1.0},
        {"cfg_truncation": 0.5},
        {"guidance_low": 0.3, "guidance_high": 0.9},
        {"cache": MASK},
        {"cache": MASK, "cache_reuse": "velocity"},
        {"cache": MASK, "cfg_scale": 1.0},
        {"cache": "off", "cache_negative": MASK, "cache_reuse": "velocity"},
        # The first step that is guided is full in its branch, though not in the mask.
        {"cache": MASK, "guidance_high": 0.87},
        {"cache": MASK, "guidance_high": 0.87, "cache_reuse": "velocity"},
    ],
)
def test_runs_are_those_there_are(call: dict[str, Any], counted: tuple[Session, Counter[str]]) -> None:
    session, runs = counted
    request = check(session.bundle.manifest, session.family, negative_prompt="b", **CALL | call)
    runs.clear()
    (job,) = session.begin(request)
    while not job.is_denoised:
        session.step([job])
    body, cached = runs["denoiser.body"], runs["denoiser.head"] - runs["denoiser.body"]
    assert runs["denoiser.tail"] == runs["denoiser.head"]
    share = cached_share(session.bundle.manifest)
    assert 0 < share < 1
    assert denoiser_runs(session, request) == pytest.approx(runs["denoiser"] + body + share * cached)


def test_steps_that_a_picture_leaves_out_do_not_count(counted: tuple[Session, Counter[str]]) -> None:
    session, _ = counted
    request = check(session.bundle.manifest, session.family, negative_prompt="b", **CALL)
    half = replace(request, inputs=replace(request.inputs, strength=0.5))
    assert denoiser_runs(session, half) == denoiser_runs(session, request) / 2 == 12


def test_where_the_change_decides_all_steps_count(counted: tuple[Session, Counter[str]]) -> None:
    session, _ = counted
    call = CALL | {"num_inference_steps": 20, "cache": "dynamic", "negative_prompt": "b"}
    assert denoiser_runs(session, check(session.bundle.manifest, session.family, **call)) == 40
