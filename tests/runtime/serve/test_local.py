"""What happens to requests between the door and the device: queue, turns, hanging up, loading, ending."""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import httpx
import pytest

from tests.runtime.serve.conftest import SECONDS, Server, make_service, open_session, serving, until
from zimgkit.engines.errors import BackendError, OutOfMemoryError
from zimgkit.runtime.serve.calls import Answer
from zimgkit.runtime.serve.catalog import Catalog, open_models
from zimgkit.runtime.serve.local import LocalService
from zimgkit.runtime.serve.service import Limits
from zimgkit.runtime.session import Session

PROMPT = "a red circle left of a blue square"
MODEL = "zimg-tiny-z"
GENERATIONS = "/v1/images/generations"


def draw(server: Server, timeout: float = SECONDS, **body: Any) -> httpx.Response:
    return httpx.post(server.url + GENERATIONS, json={"prompt": PROMPT, **body}, timeout=timeout)


class Slow(Session):
    """A session whose steps wait until they may be taken."""

    def __init__(self, bundle: Any) -> None:
        super().__init__(bundle, backend="onnxruntime", warn=lambda message: None)
        self.may = threading.Semaphore(0)
        self.steps: list[int] = []

    def step(self, jobs: Any) -> None:
        assert self.may.acquire(timeout=SECONDS)
        self.steps.append(jobs[0].request.seed)
        super().step(jobs)


@pytest.fixture
def slow():
    """A server whose steps are let through one by one, and its session."""
    sessions: list[Slow] = []

    def make(model: Any) -> Slow:
        sessions.append(Slow(model.bundle))
        return sessions[-1]

    service = LocalService(Catalog(open_models([MODEL])), [make], Limits(max_queue_seconds=4.5), warm_up=False)
    with serving(service) as server:
        try:
            yield server, sessions[0]
        finally:
            sessions[0].may.release(10_000)


def test_a_client_that_hangs_up_stops_its_picture_a_thousand_times():
    rng = random.Random(0)
    with serving(make_service()) as server:
        more = {"num_inference_steps": 12, "size": "32x32"}
        expected = draw(server, seed=1, **more).json()["data"][0]["b64_json"]

        async def hang_up(gate: asyncio.Semaphore) -> None:
            async with gate:
                body = json.dumps({"prompt": PROMPT, "seed": 0, "stream": rng.random() < 0.5, **more}).encode()
                _, writer = await asyncio.open_connection("127.0.0.1", server.port)
                head = f"POST {GENERATIONS} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n"
                writer.write(head.encode() + body[: len(body) if rng.random() < 0.9 else 5])
                await writer.drain()
                await asyncio.sleep(rng.random() * 0.03)
                writer.transport.abort()

        async def all_of_them() -> None:
            gate = asyncio.Semaphore(8)
            await asyncio.gather(*(hang_up(gate) for _ in range(1000)))

        asyncio.run(all_of_them())
        answer = draw(server, seed=1, **more)
        assert answer.json()["data"][0]["b64_json"] == expected, "the next one is drawn as ever"
        until(lambda: not server.service.drawings(), "nothing is left")
        ended = {
            reason: server.metric("zimg:request_success_total", model_name=MODEL, finished_reason=reason)
            for reason in ("succeeded", "cancelled", "failed")
        }
        assert ended["failed"] == 0
        assert ended["cancelled"] > 300, ended
        assert server.metric("zimg:num_requests_running", model_name=MODEL) == 0
        steps = server.metric("zimg:step_time_seconds_count", model_name=MODEL)
        assert steps < 12 * (ended["succeeded"] + ended["cancelled"]), "what is cancelled is not drawn to its end"


@pytest.mark.parametrize("stream", [False, True])
def test_a_picture_that_is_cancelled_takes_no_further_step(slow, stream):
    server, session = slow
    with ThreadPoolExecutor(2) as pool:
        with suppress(httpx.ReadTimeout):
            draw(server, timeout=0.3, seed=1, num_inference_steps=9, stream=stream)
        second = pool.submit(draw, server, seed=2, num_inference_steps=2)
        until(lambda: server.service.workers[0].current.cancelled, "the server has seen it")
        session.may.release(4)
        assert second.result().status_code == 200
    assert session.steps.count(1) <= 1
    assert session.steps.count(2) == 2


def test_clients_take_turns(slow):
    server, session = slow
    drawn: list[str] = []

    async def one(client: str, number: int) -> None:
        request = server.service.catalog.find(None)
        from zimgkit.runtime.request import check

        call = check(
            request.manifest, request.family, prompt=PROMPT, seed=number, num_inference_steps=1, width=32, height=32
        )
        async for _ in server.service.draw(request, call, Answer(), client=client):
            pass
        drawn.append(f"{client}{number}")

    async def all_of_them() -> None:
        tasks = [asyncio.create_task(one("many", 0))]
        await asyncio.sleep(0.05)
        tasks += [asyncio.create_task(one("many", number)) for number in (1, 2, 3)]
        await asyncio.sleep(0.05)
        tasks += [asyncio.create_task(one("few", 7))]
        await asyncio.sleep(0.05)
        assert [drawing.client for drawing in server.service.waiting.order()] == ["many", "few", "many", "many"]
        session.may.release(5)
        await asyncio.gather(*tasks)

    asyncio.run(all_of_them())
    assert drawn == ["many0", "many1", "few7", "many2", "many3"]


def test_the_queue_is_bounded_in_seconds_of_work(slow):
    server, session = slow
    body = {"num_inference_steps": 1, "size": "32x32", "guidance_scale": 0.0}
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(draw, server, **body)
        until(lambda: server.service.workers[0].current, "the first one is drawn")
        time.sleep(1.0)
        session.may.release(1)
        first.result()
        expected = server.service.rates._rates[MODEL]
        assert 0.9 < expected.run * 32 * 32 / 1e6 < 5, "a step took a second and a bit"
        seconds = expected.run * 32 * 32 / 1e6 + expected.rest * 32 * 32 / 1e6
        fitting = int(4.5 // seconds)
        waiting = [pool.submit(draw, server, **body)]
        until(lambda: server.service.workers[0].current, "the next one is drawn")
        waiting += [pool.submit(draw, server, **body) for _ in range(fitting)]
        until(lambda: len(server.service.waiting) == fitting, "others wait")
        refused = draw(server, **body)
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "queue_full"
        assert 1 <= int(refused.headers["retry-after"]) <= 120
        session.may.release(100)
        assert {answer.result().status_code for answer in waiting} == {200}


def test_the_place_in_the_queue_is_told(slow):
    server, session = slow
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(draw, server, num_inference_steps=1)
        until(lambda: server.service.workers[0].current, "the first one is drawn")
        body = {"prompt": PROMPT, "num_inference_steps": 2, "stream": True, "progress": True}
        events = []
        with httpx.stream("POST", server.url + GENERATIONS, json=body, timeout=SECONDS) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    events.append(json.loads(line[6:]))
                    if events[-1].get("queue_position") == 1:
                        session.may.release(3)
        first.result()
    assert events[0] == {"type": "progress", "queue_position": 1}
    assert [event.get("step") for event in events[1:-1]] == [0, 1, 2]
    assert events[-1]["type"] == "image_generation.completed"


def test_nothing_is_drawn_before_the_models_are_open():
    gate = threading.Event()

    def late(model: Any) -> Session:
        assert gate.wait(SECONDS)
        return open_session(model)

    service = LocalService(Catalog(open_models([MODEL])), [late], warm_up=False)
    with serving(service, ready=False) as server:
        assert httpx.get(f"{server.url}/health/live").status_code == 200
        for answer in (httpx.get(f"{server.url}/health/ready"), draw(server)):
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "loading"
            assert answer.headers["retry-after"]
        gate.set()
        until(lambda: httpx.get(f"{server.url}/health/ready").status_code == 200, "it is ready")
        assert draw(server, num_inference_steps=1).status_code == 200


def test_a_model_that_cannot_be_opened_is_told():
    def fails(model: Any) -> Session:
        raise BackendError("there is no GPU")

    service = LocalService(Catalog(open_models([MODEL])), [fails])
    service.start()
    until(lambda: service.failure, "it failed")
    assert str(service.failure) == "there is no GPU"
    assert not service.ready


@pytest.mark.parametrize(
    ("raised", "status", "told"),
    [
        (OutOfMemoryError("a picture of this size needs 9 GiB"), 400, "9 GiB"),
        (BackendError("the engine gave NaN in /srv/models/secret/denoiser.plan"), 500, "NaN in denoiser.plan"),
        (RuntimeError("surprise in /srv/secret"), 500, "the server's log has more"),
    ],
)
def test_what_fails_on_the_device_fails_one_request(raised, status, told):
    class Fails(Session):
        def step(self, jobs: Any) -> None:
            if jobs[0].request.seed == 13:
                raise raised
            super().step(jobs)

    service = LocalService(
        Catalog(open_models([MODEL])), [lambda model: Fails(model.bundle, backend="onnxruntime")], warm_up=False
    )
    with serving(service) as server:
        failed = draw(server, seed=13, num_inference_steps=2)
        assert failed.status_code == status
        assert told in failed.json()["error"]["message"]
        assert "/srv" not in failed.text
        assert failed.headers.get("x-should-retry", "false") == "false"
        body = {"prompt": PROMPT, "seed": 13, "num_inference_steps": 2, "stream": True}
        events = httpx.post(server.url + GENERATIONS, json=body, timeout=SECONDS).text
        assert '"error"' in events or status == 200
        assert draw(server, seed=1, num_inference_steps=2).status_code == 200


def test_two_devices_draw_at_once():
    together = threading.Barrier(2, timeout=SECONDS)

    class Meets(Session):
        def step(self, jobs: Any) -> None:
            together.wait()
            super().step(jobs)

    make = lambda model: Meets(model.bundle, backend="onnxruntime")  # noqa: E731
    service = LocalService(Catalog(open_models([MODEL])), [make, make], warm_up=False)
    with serving(service) as server, ThreadPoolExecutor(2) as pool:
        until(lambda: all(worker.ready.is_set() for worker in service.workers), "both are ready")
        answers = list(pool.map(lambda seed: draw(server, seed=seed, num_inference_steps=3), (1, 2)))
        assert [answer.status_code for answer in answers] == [200, 200]


def test_what_was_begun_is_drawn_when_the_server_ends():
    with serving(make_service()) as server, ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(draw, server, seed=seed, num_inference_steps=60) for seed in range(3)]
        until(lambda: len(server.service.drawings()) == 3, "all are there")
        server.process.should_exit = True
        assert [answer.result().status_code for answer in answers] == [200, 200, 200]
        with pytest.raises(httpx.ConnectError):
            draw(server)
