"""What the server's page shows of a model: what that can do."""

from __future__ import annotations

import numpy as np

from tests.runtime.serve.conftest import picture
from tests.runtime.serve.page.browsing import PROMPT, asked, expect, from_url, png, served_as, write


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
