"""Taking a picture apart, against diffusers' pipeline with the same weights, prompt, picture and seed.

The pipeline reads and draws 640 x 640 pixels at the least. These tests make that less, in both, so that they take no
time.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from diffusers.pipelines.qwenimage import pipeline_qwenimage_layered
from PIL import Image

from tests import reference
from tests.runtime.test_from_pictures import mask, picture
from zimgkit.engines.errors import UsageError
from zimgkit.runtime import Pipeline, inputs
from zimgkit.runtime.request import check
from zimgkit.runtime.sigmas import sigmas_of

BOUND = 1e-4
"""On pixels and alpha from 0 to 1; a wrong position or schedule moves them by more than 1e-2."""
SMALLER = 64
"""By how much the areas are less."""
PROMPT = "a red cup on a table"


def transparent(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth picture with smooth transparency."""
    made = picture(width, height, seed)
    made.putalpha(picture(width, height, seed + 100).getchannel(0))
    return made


@pytest.fixture(scope="module")
def bundle(bundle_of):
    return bundle_of("qwen-image-layered")


@pytest.fixture(scope="module")
def ours(bundle):
    with Pipeline.open(bundle) as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def theirs():
    return reference.qwen_image_layered()


@pytest.fixture
def small(monkeypatch):
    """Both read and draw a 64th of their areas."""
    for module in (pipeline_qwenimage_layered, inputs):
        known = module.calculate_dimensions
        monkeypatch.setattr(module, "calculate_dimensions", lambda area, ratio, f=known: f(area // SMALLER, ratio))


CASES = [
    # size of the picture, its resolution, layers, steps, guidance, whether norms are kept, seed
    ((80, 80), 640, 3, 2, None, False, 0),
    ((150, 100), 640, 2, 3, 4.0, False, 1),
    ((70, 130), 1024, 2, 2, 2.5, True, 2),
    ((300, 90), 1024, 1, 3, 1.5, False, 3),
]


@pytest.mark.parametrize(("size", "resolution", "layers", "steps", "scale", "keeps_norms", "seed"), CASES)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("small")
def test_same_layers(ours, theirs, size, resolution, layers, steps, scale, keeps_norms, seed):
    call: dict[str, Any] = {
        "image": transparent(*size, seed), "layers": layers, "resolution": resolution, "num_inference_steps": steps,
        "true_cfg_scale": scale or 1.0, "negative_prompt": "blurry" if scale else None, "cfg_normalize": keeps_norms,
    }  # fmt: skip
    seen: list[dict[str, Any]] = []
    forward = theirs.transformer.forward

    def spy(**given: Any) -> Any:
        seen.append(given)
        return forward(**given)

    theirs.transformer.forward = spy
    try:
        (expected,) = reference.draw(theirs, PROMPT, seed=seed, **call)
    finally:
        theirs.transformer.forward = forward
    (found,) = ours(PROMPT, seed=seed, output_type="np", **call).images
    assert found.shape == expected.shape
    assert found.shape[::3] == (layers, 4)
    assert expected[..., :3].std() > 0.05
    assert expected[..., 3].std() > 0.05
    assert np.abs(found - expected).max() < BOUND

    session, first = ours.session, seen[0]
    request = check(session.bundle.manifest, session.family, prompt=PROMPT, **call)
    (latents,) = session.conditioner._beside(request, None).latents
    image = first["hidden_states"].numpy()
    assert image.shape[1] == (layers + 2) * latents.shape[1]
    assert np.abs(image[:, -latents.shape[1] :] - latents).max() < 1e-4
    sigmas = sigmas_of(request, session.family, session.scheduler)
    np.testing.assert_allclose(sigmas, theirs.scheduler.sigmas.numpy(), atol=1e-6)


@pytest.mark.usefixtures("small")
class TestForms:
    CALL = {"num_inference_steps": 2, "layers": 2, "image": transparent(80, 60)}  # noqa: RUF012

    def test_a_list_of_pictures_for_each(self, ours):
        """Each as if it were drawn alone."""
        many = ours([PROMPT, "another, which is longer"], seed=[1, 2], **self.CALL).images
        assert [[layer.mode for layer in layers] for layers in many] == [["RGBA"] * 2] * 2
        for index, prompt in enumerate([PROMPT, "another, which is longer"]):
            (alone,) = ours(prompt, seed=index + 1, **self.CALL).images
            for one, other in zip(many[index], alone, strict=True):
                assert np.abs(np.asarray(one).astype(int) - np.asarray(other)).max() <= 1

    def test_arrays_tensors_and_latents(self, ours):
        pixels, tensor, latents = (
            ours(PROMPT, seed=3, output_type=kind, **self.CALL).images for kind in ("np", "pt", "latent")
        )
        assert pixels.shape == (1, 2, 64, 96, 4)
        np.testing.assert_array_equal(tensor.numpy().transpose(0, 1, 3, 4, 2), pixels)
        assert latents.shape == (1, 3 * 4 * 6, 32)
        shown = ours.preview(latents, 64, 96, frames=3)
        np.testing.assert_array_equal(np.asarray(shown[1]), (pixels[0, 1] * 255).round().astype(np.uint8))

    def test_noise_of_ones_own(self, ours):
        call = {**self.CALL, "output_type": "np"}
        noise = ours.draw_noise(1, 3, 64, 96, frames=3)
        np.testing.assert_array_equal(ours(PROMPT, latents=noise, **call).images, ours(PROMPT, seed=3, **call).images)

    def test_two_at_once(self, ours):
        def drawn(layers: int) -> Any:
            return ours(PROMPT, seed=layers, output_type="np", **{**self.CALL, "layers": layers}).images

        with ThreadPoolExecutor() as pool:
            together = list(pool.map(drawn, (1, 2)))
        for layers, found in enumerate(together, start=1):
            np.testing.assert_array_equal(found, drawn(layers))

    def test_diffsynths_names(self, ours):
        image, more = self.CALL["image"], {"num_inference_steps": 2, "seed": 1, "output_type": "np"}
        mine = ours(PROMPT, image=image, layers=2, **more).images
        np.testing.assert_array_equal(mine, ours(PROMPT, layer_input_image=image, layer_num=2, **more).images)

    def test_tiles(self, ours, monkeypatch):
        """Each layer is decoded in tiles as it is decoded whole."""
        from zimgkit.runtime.pictures.tiles import Tiling

        whole = ours(PROMPT, seed=3, output_type="np", **self.CALL).images
        monkeypatch.setattr(type(ours.session.family), "TILING", Tiling(64, 48, is_close=True))
        ours.enable_vae_tiling()
        told: list[tuple[int, int]] = []
        monkeypatch.setattr(ours.session, "report", lambda stage, *told_of: stage == "decode" and told.append(told_of))
        tiled = ours(PROMPT, seed=3, output_type="np", **self.CALL).images
        ours.session.tiling.set("auto")
        assert np.abs(whole - tiled).mean() < 0.05
        done = [tile for tile, of in told if of == 6]
        assert done == sorted(done)
        assert done[-1] == 6

    def test_a_picture_without_transparency(self, ours):
        opaque = picture(80, 60)
        also = opaque.convert("RGBA")
        call = {**self.CALL, "seed": 0, "output_type": "np"}
        np.testing.assert_array_equal(
            ours(PROMPT, **{**call, "image": opaque}).images, ours(PROMPT, **{**call, "image": also}).images
        )


def test_the_size_follows_the_picture_and_the_resolution(ours):
    def size(**call: Any) -> tuple[int, int]:
        request = check(ours.bundle.manifest, ours.session.family, prompt="x", image=picture(300, 200), **call)
        return request.width, request.height

    assert size() == (768, 512)
    assert size(resolution=1024) == (1248, 832)
    assert size(height=64, width=96) == (96, 64)


def test_a_plan_knows_of_the_layers(ours):
    few, more = (ours.plan("x", image=picture(640, 640), layers=layers) for layers in (1, 8))
    assert "vae_encoder" in few.stay + few.in_turn
    assert more.peak > few.peak


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"image": None}, "there is no picture to take apart; give it as image"),
        ({"layers": 0}, "layers is 0; give a number from 1 to 64"),
        ({"layers": 65}, "layers is 65"),
        ({"layers": 2.5}, "layers is 2.5; give a whole number"),
        ({"resolution": 512}, "resolution is 512; choose one of 640, 1024"),
        ({"resolution": np.zeros(2)}, "resolution is array.*give a whole number"),
        ({"resolution": 640, "height": 64}, "resolution and height are both given"),
        ({"layers": 2, "layer_num": 2}, "layers and layer_num are both given"),
        ({"prompt": " "}, "the prompt is empty; say what the picture shows"),
        ({"prompt": None}, "the prompt is empty"),
        ({"prompt": ["a", ""]}, "the prompt is empty"),
        ({"strength": 0.5}, "strength is given, and this bundle takes whole pictures apart"),
        ({"mask_image": mask(32, 32)}, "mask_image is given, and this bundle takes whole"),
        ({"context_image": picture(32, 32)}, "context_image is given, and this bundle takes whole"),
        ({"edit_rope_interpolation": True}, "edit_rope_interpolation is given, and this bundle takes whole"),
        ({"image": [picture(32, 32)] * 2}, "image has 2 pictures; this bundle takes one"),
        ({"image": picture(2000, 9)}, "image is 222 times as wide as high"),
        ({"image": "missing.png"}, "image missing.png does not exist"),
        ({"use_en_prompt": True}, "no argument 'use_en_prompt'; use a prompt"),
        ({"latents": np.zeros((1, 4, 32), np.float32)}, "latents have the shape"),
    ],
)
def test_bad_input(ours, call, message):
    with pytest.raises(UsageError, match=message):
        ours(**{"prompt": "a cat", "image": picture(32, 32), **call})


@pytest.mark.parametrize("call", [{"layers": 2}, {"layer_num": 2}, {"resolution": 640}, {"layer_input_image": "x.png"}])
@pytest.mark.parametrize("family", ["qwen-image", "z-image"])
def test_other_bundles_take_no_picture_apart(family, bundle_of, call):
    told = f"{next(iter(call))} is given, and this bundle takes no picture apart"
    with Pipeline.open(bundle_of(family)) as pipeline, pytest.raises(UsageError, match=told):
        pipeline("a cat", **call)
