"""Editing against diffusers' pipelines with the same weights, prompt, pictures and seed.

The pipelines read pictures at a megapixel. Most tests make that less, in both, so that they take no time.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest
from diffusers import QwenImageEditInpaintPipeline
from diffusers.pipelines.qwenimage import (
    pipeline_qwenimage_edit,
    pipeline_qwenimage_edit_inpaint,
    pipeline_qwenimage_edit_plus,
)

from tests import reference
from tests.runtime.test_from_pictures import mask, picture
from zimgkit.engines.errors import UsageError
from zimgkit.runtime import Pipeline
from zimgkit.runtime.memory.fitting import needs_in
from zimgkit.runtime.request import check

BOUND = 3e-5
"""On pixels: with random weights, another prompt moves them by 8e-4 only."""
KINDS = {
    "edit": ("qwen-image-edit", {}),
    "2509": ("qwen-image-edit-plus", {}),
    "2511": ("qwen-image-edit-plus", {"transformer": {"zero_cond_t": True}}),
}
SMALLER = 64
"""By how much the areas are less."""


@pytest.fixture(scope="module", params=list(KINDS))
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def ours(kind, bundle_of):
    family, overrides = KINDS[kind]
    with Pipeline.open(bundle_of(family, **overrides)) as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def theirs(kind):
    family, overrides = KINDS[kind]
    return reference.FAMILIES[family](0, **overrides)


@pytest.fixture
def small(ours, monkeypatch):
    """Both read pictures at a 64th of their areas."""
    own = ours.bundle.manifest.references
    less = msgspec.structs.replace(
        own, vision_area=own.vision_area // SMALLER, latents_area=own.latents_area // SMALLER
    )
    manifest = msgspec.structs.replace(ours.bundle.manifest, references=less)
    smaller = replace(ours.bundle, manifest=manifest)
    monkeypatch.setattr(ours.session, "bundle", smaller)
    monkeypatch.setattr(ours.session.conditioner, "bundle", smaller)
    for module in (pipeline_qwenimage_edit, pipeline_qwenimage_edit_inpaint, pipeline_qwenimage_edit_plus):
        known = module.calculate_dimensions
        monkeypatch.setattr(module, "calculate_dimensions", lambda area, ratio, f=known: f(area // SMALLER, ratio))


def several(kind: str, *pictures: Any) -> Any:
    return pictures[0] if kind == "edit" else list(pictures)


CASES = [
    # sizes of the pictures (the first alone where one is taken), what is drawn (width, height), steps, guidance, seed
    ([(128, 128)], (64, 64), 2, None, 0),
    ([(150, 100), (90, 130)], (96, 64), 3, 4.0, 1),
    ([(40, 120), (64, 64), (300, 100)], (48, 80), 2, 2.5, 2),
    ([(97, 61)], (80, 48), 2, 1.5, 3),
]


@pytest.mark.parametrize(("sizes", "size", "steps", "scale", "seed"), CASES)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("small")
def test_same_picture(kind, ours, theirs, sizes, size, steps, scale, seed):
    images = several(kind, *(picture(*each, seed + index) for index, each in enumerate(sizes)))
    width, height = size
    call = {
        "height": height, "width": width, "num_inference_steps": steps, "image": images,
        "true_cfg_scale": scale or 1.0, "negative_prompt": "blurry" if scale else None,
    }  # fmt: skip
    seen: list[dict[str, Any]] = []
    forward = theirs.transformer.forward

    def spy(**given: Any) -> Any:
        seen.append(given)
        return forward(**given)

    theirs.transformer.forward = spy
    try:
        expected = reference.draw(theirs, "make the cup blue", seed=seed, **call)
    finally:
        theirs.transformer.forward = forward
    found = ours("make the cup blue", seed=seed, output_type="np", **call).images
    assert found.shape == expected.shape == (1, height, width, 3)
    assert expected.std() > 0.05
    assert np.abs(found - expected).max() < BOUND

    session, first = ours.session, seen[0]
    request = check(session.bundle.manifest, session.family, prompt="make the cup blue", **call)
    references = session.conditioner._references(request)
    ((rows,),) = session.conditioner._read(request, ["make the cup blue"], references).values()
    text = first["encoder_hidden_states"][0].numpy()
    assert rows.shape == text.shape
    assert np.abs(rows - text).max() < 1e-5 * np.abs(text).max() + 1e-5
    image, condition = first["hidden_states"].numpy(), np.concatenate(references.latents, axis=1)
    assert np.abs(image[:, -condition.shape[1] :] - condition).max() < 1e-4
    assert [tuple(shape) for shape in first["img_shapes"][0]] == [
        (1, height // 16, width // 16), *((1, *layout.grid) for layout in references.layouts)
    ]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
def test_at_a_megapixel(kind, ours, theirs):
    """At the sizes of the real checkpoints, with a picture that has to be resized."""
    call = {"height": 64, "width": 96, "num_inference_steps": 1 + (kind != "2511"), "image": picture(130, 86, 3)}
    call |= {"true_cfg_scale": 1.0}
    if kind == "2511":
        call["num_inference_steps"] = 2
    expected = reference.draw(theirs, "make the cup blue", seed=5, **call)
    found = ours("make the cup blue", seed=5, output_type="np", **call).images
    assert np.abs(found - expected).max() < BOUND


@pytest.mark.usefixtures("small")
@pytest.mark.filterwarnings("ignore")
class TestReading:
    CALL = {"num_inference_steps": 2, "output_type": "latent", "height": 32, "width": 32}  # noqa: RUF012

    def test_each_picture_is_read_once(self, ours, monkeypatch):
        runs = []
        engine_of = ours.session.engines.engine

        def engine(component, device=None):
            runs.append(component)
            return engine_of(component, device)

        monkeypatch.setattr(ours.session.engines, "engine", engine)
        for seed in range(3):
            ours("one", negative_prompt=" ", true_cfg_scale=3.0, seed=seed, image=picture(77, 55, 40), **self.CALL)
        assert runs.count("vision_encoder") == runs.count("vae_encoder") == 1

    def test_each_counts(self, kind, ours):
        if kind == "edit":
            pytest.skip("takes one picture")
        images = [picture(64, 64, 1), picture(64, 64, 2)]
        one, two = (ours("one", seed=0, image=given, **self.CALL).images for given in (images[:1], images))
        swapped = ours("one", seed=0, image=images[::-1], **self.CALL).images
        assert np.abs(one - two).max() > 1e-3
        assert np.abs(two - swapped).max() > 1e-3

    def test_several_prompts_and_pictures(self, ours):
        """Each as if it were drawn alone."""
        given = {**self.CALL, "image": picture(64, 48, 7)}
        both = ours(["one", "another, which is longer"], seed=[1, 2], **given).images
        for index, prompt in enumerate(["one", "another, which is longer"]):
            alone = ours(prompt, seed=index + 1, **given).images
            np.testing.assert_allclose(both[index], alone[0], atol=1e-5)

    def test_diffsynths_name(self, ours):
        image = picture(64, 48, 7)
        mine = ours("one", seed=1, edit_image=image, **self.CALL).images
        np.testing.assert_array_equal(mine, ours("one", seed=1, image=image, **self.CALL).images)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("small")
def test_from_another_picture(kind, ours, theirs, masked):
    """In DiffSynth's words, which has one picture to start from and others to edit."""
    images, start = several(kind, picture(97, 61, 1), picture(64, 80, 2)), picture(64, 48, 3)
    where = mask(64, 48, "disc")
    call = {"height": 48, "width": 64, "true_cfg_scale": 2.5, "negative_prompt": "blurry"}
    anew = np.asarray(where)[::8, ::8] / 255 if masked else None
    more = reference.start_from(theirs, start, seed=4, strength=0.7, steps=3, packed=True, drawn_anew=anew)
    expected = reference.draw(theirs, "make the cup blue", seed=4, image=images, **call, **more)
    call |= {"mask_image": where} if masked else {}
    found = ours(
        "make the cup blue", seed=4, edit_image=images, input_image=start, denoising_strength=0.7,
        num_inference_steps=3, output_type="np", **call,
    ).images  # fmt: skip
    assert np.abs(found - expected).max() < BOUND


@pytest.mark.parametrize(
    ("size", "steps", "strength", "scale", "seed"), [((128, 128), 4, 0.6, None, 0), ((150, 100), 3, 0.85, 3.0, 1)]
)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("small")
def test_within_a_mask(kind, ours, theirs, size, steps, strength, scale, seed):
    if kind != "edit":
        pytest.skip("diffusers has a pipeline of the first checkpoint alone")
    inpaint = QwenImageEditInpaintPipeline(**theirs.components)
    inpaint.set_progress_bar_config(disable=True)
    call = {
        "image": picture(*size, seed), "mask_image": mask(*size, "disc"), "strength": strength,
        "num_inference_steps": steps, "true_cfg_scale": scale or 1.0, "negative_prompt": "blurry" if scale else None,
    }  # fmt: skip
    expected = reference.draw(inpaint, "make the cup blue", seed=seed, **call)
    found = ours("make the cup blue", seed=seed, output_type="np", **call).images
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < BOUND
    del call["mask_image"]
    whole = ours("make the cup blue", seed=seed, output_type="np", **call).images
    assert np.abs(found - whole).max() > 100 * BOUND


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("small")
def test_it_starts_from_the_first_picture_where_none_is_named(kind, ours):
    images = several(kind, picture(97, 61, 1), picture(64, 80, 2))
    call = {"height": 48, "width": 64, "seed": 1, "num_inference_steps": 2, "output_type": "latent"}
    named = ours("one", edit_image=images, input_image=picture(97, 61, 1), denoising_strength=0.5, **call)
    found = ours("one", image=images, denoising_strength=0.5, **call)
    np.testing.assert_array_equal(found.images, named.images)
    alone = ours("one", input_image=picture(97, 61, 1), strength=0.5, **call).request.inputs
    assert alone.image is alone.references[0]
    assert found.request.inputs.image is found.request.inputs.references[0]


def test_the_size_follows_what_it_starts_from(kind, ours):
    images, start = several(kind, picture(300, 200), picture(160, 90)), picture(100, 200)
    request = check(ours.bundle.manifest, ours.session.family, prompt="x", image=images, input_image=start)
    assert (request.width, request.height) == (736, 1440)


def test_the_size_follows_the_last_picture(kind, ours):
    images = several(kind, picture(300, 200), picture(160, 90))
    request = check(ours.bundle.manifest, ours.session.family, prompt="x", image=images)
    assert (request.width, request.height) == ((1248, 832) if kind == "edit" else (1376, 768))
    request = check(ours.bundle.manifest, ours.session.family, prompt="x", image=images, height=64)
    assert request.height == 64


def test_a_plan_knows_of_the_pictures(kind, ours):
    few = ours.plan("x", image=picture(64, 64), height=64, width=64)
    assert "vision_encoder" in few.stay + few.in_turn
    if kind != "edit":
        session = ours.session

        def working(count: int) -> int:
            images = [picture(64, 64)] * count
            request = check(ours.bundle.manifest, session.family, prompt="x", image=images, height=64, width=64)
            return needs_in(session._setting(request), session._picture(request))["denoiser"].working

        assert working(3) > 2 * working(1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({}, "there is no picture to edit; give it as image"),
        ({"image": []}, "there is no picture to edit"),
        ({"image": [picture(32, 32)] * 4}, "image has 4 pictures; this bundle takes (one|3 at most)"),
        ({"strength": 0.5}, "there is no picture to edit"),
        ({"mask_image": mask(32, 32)}, "there is no picture to edit"),
        ({"image": picture(32, 32), "strength": 0}, "strength is 0, which draws nothing anew"),
        ({"image": picture(32, 32), "mask_blur": 3}, "mask_blur is given, and no mask"),
        ({"image": picture(32, 32), "input_image": "gone.png"}, "input_image gone.png does not exist"),
        ({"image": picture(2000, 9)}, "image is 222 times as wide as high"),
        ({"image": picture(32, 32), "edit_image": picture(32, 32)}, "image and edit_image are both given"),
        ({"image": "missing.png"}, "image missing.png does not exist"),
        ({"image": picture(32, 32), "prompt": "a <|image_pad|>"}, "stands for a picture"),
    ],
)
def test_bad_input(ours, call, message):
    with pytest.raises(UsageError, match=message):
        ours(**{"prompt": "a cat", **call})
