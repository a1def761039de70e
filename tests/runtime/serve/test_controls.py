"""ControlNets that a request asks for: drawn as a pipeline draws them, and what is wrong told of ``controls``."""

from __future__ import annotations

import base64
import json
from io import BytesIO
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.runtime.serve.conftest import picture, pixels
from zimgkit.runtime import Pipeline
from zimgkit.runtime.pictures.metadata import read

CALL = {"prompt": "a red cup", "negative_prompt": "blurry", "num_inference_steps": 2, "seed": 3}
SIZE = {"width": 48, "height": 64}
EDGES, DEPTH = picture(48, 64, 1), picture(80, 32, 2)
"""The second is resized."""
MASK = Image.fromarray(np.pad(np.full((32, 24), 255, np.uint8), ((0, 32), (0, 24))))


def png(image: Image.Image) -> bytes:
    data = BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def encoded(image: Image.Image) -> str:
    return base64.b64encode(png(image)).decode()


def sent(control: dict[str, Any]) -> dict[str, Any]:
    return {key: encoded(value) if isinstance(value, Image.Image) else value for key, value in control.items()}


def asked(server, controls: Any, **more: Any) -> httpx.Response:
    body = json.dumps({**CALL, **SIZE, "controls": controls, **more})  # Which also writes NaN.
    return httpx.post(f"{server.url}/v1/images/generations", content=body, timeout=60)


def drawn(answer: httpx.Response) -> BytesIO:
    return BytesIO(base64.b64decode(answer.raise_for_status().json()["data"][0]["b64_json"]))


def same(*files: BytesIO) -> bool:
    first, second = (pixels(Image.open(file)) for file in files)
    return np.array_equal(first, second)


@pytest.fixture(scope="module")
def pipeline(controlled_bundle):
    with Pipeline.open(controlled_bundle, backend="onnxruntime") as opened:
        yield opened


@pytest.mark.parametrize(
    "controls",
    [
        [{"name": "canny", "image": EDGES, "scale": 0.7, "end": 0.5}],
        [{"name": "canny", "image": EDGES}, {"name": "depth", "image": DEPTH, "scale": 0.5, "start": 0.5}],
        {"name": "inpaint", "image": EDGES, "mask": MASK},
    ],
)
def test_pictures_are_those_of_a_pipeline(controlled, pipeline, controls):
    several = controls if isinstance(controls, list) else [controls]
    said = [sent(one) for one in several] if isinstance(controls, list) else sent(controls)
    found = drawn(asked(controlled, said))
    expected = pipeline(**CALL, **SIZE, controls=controls).images[0]
    assert np.array_equal(pixels(Image.open(found)), pixels(expected))
    assert not same(found, drawn(asked(controlled, None)))
    recorded = read(found).controls
    assert [one.name for one in recorded] == [one["name"] for one in several]
    assert [one.scale for one in recorded] == [one.get("scale", 1) for one in several]


def test_a_form_has_them_as_json(controlled, pipeline):
    control, start = {"name": "canny", "image": EDGES, "scale": 0.7}, picture(48, 64, 3)
    fields = {**CALL, **SIZE, "controls": json.dumps([sent(control)])}
    url, files = f"{controlled.url}/v1/images/edits", {"image": ("start.png", png(start))}
    answer = httpx.post(url, data=fields, files=files, timeout=60)
    expected = pipeline(**CALL, **SIZE, image=start, controls=[control]).images[0]
    assert np.array_equal(pixels(Image.open(drawn(answer))), pixels(expected))
    answer = httpx.post(url, data=fields | {"controls": "{"}, files=files)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "controls")


def test_a_model_says_which_it_has(controlled, server):
    (model,) = httpx.get(f"{controlled.url}/v1/models").json()["data"]
    assert {one["name"]: one["takes"] for one in model["zimg"]["controls"]} == {
        "canny": ["image"],
        "depth": ["image"],
        "inpaint": ["image", "mask"],
    }
    answer = asked(server, [{"name": "canny", "image": encoded(EDGES)}])
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "controls")
    assert "has no ControlNet" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("control", "told"),
    [
        ({"name": "pose", "image": EDGES}, "no ControlNet 'pose'; it has canny, depth, inpaint"),
        ({"image": EDGES}, "without its name"),
        ({"name": "canny"}, "canny is given no image"),
        ({"name": "inpaint", "image": EDGES}, "inpaint is given no mask"),
        ({"name": "canny", "image": EDGES, "mask": MASK}, "canny is given a mask"),
        ({"name": "canny", "image": "!"}, "neither base64 nor a data URL"),
        ({"name": "canny", "image": "bm9uZQ=="}, "the image of the ControlNet canny"),
        ({"name": "canny", "image": "http://127.0.0.1/x.png"}, "no address is fetched"),
        ({"name": "canny", "image": EDGES, "scale": float("nan")}, "scale of the ControlNet canny is nan"),
        ({"name": "canny", "image": EDGES, "scale": 1e9}, "scale of the ControlNet canny"),
        ({"name": "canny", "image": EDGES, "scale": "much"}, "controls"),
        ({"name": "canny", "image": EDGES, "start": 0.5, "end": 0.5}, "start comes before end"),
        ({"name": "canny", "image": EDGES, "weight": 1}, "controls"),
        ("canny", "controls"),
    ],
)
def test_what_is_wrong_is_told_of_controls(controlled, control, told):
    answer = asked(controlled, [sent(control) if isinstance(control, dict) else control])
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "controls"), error
    assert told in error["message"]


def test_a_picture_that_is_too_large_is_not_decoded(controlled):
    header = png(Image.new("1", (16, 16)))
    bomb = header[:16] + (60_000).to_bytes(4, "big") * 2 + header[24:]
    answer = asked(controlled, [{"name": "canny", "image": base64.b64encode(bomb).decode()}])
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "controls")


def test_nets_that_are_given_twice_are_told(controlled):
    answer = asked(controlled, [sent({"name": "canny", "image": EDGES})] * 2)
    assert "given twice" in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"] == "controls"
