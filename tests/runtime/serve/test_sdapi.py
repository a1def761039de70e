"""The web UI's API, as its clients speak it."""

from __future__ import annotations

import base64
import json
import time
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import httpx
import numpy as np
import pytest
from PIL import Image, ImageOps

from tests.runtime.serve.conftest import SECONDS, picture, pixels, until
from zimgkit.runtime.pictures.metadata import read

PROMPT = "a red circle left of a blue square"
Z, QWEN = "zimg-tiny-z", "zimg-tiny-qwen"


@pytest.fixture
def ask(server):
    with httpx.Client(base_url=f"{server.url}/sdapi/v1/", timeout=SECONDS) as client:

        def call(path, body=None):
            answer = client.get(path) if body is None else client.post(path, json=body)
            return answer.json() if answer.status_code == 200 else answer

        yield call
        client.post("options", json={"sd_model_checkpoint": Z})


def encoded(image: Image.Image) -> str:
    data = BytesIO()
    image.save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()


def opened(text: str) -> Image.Image:
    return Image.open(BytesIO(base64.b64decode(text)))


def test_text_to_image(ask, pipelines):
    body = {
        "prompt": PROMPT,
        "negative_prompt": "",
        "steps": 3,
        "width": 70,
        "height": 50,
        "seed": 5,
        "cfg_scale": 1.0,
        "batch_size": 2,
        "n_iter": 1,
        "sampler_name": "DPM++ 2M",
        "hr_scale": 2,
        "alwayson_scripts": {},
        "save_images": False,
    }
    answer = ask("txt2img", body)
    expected = pipelines(Z)(
        PROMPT, num_inference_steps=3, width=64, height=48, seed=5, cfg_scale=1.0, num_images_per_prompt=2
    ).images
    assert [pixels(opened(one)).tobytes() for one in answer["images"]] == [pixels(one).tobytes() for one in expected]
    info = json.loads(answer["info"])
    assert (info["seed"], info["steps"], info["width"], info["height"]) == (5, 3, 64, 48)
    assert len(info["infotexts"]) == 2
    assert info["infotexts"][0].startswith(PROMPT)


@pytest.mark.parametrize("invert", [0, 1])
def test_image_to_image_within_a_mask(ask, pipelines, invert):
    image, mask = picture(64, 64), Image.new("L", (64, 64), 0)
    mask.paste(255, (0, 0, 32, 64))
    body = {
        "prompt": PROMPT,
        "init_images": [f"data:image/png;base64,{encoded(image)}"],
        "mask": encoded(mask),
        "inpainting_mask_invert": invert,
        "denoising_strength": 0.8,
        "steps": 4,
        "seed": 2,
        "mask_blur": 0,
    }
    answer = ask("img2img", body)
    drawn = ImageOps.invert(mask) if invert else mask
    expected = pipelines(Z)(
        PROMPT,
        image=image,
        mask_image=drawn,
        strength=0.8,
        num_inference_steps=4,
        seed=2,
        mask_blur=0,
        keep_unmasked=True,
    ).images[0]
    assert np.array_equal(pixels(opened(answer["images"][0])), pixels(expected))


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_image_to_image_resizes(ask, mode):
    body = {"prompt": PROMPT, "init_images": [encoded(picture(100, 40))], "steps": 1, "width": 64, "height": 64}
    answer = ask("img2img", {**body, "resize_mode": mode})
    assert opened(answer["images"][0]).size == (64, 64)


def test_a_client_chooses_a_model_for_itself(ask, server):
    assert [model["title"] for model in ask("sd-models")] == [Z, QWEN]
    assert ask("options")["sd_model_checkpoint"] == Z
    ask("options", {"sd_model_checkpoint": QWEN, "CLIP_stop_at_last_layers": 2})
    assert ask("options")["sd_model_checkpoint"] == QWEN
    drawn = opened(ask("txt2img", {"prompt": PROMPT, "steps": 1, "width": 32, "height": 32})["images"][0])
    assert "zimg-tiny-qwen" in drawn.info["parameters"]
    named = {"override_settings": {"sd_model_checkpoint": f"{Z} [0123abcd]"}}
    body = {"prompt": PROMPT, "steps": 1, "width": 32, "height": 32, **named}
    assert "zimg-tiny-z" in opened(ask("txt2img", body)["images"][0]).info["parameters"]
    assert ask("options", {"sd_model_checkpoint": "v1-5"}).status_code == 404


def test_lists(ask):
    assert [sampler["name"] for sampler in ask("samplers")] == ["Euler"]
    assert ask("schedulers")[0]["name"] == "automatic"
    assert ask("loras") == []
    assert ask("upscalers") == []


def test_progress_and_interrupt(ask, server):
    assert ask("progress")["progress"] == 0
    with ThreadPoolExecutor(1) as pool:
        body = {"prompt": PROMPT, "steps": 1000, "width": 64, "height": 64}
        drawing = pool.submit(httpx.post, f"{server.url}/sdapi/v1/txt2img", json=body, timeout=SECONDS)
        until(lambda: ask("progress")["progress"] > 0, "it begins")
        until(lambda: ask("progress")["current_image"], "there is a preview")
        seen = ask("progress")
        assert opened(seen["current_image"]).size == (64, 64)
        assert seen["state"]["sampling_steps"] == 1000
        assert seen["eta_relative"] > 0
        assert ask("progress?skip_current_image=true")["current_image"] is None
        started = time.monotonic()
        ask("interrupt", {})
        answer = drawing.result()
    assert time.monotonic() - started < 5
    assert answer.status_code == 200, "its clients take an interrupted picture for an answer"
    assert [opened(image).size for image in answer.json()["images"]] == [(64, 64)], "as far as it got"


def test_png_info(ask):
    answer = ask("txt2img", {"prompt": PROMPT, "steps": 1, "seed": 8, "width": 32, "height": 32})
    info = ask("png-info", {"image": f"data:image/png;base64,{answer['images'][0]}"})
    assert info["info"] == read(BytesIO(base64.b64decode(answer["images"][0]))).to_text()
    assert info["parameters"]["seed"] == 8
    assert ask("png-info", {"image": encoded(picture())})["info"] == ""


@pytest.mark.parametrize(
    ("path", "body", "told"),
    [
        ("txt2img", {}, "prompt is empty"),
        ("txt2img", {"prompt": PROMPT, "steps": "many"}, "steps"),
        ("txt2img", {"prompt": PROMPT, "width": 0}, "width"),
        ("txt2img", {"prompt": f"{PROMPT} <lora:style:0.5>"}, "not served with style:0.5"),
        ("txt2img", {"prompt": f"{PROMPT} <lora:style:1.2.3>"}, "<lora:NAME:SCALE>"),
        ("txt2img", {"prompt": PROMPT, "override_settings": 3}, "override_settings"),
        ("img2img", {"prompt": PROMPT}, "init_images"),
        ("img2img", {"prompt": PROMPT, "init_images": ["%%%"]}, "base64"),
        ("img2img", {"prompt": PROMPT, "init_images": ["http://127.0.0.1/a.png"]}, "no address is fetched"),
        ("img2img", {"prompt": PROMPT, "init_images": [""]}, "empty"),
        ("png-info", {"image": 3}, "valid string"),
        ("png-info", {}, "image is missing"),
        ("options", {"sd_model_checkpoint": ["x"]}, "valid string"),
    ],
)
def test_what_is_wrong_is_told(ask, path, body, told):
    answer = ask(path, body)
    assert answer.status_code in (400, 404), answer.text
    assert told in answer.json()["error"]["message"]
    assert answer.json()["detail"] == answer.json()["error"]["message"], "what its clients show"
