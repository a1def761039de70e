"""The server's page for everybody: keys alone, names and contrast, any width.

With ``ZIMG_SCREENSHOTS=docs`` this writes the pictures of docs/serving.md.
"""

from __future__ import annotations

import os
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from tests.runtime.serve.conftest import picture
from tests.runtime.serve.page.browsing import PHONE, PROMPT, draw, expect, keep_seed, opened, png, write


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
