"""From a picture, and within a mask, against diffusers' pipelines with the same weights, prompt, picture and seed."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from diffusers import (
    QwenImageImg2ImgPipeline,
    QwenImageInpaintPipeline,
    ZImageImg2ImgPipeline,
    ZImageInpaintPipeline,
)
from PIL import Image

from tests import reference
from zimgkit.engines.errors import UsageError
from zimgkit.runtime import Pipeline

BOUND = 1e-3
"""On pixels from 0 to 1."""
TASKS = ("image-to-image", "inpaint")
THEIRS = {
    ("z-image", "image-to-image"): ZImageImg2ImgPipeline,
    ("z-image", "inpaint"): ZImageInpaintPipeline,
    ("qwen-image", "image-to-image"): QwenImageImg2ImgPipeline,
    ("qwen-image", "inpaint"): QwenImageInpaintPipeline,
}


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth picture: a few waves in each channel."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    waves = [np.sin(rng.uniform(2, 9) * x + rng.uniform(2, 9) * y + rng.uniform(0, 6)) for _ in range(3)]
    return Image.fromarray(((np.stack(waves, axis=2) + 1) * 127.5).astype(np.uint8))


def mask(width: int, height: int, kind: str = "half") -> Image.Image:
    made = np.zeros((height, width), np.uint8)
    if kind == "half":
        made[:, width // 2 :] = 255
    else:
        y, x = np.mgrid[0:height, 0:width]
        made[(x - width / 2) ** 2 + (y - height / 2) ** 2 < (min(width, height) / 3) ** 2] = 255
    return Image.fromarray(made)


@pytest.fixture(scope="module", params=["z-image", "qwen-image"])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def ours(family, bundle_of):
    with Pipeline.open(bundle_of(family, tasks=TASKS)) as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def theirs(family):
    own = reference.FAMILIES[family]()

    def make(task: str) -> Any:
        made = THEIRS[family, task](**own.components)
        made.set_progress_bar_config(disable=True)
        return made

    return {task: make(task) for task in TASKS}


def scales(family: str, scale: float | None) -> dict[str, float]:
    return {"guidance_scale": scale or 0.0} if family == "z-image" else {"true_cfg_scale": scale or 1.0}


CASES = [
    # size of the picture, size of what is drawn (width, height), steps, strength, guidance scale, seed
    ((64, 64), (64, 64), 4, 0.6, None, 0),
    ((96, 64), (96, 64), 5, 0.8, 3.0, 1),
    ((80, 112), (80, 112), 3, 1.0, None, 2),
    ((70, 50), (64, 48), 6, 0.35, 2.5, 3),
]


@pytest.mark.parametrize(("given", "size", "steps", "strength", "scale", "seed"), CASES)
@pytest.mark.filterwarnings("ignore")
class TestSamePicture:
    def call(self, family, size, steps, strength, scale):
        width, height = size
        return {
            "height": height, "width": width, "num_inference_steps": steps, "strength": strength,
            "negative_prompt": "blurry" if scale else None,
        } | scales(family, scale)  # fmt: skip

    def test_from_a_picture(self, family, ours, theirs, given, size, steps, strength, scale, seed):
        image = picture(*given, seed)
        call = self.call(family, size, steps, strength, scale)
        # The pipeline of one family takes pictures of the size to draw alone.
        resized = image if family == "qwen-image" else image.resize(size, Image.Resampling.LANCZOS)
        expected = reference.draw(theirs["image-to-image"], "a red circle", seed=seed, image=resized, **call)
        found = ours("a red circle", seed=seed, image=image, output_type="np", **call).images
        assert found.shape == expected.shape == (1, size[1], size[0], 3)
        assert expected.std() > 0.05
        assert np.abs(found - expected).max() < BOUND

    @pytest.mark.parametrize("kind", ["half", "disc"])
    def test_within_a_mask(self, family, ours, theirs, given, size, steps, strength, scale, seed, kind):
        image, where = picture(*given, seed), mask(*given, kind)
        call = self.call(family, size, steps, strength, scale)
        resized = image if family == "qwen-image" else image.resize(size, Image.Resampling.LANCZOS)
        expected = reference.draw(theirs["inpaint"], "a red circle", seed=seed, image=resized, mask_image=where, **call)
        found = ours("a red circle", seed=seed, image=image, mask_image=where, output_type="np", **call).images
        assert np.abs(found - expected).max() < BOUND
        whole = ours("a red circle", seed=seed, image=image, output_type="np", **call).images
        assert np.abs(found - whole).max() > 10 * BOUND


@pytest.mark.filterwarnings("ignore")
class TestBatches:
    CALL: ClassVar[dict[str, Any]] = {"height": 48, "width": 64, "num_inference_steps": 3, "strength": 0.7}

    def test_several_pictures_of_one_seed(self, family, ours, theirs):
        image, call = picture(64, 48), self.CALL | {"num_images_per_prompt": 3} | scales(family, None)
        expected = reference.draw(theirs["image-to-image"], "one", seed=5, image=image, **call)
        found = ours("one", seed=5, image=image, output_type="np", **call).images
        assert np.abs(found - expected).max() < BOUND

    def test_the_reference_strength(self, family, ours, theirs):
        image, where = picture(64, 48), mask(64, 48)
        call = {"height": 48, "width": 64, "num_inference_steps": 4} | scales(family, None)
        for task, more in (("image-to-image", {}), ("inpaint", {"mask_image": where})):
            expected = reference.draw(theirs[task], "one", seed=6, image=image, **call, **more)
            found = ours("one", seed=6, image=image, output_type="np", **call, **more).images
            assert np.abs(found - expected).max() < BOUND

    def test_a_seed_for_each_picture(self, family, ours, theirs):
        """The picture's latents are drawn from the first one's generator."""
        image, call = picture(64, 48), self.CALL | scales(family, None)
        generators = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
        expected = theirs["image-to-image"](
            ["one", "two"], generator=generators, image=image, output_type="np", **call
        ).images
        found = ours(["one", "two"], seed=[7, 8], image=image, output_type="np", **call).images
        assert np.abs(found - expected).max() < BOUND

    def test_one_of_a_batch_again(self, ours):
        """As a picture's parameters ask for it: its noise is drawn after the latents of the picture."""
        image, call = picture(64, 48), self.CALL | {"image": picture(64, 48), "output_type": "np"}
        whole = ours("one", seed=9, num_images_per_prompt=3, **call).images
        noise = ours.session.draw_noise(3, 9, 48, 64, 2, after_posterior=True)
        again = ours("one", seed=9, latents=noise, **call | {"image": image}).images
        np.testing.assert_array_equal(again[0], whole[2])


class TestDiffSynthsNames:
    """What it draws is compared in ``test_recorded_pictures.py``."""

    def test_a_hard_mask_blends_alike(self, ours):
        """Where each latent is drawn anew or kept, blending velocities and blending latents are the same."""
        image, where = picture(64, 64), mask(8, 8)
        call = {"num_inference_steps": 3, "denoising_strength": 0.8, "output_type": "latent", "height": 64, "width": 64}
        ours_way = ours("one", seed=1, image=image, mask_image=where, **call).images
        their_way = ours("one", seed=1, image=image, inpaint_mask=where, **call).images
        np.testing.assert_allclose(ours_way, their_way, atol=2e-4)

    def test_a_blurred_mask_blends_softly(self, ours):
        image, where = picture(64, 64), mask(64, 64)
        call = {"num_inference_steps": 3, "height": 64, "width": 64, "output_type": "np", "image": image}
        hard = ours("one", seed=1, inpaint_mask=where, **call).images
        soft = ours("one", seed=1, mask_image=where, inpaint_blur_size=2, inpaint_blur_sigma=1.0, **call).images
        assert np.abs(hard - soft).max() > 1e-3


class TestWhatTheMaskKeeps:
    def test_pixels_stay_to_the_level(self, ours):
        image, where = picture(64, 48), mask(64, 48, "disc")
        (found,) = ours("one", seed=1, image=image, mask_image=where, keep_unmasked=True, num_inference_steps=2).images
        kept = np.asarray(where) == 0
        np.testing.assert_array_equal(np.asarray(found)[kept], np.asarray(image)[kept])
        assert np.abs(np.asarray(found)[~kept].astype(int) - np.asarray(image)[~kept]).max() > 10

    def test_a_blur_mixes_at_the_edge_alone(self, ours):
        image, where = picture(128, 48), mask(128, 48)
        call = {"image": image, "mask_image": where, "num_inference_steps": 2, "seed": 1, "keep_unmasked": True}
        (found,) = ours("one", mask_blur=4, **call).images
        np.testing.assert_array_equal(np.asarray(found)[:, :40], np.asarray(image)[:, :40])


class TestSizes:
    @pytest.mark.parametrize(
        ("given", "asked", "drawn"),
        [
            ((64, 48), {}, (64, 48)),
            ((70, 50), {}, (64, 48)),
            ((5, 9), {}, (16, 16)),
            ((70, 50), {"width": 32}, (32, 16)),
            ((70, 50), {"height": 96}, (128, 96)),
            ((4000, 3000), {}, (1168, 880)),
            ((300, 200), {"width": 48, "height": 64}, (48, 64)),
        ],
    )
    def test_that_of_the_picture_within_what_the_bundle_is_for(self, ours, given, asked, drawn):
        from zimgkit.runtime.request import check

        defaults = ours.bundle.manifest.defaults
        if given == (4000, 3000):
            factor = (defaults.width * defaults.height / (4000 * 3000)) ** 0.5
            drawn = tuple(int(side * factor) // 16 * 16 for side in given)
        request = check(ours.bundle.manifest, ours.session.family, prompt="x", image=Image.new("RGB", given), **asked)
        assert (request.width, request.height) == drawn


def test_an_encoded_picture_is_kept(ours, monkeypatch):
    runs = []
    engine_of = ours.session.engines.engine

    def engine(component, device=None):
        runs.append(component)
        return engine_of(component, device)

    monkeypatch.setattr(ours.session.engines, "engine", engine)
    call = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "latent"}
    image = picture(33, 33, seed=99)
    for seed in range(3):
        ours("one", seed=seed, image=image.copy(), **call)
    assert runs.count("vae_encoder") == 1
    ours("one", seed=0, image=picture(33, 33, seed=98), **call)
    assert runs.count("vae_encoder") == 2


def test_transparent_parts_are_white(ours):
    image = picture(32, 32).convert("RGBA")
    image.putalpha(Image.fromarray(np.where(np.arange(32) < 16, 255, 0).astype(np.uint8)[None].repeat(32, axis=0)))
    white = np.asarray(image.convert("RGB")).copy()
    white[:, 16:] = 255
    call = {"num_inference_steps": 2, "seed": 0, "output_type": "latent"}
    np.testing.assert_array_equal(
        ours("x", image=image, **call).images, ours("x", image=Image.fromarray(white), **call).images
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"mask_image": mask(8, 8)}, "mask_image is given, and no image"),
        ({"strength": 0.5}, "strength is given, and no image"),
        ({"image": picture(32, 32), "mask_blur": 3}, "mask_blur is given, and no mask"),
        ({"image": picture(32, 32), "strength": 1.5}, "strength is 1.5"),
        ({"image": picture(32, 32), "strength": -0.1}, "strength is -0.1"),
        ({"image": picture(32, 32), "strength": 0}, "strength is 0"),
        ({"image": picture(32, 32), "denoising_strength": 0.0}, "denoising_strength is 0"),
        ({"image": picture(32, 32), "strength": 1e-20, "num_inference_steps": 4}, "leaves no step of 4; give"),
        ({"image": picture(32, 32), "input_image": picture(32, 32)}, "image and input_image are both given"),
        ({"image": picture(32, 32), "strength": 0.5, "denoising_strength": 0.5}, "strength and denoising_strength"),
        ({"image": [picture(32, 32), picture(32, 32)]}, "image has 2 pictures; this bundle takes one"),
        ({"image": "missing.png"}, "image missing.png does not exist"),
        ({"image": 3}, "image is of type int"),
        ({"image": picture(32, 32), "mask_image": "missing.png"}, "mask_image missing.png does not exist"),
        ({"image": picture(32, 32), "mask_image": mask(8, 8), "keep_unmasked": 1}, "keep_unmasked is 1"),
        ({"image": picture(32, 32), "mask_image": mask(8, 8), "inpaint_blur_size": 2}, "blur_size is given alone"),
        ({"image": picture(32, 32), "sigmas": [1.0, 0.5], "denoising_strength": 0.5}, "sigmas and denoising_strength"),
        ({"image": picture(32, 32), "height": "tall"}, "height is 'tall'"),
    ],
)  # fmt: skip
def test_bad_input(ours, call, message):
    with pytest.raises(UsageError, match=message):
        ours("a cat", **call)
    assert not ours.session.engines.opened or "text_encoder" in ours.session.engines.opened


def test_a_bundle_that_draws_from_text_alone(family, bundle_of):
    with Pipeline.open(bundle_of(family)) as plain, pytest.raises(UsageError, match="built for text-to-image") as info:
        plain("a cat", image=picture(32, 32))
    assert "--tasks image-to-image" in str(info.value)
    assert "vae_encoder" not in plain.bundle.manifest.components
