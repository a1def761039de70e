"""ControlNets on the server's page."""

from __future__ import annotations

import base64
import json
import shlex
import shutil
import subprocess
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from tests.commands import invoke
from tests.runtime.serve.conftest import picture, pixels
from tests.runtime.serve.page.browsing import (
    asked,
    copied,
    downloaded,
    draw,
    drop,
    expect,
    from_url,
    keep_seed,
    opened,
    png,
    sent,
    served_as,
    write,
)
from zimgkit.runtime.commands.cli import main as zimg_run
from zimgkit.runtime.controls import ControlInput

EDGES, DEPTH = picture(48, 64, 1), picture(48, 64, 2)
MASK = Image.fromarray(np.pad(np.full((32, 24), 255, np.uint8), ((0, 32), (0, 24))))


def field(name: str) -> str:
    return f"[id='{name}']"


def put(page, **numbers):
    for name, value in numbers.items():
        page.fill(field(name.replace("__", ".")), str(value))


def test_nets_act_are_kept_and_copied(context, controlled, controlled_bundle, tmp_path, monkeypatch):
    page = opened(context, controlled.url)
    assert page.locator("#nets legend").all_inner_texts() == ["canny", "depth", "inpaint"]
    write(page, prompt="a red cup", num_inference_steps=2, width=48, height=64)
    keep_seed(page, 3)
    assert "controls" not in sent(page)
    plain = downloaded(page)
    drop(page, "[data-input='canny.image']", png(EDGES)["buffer"], "edges.png")
    page.set_input_files(field("depth.image"), png(DEPTH, "it's depth.png"))
    expect(page.locator("#nets img")).to_have_count(2)
    put(page, canny__scale=0.7, canny__end=0.5, depth__scale=0.5)
    page.reload()
    expect(page.locator("#nets img")).to_have_count(2)
    body = sent(page)
    canny, depth = body["controls"]
    assert np.array_equal(from_url(canny.pop("image")), EDGES)
    assert np.array_equal(from_url(depth.pop("image")), DEPTH)
    assert canny == {"name": "canny", "scale": 0.7, "start": 0, "end": 0.5}
    assert depth == {"name": "depth", "scale": 0.5, "start": 0, "end": 1}
    data = downloaded(page)
    expected = pixels(Image.open(BytesIO(data)))
    assert not np.array_equal(expected, pixels(Image.open(BytesIO(plain))))

    # What is copied draws the same.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "edges.png").write_bytes(png(EDGES)["buffer"])
    (tmp_path / "it's depth.png").write_bytes(png(DEPTH)["buffer"])
    words = shlex.split(copied(page, "Copy command"))
    assert words[-2:] == ["--control=canny=edges.png:0.7:0:0.5", "--control=depth=it's depth.png:0.5:0:1"]
    (tmp_path / "qwen").symlink_to(controlled_bundle)
    assert invoke(zimg_run, *words[1:], "--backend=onnxruntime", "--quiet").code == 0
    assert np.array_equal(pixels(Image.open("out.png")), expected)
    if shutil.which("curl"):
        answer = subprocess.run(["sh", "-c", copied(page, "Copy curl")], capture_output=True, check=True)
        found = base64.b64decode(json.loads(answer.stdout)["data"][0]["b64_json"])
        assert np.array_equal(pixels(Image.open(BytesIO(found))), expected)
    pytest.importorskip("openai", reason="OpenAI's client is not installed")
    exec(compile(copied(page, "Copy Python"), "copied", "exec"), {})
    assert np.array_equal(pixels(Image.open("picture-0.png")), expected)

    # A picture that is dropped says which to give again.
    page.click("[data-input='depth.image'] li button")
    put(page, canny__scale=1, canny__end=1)
    drop(page, "#tiles", data)
    page.click("#notice >> text=Take parameters")
    expect(page.locator("#notice")).to_contain_text("image of canny), a picture (image of depth)")
    for name, value in {"canny.scale": "0.7", "canny.end": "0.5", "depth.scale": "0.5", "inpaint.scale": "1"}.items():
        expect(page.locator(field(name))).to_have_value(value)
    assert page.input_value("#more") == ""


def test_what_is_wrong_is_told_at_its_net(context, controlled):
    page = opened(context, controlled.url)
    write(page, prompt="a red cup", num_inference_steps=1, width=48, height=64)
    page.set_input_files(field("inpaint.image"), png(EDGES))
    page.click("#draw")
    expect(page.locator(field("add-inpaint.mask"))).to_have_attribute("aria-invalid", "true")
    expect(page.locator("#error")).to_contain_text("is given no mask")
    page.set_input_files(field("inpaint.mask"), png(MASK))
    put(page, inpaint__scale=1000)
    page.click("#draw")
    expect(page.locator(field("inpaint.scale"))).to_be_focused()
    put(page, inpaint__scale=0.5, inpaint__start=1)
    page.click("#draw")
    expect(page.locator(field("inpaint.start"))).to_be_focused()
    put(page, inpaint__start="")
    draw(page)


def test_they_are_a_models_own(page, server):
    nets = [{"name": "union", "takes": ["image", "mask", "inpaint_image"], "scale": 0.8}]
    served_as(page, server, {"controls": nets}, {"controls": []})
    put(page, union__scale=0.6)
    for key in ("image", "mask", "inpaint_image"):
        page.set_input_files(field(f"union.{key}"), png(EDGES, f"{key}.png"))
    page.select_option("#model", "model-1")
    expect(page.locator("#controls")).to_be_hidden()
    write(page, prompt="a red cup")
    assert "controls" not in asked(page)[1]
    page.select_option("#model", "model-0")
    (control,) = asked(page)[1]["controls"]
    assert control["scale"] == 0.6
    assert control.keys() == {"name", "image", "mask", "inpaint_image", "scale", "start", "end"}
    page.click("summary")
    page.click("details >> text=Copy command")
    text = page.evaluate("() => navigator.clipboard.readText()")
    beside = ["--control-mask=union=mask.png", "--control-inpaint-image=union=inpaint_image.png"]
    assert shlex.split(text)[-3:] == ["--control=union=image.png:0.6:0:1", *beside]
    page.click("[data-input='union.image'] li button")
    page.click("details >> text=Copy command")
    expect(page.locator("#notice")).to_contain_text("Copied without the numbers of union, which no option takes.")
    assert shlex.split(page.evaluate("() => navigator.clipboard.readText()"))[-2:] == beside


def test_a_picture_to_start_from_goes_with_them(context, controlled, tmp_path, monkeypatch):
    page = opened(context, controlled.url)
    write(page, prompt="a red cup", num_inference_steps=2)
    for name in ("image", "canny.image"):
        page.set_input_files(field(name), png(EDGES, "edges.png"))
    assert len(sent(page)["controls"]) == 1
    expected = pixels(Image.open(BytesIO(downloaded(page))))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "edges.png").write_bytes(png(EDGES)["buffer"])
    pytest.importorskip("openai", reason="OpenAI's client is not installed")
    exec(compile(copied(page, "Copy Python"), "copied", "exec"), {})
    assert np.array_equal(pixels(Image.open("picture-0.png")), expected)


def test_windows_that_count_down_are_shares_of_the_steps(page):
    for steps in (2, 5, 8, 30):
        for start, end in ((1.0, 0.0), (1.0, 0.4), (0.9, 0.3), (0.75, 0.25)):
            said = {"name": "canny", "start": start, "end": end, "counts_down": True}
            found = page.evaluate("([said, steps]) => netOfRecord(said, steps)", [said, steps])
            down, shares = ControlInput(**said), ControlInput(**found)
            assert [shares.acts(i, steps) for i in range(steps)] == [down.acts(i, steps) for i in range(steps)]
