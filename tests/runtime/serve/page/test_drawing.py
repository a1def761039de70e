"""Pictures that are drawn on the server's page: seeds, progress, cancelling, tabs and the gallery."""

from __future__ import annotations

from tests.runtime.serve.page.browsing import (
    LONG,
    PROMPT,
    downloaded,
    draw,
    expect,
    generated,
    idle,
    keep_seed,
    opened,
    sent,
    write,
)


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
