"""Drawing from pictures and text with Z-Image-Omni, against diffusers with the same weights, prompt, pictures, seed."""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor

from tests import reference
from tests.commands import invoke
from tests.runtime.test_from_pictures import mask, picture
from zimgkit.engines.errors import CheckpointError, UsageError
from zimgkit.export.build import build
from zimgkit.export.compilers.shape_profiles import ServedShapes, shape_profiles
from zimgkit.export.inspect import checkpoint_summary
from zimgkit.export.quality.verify import verify
from zimgkit.runtime import Pipeline
from zimgkit.runtime.commands.cli import main
from zimgkit.runtime.request import check

BOUND = 1e-4
"""On pixels from 0 to 1."""


@pytest.fixture(scope="module")
def ours(bundle_of):
    with Pipeline.open(bundle_of("z-image-omni")) as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def theirs():
    return reference.FAMILIES["z-image-omni"](0)


LONG = "make the cup on the table blue, and the table of old wood with rings of many years in it"
CASES = [
    # sizes of the pictures, what is drawn (width, height; None as it comes), prompt, steps, guidance scale, seed
    ([], (64, 64), "a cup", 2, 0.0, 0),
    ([], (96, 48), LONG, 2, 3.0, 1),
    ([(64, 64)], (64, 64), "make the cup blue", 2, 0.0, 2),
    ([(150, 100)], (96, 64), LONG, 3, 4.0, 3),
    ([(97, 71), (64, 160)], (48, 80), "both", 2, 2.5, 4),
    ([(64, 200), (101, 77)], None, "", 2, 1.0, 5),
]


@pytest.mark.parametrize(("sizes", "size", "prompt", "steps", "scale", "seed"), CASES)
@pytest.mark.filterwarnings("ignore")
def test_same_picture(ours, theirs, sizes, size, prompt, steps, scale, seed):
    images = [picture(*each, seed + index) for index, each in enumerate(sizes)]
    call: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": scale, "image": images or None}
    call |= {"negative_prompt": "blurry, and too dark for anything to be seen" if scale > 2 else None}
    call |= dict(zip(("width", "height"), size, strict=True)) if size else {}
    expected = reference.draw(theirs, prompt, seed=seed, **call)
    found = ours(prompt, seed=seed, output_type="np", **call).images
    assert found.shape == expected.shape
    assert expected.std() > 0.05
    assert np.abs(found - expected).max() < BOUND


@pytest.mark.parametrize("sizes", [[], [(64, 64)], [(97, 71), (64, 160)]])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_from_another_picture(ours, theirs, sizes, masked):
    """In DiffSynth's words, which has one picture to start from and others to edit."""
    images, start, where = [picture(*each, 1) for each in sizes] or None, picture(64, 48, 3), mask(64, 48, "disc")
    call = {"height": 48, "width": 64, "guidance_scale": 2.5, "negative_prompt": "blurry"}
    anew = np.asarray(where)[::8, ::8] / 255 if masked else None
    more = reference.start_from(theirs, start, seed=4, strength=0.7, steps=3, packed=False, drawn_anew=anew)
    expected = reference.draw(theirs, "a blue cup", seed=4, image=images, **call, **more)
    call |= {"mask_image": where} if masked else {}
    found = ours(
        "a blue cup", seed=4, edit_image=images, input_image=start, denoising_strength=0.7, num_inference_steps=3,
        output_type="np", **call,
    )  # fmt: skip
    assert len(found.request.inputs.references) == len(sizes)
    assert np.abs(found.images - expected).max() < BOUND


def test_larger_pictures_are_reduced(ours, theirs):
    """To what is drawn where a call says it, else to a megapixel; others stay, with their edges cut off."""
    images = [picture(1201, 1000, 1), picture(111, 90, 2)]
    call = {"num_inference_steps": 1, "guidance_scale": 0.0, "image": images, "width": 96, "height": 64}
    expected = reference.draw(theirs, "x", seed=1, **call)
    found = ours("x", seed=1, output_type="np", **call)
    assert np.abs(found.images - expected).max() < BOUND
    assert [layout.latents for layout in ours.session.conditioner.layouts(found.request)] == [(80, 64), (96, 80)]
    del call["width"]
    (whole, small) = ours.session.conditioner.layouts(asked(ours, **call))
    assert whole.reduced == Flux2ImageProcessor._resize_to_target_area(images[0]).size == (1122, 934)
    assert (whole.latents, small.reduced) == ((1120, 928), (111, 90))
    (whole, _) = ours.session.conditioner.layouts(asked(ours, **call, edit_image_auto_resize=False))
    assert whole.latents == (1200, 992)


def asked(pipeline, **call):
    return check(pipeline.bundle.manifest, pipeline.session.family, prompt="x", **call)


@pytest.mark.parametrize(
    ("sizes", "given", "size"),
    [
        ([(300, 200), (111, 97)], {}, (96, 96)),
        ([(2000, 1000)], {}, (720, 1440)),
        ([(2000, 1000)], {"width": 640}, (720, 640)),
        ([], {}, (1024, 1024)),
    ],
)
def test_the_size_follows_the_last_picture(ours, sizes, given, size):
    request = asked(ours, image=[picture(*each) for each in sizes], **given)
    assert (request.height, request.width) == size


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
        for seed in range(2):
            ours("one", guidance_scale=3.0, seed=seed, image=picture(77, 65, 40), **self.CALL)
        assert runs.count("vision_encoder") == runs.count("vae_encoder") == 1
        assert "denoiser" not in runs

    def test_each_counts(self, ours):
        images = [picture(64, 64, 1), picture(64, 64, 2)]
        none, one, two, swapped = (
            ours("one", seed=0, image=given, **self.CALL).images for given in (None, images[:1], images, images[::-1])
        )
        for other in (none, two, swapped):
            assert np.abs(one - other).max() > 1e-3
        assert np.abs(two - swapped).max() > 1e-3

    def test_several_prompts_and_pictures(self, ours):
        """Each as if it were drawn alone."""
        given = {**self.CALL, "image": picture(64, 80, 7), "guidance_scale": 2.0}
        both = ours(["one", "another, which is longer"], seed=[1, 2], **given).images
        for index, prompt in enumerate(["one", "another, which is longer"]):
            alone = ours(prompt, seed=index + 1, **given).images
            np.testing.assert_allclose(both[index], alone[0], atol=1e-5)

    def test_diffsynths_name(self, ours):
        image = picture(64, 80, 7)
        mine = ours("one", seed=1, edit_image=image, **self.CALL).images
        np.testing.assert_array_equal(mine, ours("one", seed=1, image=image, **self.CALL).images)


def test_a_plan_knows_of_the_pictures(ours):
    none, few, more = (
        ours.plan("x", image=[picture(64, 64)] * count, height=64, width=64, negative_prompt="") for count in (0, 1, 8)
    )
    assert {"vision_encoder", "picture_conditioner"} <= {*few.stay, *few.in_turn}
    assert not {"vision_encoder", "picture_conditioner"} & {*none.stay, *none.in_turn}
    assert none.peak < few.peak < more.peak


def test_a_picture_carries_what_it_was_drawn_from(bundle_of, tmp_path, monkeypatch):
    """The area too, which larger ones were reduced to: it does not follow from the size that was drawn."""
    monkeypatch.chdir(tmp_path)
    picture(1201, 1000, 1).save("large.png")
    picture(70, 66, 2).save("small.png")
    options = ("--bundle", bundle_of("z-image-omni"), "--quiet")
    images = ("--image", "large.png", "--image", "small.png")
    call = ("--num-inference-steps", "1", "--seed", "3", "--width", "64", "--json", "-o", "a.png")
    found = invoke(main, "generate", "x", *images, *call, *options)
    assert found.code == 0, found.err
    recorded = json.loads(found.out)["parameters"]
    assert [file["name"] for file in recorded["image"]] == ["large.png", "small.png"]
    assert (recorded["edit_image_area"], recorded["height"], recorded["width"]) == (1024 * 1024, 64, 64)
    again = invoke(main, "generate", "--from-image", "a.png", "-o", "b.png", *options)
    assert again.code == 0, again.err
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"image": [picture(64, 64)] * 9}, "image has 9 pictures; this bundle takes 8 at most"),
        ({"image": picture(63, 70)}, "image is 63x70; this bundle takes sides of 64 pixels and more"),
        ({"image": [picture(64, 70), picture(600, 64)]}, "image 2 is 9.4 times as wide as high; crop it to 8 at most"),
        ({"image": picture(2600, 410), "height": 16, "width": 16}, "image is 40x6 at 256 pixels; give a larger"),
        ({"strength": 0.5}, "strength is given, and no image; give the picture to start from"),
        ({"mask_image": mask(64, 64)}, "mask_image is given, and no image"),
        ({"image": picture(64, 64), "keep_unmasked": True}, "keep_unmasked is given, and no mask"),
        ({"edit_image_auto_resize": False}, "edit_image_auto_resize is given, and no image; give the picture to edit"),
        ({"image": picture(64, 64), "edit_rope_interpolation": True}, "this bundle has nothing like it"),
        ({"image": picture(64, 64), "height": "64"}, "height is '64'; give a whole number"),
        (
            {"image": picture(64, 64), "context_image": picture(64, 64)},
            "context_image is given, and this model has nothing like it",
        ),
        ({"image": picture(64, 64), "prompt": None, "prompt_embeds": np.ones((1, 3, 32))}, "are given, and pictures"),
        ({"image": "missing.png"}, "image missing.png does not exist"),
    ],
)
def test_bad_input(ours, call, message):
    with pytest.raises(UsageError, match=message):
        ours(**{"prompt": "a cat", **call})


class TestTheCheckpoint:
    def test_what_it_becomes(self, ours, checkpoint_of):
        manifest = ours.bundle.manifest
        assert manifest.tasks == ("text-to-image", "edit")
        assert manifest.components["denoiser.conditions"].variant_of == "denoiser"
        assert manifest.text.prefix == "<|im_start|>user\n"
        root = checkpoint_of("z-image-omni")
        with Pipeline.open(ours.bundle.root) as again:
            assert again.bundle.manifest.sources["checkpoint"].files.keys() >= {"siglip/model.safetensors"}
        report = verify(ours.bundle.root, str(root))
        assert report["passed"]
        assert {"vision_encoder", "picture_conditioner", "vae_encoder"} <= set(report["components"])
        assert set(checkpoint_summary(str(root))["components"]) >= {"vision_encoder", "picture_conditioner"}

    @pytest.mark.parametrize("folder", ["siglip", "siglip_processor"])
    def test_a_folder_that_is_not_there(self, checkpoint_of, tmp_path, folder):
        root = tmp_path / "omni"
        shutil.copytree(checkpoint_of("z-image-omni"), root, ignore=shutil.ignore_patterns(folder))
        with pytest.raises(CheckpointError, match=rf"omni has no folder {folder}; fetch the files that are missing"):
            build(str(root), tmp_path / "bundle", precision="fp32")

    @pytest.mark.parametrize(
        ("file", "change", "message"),
        [
            ("siglip/config.json", {"num_patches": 60}, "num_patches is 60, no square"),
            (
                "siglip/config.json",
                {"num_patches": 100},
                "'embeddings.position_embedding.weight' of the siglip has shape",
            ),
            (
                "transformer/config.json",
                {"siglip_feat_dim": 32},
                "'siglip_embedder.0.weight' of the transformer has shape",
            ),
            (
                "siglip_processor/preprocessor_config.json",
                {"patch_size": 0},
                "config.siglip_processor: patch_size is 0",
            ),
            ("siglip_processor/preprocessor_config.json", {"patch_size": 8}, "patch_size"),
        ],
    )
    def test_a_config_of_another_size(self, checkpoint_of, tmp_path, file, change, message):
        root = tmp_path / "omni"
        shutil.copytree(checkpoint_of("z-image-omni"), root)
        config = json.loads((root / file).read_text())
        (root / file).write_text(json.dumps(config | change))
        with pytest.raises(CheckpointError, match=message):
            build(str(root), tmp_path / "bundle", precision="fp32")

    def test_tasks_that_it_has_not(self, checkpoint_of, tmp_path):
        with pytest.raises(UsageError, match="'inpaint' is no task of this checkpoint; choose of text-to-image, edit"):
            build(str(checkpoint_of("z-image-omni")), tmp_path / "bundle", tasks=("inpaint",))


@pytest.mark.parametrize("count", [0, 1, 3, 8])
def test_what_is_compiled_serves_it(ours, monkeypatch, count):
    """Every length that an engine is given lies within its shape profile."""
    served = shape_profiles(ours.bundle.manifest, ServedShapes(sizes=((96, 64),)))
    engine_of, seen = ours.session.engines.engine, set()

    @contextmanager
    def engine(component, device=None):
        with engine_of(component, device) as opened:
            run = opened.run

            def spy(feeds, **more):
                inputs = ours.bundle.component(component).inputs
                seen.add(component)
                for name, value in feeds.items():
                    shape = ours.bundle.component(component).inputs[name].shape
                    for dimension, length in zip(shape, value.shape, strict=True):
                        if isinstance(dimension, str):
                            low, _, high = served[component][0][dimension]
                            assert low <= length <= high, (component, name, dimension)
                assert inputs.keys() == feeds.keys()
                return run(feeds, **more)

            monkeypatch.setattr(opened, "run", spy)
            try:
                yield opened
            finally:
                monkeypatch.setattr(opened, "run", run)

    monkeypatch.setattr(ours.session.engines, "engine", engine)
    images = [picture(64 + 20 * index, 150 - 7 * index, index) for index in range(count)]
    ours("a cup" * (1 + 15 * count), height=64, width=96, num_inference_steps=1, guidance_scale=2.0, image=images)
    assert ("picture_conditioner" in seen) == bool(count)
