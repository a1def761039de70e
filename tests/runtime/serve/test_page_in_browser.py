"""The server's page in a real Chromium, as somebody uses it: with a mouse, with keys, on a phone, in two tabs.

With ``ZIMG_SCREENSHOTS=docs`` it writes the pictures of docs/serving.md.
"""

from __future__ import annotations

import ast
import base64
import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.commands import invoke
from tests.runtime.serve.conftest import make_service, picture, pixels, serving, until
from zimgkit.runtime.commands.cli import main as zimg_run

sync_api = pytest.importorskip("playwright.sync_api", reason="the extra browser is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
expect = sync_api.expect
PROMPT = "a red circle left of a blue square"
LONG = 1000
"""Steps of a picture that is not waited for."""
DESKTOP = {"width": 1280, "height": 900}
PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def context(browser) -> Iterator[Any]:
    """A browser without a past, whose requests stay on this machine, and whose console stays empty."""
    found = browser.new_context(viewport=DESKTOP, permissions=["clipboard-read", "clipboard-write"])
    watched = Watched(found)
    yield found
    found.close()
    assert watched.complaints == []
    assert {urlsplit(url).hostname for url in watched.requests if not url.startswith(("data:", "blob:"))} <= {
        "127.0.0.1"
    }


class Watched:
    """What pages of a context ask for, and complain of."""

    def __init__(self, context: Any) -> None:
        self.requests: list[str] = []
        self.complaints: list[str] = []
        context.on("request", lambda request: self.requests.append(request.url))
        context.on("console", self._console)
        context.on("weberror", lambda error: self.complaints.append(str(error.error)))

    def _console(self, message: Any) -> None:
        # That a request was refused is told there in any case.
        if message.type in ("error", "warning") and "Failed to load resource" not in message.text:
            self.complaints.append(message.text)


def opened(context: Any, url: str) -> Any:
    page = context.new_page()
    page.set_default_timeout(20_000)
    page.goto(url)
    expect(page.locator("#model")).not_to_have_value("")
    return page


@pytest.fixture
def page(context, server) -> Any:
    return opened(context, server.url)


def write(page: Any, **fields: Any) -> None:
    for name, value in fields.items():
        page.fill(f"#{name}", str(value))


def keep_seed(page: Any, seed: int | str) -> None:
    page.check("#keep")
    page.fill("#seed", str(seed))


def draw(page: Any, pictures: int = 1) -> None:
    page.click("#draw")
    expect(page.locator("#status")).to_contain_text(f"{pictures} picture", timeout=20_000)


def downloaded(page: Any) -> bytes:
    with page.expect_download() as download:
        page.click("text=Download")
    return Path(download.value.path()).read_bytes()


def sent(page: Any, pictures: int = 1) -> dict[str, Any]:
    """Draw, and what was asked for."""
    with page.expect_request("**/v1/images/*") as request:
        draw(page, pictures)
    return json.loads(request.value.post_data)


def png(image: Image.Image, name: str = "given.png") -> dict[str, Any]:
    data = BytesIO()
    image.save(data, "PNG")
    return {"name": name, "mimeType": "image/png", "buffer": data.getvalue()}


def from_url(url: str) -> Image.Image:
    return Image.open(BytesIO(base64.b64decode(url.partition(",")[2])))


def drop(page: Any, selector: str, data: bytes, name: str = "dropped.png") -> None:
    transfer = page.evaluate_handle(
        """([text, name]) => {
            const found = new DataTransfer();
            const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
            found.items.add(new File([bytes], name, {type: "image/png"}));
            return found;
        }""",
        [base64.b64encode(data).decode(), name],
    )
    page.dispatch_event(selector, "drop", {"dataTransfer": transfer})


def idle(server: Any) -> None:
    until(lambda: not server.service.drawings(), "nothing is drawn any more")


def generated(server: Any, **body: Any) -> bytes:
    answer = httpx.post(f"{server.url}/v1/images/generations", json=body, timeout=60)
    return base64.b64decode(answer.raise_for_status().json()["data"][0]["b64_json"])


def test_a_picture_is_that_of_the_api_and_stays_in_the_gallery(page, server):
    write(page, prompt=PROMPT, num_inference_steps=4, guidance_scale=1.5, negative_prompt="a dog", width=64, height=48)
    keep_seed(page, 2**64 - 3)
    body = sent(page)
    assert body["seed"] == str(2**64 - 3), "exact, which no number of JavaScript is"
    data = downloaded(page)
    whole = {"prompt": PROMPT, "num_inference_steps": 4, "guidance_scale": 1.5, "negative_prompt": "a dog"}
    assert data == generated(server, **whole, size="64x48", seed=2**64 - 3)
    page.reload()
    expect(page.locator("#gallery img")).to_have_count(1)
    assert downloaded(page) == data
    assert page.input_value("#prompt") == PROMPT
    page.click("text=Delete")
    expect(page.locator("#gallery-empty")).to_be_visible()
    page.reload()
    expect(page.locator("#gallery-empty")).to_be_visible()


def test_each_picture_has_a_new_seed_unless_it_is_kept(page):
    write(page, prompt=PROMPT, num_inference_steps=1, n=2)
    seeds = [sent(page, 2)["seed"] for _ in range(2)]
    assert seeds[0] != seeds[1]
    page.click("#dice")
    rolled = int(page.input_value("#seed"))
    assert rolled not in seeds
    assert [sent(page, 2)["seed"] for _ in range(2)] == [rolled, rolled]
    expect(page.locator("#gallery img")).to_have_count(8)
    expect(page.locator("#tiles button")).to_have_count(2)


def test_previews_and_progress_are_shown_and_nothing_jumps(page):
    boxes = """() => ["#tiles", "#draw", "#progress", "#status", "#gallery"].map((one) => {
        const box = document.querySelector(one).getBoundingClientRect(); return [one, box.x, box.y, box.width];
    })"""
    write(page, prompt=PROMPT, num_inference_steps=1)
    draw(page)
    before = page.evaluate(boxes)
    page.evaluate(
        """() => {
            window.sources = new Set();
            new MutationObserver(() => {
                for (const one of document.querySelectorAll("#tiles img")) window.sources.add(one.src.slice(0, 5));
            }).observe(document.querySelector("#tiles"), {subtree: true, attributes: true, childList: true});
        }"""
    )
    write(page, num_inference_steps=200)
    page.click("#draw")
    expect(page.locator("#status")).to_contain_text("Step ")
    assert page.evaluate(boxes) == before
    assert page.get_attribute("#draw", "aria-disabled") == "true"
    expect(page.locator("#gallery img")).to_have_count(2, timeout=30_000)
    assert page.evaluate(boxes) == before
    assert {"data:", "blob:"} <= set(page.evaluate("() => [...window.sources]"))


@pytest.mark.parametrize("keys", [False, True])
def test_what_is_masked_is_drawn_anew(page, keys):
    given = picture(96, 64)
    page.set_input_files("#image", png(given))
    page.click("#edit-mask")
    canvas = page.locator("#canvas")
    expect(canvas).to_be_focused()
    if keys:
        page.keyboard.press("Shift+ArrowLeft")
        page.keyboard.down("Space")
        for _ in range(4):
            page.keyboard.press("ArrowUp")
        page.keyboard.up("Space")
        page.keyboard.press("]")
        page.keyboard.press("Space")
        page.keyboard.press("Control+z")
        expect(page.locator("#mask-status")).to_have_text("Undone.")
        page.keyboard.press("Tab")
        page.keyboard.press("Tab")
        expect(page.locator("#mask-done")).to_be_focused()
        page.keyboard.press("Enter")
    else:
        expect(page.locator("#mask-picture")).to_have_js_property("complete", True)
        box = canvas.bounding_box()
        page.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + box["height"] * 0.25)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + box["height"] * 0.5, steps=4)
        page.mouse.up()
        for undone in ("Invert", "Clear"):
            page.click(f"#mask >> text={undone}")
            page.click("#mask >> text=Undo")
        page.click("#mask-done")
    expect(page.locator("#edit-mask")).to_be_focused()
    write(page, prompt=PROMPT, num_inference_steps=4)
    body = sent(page)
    mask = np.asarray(from_url(body["mask_image"]).convert("L"))
    assert mask.shape == (64, 96)
    assert 0.005 < (mask == 255).mean() < 0.2
    assert (mask == 0).mean() > 0.75
    column = mask.sum(axis=0).argmax()
    assert abs(column - (38 if keys else 24)) < 12
    drawn = pixels(Image.open(BytesIO(downloaded(page))))
    same = (drawn == pixels(given)).all(axis=2)
    assert same[mask == 0].all()
    assert not same[mask == 255].all()


def test_a_picture_is_the_start_of_the_next(page):
    write(page, prompt=PROMPT, num_inference_steps=3)
    draw(page)
    expect(page.locator("#of-picture")).to_be_hidden()
    page.click("text=Use as input")
    expect(page.locator("#strength")).to_have_value("0.6")
    write(page, strength=0.5)
    assert sent(page)["strength"] == 0.5
    expect(page.locator("#image-list img")).to_have_count(1)
    page.reload()
    expect(page.locator("#image-list img")).to_have_count(1)
    expect(page.locator("#strength")).to_have_value("0.5")
    page.click("#image-list button")
    assert "image" not in sent(page)


def test_escape_cancels(page, server):
    write(page, prompt=PROMPT, num_inference_steps=LONG)
    page.click("#draw")
    expect(page.locator("#status")).to_contain_text("Step ")
    page.keyboard.press("Escape")
    expect(page.locator("#status")).to_have_text("Cancelled.")
    idle(server)
    write(page, num_inference_steps=1)
    draw(page)


def test_a_reload_cancels_and_says_so(page, server):
    write(page, prompt=PROMPT, num_inference_steps=LONG)
    page.click("#draw")
    expect(page.locator("#status")).to_contain_text("Step ")
    page.reload()
    expect(page.locator("#status")).to_have_text("The reload cancelled what was being drawn.")
    idle(server)
    assert page.input_value("#prompt") == PROMPT
    assert page.input_value("#num_inference_steps") == str(LONG)
    page.reload()
    expect(page.locator("#status")).to_have_text("")


def test_two_tabs_wait_for_each_other_and_share_a_gallery(context, page, server):
    other = opened(context, server.url)
    write(page, prompt=PROMPT, num_inference_steps=LONG)
    page.click("#draw")
    expect(page.locator("#status")).to_contain_text("Step ")
    write(other, prompt="a blue square", num_inference_steps=2)
    other.click("#draw")
    expect(other.locator("#status")).to_have_text("Waiting: one request is drawn before this one.")
    page.click("#cancel")
    expect(page.locator("#status")).to_have_text("Cancelled.")
    expect(other.locator("#status")).to_contain_text("1 picture")
    for tab in (page, other):
        expect(tab.locator("#gallery img")).to_have_count(1)
    assert (page.input_value("#prompt"), other.input_value("#prompt")) == (PROMPT, "a blue square")


@pytest.mark.parametrize("place", ["#tiles", "#pictures .drop"])
def test_a_dropped_picture_gives_its_parameters_back(page, server, place):
    call = {"prompt": 'two "green" triangles', "num_inference_steps": 3, "guidance_scale": 2.5, "seed": 2**63 + 7}
    data = generated(server, **call, model="zimg-tiny-qwen", size="64x96", n=2, negative_prompt="blur")
    drop(page, place, data)
    page.click("#notice >> text=Take parameters")
    expected = call | {"model": "zimg-tiny-qwen", "width": 64, "height": 96, "n": 2, "negative_prompt": "blur"}
    for name, value in expected.items():
        expect(page.locator(f"#{name}")).to_have_value(str(value))
    assert page.is_checked("#keep")
    assert page.input_value("#more") == ""
    given = place != "#tiles"
    expect(page.locator("#image-list img")).to_have_count(int(given))
    if given:
        page.click("#image-list button")
    draw(page, 2)
    assert downloaded(page) == data


def test_a_picture_without_parameters_can_be_the_start(page):
    drop(page, "#tiles", png(picture())["buffer"])
    expect(page.locator("#notice")).to_contain_text("no parameters")
    page.click("#notice >> text=Use as input")
    expect(page.locator("#image-list img")).to_have_count(1)
    drop(page, "#pictures .drop", b"no picture", "broken.png")
    expect(page.locator("#notice")).to_contain_text("broken.png: this file is no picture")


@pytest.mark.parametrize(
    ("fields", "field", "told"),
    [
        ({"prompt": " "}, "#prompt", "Prompt is empty"),
        ({"prompt": PROMPT, "width": 70, "height": 64}, "#width", "not a multiple of 16"),
        ({"prompt": PROMPT, "num_inference_steps": 5000}, "#num_inference_steps", "1000"),
        ({"prompt": PROMPT, "seed": "seven"}, "#seed", "whole number"),
        ({"prompt": PROMPT, "n": 11}, "#n", "10"),
        ({"prompt": PROMPT, "more": "{"}, "#more", "no JSON object"),
        ({"prompt": PROMPT, "more": '{"cfg_normalisation": 1}'}, "#more", "use cfg_normalization"),
    ],
)
def test_what_is_wrong_is_told_at_its_field(page, fields, field, told):
    page.click("summary")
    if "seed" in fields:
        page.check("#keep")
    write(page, **fields)
    page.click("#draw")
    expect(page.locator(field)).to_have_attribute("aria-invalid", "true")
    expect(page.locator(field)).to_be_focused()
    expect(page.locator("#error")).to_contain_text(told)
    write(page, prompt=PROMPT, width="", height="", num_inference_steps=1, seed=1, n=1, more="")
    draw(page)
    expect(page.locator(".error")).to_have_count(0)


def test_a_key_is_asked_for_and_kept(context):
    with serving(make_service(warm_up=False), keys=("sk-secret",)) as guarded:
        page = context.new_page()
        page.goto(guarded.url)
        expect(page.locator("#key")).to_be_focused()
        expect(page.locator("#error")).to_contain_text("key is missing or wrong")
        page.keyboard.type("sk-secret")
        page.keyboard.press("Tab")
        expect(page.locator("#model")).to_have_value("zimg-tiny-z")
        write(page, prompt=PROMPT, num_inference_steps=1)
        draw(page)
        page.reload()
        expect(page.locator("#model")).to_have_value("zimg-tiny-z")
        page.click("summary")
        page.click("details >> text=Copy curl")
        copied = page.evaluate("() => navigator.clipboard.readText()")
        assert "$OPENAI_API_KEY" in copied
        assert "sk-secret" not in copied


def test_a_full_queue_is_told_with_when_to_try_again(page):
    full = {"error": {"message": "600 seconds of work are waiting; try again later", "param": None}}
    page.route("**/v1/images/*", lambda route: route.fulfill(status=429, headers={"Retry-After": "40"}, json=full))
    write(page, prompt=PROMPT)
    page.click("#draw")
    expect(page.locator("#notice")).to_contain_text("600 seconds of work are waiting; try again later (40 s)")


def test_a_server_that_is_gone_is_told(context):
    with serving(make_service(warm_up=False)) as server:
        page = opened(context, server.url)
    write(page, prompt=PROMPT)
    page.click("#draw")
    expect(page.locator("#status")).to_have_text("The server cannot be reached")


@pytest.mark.parametrize("masked", [False, True])
def test_what_is_copied_draws_the_same(page, tmp_path, monkeypatch, masked):
    page.click("summary")
    write(
        page,
        prompt='it\'s "a" red $HOME circle\nabove -- a square',
        num_inference_steps=2,
        more='{"cfg_normalization": 1, "keep_unmasked": false}' if masked else '{"cfg_truncation": 0.9}',
    )
    keep_seed(page, 12345)
    if masked:
        page.set_input_files("#image", png(picture(), "it's given.png"))
        page.click("#edit-mask")
        page.keyboard.press("Space")
        page.click("#mask-done")
    body = sent(page)
    expected = pixels(Image.open(BytesIO(downloaded(page))))
    (tmp_path / "it's given.png").write_bytes(png(picture())["buffer"])
    if masked:
        from_url(body["mask_image"]).save(tmp_path / "mask.png")
    monkeypatch.chdir(tmp_path)

    def copied(label: str) -> str:
        page.click(f"#chosen >> text={label}")
        expect(page.locator("#notice")).to_contain_text("Copied")
        text = page.evaluate("() => navigator.clipboard.readText()")
        page.click("#notice >> text=Close")
        return text

    words = shlex.split(copied("Copy command"))
    assert words[:2] == ["zimg-run", "generate"]
    assert invoke(zimg_run, *words[1:], "--quiet").code == 0
    assert np.array_equal(pixels(Image.open("out.png")), expected)
    pytest.importorskip("openai", reason="OpenAI's client is not installed")
    exec(compile(copied("Copy Python"), "copied", "exec"), {})
    assert np.array_equal(pixels(Image.open("picture-0.png")), expected)
    if shutil.which("curl"):
        answer = subprocess.run(["sh", "-c", copied("Copy curl")], capture_output=True, check=True)
        data = base64.b64decode(json.loads(answer.stdout)["data"][0]["b64_json"])
        assert np.array_equal(pixels(Image.open(BytesIO(data))), expected)


def test_values_are_written_as_python_and_curl_read_them(page):
    value = {"a": [1, 2.5, True, None, {"b": "it's \"\n\u00e9"}], "c": False}
    assert ast.literal_eval(page.evaluate("(value) => python(value)", value)) == value
    request = {"fields": {"sigmas": [1, 0.5], "prompt": "@x"}, "files": {"image": ['a"\\b.png']}}
    words = shlex.split(page.evaluate("(request) => curlOf(request)", request))
    assert words[2:] == [
        *("--form-string", "sigmas[]=1", "--form-string", "sigmas[]=0.5", "--form-string", "prompt=@x"),
        *("-F", 'image=@"a\\"\\\\b.png"'),
    ]
    told = "Copied without sigmas, which no option takes."
    page.click("summary")
    write(page, prompt=PROMPT, more='{"sigmas": [1, 0.5]}')
    page.click("details >> text=Copy command")
    expect(page.locator("#notice")).to_contain_text(told)


def served_as(page: Any, server: Any, *changes: dict[str, Any]) -> None:
    """Let the page take a served model for others."""
    entry = httpx.get(f"{server.url}/v1/models").json()["data"][0]
    models = [entry | {"id": f"model-{n}", "zimg": entry["zimg"] | change} for n, change in enumerate(changes)]
    page.route("**/v1/models", lambda route: route.fulfill(json={"object": "list", "data": models}))
    page.route(
        "**/v1/images/*",
        lambda route: route.fulfill(status=400, json={"error": {"message": "no such model", "param": "model"}}),
    )
    page.reload()
    expect(page.locator("#model")).to_have_value("model-0")


def asked(page: Any) -> tuple[str, dict[str, Any]]:
    with page.expect_request("**/v1/images/*") as request:
        page.click("#draw")
    expect(page.locator("#error")).to_contain_text("No such model")
    return urlsplit(request.value.url).path, json.loads(request.value.post_data)


def test_only_what_a_model_can_do_is_shown(page, server):
    served_as(page, server, {"tasks": ["text-to-image"]})
    for hidden in ("#pictures", "#of-picture", "#context", "#of-layers", "#lora-sets"):
        expect(page.locator(hidden)).to_be_hidden()
    write(page, guidance_scale=0)
    expect(page.locator("#negative")).to_be_hidden()


def test_a_model_that_edits_takes_several_pictures(page, server):
    served_as(page, server, {"tasks": ["edit"], "least_images": 1, "most_images": 3})
    write(page, prompt="the first in the style of the second")
    page.click("#draw")
    expect(page.locator("#error")).to_contain_text("needs a picture")
    page.set_input_files("#image", [png(picture(seed=number), f"{number}.png") for number in range(4)])
    expect(page.locator("#image-list img")).to_have_count(3)
    for hidden in ("#of-picture", "#edit-mask"):
        expect(page.locator(hidden)).to_be_hidden()
    path, body = asked(page)
    assert path == "/v1/images/edits"
    assert [np.array_equal(from_url(one), picture(seed=n)) for n, one in enumerate(body["image"], 1)] == [True] * 3
    assert not {"strength", "mask_image", "width"} & body.keys()


def test_layers_and_control_pictures(page, server):
    context = {"tasks": ["text-to-image", "context"]}
    served_as(page, server, context, {"tasks": ["layers"], "layers": 4, "least_images": 1})
    write(page, prompt=PROMPT)
    page.set_input_files("#context_image", png(picture()))
    expect(page.locator("#context_image-list img")).to_have_count(1)
    path, body = asked(page)
    assert path == "/v1/images/generations"
    assert np.array_equal(from_url(body["context_image"]), picture())
    page.select_option("#model", "model-1")
    expect(page.locator("#layers")).to_have_value("4")
    page.set_input_files("#image", png(picture()))
    page.select_option("#resolution", "640")
    body = asked(page)[1]
    assert (body["layers"], body["resolution"], body["partial_images"]) == (4, 640, 0)
    assert not {"context_image", "width", "strength"} & body.keys()


def test_loras_are_chosen_among_the_sets_that_are_served(page, server):
    sets = [[], [{"name": "ink", "weight": 0.8}], [{"name": "ink", "weight": 0.8}, {"name": "line", "weight": 1}]]
    served_as(page, server, *({"loras": one} for one in sets), {"name": "another"})
    assert page.locator("#loras option").all_inner_texts() == ["none", "ink:0.8", "ink:0.8, line:1"]
    page.select_option("#loras", label="ink:0.8, line:1")
    expect(page.locator("#model")).to_have_value("model-2")
    write(page, prompt=PROMPT)
    assert asked(page)[1]["model"] == "model-2"
    page.select_option("#model", "model-3")
    expect(page.locator("#lora-sets")).to_be_hidden()


def test_a_size_is_chosen_by_its_shape(page, server):
    served_as(page, server, {"width": 1024, "height": 1024})
    write(page, prompt=PROMPT)
    assert "width" not in asked(page)[1]
    for shape, size in {"1:1": (1024, 1024), "16:9": (1360, 768), "2:3": (832, 1248)}.items():
        page.click(f"#presets >> text={shape}")
        expect(page.locator(f"#presets button:has-text('{shape}')")).to_have_attribute("aria-pressed", "true")
        body = asked(page)[1]
        assert (body["width"], body["height"]) == size


def test_a_keyboard_is_enough(page):
    names = []
    page.focus("#theme")
    for _ in range(40):
        page.keyboard.press("Tab")
        names.append(page.evaluate("() => document.activeElement.id || document.activeElement.textContent"))
        if names[-1] == "draw":
            break
        shown = page.evaluate("() => getComputedStyle(document.activeElement).outlineStyle")
        assert shown != "none", names[-1]
    for name in (
        "prompt",
        "negative_prompt",
        "model",
        "add-image",
        "auto",
        "16:9",
        "width",
        "n",
        "seed",
        "dice",
        "keep",
    ):
        assert name in names
    page.focus("#prompt")
    page.keyboard.type(PROMPT)
    page.fill("#num_inference_steps", "1")
    for seed in range(3):
        keep_seed(page, seed)
        page.keyboard.press("Control+Enter")
        expect(page.locator("#gallery img")).to_have_count(seed + 1)
        expect(page.locator("#about")).to_contain_text(f"seed {seed}")
    page.focus("#gallery button[aria-pressed=true]")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    expect(page.locator("#about")).to_contain_text("seed 0")
    page.keyboard.press("Home")
    page.keyboard.press("Enter")
    expect(page.locator("#about")).to_contain_text("seed 2")


def test_the_gallery_is_bounded(page):
    entry = """async (made) => {
        const blob = new Blob(["old"], {type: "image/png"});
        const fields = {prompt: "old", seed: made, model: "zimg-tiny-z"};
        const entry = {blob, thumbnail: blob, fields, files: {}, size: "1x1", index: 0};
        for (let n = 0; n < made; n++) await stored("pictures", "add", {made: n, ...entry});
    }"""
    page.evaluate(entry, 205)
    page.reload()
    expect(page.locator("#gallery img")).to_have_count(205)
    write(page, prompt=PROMPT, num_inference_steps=1)
    draw(page)
    expect(page.locator("#gallery img")).to_have_count(200)
    assert page.evaluate("() => stored('pictures', 'count')") == 200


CONTRAST = """() => {
    const number = (colour) => colour.match(/[\\d.]+/g).map(Number);
    const luminance = ([r, g, b]) => [r, g, b].map((v) => v / 255)
        .map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const behind = (node) => {
        for (; node; node = node.parentElement) {
            const found = number(getComputedStyle(node).backgroundColor);
            if (found[3] !== 0) return found;
        }
    };
    const text = (node) => [...node.childNodes].some((one) => one.nodeType === 3 && one.textContent.trim());
    return [...document.body.querySelectorAll("*:not(script, option)")]
        .filter((one) => one.checkVisibility() && (text(one) || one.value))
        .map((one) => {
            const pair = [luminance(number(getComputedStyle(one).color)), luminance(behind(one))].sort((a, b) => b - a);
            return [one.id || one.textContent.slice(0, 30), (pair[0] + 0.05) / (pair[1] + 0.05)];
        }).filter(([, ratio]) => ratio < 4.5);
}"""
NAMED = {"button", "textbox", "spinbutton", "combobox", "checkbox", "slider", "progressbar", "dialog", "image"}


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_control_has_a_name_and_every_text_contrast(context, page, theme):
    for _ in range({"light": 1, "dark": 2}[theme]):
        page.click("#theme")
    expect(page.locator("#theme")).to_have_text(f"Theme: {theme}")
    page.click("summary")
    page.set_input_files("#image", png(picture()))
    write(page, prompt=PROMPT, num_inference_steps=1, n=2)
    draw(page, 2)
    page.click("#dice")

    def check() -> int:
        tree = context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
        seen = [node for node in tree if not node["ignored"] and node["role"]["value"] in NAMED]
        assert [node for node in seen if not node.get("name", {}).get("value", "").strip()] == []
        assert page.evaluate(CONTRAST) == []
        return len(seen)

    assert check() > 40
    page.click("#edit-mask")
    assert check() > 8
    page.keyboard.press("Escape")
    expect(page.locator("#mask")).to_be_hidden()
    page.reload()
    expect(page.locator("#theme")).to_have_text(f"Theme: {theme}")


SMALL = """() => [...document.querySelectorAll("button, input:not([type=checkbox], [type=range]), select")]
    .filter((one) => one.checkVisibility()).map((one) => [one.id || one.textContent, one.getBoundingClientRect()])
    .filter(([, box]) => box.width < 24 || box.height < 24).map(([name]) => name)"""


@pytest.mark.parametrize("width", [320, 390, 768, 1280, 1920])
def test_it_fits_any_width(page, width):
    page.set_viewport_size({"width": width, "height": 800})
    page.click("summary")
    page.set_input_files("#image", png(picture(), "a" * 100 + ".png"))
    write(page, prompt="w" * 500, num_inference_steps=1)
    draw(page)
    for open_mask in (False, True):
        if open_mask:
            page.click("#edit-mask")
        assert page.evaluate("() => document.documentElement.scrollWidth") <= width
        assert page.evaluate(SMALL) == []


@pytest.mark.skipif("ZIMG_SCREENSHOTS" not in os.environ, reason="no ZIMG_SCREENSHOTS=FOLDER says where to")
def test_screenshots(browser, server):
    folder = Path(os.environ["ZIMG_SCREENSHOTS"])
    prompts = ("a red circle left of a blue square", "a green triangle above a yellow circle", "a blue star")
    for name, scheme, options in (
        ("serve-page", "dark", {"viewport": {"width": 1280, "height": 1070}}),
        ("serve-page-phone", "light", {"viewport": PHONE, "device_scale_factor": 2, "is_mobile": True}),
    ):
        context = browser.new_context(color_scheme=scheme, **options)
        page = opened(context, server.url)
        for seed, prompt in enumerate(prompts):
            write(page, prompt=prompt, n=1 + 3 * (seed == 2))
            keep_seed(page, seed)
            draw(page, 4 if seed == 2 else 1)
        Image.open(BytesIO(page.screenshot())).save(folder / f"{name}.webp", quality=80, method=6)
        context.close()
