"""Cached steps against diffusers' pipelines whose blocks are left out by hand, and whose state they are."""

from __future__ import annotations

import concurrent.futures
import gc
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from tests import reference
from zimgkit.engines.base import open_engine
from zimgkit.engines.bundle import Bundle, CacheMask, CompiledEngine
from zimgkit.engines.errors import BackendError, UsageError
from zimgkit.runtime import Pipeline
from zimgkit.runtime.caching import notes, pieces
from zimgkit.runtime.request import check
from zimgkit.runtime.session import Session

BOUND = 1e-3
"""On pixels from 0 to 1."""
DEPTH = {"z-image": {"n_layers": 4}, "qwen-image": {"num_layers": 4}}
MASK = "110100101000"
SIZE: dict[str, Any] = {"height": 32, "width": 48, "num_inference_steps": len(MASK), "negative_prompt": "b"}
CALL: dict[str, Any] = SIZE | {"cfg_scale": 3.0, "seed": 1, "output_type": "np"}


@pytest.fixture(scope="module", params=["z-image", "qwen-image"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def bundle(family: str, bundle_of: Callable[..., Path]) -> Bundle:
    return Bundle.open(bundle_of(family, cut=True, transformer=DEPTH[family]))


@pytest.fixture(scope="module")
def ours(bundle: Bundle) -> Iterator[Pipeline]:
    with Pipeline(bundle) as pipeline:
        yield pipeline


class Blocks(torch.nn.Module):
    """All blocks: the first one always, the others in some steps, while in others what they added is added again."""

    def __init__(self, blocks: Any, is_full: Callable[[int, int, Any], bool], order: int, branches: int) -> None:
        super().__init__()
        self.first, *self.others = blocks
        self.is_full, self.order, self.branches = is_full, order, branches
        self.calls = 0
        self.kept: dict[int, list[tuple[int, torch.Tensor]]] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        step, branch = divmod(self.calls, self.branches)
        self.calls += 1
        kept = self.kept.setdefault(branch, [])
        before = args[0] if args else kwargs["hidden_states"]
        out = self.first(*args, **kwargs)
        stream = out if args else out[1]
        if not self.is_full(step, branch, stream - before) and kept:
            residual = kept[-1][1]
            if self.order and len(kept) > 1:
                (older, earlier), (last, _) = kept[-2:]
                residual = residual + (residual - earlier) * (step - last) / (last - older)
            return stream + residual if args else (out[0], stream + residual)
        for block in self.others:
            if args:
                out = block(out, *args[1:])
            else:
                out = block(**kwargs | {"encoder_hidden_states": out[0], "hidden_states": out[1]})
        kept.append((step, (out if args else out[1]) - stream))
        return out


def cached_reference(family: str, is_full: Callable[[int, int, Any], bool], order: int = 0, branches: int = 2) -> Any:
    """A reference pipeline of the same weights. Z-Image's computes both branches in one call.

    Args:
        family: which.
        is_full: step, branch and what the first block added, the prompt's first -> whether it is computed in full.
        order: of the extrapolation.
        branches: of guidance.
    """
    theirs = reference.FAMILIES[family](0, transformer=DEPTH[family])
    name = "layers" if family == "z-image" else "transformer_blocks"
    blocks = Blocks(getattr(theirs.transformer, name), is_full, order, 1 if family == "z-image" else branches)
    setattr(theirs.transformer, name, torch.nn.ModuleList([blocks]))
    return theirs


def drawn_by(theirs: Any, family: str, scale: float, **call: Any) -> Any:
    guided = {"guidance_scale": scale - 1} if family == "z-image" else {"true_cfg_scale": scale}
    return reference.draw(theirs, "a cat", seed=1, **SIZE | call, **guided)


@pytest.mark.parametrize(("order", "scale"), [(0, 3.0), (1, 3.0), (1, 1.0)])
def test_as_diffusers_with_blocks_left_out(family: str, ours: Pipeline, order: int, scale: float) -> None:
    def is_full(step: int, branch: int, stream: Any) -> bool:
        return MASK[step] == "1"

    theirs = cached_reference(family, is_full, order, 2 if scale > 1 else 1)
    expected = drawn_by(theirs, family, scale)
    call = CALL | {"cfg_scale": scale, "cache_order": order}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found, whole = (ours("a cat", **call, cache=cache).images for cache in (MASK, "off"))
    assert np.abs(found - expected).max() < BOUND
    assert np.abs(found - whole).max() > 3 * BOUND


def test_the_negative_branch_has_a_mask_of_its_own(ours: Pipeline, bundle: Bundle, family: str) -> None:
    negative = "100000100000"
    if family == "qwen-image":
        masks = (MASK, negative)
        theirs = cached_reference(family, lambda step, branch, stream: masks[branch][step] == "1")
        found = ours("a cat", **CALL, cache=MASK, cache_negative=negative, cache_order=0).images
        assert np.abs(found - drawn_by(theirs, family, 3.0)).max() < BOUND
    counted = Counted(bundle)
    counted.pipeline("a cat", **CALL, cache="off", cache_negative=negative)
    assert counted.runs == {"denoiser.head": 24, "denoiser.body": 14, "denoiser.tail": 24}


class Counted:
    """A pipeline, and how often each of its denoiser's graphs was run."""

    def __init__(self, bundle: Bundle, fails: Callable[[str, int], bool] = lambda name, run: False) -> None:
        self.runs: Counter[str] = Counter()
        self.handles: list[weakref.ref[Any]] = []
        self._fails = fails
        self.pipeline = Pipeline(bundle, opener=self._open)

    def _open(self, bundle: Bundle, component: str, backend: str, device: str | None) -> Any:
        engine: Any = open_engine(bundle, component, backend, device)
        if component.startswith("denoiser"):
            run = engine.run

            def counted(feeds: Any, keep: Any = ()) -> Any:
                self.runs[component] += 1
                if self._fails(component, self.runs[component]):
                    raise BackendError("it failed")
                found = run(feeds, keep)
                self.handles += [weakref.ref(found[name].value) for name in keep if hasattr(found[name].value, "shape")]
                return found

            engine.run = counted
        return engine


def test_what_is_run(bundle: Bundle) -> None:
    counted = Counted(bundle)
    counted.pipeline("a cat", **CALL, cache=MASK)
    assert counted.runs == {"denoiser.head": 24, "denoiser.body": 10, "denoiser.tail": 24}
    counted.runs.clear()
    counted.pipeline("a cat", **CALL | {"num_inference_steps": 20}, cache="balanced")
    assert counted.runs == {"denoiser.head": 40, "denoiser.body": 24, "denoiser.tail": 40}


def test_dynamic(family: str, bundle: Bundle) -> None:
    """After four steps the change of what the first block adds decides, in the prompt's branch for both."""
    steps, threshold = 40, {"z-image": 0.955, "qwen-image": 0.7}[family]  # Random weights change a lot.
    full: dict[int, Any] = {}

    def is_full(step: int, branch: int, added: Any) -> bool:
        if branch == 0:
            now = added[0]
            last = full[max(full)] if full else now
            if step < 4 or step == steps - 1 or (now - last).abs().mean() / last.abs().mean() >= threshold:
                full[step] = now
        return step in full

    call = {"num_inference_steps": steps}
    expected = drawn_by(cached_reference(family, is_full), family, 3.0, **call)
    counted = Counted(bundle)
    found = counted.pipeline("a cat", **CALL | call, cache=f"dynamic:{threshold}", cache_order=0).images
    assert counted.runs["denoiser.body"] == 2 * len(full)
    assert np.abs(found - expected).max() < BOUND
    assert 5 < len(full) < steps


def test_no_call_sees_the_state_of_another(ours: Pipeline) -> None:
    first = ours("a cat", **CALL, cache=MASK).images
    ours("a dog", **CALL | {"num_inference_steps": 5, "seed": 3}, cache="10101", cache_order=1)
    ours("a cat", **CALL)
    assert np.array_equal(ours("a cat", **CALL, cache=MASK).images, first)


def test_two_threads(ours: Pipeline) -> None:
    calls = [CALL | {"seed": seed, "cache": MASK, "cache_order": seed % 2} for seed in range(4)]
    alone = [ours("a cat", **call).images for call in calls]
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda call: ours("a cat", **call).images, calls))
    assert all(map(np.array_equal, found, alone))


def batching(bundle: Bundle, most: int = 4) -> Bundle:
    """The same, as if it had engines that take several pictures: ONNX Runtime takes any batch anyway."""
    engines = tuple(
        CompiledEngine(name, "", "onnxruntime", "", "", "", "", ({"batch": (1, 1, most)},))
        for name in bundle.manifest.components
        if name.startswith("denoiser")
    )
    return replace(bundle, manifest=msgspec.structs.replace(bundle.manifest, engines=engines))


def test_pictures_that_go_together_and_apart(bundle: Bundle, ours: Pipeline) -> None:
    """A residual goes with its picture, in whatever company that takes a step."""
    call = CALL | {"num_images_per_prompt": 3, "cache": MASK, "cache_order": 1}
    alone = ours("a cat", **call).images
    session = Session(bundle)
    session.bundle = batching(bundle)
    request = check(session.bundle.manifest, session.family, prompt="a cat", **call)
    first, second, third = jobs = session.begin(request)
    assert [len(group) for group in session.groups(jobs)] == [3]
    for _ in range(4):
        session.step(jobs)
    for _ in range(2):
        session.step([third, first])
    second_alone = [second]
    for _ in range(2):
        session.step(second_alone)
    session.step([second, third, first])
    session.step([third])
    session.step([second, first])
    while not first.is_denoised:
        session.step([third, second, first])
    found = np.stack([session.finish(job) for job in jobs])
    assert np.abs(found - alone).max() < 1e-4
    assert not any(job.residuals for job in jobs)
    session.close()


def test_cancelled_jobs_leave_nothing_on_the_device(bundle: Bundle) -> None:
    counted = Counted(bundle)
    session = counted.pipeline.session
    jobs = session.begin(check(session.bundle.manifest, session.family, prompt="a", **CALL, cache=MASK))
    for _ in range(3):
        session.step(jobs)
    (job,) = jobs
    assert len(job.residuals) == 2
    job.cancel()
    assert not job.residuals
    gc.collect()
    assert not [handle for handle in counted.handles if handle() is not None]


def test_a_step_that_failed_can_be_taken_again(bundle: Bundle, ours: Pipeline) -> None:
    """The first branch's new residual takes nothing from the picture."""
    expected = ours("a", **CALL, cache=MASK, cache_order=1).images[0]
    failing = [True]
    counted = Counted(bundle, lambda name, run: bool(failing) and name == "denoiser.body" and run == 6)
    session = counted.pipeline.session
    call = CALL | {"cache": MASK, "cache_order": 1}
    (job,) = session.begin(check(session.bundle.manifest, session.family, prompt="a", **call))
    while not job.is_denoised:
        try:
            session.step([job])
        except BackendError:
            failing.clear()
    assert not failing and np.array_equal(session.finish(job), expected)


@pytest.mark.parametrize("backend", ["torch", "openvino"])
def test_other_backends_draw_the_same_picture(bundle: Bundle, ours: Pipeline, backend: str) -> None:
    if backend == "openvino":
        pytest.importorskip("openvino")
    with Pipeline(bundle, backend=backend, device="cpu") as other:
        found = other("a cat", **CALL, cache=MASK, cache_order=1).images
    assert np.abs(found - ours("a cat", **CALL, cache=MASK, cache_order=1).images).max() < BOUND


def test_a_denoiser_that_is_not_cut_keeps_its_velocity(bundle: Bundle) -> None:
    manifest = bundle.manifest
    components = {name: entry for name, entry in manifest.components.items() if not name.startswith("denoiser.")}
    uncut = replace(bundle, manifest=msgspec.structs.replace(manifest, components=components))
    counted = Counted(uncut)
    session = counted.pipeline.session
    call = CALL | {"cfg_scale": 1.0, "negative_prompt": None}
    with pytest.warns(UserWarning, match="the denoiser of this bundle is not cut, so that velocities are reused"):
        (job,) = session.begin(check(manifest, session.family, prompt="a", **call, cache=MASK, cache_order=0))
    before = None
    for digit in MASK:
        session.step([job])
        assert (before is None or not np.array_equal(job.velocity, before)) == (digit == "1")
        before = job.velocity
    assert counted.runs == {"denoiser": 5}
    with pytest.raises(UsageError, match="is not cut, and only its head tells how much has changed; build it with"):
        counted.pipeline("a", **call | {"num_inference_steps": 13}, cache="dynamic")


def test_pieces_that_are_not_compiled(bundle: Bundle) -> None:
    with Pipeline(bundle) as pipeline:
        request = check(bundle.manifest, pipeline.session.family, prompt="a", **CALL, cache=MASK)
    assert pieces(bundle, "denoiser", "tensorrt", request.caching) == ()
    (note,) = notes(bundle, request, "tensorrt")
    assert note.startswith("the pieces of the denoiser are not compiled, so that velocities are reused, and not")
    assert note.endswith("--component denoiser.head --component denoiser.body --component denoiser.tail")
    names = bundle.manifest.pieces("denoiser")
    engines = tuple(CompiledEngine(name, "", "tensorrt", "", "", "", "", ()) for name in names)
    compiled = replace(bundle, manifest=msgspec.structs.replace(bundle.manifest, engines=engines))
    assert pieces(compiled, "denoiser", "tensorrt", request.caching) == names and not notes(
        compiled, request, "tensorrt"
    )


def test_what_a_call_is_told(ours: Pipeline, bundle: Bundle) -> None:
    with pytest.warns(UserWarning, match="the cache 'balanced' is off, for 12 steps are too few"):
        found = ours("a", **CALL, cache="balanced").images
    assert np.array_equal(found, ours("a", **CALL).images)
    with pytest.raises(UsageError, match="cache is a mask of 3 steps, and 12 are taken"):
        ours("a", **CALL, cache="101")
    with pytest.raises(UsageError, match="cache_order is 2"):
        ours("a", **CALL, cache=MASK, cache_order=2)
    with pytest.raises(UsageError, match="cache is 1; give a text"):
        ours("a", **CALL, cache=1)
    own = msgspec.structs.replace(bundle.manifest, caches={"own": CacheMask("110100101000")})
    with Pipeline(replace(bundle, manifest=own)) as other:
        assert np.array_equal(other("a", **CALL, cache="own").images, ours("a", **CALL, cache=MASK).images)
        with pytest.warns(UserWarning, match="the mask 'own' is of 12 steps, and is stretched to 14"):
            other("a", **CALL | {"num_inference_steps": 14}, cache="own")
