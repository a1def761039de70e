"""The server on a Ray cluster of two CPU replicas on this machine."""

from __future__ import annotations

import base64
import json
import os
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.runtime.serve.conftest import MODELS, pixels, until

ray = pytest.importorskip("ray", reason="the extra ray is not installed")

from ray import serve  # noqa: E402

from zimgkit.engines.errors import UsageError, ZimgError  # noqa: E402
from zimgkit.runtime.serve.ray_app import Arguments, ByWork, app  # noqa: E402

PROMPT = "a red circle left of a blue square"
SECONDS = 120


@pytest.fixture(scope="module")
def cluster():
    """Two replicas, and the address of their server."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    ray.init(num_cpus=4, include_dashboard=False, object_store_memory=80 << 20, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    arguments = Arguments(
        bundles=list(MODELS),
        min_replicas=2,
        max_replicas=2,
        gpus=0,
        no_auth=True,
        backend="onnxruntime",
        models_per_replica=1,
    )
    serve.run(app(arguments), name="zimg", route_prefix="/")
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()


def draw(url: str, **body: Any) -> httpx.Response:
    body = {"prompt": PROMPT, "num_inference_steps": 4, **body}
    return httpx.post(f"{url}/v1/images/generations", json=body, timeout=SECONDS)


def drawn(answer: httpx.Response) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    return pixels(Image.open(BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"]))))


def painters() -> list[Any]:
    return [actor for actor in ray.util.list_named_actors(all_namespaces=True) if "Painter" in actor["name"]]


def test_pictures_are_those_of_a_pipeline(cluster, pipelines):
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda seed: draw(cluster, seed=seed, model=MODELS[seed % 2]), range(12)))
    for seed, answer in enumerate(found):
        pipeline = pipelines(MODELS[seed % 2])
        negative = pipeline.bundle.manifest.defaults.negative_prompt
        expected = pipeline(PROMPT, negative_prompt=negative, seed=seed, num_inference_steps=4).images[0]
        assert np.array_equal(drawn(answer), pixels(expected)), seed


def test_a_request_goes_where_its_model_is_open(cluster):
    def opened() -> list[list[str]]:
        running = ray.get(serve.context._get_global_client()._controller._all_running_replicas.remote())
        painters = next(replicas for name, replicas in running.items() if name.name == "Painter")
        return sorted(sorted(replica.multiplexed_model_ids) for replica in painters)

    def each_has_one() -> bool:
        for model in MODELS:
            drawn(draw(cluster, model=model))
        return opened() == sorted([name] for name in MODELS)

    until(each_has_one, "each replica has opened one")
    for seed in range(8):
        drawn(draw(cluster, seed=seed, model=MODELS[seed % 2]))
    assert opened() == sorted([name] for name in MODELS), "none was closed for another"


def test_a_stream_comes_through(cluster):
    body = {
        "prompt": PROMPT,
        "seed": 3,
        "num_inference_steps": 8,
        "stream": True,
        "partial_images": 2,
        "progress": True,
    }
    kinds, arrived = [], []
    with httpx.stream("POST", f"{cluster}/v1/images/generations", json=body, timeout=SECONDS) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                kinds.append(json.loads(line[6:])["type"])
                arrived.append(time.monotonic())
    assert kinds.count("image_generation.partial_image") == 2
    assert kinds[-1] == "image_generation.completed"
    assert kinds.count("progress") >= 9
    assert arrived[-1] > arrived[0], "as it is drawn, not at its end"


def test_a_replica_that_is_killed_loses_no_request(cluster):
    expected = drawn(draw(cluster, seed=5, num_inference_steps=150))
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(draw, cluster, seed=5, num_inference_steps=150) for _ in range(4)]
        time.sleep(0.5)
        ray.kill(ray.get_actor(**painters()[0]))
        for answer in answers:
            assert np.array_equal(drawn(answer.result()), expected)


def test_what_is_wrong_is_told(cluster):
    assert draw(cluster, model="other").status_code == 404
    answer = draw(cluster, size="100x100")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "size"
    long = draw(cluster, seed=1, width=4096, height=4096, num_inference_steps=1000)
    assert long.status_code == 400, "what the replica refuses is refused as it says"
    assert long.json()["error"]["code"] in ("takes_too_long", "out_of_memory")


def test_a_client_that_hangs_up_stops_its_picture(cluster):
    body = {"num_inference_steps": 1000, "width": 256, "height": 256}
    for _ in range(3):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{cluster}/v1/images/generations", json={"prompt": PROMPT, **body}, timeout=0.7)
    started = time.monotonic()
    drawn(draw(cluster, seed=1))
    drawn(draw(cluster, seed=2))
    assert time.monotonic() - started < 30, "nothing is drawn for nobody"


@pytest.mark.parametrize(
    ("work", "requests", "low", "high", "expected"),
    [(0, 0, 0, 8, 0), (0, 1, 0, 8, 1), (29, 1, 1, 8, 1), (31, 2, 1, 8, 2), (600, 50, 1, 8, 8), (0, 0, 2, 8, 2)],
)
def test_replicas_are_as_many_as_the_work_needs(work, requests, low, high, expected):
    context = SimpleNamespace(
        aggregated_metrics={"work_seconds": {"a": work / 2, "b": work / 2}},
        total_num_requests=requests,
        capacity_adjusted_min_replicas=low,
        capacity_adjusted_max_replicas=high,
    )
    assert ByWork(30.0)(context) == (expected, {})


def test_bad_arguments(tmp_path):
    with pytest.raises(UsageError, match="no key is asked for"):
        app(Arguments(bundles="zimg-tiny-z"))
    with pytest.raises(ZimgError, match="nowhere"):
        app(Arguments(bundles="nowhere", no_auth=True))
    with pytest.raises(ValueError, match="extra"):
        Arguments(bundles="zimg-tiny-z", replicas=3)
