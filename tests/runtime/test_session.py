"""Jobs, step by step: alone, together, cancelled, in threads, and with little memory."""

from __future__ import annotations

import concurrent.futures
import gc
import re
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from zimgkit.engines.base import open_engine
from zimgkit.engines.bundle import Bundle
from zimgkit.engines.errors import BackendError, CancelledError, OutOfMemoryError, UsageError
from zimgkit.runtime import Pipeline
from zimgkit.runtime.request import Request, check
from zimgkit.runtime.session import Session

SMALL: dict[str, Any] = {"height": 32, "width": 48, "num_inference_steps": 3, "negative_prompt": "b", "cfg_scale": 3.0}


@pytest.fixture(scope="module", params=["z-image", "qwen-image"])
def bundle(request: pytest.FixtureRequest, bundle_of: Callable[..., Path]) -> Bundle:
    return Bundle.open(bundle_of(request.param))


@pytest.fixture
def session(bundle: Bundle) -> Iterator[Session]:
    opened = Session(bundle, memory_budget=0)
    yield opened
    opened.close()


def ask(session: Session, **call: Any) -> Request:
    return check(session.bundle.manifest, session.family, **(SMALL | {"prompt": "a", "seed": 1} | call))


def drawn(bundle: Bundle, **call: Any) -> Any:
    """The pictures that one thread draws in one call."""
    with Pipeline(bundle) as pipeline:
        return pipeline(**(SMALL | {"prompt": "a", "seed": 1, "output_type": "np"} | call)).images


def runs(session: Session, call: dict[str, Any]) -> tuple[Any, dict[str, int]]:
    """A picture, and how often each engine was run and opened for it."""
    counts: dict[str, int] = {}

    def opener(bundle: Bundle, component: str, backend: str, device: str | None) -> Any:
        engine = open_engine(bundle, component, backend, device)
        counts[f"{component} opened"] = counts.get(f"{component} opened", 0) + 1
        run = engine.run

        def counted(*args: Any, **more: Any) -> Any:
            counts[component] = counts.get(component, 0) + 1
            return run(*args, **more)

        engine.run = counted  # type: ignore[method-assign]
        return engine

    with Pipeline(session.bundle, opener=opener, memory_budget=0) as pipeline:
        picture = pipeline(**(SMALL | {"prompt": "a", "seed": 1, "output_type": "np"} | call)).images
    return picture, counts


def test_what_no_step_is_guided_by_is_not_read(session: Session) -> None:
    """A step outside of the interval takes one branch; where all are, no negative prompt is encoded or planned for."""
    low = float(np.mean(session.begin(ask(session))[0].schedule.sigmas[1:3]))
    _, counts = runs(session, {"guidance_low": low})
    assert (counts["text_encoder"], counts["denoiser"], counts["denoiser opened"]) == (2, 3 + 2, 1)
    with pytest.warns(UserWarning, match="no step is guided: .* leave out all noise levels, 1 to 0"):
        found, counts = runs(session, {"guidance_high": 0.01})
    assert (counts["text_encoder"], counts["denoiser"]) == (1, 3)
    off = session.family.guidance_scale(1.0)
    assert np.array_equal(found, drawn(session.bundle, cfg_scale=None, guidance_scale=off))
    long = {"negative_prompt": "b" * 400, "prompt": "a"}
    short, whole = (session.plan(ask(session, **long, **more)) for more in ({"guidance_high": 0.01}, {}))
    assert short.peak < whole.peak


def test_both_branches_of_guidance_share_one_load_of_the_weights(bundle: Bundle, session: Session) -> None:
    low, sets = float(np.mean(session.begin(ask(session))[0].schedule.sigmas[1:3])), list[int]()

    def opener(bundle: Bundle, component: str, backend: str, device: str | None) -> Any:
        engine = open_engine(bundle, component, backend, device)
        if component == "denoiser":
            run_together = engine.run_together

            def counted(given: Any) -> Any:
                sets.append(len(given))
                return run_together(given)

            engine.run_together = counted  # type: ignore[method-assign]
        return engine

    with Pipeline(bundle, opener=opener) as pipeline:
        pipeline(**SMALL, prompt="a", guidance_low=low)
    assert sets == [2, 2, 1]


def test_step_by_step_is_a_call(bundle: Bundle, session: Session) -> None:
    call = {"prompt": ["a", "two of them"], "num_images_per_prompt": 2}
    jobs = session.begin(ask(session, **call))
    assert [job.index for job in jobs] == [0, 1, 2, 3]
    seen = []
    while not jobs[0].is_denoised:
        seen.append((jobs[0].step, round(jobs[0].progress, 3), jobs[0].sigma > 0))
        session.step(jobs)
    assert seen == [(0, 0.0, True), (1, 0.333, True), (2, 0.667, True)]
    assert (jobs[0].sigma, jobs[0].progress) == (0.0, 1.0)
    pictures = np.stack([session.finish(job) for job in jobs])
    assert np.array_equal(pictures, drawn(bundle, **call))


def test_jobs_of_several_requests_go_on_in_any_order(bundle: Bundle, session: Session) -> None:
    calls = [{"seed": 3}, {"prompt": "other", "height": 48}, {"num_inference_steps": 5, "negative_prompt": "c"}]
    (first,), (second,), (third,) = (session.begin(ask(session, **call)) for call in calls)
    session.step([third, first])
    session.step([second])
    session.step([second, third, first])
    session.step([first, second])
    session.step([third])
    (late,) = session.begin(ask(session, seed=9))
    session.step([late, third])
    session.step([third, late])
    session.step([late])
    for job, call in zip([first, second, third, late], [*calls, {"seed": 9}], strict=True):
        assert np.array_equal(session.finish(job), drawn(bundle, **call)[0])


def test_what_is_done_takes_no_step_and_what_is_not_gives_no_picture(session: Session) -> None:
    (job,) = session.begin(ask(session))
    with pytest.raises(ValueError, match="steps left"):
        session.finish(job)
    for _ in range(3):
        session.step([job])
    with pytest.raises(ValueError, match="no step left"):
        session.step([job])


def test_a_cancelled_job_stops_between_steps_and_the_others_go_on(bundle: Bundle, session: Session) -> None:
    jobs = session.begin(ask(session, num_images_per_prompt=3))
    session.step(jobs)
    jobs[1].cancel()
    with pytest.raises(CancelledError, match="picture 2 of 3 was cancelled"):
        session.step(jobs)
    assert [job.step for job in jobs] == [1, 1, 1]
    with pytest.raises(CancelledError):
        session.finish(jobs[1])
    for _ in range(2):
        session.step([jobs[0], jobs[2]])
    whole = drawn(bundle, num_images_per_prompt=3)
    assert np.array_equal(session.finish(jobs[0]), whole[0])
    assert np.array_equal(session.finish(jobs[2]), whole[2])
    jobs[1].cancel()


class Handle:
    """An input on an imagined device."""

    def __init__(self, value: Any) -> None:
        self.value = value


class Device:
    """Opens real engines, counts what is open and uploaded, and has room for so many engines."""

    def __init__(self, room: int = 100) -> None:
        self.room = room
        self.open: list[str] = []
        self.handles: list[weakref.ref[Handle]] = []

    def alive(self) -> int:
        gc.collect()
        return sum(handle() is not None for handle in self.handles)

    def __call__(self, bundle: Bundle, component: str, backend: str, device: str | None) -> Any:
        if len(self.open) >= self.room:
            raise OutOfMemoryError("the device is full")
        engine, outer = open_engine(bundle, component, backend, device), self
        outer.open.append(component)

        class Counted:
            device = "imagined"

            def upload(self, feeds: Any) -> Any:
                made = {name: Handle(value) for name, value in feeds.items()}
                outer.handles += [weakref.ref(handle) for handle in made.values()]
                return made

            def run(self, feeds: Any, keep: Any = ()) -> Any:
                assert component in outer.open, "a closed engine ran"
                values = {name: feed.value if isinstance(feed, Handle) else feed for name, feed in feeds.items()}
                return engine.run(values)

            def run_together(self, sets: Any) -> Any:
                return [self.run(feeds) for feeds in sets]

            def close(self) -> None:
                outer.open.remove(component)
                engine.close()

        return Counted()


def test_what_a_prompt_has_on_the_device_leaves_it_with_its_last_picture(bundle: Bundle) -> None:
    device = Device()
    session = Session(bundle, opener=device)
    request = ask(session, prompt=["a", "b and more"], num_images_per_prompt=2, negative_prompt=["c", "d"])
    jobs = session.begin(request)
    assert device.alive() == 0
    for job in jobs[:1]:
        for _ in range(3):
            session.step([job])
    once = device.alive()
    assert once > 0
    for _ in range(3):
        session.step([jobs[1]])
    assert device.alive() == 0
    session.step(jobs[2:])
    assert device.alive() == once
    jobs[2].cancel()
    assert device.alive() == once
    jobs[3].cancel()
    assert device.alive() == 0
    session.close()
    assert device.open == []


def test_the_denoiser_stays_open_from_step_to_step_whatever_the_budget(bundle: Bundle) -> None:
    device = Device()
    session = Session(bundle, memory_budget=0, opener=device)
    (job,) = session.begin(ask(session))
    assert device.open == []
    session.step([job])
    assert device.open == ["denoiser"]
    session.step([job])
    session.step([job])
    assert device.open == []
    (job,) = session.begin(ask(session))
    session.step([job])
    job.cancel()
    assert device.open == []


def test_a_job_that_is_forgotten_keeps_nothing(bundle: Bundle) -> None:
    device = Device()
    session = Session(bundle, memory_budget=0, opener=device)
    jobs = session.begin(ask(session))
    session.step(jobs)
    assert device.open == ["denoiser"]
    jobs.clear()
    assert device.alive() == 0
    assert device.open == []


def test_a_full_device_gives_up_an_engine_between_two_steps_but_none_in_use(bundle: Bundle) -> None:
    device = Device(room=1)
    with Pipeline(bundle, opener=device) as pipeline:
        messages = []

        def look(pipe: Pipeline, step: int, timestep: float, tensors: dict[str, Any]) -> None:
            # Between two steps the denoiser is not in use: it makes room, and is opened again.
            assert pipe.preview(tensors["denoised"], 32, 48)[0].size == (48, 32)
            assert device.open == ["vae_decoder"]
            with pipe.session.engines.engine("denoiser"):
                assert device.open == ["denoiser"]
                try:
                    pipe.preview(tensors["denoised"], 32, 48)
                except OutOfMemoryError as error:
                    messages.append(str(error))

        call = SMALL | {"prompt": "a", "seed": 1, "output_type": "np"}
        wanted = ("latents", "denoised")
        found = pipeline(**call, callback_on_step_end=look, callback_on_step_end_tensor_inputs=wanted).images
    assert messages == ["the device is full"] * 3
    assert np.array_equal(found, drawn(bundle))


@pytest.mark.parametrize("budget", [0, None])
def test_eight_threads_draw_what_one_draws(bundle: Bundle, budget: int | None) -> None:
    device = Device()
    calls = [{"prompt": f"number {index}", "seed": index, "height": 32 + 16 * (index % 2)} for index in range(16)]
    expected = [drawn(bundle, **call) for call in calls]
    with Pipeline(bundle, memory_budget=budget, opener=device) as pipeline:

        def draw(call: dict[str, Any]) -> Any:
            looks = []
            found = pipeline(
                **(SMALL | {"output_type": "np"} | call),
                callback_on_step_end=lambda pipe, i, t, tensors: looks.append(
                    pipe.preview(tensors["latents"], call["height"], 48)
                ),
            ).images
            assert len(looks) == 3
            return found

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            for found, picture in zip(pool.map(draw, calls), expected, strict=True):
                assert np.array_equal(found, picture)
    assert device.open == []
    assert device.alive() == 0


def test_eight_threads_share_a_device_with_room_for_one_engine(bundle: Bundle) -> None:
    """Where all need room that only others can give, they wait for each other; nobody fails."""
    device = Device(room=1)
    with Pipeline(bundle, opener=device) as pipeline:
        call = SMALL | {"prompt": "a", "output_type": "np"}
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda seed: pipeline(**call, seed=seed).images, range(8)))
    for seed, pictures in enumerate(found):
        assert np.array_equal(pictures, drawn(bundle, seed=seed))


def test_components_have_devices_of_their_own(bundle: Bundle) -> None:
    where = {}

    def opener(bundle: Bundle, component: str, backend: str, device: str | None) -> Any:
        where[component] = device
        return open_engine(bundle, component, backend, "cpu")

    with Pipeline(bundle, device={"text_encoder": "cuda:1", "denoiser": "cuda:0"}, opener=opener) as pipeline:
        pipeline("a", **SMALL, seed=1)
    assert where == {"text_encoder": "cuda:1", "conditioner": None, "denoiser": "cuda:0", "vae_decoder": None}


def test_a_device_for_a_component_that_there_is_not(bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="device names the component 'denoizer'; choose of text_encoder, conditioner"):
        Pipeline(bundle, device={"denoizer": "cpu"})
    with Pipeline(bundle, device="cpu") as pipeline, pytest.raises(UsageError, match="'vae'; choose of"):
        pipeline.to({"vae": "cpu"})


def test_rows_of_another_text_encoder_are_refused(session: Session) -> None:
    width = session.bundle.component("conditioner").inputs["prompt_embeds"].shape[-1]
    with pytest.raises(UsageError, match=f"3 rows of 5 numbers; this bundle takes .* rows of {width} numbers"):
        session.begin(ask(session, prompt=None, prompt_embeds=[np.zeros((3, 5), np.float32)]))


@pytest.mark.parametrize(("component", "message"), [("denoiser", "step 1 of 3"), ("vae_decoder", "the VAE decoder")])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.filterwarnings("error")
def test_what_is_no_number_makes_no_picture(bundle: Bundle, component: str, message: str, value: float) -> None:
    def opener(bundle: Bundle, name: str, backend: str, device: str | None) -> Any:
        engine = open_engine(bundle, name, backend, device)
        if name == component:
            run = engine.run

            def broken(feeds: Any, keep: Any = ()) -> Any:
                found = run(feeds, keep)
                next(iter(found.values())).flat[5] = value
                return found

            engine.run = broken  # type: ignore[method-assign]
        return engine

    with Pipeline(bundle, opener=opener) as pipeline, pytest.raises(BackendError, match=f"{message} gave NaN or Inf"):
        pipeline("a", **SMALL, seed=1)


def test_the_documentation() -> None:
    text = (Path(__file__).parents[2] / "docs" / "how-it-works.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    there: dict[str, Any] = {}
    exec(code, there)
    with Pipeline.open("zimg-tiny-z") as pipeline:
        assert np.array_equal(there["picture"], pipeline("a red circle", seed=1, output_type="np").images[0])


def test_another_device_is_another_choice() -> None:
    with Pipeline.open("zimg-tiny-z") as pipeline:
        assert (pipeline.to("cpu").backend, pipeline.session.choice.reason != "") == ("onnxruntime", True)
        assert (pipeline.to("npu").backend, pipeline.session.engines.backend) == ("openvino", "openvino")
        assert (pipeline.to("cuda").backend, pipeline.session.engines.backend) == ("onnxruntime", "onnxruntime")
    with Pipeline.open("zimg-tiny-z", backend="torch") as pipeline:
        assert (pipeline.to("npu").backend, pipeline.session.choice.reason) == ("torch", "")
