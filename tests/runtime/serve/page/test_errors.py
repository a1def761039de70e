"""What the server's page says where something is wrong, and where it says it."""

from __future__ import annotations

import pytest

from tests.runtime.serve.conftest import make_service, serving
from tests.runtime.serve.page.browsing import PROMPT, draw, expect, opened, write


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
