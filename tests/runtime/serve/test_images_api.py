"""OpenAI's images API, spoken by OpenAI's own client."""

from __future__ import annotations

import asyncio
import base64
import json
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image, ImageOps

from tests.runtime.serve.conftest import picture, pixels
from zimgkit.runtime.pictures.metadata import read

openai = pytest.importorskip("openai", reason="OpenAI's client is not installed")
PROMPT = "a red circle left of a blue square"
Z, QWEN = "zimg-tiny-z", "zimg-tiny-qwen"


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=2) as found:
        yield found


def opened(entry: Any) -> Image.Image:
    return Image.open(BytesIO(base64.b64decode(entry.b64_json)))


def file(image: Image.Image, kind: str = "PNG") -> bytes:
    data = BytesIO()
    image.save(data, kind)
    return data.getvalue()


@pytest.mark.parametrize(
    ("model", "call"),
    [
        (Z, {}),
        (Z, {"size": "64x48", "extra_body": {"seed": 7, "num_inference_steps": 3, "guidance_scale": 0.0}}),
        (Z, {"n": 3, "extra_body": {"seed": 2**40, "num_inference_steps": 4}}),
        (Z, {"n": 2, "extra_body": {"seed": [5, 6], "num_inference_steps": 2}}),
        (Z, {"extra_body": {"width": 48, "height": 80, "seed": 1, "sigmas": [1.0, 0.6, 0.3]}}),
        (QWEN, {"extra_body": {"seed": 3, "num_inference_steps": 4, "negative_prompt": "a blue triangle"}}),
        (QWEN, {"n": 2, "size": "96x64", "extra_body": {"seed": 9, "num_inference_steps": 2, "cfg_scale": 1.0}}),
    ],
)
def test_pictures_are_those_of_a_pipeline(client, pipelines, model, call):
    answer = client.images.generate(model=model, prompt=PROMPT, **call)
    pipeline, more = pipelines(model), dict(call.get("extra_body", {}))
    defaults = pipeline.bundle.manifest.defaults
    more.setdefault("negative_prompt", defaults.negative_prompt)
    if "seed" not in more:
        more["seed"] = answer.data[0].seed
    if "size" in call:
        more["width"], more["height"] = map(int, call["size"].split("x"))
    if "sigmas" not in more:
        more.setdefault("num_inference_steps", defaults.num_inference_steps)
    expected = pipeline(PROMPT, num_images_per_prompt=call.get("n", 1), **more)
    assert len(answer.data) == call.get("n", 1)
    for entry, image in zip(answer.data, expected.images, strict=True):
        assert np.array_equal(pixels(opened(entry)), pixels(image))
    assert answer.size == "{}x{}".format(*expected.images[0].size)
    assert (answer.output_format, answer.background, answer.quality) == ("png", "opaque", "auto")


def test_a_picture_says_how_it_is_drawn_again(client, pipelines):
    answer = client.images.generate(model=Z, prompt=PROMPT, n=2, extra_body={"num_inference_steps": 2})
    for index, entry in enumerate(answer.data):
        record = read(BytesIO(base64.b64decode(entry.b64_json)))
        assert (record.prompt, record.seed, record.image_index, record.num_images) == (PROMPT, entry.seed, index, 2)
        again = client.images.generate(
            model=Z, prompt=PROMPT, n=2, extra_body={"num_inference_steps": 2, "seed": entry.seed}
        )
        assert again.data[index].b64_json == entry.b64_json


def test_usage_counts_tokens(client):
    usage = client.images.generate(
        model=Z, prompt=PROMPT, n=2, size="64x48", extra_body={"num_inference_steps": 1}
    ).usage
    assert usage.output_tokens == 2 * 4 * 3
    assert usage.input_tokens == usage.input_tokens_details.text_tokens > 8
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens


@pytest.mark.parametrize(("quality", "steps"), [("low", 10), ("medium", 20), ("auto", 20), ("high", 30), ("hd", 30)])
def test_quality_is_steps(client, quality, steps):
    answer = client.images.generate(model=Z, prompt=PROMPT, quality=quality, size="32x32")
    assert read(BytesIO(base64.b64decode(answer.data[0].b64_json))).num_inference_steps == steps


@pytest.mark.parametrize(("kind", "called"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_formats(client, kind, called):
    sizes = []
    for compression in (100, 20):
        answer = client.images.generate(
            model=Z,
            prompt=PROMPT,
            output_format=kind,
            output_compression=compression,
            extra_body={"seed": 1, "num_inference_steps": 2},
        )
        data = base64.b64decode(answer.data[0].b64_json)
        assert (Image.open(BytesIO(data)).format, answer.output_format) == (called, kind)
        assert read(BytesIO(data)).prompt == PROMPT
        sizes.append(len(data))
    assert sizes[1] == sizes[0] if kind == "png" else sizes[1] < sizes[0]


def test_an_address_gives_the_same_bytes(client, server):
    more = {"seed": 4, "num_inference_steps": 2}
    whole = client.images.generate(model=Z, prompt=PROMPT, extra_body=more).data[0]
    kept = client.images.generate(model=Z, prompt=PROMPT, response_format="url", extra_body=more).data[0]
    assert kept.b64_json is None
    assert kept.url.startswith(f"{server.url}/v1/images/")
    fetched = httpx.get(kept.url)
    assert fetched.content == base64.b64decode(whole.b64_json)
    assert fetched.headers["content-type"] == "image/png"
    assert httpx.get(kept.url.replace("/content", "x/content")).status_code == 404


@pytest.mark.parametrize(("model", "partial_images", "n"), [(Z, 0, 1), (Z, 2, 1), (QWEN, 3, 1), (Z, 1, 2)])
def test_a_stream_has_previews_and_ends_with_the_picture(client, model, partial_images, n):
    more = {"seed": 11, "num_inference_steps": 6}
    whole = client.images.generate(model=model, prompt=PROMPT, n=n, extra_body=more)
    with client.images.generate(
        model=model, prompt=PROMPT, n=n, stream=True, partial_images=partial_images, extra_body=more
    ) as stream:
        events = list(stream)
    partial = [event for event in events if event.type == "image_generation.partial_image"]
    completed = [event for event in events if event.type == "image_generation.completed"]
    assert len(partial) == partial_images * n
    assert [event.partial_image_index for event in partial] == list(range(partial_images * n))
    assert [event.b64_json for event in completed] == [entry.b64_json for entry in whole.data]
    assert completed[0].usage.total_tokens == whole.usage.total_tokens
    assert completed[0].size == whole.size
    if partial_images > 1 and n == 1:
        last = pixels(opened(completed[0])).astype(float)
        distances = [np.abs(pixels(opened(event)) - last).mean() for event in partial]
        assert distances[-1] < distances[0], "previews come nearer"


def test_progress_events_are_asked_for(client):
    with client.images.generate(
        model=Z, prompt=PROMPT, stream=True, extra_body={"progress": True, "num_inference_steps": 3}
    ) as stream:
        events = list(stream)
    steps = [event.step for event in events if event.type == "progress"]
    assert steps == [0, 1, 2, 3]
    assert events[-1].type == "image_generation.completed"


@pytest.mark.parametrize("several", [False, True])
def test_an_edit_starts_from_a_picture(client, pipelines, several):
    image = picture(64, 64, seed=1)
    more = {"seed": 5, "num_inference_steps": 4, "strength": 0.7}
    sent = [file(image)] if several else file(image)
    answer = client.images.edit(model=Z, image=sent, prompt=PROMPT, size="64x64", extra_body=more)
    expected = pipelines(Z)(PROMPT, image=image, width=64, height=64, **more).images[0]
    assert np.array_equal(pixels(opened(answer.data[0])), pixels(expected))


@pytest.mark.parametrize("model", [Z, QWEN])
def test_a_mask_is_transparent_where_it_is_drawn_anew(client, pipelines, model):
    image = picture(64, 64, seed=2)
    drawn = Image.new("L", (64, 64), 0)
    drawn.paste(255, (16, 16, 48, 64))
    mask = image.copy()
    mask.putalpha(ImageOps.invert(drawn))
    more = {"seed": 6, "num_inference_steps": 4}
    answer = client.images.edit(
        model=model, image=("a.png", file(image), "image/png"), mask=file(mask), prompt=PROMPT, extra_body=more
    )
    expected = pipelines(model)(
        PROMPT,
        image=image,
        mask_image=drawn,
        keep_unmasked=True,
        negative_prompt=pipelines(model).bundle.manifest.defaults.negative_prompt,
        **more,
    ).images[0]
    found = pixels(opened(answer.data[0]))
    assert np.array_equal(found, pixels(expected))
    outside = np.asarray(drawn) == 0
    assert np.array_equal(found[outside], pixels(image)[outside]), "what is not masked stays as it is"


def test_a_stream_of_edits(client):
    with client.images.edit(
        model=Z,
        image=file(picture()),
        prompt=PROMPT,
        stream=True,
        partial_images=1,
        extra_body={"num_inference_steps": 4},
    ) as stream:
        assert [event.type for event in stream] == ["image_edit.partial_image", "image_edit.completed"]


def test_edits_take_json(server):
    url = "data:image/png;base64," + base64.b64encode(file(picture())).decode()
    body = {"prompt": PROMPT, "images": [{"image_url": url}], "num_inference_steps": 2, "seed": 1}
    answer = httpx.post(f"{server.url}/v1/images/edits", json=body).json()
    assert Image.open(BytesIO(base64.b64decode(answer["data"][0]["b64_json"]))).size == (64, 48)


def test_models(client):
    assert [model.id for model in client.models.list().data] == [Z, QWEN]
    assert client.models.retrieve(QWEN).zimg["family"] == "qwen-image"
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("gpt-image-1")
    assert error.value.body["code"] == "model_not_found"


def test_the_asynchronous_client(server, pipelines):
    async def draw() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            calls = [
                client.images.generate(model=Z, prompt=PROMPT, extra_body={"seed": seed, "num_inference_steps": 2})
                for seed in range(8)
            ]
            answers = await asyncio.gather(*calls)
            stream = await client.images.generate(
                model=Z, prompt=PROMPT, stream=True, partial_images=1, extra_body={"num_inference_steps": 3}
            )
            assert [event.type async for event in stream] == [
                "image_generation.partial_image",
                "image_generation.completed",
            ]
            return answers

    for seed, answer in enumerate(asyncio.run(draw())):
        expected = pipelines(Z)(PROMPT, seed=seed, num_inference_steps=2).images[0]
        assert np.array_equal(pixels(opened(answer.data[0])), pixels(expected))


def test_many_at_once_get_their_own(client, pipelines):
    def draw(seed: int) -> np.ndarray:
        model, side = (Z, QWEN)[seed % 2], (32, 48, 64)[seed % 3]
        more = {"seed": seed, "num_inference_steps": 2, "width": side, "height": 48}
        answer = client.images.generate(model=model, prompt=f"{PROMPT} {seed}", extra_body=more)
        return pixels(opened(answer.data[0]))

    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(draw, range(12)))
    for seed, drawn in enumerate(found):
        pipeline = pipelines((Z, QWEN)[seed % 2])
        expected = pipeline(
            f"{PROMPT} {seed}",
            seed=seed,
            num_inference_steps=2,
            width=(32, 48, 64)[seed % 3],
            height=48,
            negative_prompt=pipeline.bundle.manifest.defaults.negative_prompt,
        ).images[0]
        assert np.array_equal(drawn, pixels(expected)), seed


PNG = base64.b64encode(file(picture())).decode()
NO_PICTURE = base64.b64encode(b"no picture").decode()


@pytest.mark.parametrize(
    ("body", "status", "param", "told"),
    [
        ({}, 400, "prompt", "prompt is empty"),
        ({"prompt": " \n"}, 400, "prompt", "prompt is empty"),
        ({"prompt": 3}, 400, "prompt", "valid string"),
        ({"prompt": "x" * 32_001}, 400, "prompt", "at most 32000"),
        ({"prompt": PROMPT, "model": "dall-e-3"}, 404, "model", "served: zimg-tiny-z"),
        ({"prompt": PROMPT, "size": "100x100"}, 400, "size", "nearest is 96x96"),
        ({"prompt": PROMPT, "size": "0x64"}, 400, "size", "WIDTHxHEIGHT"),
        ({"prompt": PROMPT, "size": "1024"}, 400, "size", "WIDTHxHEIGHT"),
        ({"prompt": PROMPT, "size": "900000x64"}, 400, "width", "from 16 to 8192"),
        ({"prompt": PROMPT, "size": "64x64", "width": 64}, 400, "size", "both given"),
        ({"prompt": PROMPT, "n": 0}, 400, "n", "greater than or equal to 1"),
        ({"prompt": PROMPT, "n": 11}, 400, "n", "less than or equal to 10"),
        ({"prompt": PROMPT, "quality": "best"}, 400, "quality", "'hd'"),
        ({"prompt": PROMPT, "response_format": "png"}, 400, "response_format", "'url'"),
        ({"prompt": PROMPT, "output_format": "gif"}, 400, "output_format", "'webp'"),
        ({"prompt": PROMPT, "output_compression": 101}, 400, "output_compression", "100"),
        ({"prompt": PROMPT, "background": "transparent"}, 400, "background", "no transparency"),
        ({"prompt": PROMPT, "partial_images": 2}, 400, "partial_images", "stream"),
        ({"prompt": PROMPT, "stream": True, "partial_images": 4}, 400, "partial_images", "3"),
        ({"prompt": PROMPT, "guidance_scale": "high"}, 400, "guidance_scale", "number"),
        ({"prompt": PROMPT, "guidance_scale": 1e400}, 400, "guidance_scale", ""),
        ({"prompt": PROMPT, "guidance_scale": float("nan")}, 400, "guidance_scale", ""),
        ({"prompt": PROMPT, "num_inference_steps": 0}, 400, "num_inference_steps", "1"),
        ({"prompt": PROMPT, "seed": -(2**70)}, 400, "seed", ""),
        ({"prompt": PROMPT, "seed": [1, 2]}, 400, "seed", "seed"),
        ({"prompt": PROMPT, "steps": 3}, 400, "steps", "num_inference_steps"),
        ({"prompt": PROMPT, "gidance_scale": 3}, 400, "gidance_scale", "use guidance_scale"),
        ({"prompt": PROMPT, "loras": [{"name": "style"}]}, 400, "loras", "served with: none"),
        ({"prompt": PROMPT, "loras": "style"}, 400, "loras", "list"),
        ({"prompt": PROMPT, "mask_image": PNG}, 400, "mask", ""),
    ],
)
def test_what_is_wrong_is_told(server, body, status, param, told):
    answer = httpx.post(f"{server.url}/v1/images/generations", content=json.dumps(body))
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["param"] == param, error
    assert told in error["message"], error
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    assert answer.headers["x-request-id"]


@pytest.mark.parametrize(
    ("fields", "files", "status", "param", "told"),
    [
        ({"prompt": PROMPT}, {}, 400, "image", "image is missing"),
        ({"prompt": PROMPT}, {"image": b""}, 400, "image", ""),
        ({"prompt": PROMPT}, {"image": b"GIF89a"}, 400, "image", "no picture"),
        ({"prompt": PROMPT, "image": NO_PICTURE}, {}, 400, "image", "no picture"),
        ({"prompt": PROMPT, "image": "%%%"}, {}, 400, "image", "base64"),
        ({"prompt": PROMPT, "image": "http://127.0.0.1:1/a.png"}, {}, 400, "image", "no address is fetched"),
        ({"prompt": PROMPT, "image": "file:///etc/passwd"}, {}, 400, "image", "no address is fetched"),
        ({"prompt": PROMPT, "image": PNG, "mask": PNG}, {}, 400, "mask", "no transparency"),
        ({"prompt": PROMPT, "image": [PNG, PNG]}, {}, 400, "image", ""),
        ({"prompt": PROMPT, "image": [PNG] * 17}, {}, 400, "image", "16"),
        ({"prompt": PROMPT, "image": PNG, "strength": "2"}, {}, 400, "strength", "1"),
        ({"image": PNG}, {}, 400, "prompt", "empty"),
    ],
)
def test_what_is_wrong_with_an_edit_is_told(server, fields, files, status, param, told):
    url = f"{server.url}/v1/images/edits"
    if files:
        answer = httpx.post(url, data=fields, files={name: (name, data) for name, data in files.items()})
    else:
        answer = httpx.post(url, json=fields)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["param"] == param, answer.text
    assert told in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"prompt": "\\ud800"}']
)
def test_what_is_no_body_is_told(server, body):
    answer = httpx.post(f"{server.url}/v1/images/generations", content=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/images/generations", 405),
        ("POST", "/v1/images/variations", 400),
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/images/../../etc/passwd/content", 404),
        ("POST", "/v1/images/edits", 415),
    ],
)
def test_other_paths_have_the_error_object_too(server, method, path, status):
    answer = httpx.request(method, server.url + path)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


def test_the_client_does_not_repeat_what_is_wrong(server, client):
    before = server.metric("zimg:requests_refused_total", code="model_not_found")
    with pytest.raises(openai.NotFoundError):
        client.images.generate(model="other", prompt=PROMPT)
    assert server.metric("zimg:requests_refused_total", code="model_not_found") == before + 1
