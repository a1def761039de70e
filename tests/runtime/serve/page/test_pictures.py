"""Pictures that are given to the server's page: to start from, with a mask, and for their parameters."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from tests.runtime.serve.conftest import picture, pixels
from tests.runtime.serve.page.browsing import (
    PROMPT,
    downloaded,
    draw,
    drop,
    expect,
    from_url,
    generated,
    png,
    sent,
    write,
)


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
