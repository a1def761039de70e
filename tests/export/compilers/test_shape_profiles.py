"""Shape profiles against the shapes of the arrays that the host really makes."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from tests import handmade
from zimgkit.engines.bundle import Component, Defaults, Manifest, TensorSpec
from zimgkit.engines.errors import UsageError
from zimgkit.export.compilers.shape_profiles import ServedShapes, parse_size, shape_profiles
from zimgkit.export.networks import qwen_image_demo, z_image_demo
from zimgkit.export.networks.registry import FAMILIES, parts, sources
from zimgkit.export.networks.text_encoder import text_part
from zimgkit.runtime import families
from zimgkit.runtime.inputs import NONE
from zimgkit.runtime.references import layout
from zimgkit.runtime.text.tokenizer import PromptTokenizer, keep_rows

CONFIGS = {"z-image": z_image_demo.CONFIGS, "qwen-image": qwen_image_demo.CONFIGS}


def manifest_of(name: str) -> Manifest:
    """What a bundle of the demo's checkpoint says of its graphs."""
    configs, components = CONFIGS[name], {}
    for source in sources(name):
        for component, part in parts(name, source, configs[source]).items():
            inputs = {entry.name: TensorSpec("", entry.shape) for entry in part.inputs}
            components[component] = Component((), {"bfloat16": "x.onnx"} if part.network else {}, inputs)
    # A template of single tokens: the shortest prompt is one row.
    text = families.family(name).TEXT
    text = msgspec.structs.replace(text, prefix="<|im_start|>" * text.drop, suffix="<|im_end|>")
    config = configs | {"text_encoder": text_part(configs["text_encoder"])}
    return handmade.manifest(
        name, components=components, config=config, text=text, defaults=Defaults(8, 0.0, 1024, 768)
    )


@pytest.fixture(scope="module", params=list(CONFIGS))
def manifest(request: pytest.FixtureRequest) -> Manifest:
    return manifest_of(request.param)


@pytest.fixture(scope="module")
def tokenizer(manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> PromptTokenizer:
    """A token for each byte."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    made.save(str(path))
    return PromptTokenizer(path, manifest.text)


def arrays(
    manifest: Manifest, tokenizer: PromptTokenizer, letters: int, size: tuple[int, int], batch: int, max_tokens: int
) -> dict[str, dict[str, Any]]:
    """What a call gives each graph, as the pipeline makes it."""
    family, (width, height) = families.family_of(manifest), size
    ids = tokenizer.encode("a" * letters)[:, : manifest.text.drop + max_tokens]
    rows = keep_rows(np.zeros((ids.shape[1], 8), np.float32), manifest.text, max_tokens)
    conditioner = family.conditioner_inputs(rows)
    constants = family.denoiser_constants(conditioner["prompt_embeds"], len(rows), height, width)
    latents = family.from_noise(np.zeros((batch, *family.noise_shape(height, width)), np.float32))
    # What follows from the schedule has no dynamic dimension.
    scheduled = {name: np.zeros((1, 1), np.float32) for name in ("sinusoids", "modulation")}
    own = manifest.components["denoiser"].inputs
    steps = family.denoiser_inputs(latents) | {name: rows for name, rows in scheduled.items() if name in own}
    return {
        "text_encoder": family.text_encoder_inputs(ids),
        "conditioner": conditioner,
        "denoiser": {**constants, **steps},
        "vae_encoder": {"image": np.zeros((1, 3, height, width), np.float32)},
        "vae_decoder": {"latents": family.to_vae(latents[:1], height, width)},
    }


def lengths(component: Component, given: dict[str, Any]) -> dict[str, int]:
    """The length of each dynamic dimension in these arrays."""
    assert set(given) == set(component.inputs)
    found: dict[str, int] = {}
    for name, spec in component.inputs.items():
        for dimension, length in zip(spec.shape, given[name].shape, strict=True):
            if isinstance(dimension, str):
                assert found.setdefault(dimension, length) == length, (name, dimension)
    return found


@pytest.mark.parametrize("seed", range(4))
def test_a_size_range_serves_all_that_is_within(manifest, tokenizer, seed):
    rng = np.random.default_rng(seed)
    for _ in range(8):
        drawn = np.sort(rng.integers(1, 60, (3, 2)), axis=0) * 16
        min_size, opt_size, max_size = (tuple(map(int, size)) for size in drawn)
        batch, max_tokens = int(rng.integers(1, 5)), int(rng.integers(1, 1025))
        made = shape_profiles(
            manifest, ServedShapes(size_range=(min_size, opt_size, max_size), max_prompt_tokens=max_tokens, batch=batch)
        )
        for _ in range(3):
            size = tuple(16 * int(rng.integers(a // 16, b // 16 + 1)) for a, b in zip(min_size, max_size, strict=True))
            letters = int(rng.choice([0, 1, rng.integers(0, 1100), max_tokens - 1, max_tokens, 1200]))
            call = arrays(manifest, tokenizer, letters, size, int(rng.integers(1, batch + 1)), max_tokens)
            for name, component in manifest.components.items():
                if component.graphs:
                    (profile,) = made[name]
                    for dimension, length in lengths(component, call[name]).items():
                        assert profile[dimension][0] <= length <= profile[dimension][2], (
                            name,
                            dimension,
                            size,
                            letters,
                        )


@pytest.mark.parametrize("seed", range(4))
def test_one_size_is_served_exactly(manifest, tokenizer, seed):
    rng = np.random.default_rng(seed)
    of_prompts = {"tokens", "text_tokens", "caption_tokens", "all_tokens"}
    for _ in range(8):
        size = tuple(16 * int(count) for count in rng.integers(1, 90, 2))
        made = shape_profiles(manifest, ServedShapes(sizes=(size,), max_prompt_tokens=600))
        for letters in (0, 599, 600, 700):
            call = arrays(manifest, tokenizer, letters, size, 1, 600)
            for name, (profile,) in made.items():
                for dimension, length in lengths(manifest.components[name], call[name]).items():
                    assert profile[dimension][0] <= length <= profile[dimension][2], (name, dimension, size, letters)
                    assert dimension in of_prompts or set(profile[dimension]) == {length}, (name, dimension, size)
                    # The shortest and the longest prompt are the min and the max.
                    if dimension in of_prompts and letters in (0, 600):
                        assert length == profile[dimension][0 if letters == 0 else 2]


def test_sizes_of_their_own_and_together(manifest):
    sizes = ((512, 512), (768, 512), (512, 512))
    made = shape_profiles(manifest, ServedShapes(sizes=sizes, size_range=((256, 256), (512, 512), (1024, 1024))))
    # What does not depend on the picture has one profile; the same size twice has one.
    assert {name: len(found) for name, found in made.items()} == {
        "text_encoder": 1, "conditioner": 1, "denoiser": 3, "vae_encoder": 3, "vae_decoder": 3,
    }  # fmt: skip
    assert [profile["width"] for profile in made["vae_decoder"]] == [(64,) * 3, (96,) * 3, (32, 64, 128)]
    assert [profile["height"] for profile in made["vae_decoder"]] == [(64,) * 3, (64,) * 3, (32, 64, 128)]
    # Pictures go in as they are.
    assert [entry["image_width"] for entry in made["vae_encoder"]] == [(512,) * 3, (768,) * 3, (256, 512, 1024)]
    # A picture and its turned twin are alike to the denoiser only.
    turned = shape_profiles(manifest, ServedShapes(sizes=((768, 512), (512, 768))))
    assert (len(turned["denoiser"]), len(turned["vae_decoder"])) == (1, 2)


def test_defaults_of_a_size_range(manifest):
    (image,) = shape_profiles(manifest, ServedShapes())["vae_decoder"]
    assert (image["width"], image["height"], image["batch"]) == ((96,) * 3, (128,) * 3, (1, 1, 1))
    for max_size, expected in {
        (1536, 1536): (32, 96, 192),  # The recommended size is the opt size where it is within.
        (512, 1536): (32, 64, 64),
        (128, 2048): (16, 16, 16),  # The min size is no larger than the max.
    }.items():
        (image,) = shape_profiles(manifest, ServedShapes(size_range=(None, None, max_size)))["vae_decoder"]
        assert image["width"] == expected
    (text,) = shape_profiles(manifest, ServedShapes())["text_encoder"]
    drop = manifest.text.drop
    assert text["tokens"] == (drop + 1, drop + 128, drop + 512)
    (text,) = shape_profiles(manifest, ServedShapes(max_prompt_tokens=50))["text_encoder"]
    assert text["tokens"] == (drop + 1, drop + 50, drop + 50)


def test_parts_without_a_graph_have_none():
    assert set(shape_profiles(manifest_of("qwen-image"), ServedShapes())) == {
        "text_encoder", "conditioner", "denoiser", "vae_encoder", "vae_decoder",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (
            ServedShapes(sizes=((1000, 512),)),
            "1000x512 cannot be drawn; give a width and a height",
        ),
        (ServedShapes(sizes=((512, 0),)), "512x0 cannot be drawn"),
        (ServedShapes(sizes=((512, -512),)), "512x-512 cannot be drawn"),
        (ServedShapes(sizes=((512, 8208),)), "512x8208 cannot be drawn"),
        (ServedShapes(size_range=((8, 8), None, (512, 512))), "8x8 cannot be drawn"),
        (ServedShapes(size_range=(None, (500, 500), (512, 512))), "500x500 cannot be drawn"),
        (
            ServedShapes(size_range=((512, 512), None, (256, 1024))),
            "min, opt and max size are 512x512, 256x1024, 256x1024; give",
        ),
        (
            ServedShapes(size_range=(None, (1024, 256), (512, 512))),
            "are 256x256, 1024x256, 512x512; give them",
        ),
        (ServedShapes(max_prompt_tokens=0), "max_prompt_tokens is 0; give a number from 1 to 1024"),
        (ServedShapes(max_prompt_tokens=1025), "max_prompt_tokens is 1025; give a number from 1 to 1024"),
        (ServedShapes(batch=0), "batch is 0; give a number from 1 to 64"),
        (ServedShapes(batch=65), "batch is 65; give a number from 1 to 64"),
    ],
)
def test_what_cannot_be_served(manifest, shapes, message):
    with pytest.raises(UsageError) as caught:
        shape_profiles(manifest, shapes)
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["1024x768", " 1024X768\n", "1024×768"])
def test_sizes_as_text(text):
    assert parse_size(text) == (1024, 768)


@pytest.mark.parametrize(
    "text", ["", "1024", "x", "1024x", "x768", "1024x768x3", "-16x16", "1e3x16", "16 x 16", "9999999x16"]
)
def test_text_that_is_no_size(text):
    with pytest.raises(UsageError, match="is no size; give WIDTHxHEIGHT in pixels, such as 1024x1024"):
        parse_size(text)


@pytest.mark.parametrize("pipeline", ["QwenImageEditPipeline", "QwenImageEditPlusPipeline"])
@pytest.mark.parametrize("seed", range(3))
def test_pictures_beside_the_drawn_one(pipeline, seed):
    """Every picture up to four times as wide as high, or as high as wide, and as many as the bundle takes."""
    plain = manifest_of("qwen-image")
    config = plain.config | {"text_encoder": dict(plain.config["text_encoder"]) | {
        "vision_config": CONFIGS["qwen-image"]["text_encoder"]["vision_config"]}}  # fmt: skip
    references = FAMILIES["qwen-image"].editors[pipeline]
    components = dict(plain.components)
    for source in ("text_encoder", "transformer"):
        for name, part in parts("qwen-image", source, CONFIGS["qwen-image"][source], ("edit",)).items():
            for key, own in {name: part, **{f"{name}.{more}": own for more, own in part.variants.items()}}.items():
                inputs = {entry.name: TensorSpec("", entry.shape) for entry in own.inputs}
                components[key] = Component((), {"bfloat16": "x.onnx"} if own.network else {}, inputs)
    more = {"config": config, "references": references, "components": components}
    manifest = msgspec.structs.replace(plain, **more)
    host, rng = families.family_of(manifest), np.random.default_rng(seed)
    made = {
        name: profiles[0] for name, profiles in shape_profiles(manifest, ServedShapes(sizes=((1024, 768),))).items()
    }
    for _ in range(20):
        count = int(rng.integers(1, references.most + 1))
        sizes = [
            (int(rng.integers(64, 256)), 64) if rng.random() < 0.5 else (64, int(rng.integers(64, 256)))
            for _ in range(count)
        ]
        found = [layout(size, NONE, references, host) for size in sizes]
        beside = sum(own.grid[0] * own.grid[1] for own in found)
        dimensions = host.dynamic_dimensions(768, 1024, 100, beside)
        assert holds(made["denoiser.conditions"], dimensions | {"batch": 1})
        assert holds(made["text_encoder.pictures"], {"picture_tokens": sum(own.tokens for own in found)})
        for own in found:
            rows, columns = own.patches
            feeds = host.vision_inputs(Image.new("RGB", own.vision)).feeds
            assert holds(made["vision_encoder"], {"patches": rows * columns, "windows": len(feeds["window_index"])})
            assert holds(made["vae_encoder"], dict(zip(("image_width", "image_height"), own.latents, strict=True)))


def holds(profile: dict[str, tuple[int, int, int]], dimensions: dict[str, int]) -> bool:
    return all(low <= dimensions[name] <= high for name, (low, _, high) in profile.items() if name in dimensions)
