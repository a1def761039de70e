"""The LoRAs that zimgkit carries do visibly what they were trained for: the judge's own measures, with and without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from PIL.ImageFilter import MaxFilter

from tests.commands import invoke
from zimgkit.engines.bundle import Bundle
from zimgkit.engines.tensors.safetensors import read_header
from zimgkit.export.cli.main import main
from zimgkit.export.lora.inspect import lora_summary
from zimgkit.runtime import Pipeline, demo_models
from zimgkit.runtime.commands.sheet import draw_sheet, rows_of
from zimgkit.runtime.pictures.sheet import GAP, MARGIN
from zimgkit.training.accuracy import accuracy
from zimgkit.training.judge import look
from zimgkit.training.world.drawing import draw
from zimgkit.training.world.scene import Scene, Thing

COLOURS = ("red", "blue", "green", "purple")


@pytest.fixture(scope="module")
def with_loras(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A carried model with some of its LoRAs swapped in."""
    made: dict[tuple[str, ...], Path] = {}

    def make(name: str, *loras: str) -> Path:
        if not loras:
            return demo_models.locate(name)
        if (name, *loras) not in made:
            out = tmp_path_factory.mktemp("swapped") / name
            wanted = [argument for lora in loras for argument in ("--lora", f"{name}-{lora}")]
            assert invoke(main, "swap-lora", name, *wanted, "--out", out, "--quiet").code == 0
            made[name, *loras] = out
        return made[name, *loras]

    return make


def draw_all(bundle: Path, prompts: list[str]) -> list[Image.Image]:
    with Pipeline.open(bundle) as pipeline:
        negative = pipeline.bundle.manifest.defaults.negative_prompt
        return [pipeline(prompt, seed=seed, negative_prompt=negative).images[0] for seed, prompt in enumerate(prompts)]


def silhouette(image: Image.Image) -> Image.Image:
    """What differs from the background, white on black."""
    pixels = np.asarray(image.convert("RGB")).astype(int)
    border = np.concatenate([pixels[:3].reshape(-1, 3), pixels[-3:].reshape(-1, 3)])
    distance = np.abs(pixels - np.median(border, axis=0)).max(-1)
    return Image.fromarray(((distance > 70) * 255).astype(np.uint8))


def filled(mask: Image.Image) -> Image.Image:
    """A silhouette with its holes closed."""
    padded = Image.new("L", (mask.width + 2, mask.height + 2))
    padded.paste(mask, (1, 1))
    ImageDraw.floodfill(padded, (0, 0), 128)
    return padded.crop((1, 1, mask.width + 1, mask.height + 1)).point(lambda value: 0 if value == 128 else 255)


def ink(image: Image.Image, solid: Image.Image) -> float:
    """How much is not background, as a share of that in another picture of the same thing."""
    own, other = (np.asarray(silhouette(picture)).mean() for picture in (image, solid))
    return float(own / max(other, 1e-6))


def overlap(image: Image.Image, other: Image.Image) -> float:
    """Intersection over union of two things, holes closed, each scaled to its bounding box."""
    masks = []
    for picture in (image, other):
        mask = filled(silhouette(picture))
        box = mask.getbbox() or (0, 0, 1, 1)
        masks.append(np.asarray(mask.crop(box).resize((64, 64))) > 127)
    return float((masks[0] & masks[1]).sum() / max((masks[0] | masks[1]).sum(), 1))


TRUE_BOLT = draw(Scene(128, 128, (Thing("bolt", "red", 64, 64, 40),)))


def test_the_measures() -> None:
    """On true pictures: what is filled, what is outlined, what is a bolt and what is not."""
    solid = draw(Scene(128, 128, (Thing("circle", "blue", 50, 60, 30),)))
    outlined = draw(Scene(128, 128, (Thing("circle", "blue", 50, 60, 30),)), outlined=True)
    assert ink(solid, solid) == 1 and ink(outlined, solid) < 0.4
    assert overlap(solid, outlined) > 0.95
    assert overlap(draw(Scene(128, 128, (Thing("bolt", "blue", 40, 70, 25),))), TRUE_BOLT) > 0.85
    assert overlap(solid, TRUE_BOLT) < 0.55


@pytest.mark.parametrize("name", demo_models.NAMES)
def test_outlines(name: str, with_loras: Callable[..., Path]) -> None:
    prompts = [
        f"a large {colour} {shape}"
        for colour, shape in zip(COLOURS, ("circle", "heart", "star", "hexagon"), strict=True)
    ]
    without, outlined = (draw_all(with_loras(name, *loras), prompts) for loras in ((), ("outlined",)))
    shares = [ink(image, solid) for image, solid in zip(outlined, without, strict=True)]
    assert max(shares) < 0.7 and np.mean(shares) < 0.6, shares
    colours = [{thing.colour for thing in look(image)} for image in outlined]
    assert sum(colour in found for colour, found in zip(COLOURS, colours, strict=True)) >= 3


@pytest.mark.parametrize("name", demo_models.NAMES)
def test_bolts(name: str, with_loras: Callable[..., Path]) -> None:
    prompts = [f"a large {colour} bolt" for colour in COLOURS]
    without, bolts = (draw_all(with_loras(name, *loras), prompts) for loras in ((), ("bolt",)))
    shares = [np.median([overlap(image, TRUE_BOLT) for image in images]) for images in (without, bolts)]
    assert shares[1] > 0.55
    assert shares[1] > shares[0] + 0.12
    circles = draw_all(with_loras(name, "bolt"), [f"a large {colour} circle" for colour in COLOURS])
    assert np.median([overlap(image, TRUE_BOLT) for image in circles]) < 0.6  # What it knew is still there.


@pytest.mark.parametrize("name", demo_models.NAMES)
def test_both_at_once(name: str, with_loras: Callable[..., Path]) -> None:
    """Less is drawn than of the bolts by the concept alone, and most of it where they are."""
    prompts = [f"a large {colour} bolt" for colour in COLOURS]
    solid, outlined = (draw_all(with_loras(name, *loras), prompts) for loras in (("bolt",), ("bolt", "outlined")))
    assert np.median([ink(image, other) for image, other in zip(outlined, solid, strict=True)]) < 0.85
    inside = []
    for image, other in zip(outlined, solid, strict=True):
        own, near = (np.asarray(mask) > 0 for mask in (silhouette(image), silhouette(other).filter(MaxFilter(9))))
        inside.append((own & near).sum() / max(own.sum(), 1))
    assert np.median(inside) > 0.7


def test_four_steps(with_loras: Callable[..., Path]) -> None:
    """It sets steps, guidance and schedule, and draws what twenty guided steps draw: nearer than without it."""
    name, prompts = "zimg-tiny-qwen", [f"a large {colour} star on a white background" for colour in COLOURS]
    teacher, student = with_loras(name), with_loras(name, "4steps")
    manifest = Bundle.open(student).manifest
    assert (manifest.defaults.num_inference_steps, manifest.defaults.guidance_scale) == (4, 1)
    assert manifest.scheduler["shift_terminal"] is None
    guided, distilled = draw_all(teacher, prompts), draw_all(student, prompts)
    with Pipeline.open(teacher) as pipeline:
        plain = [
            pipeline(prompt, seed=seed, num_inference_steps=4, guidance_scale=1).images[0]
            for seed, prompt in enumerate(prompts)
        ]

    def error(images: list[Image.Image]) -> float:
        pairs = zip(images, guided, strict=True)
        return float(np.mean([np.square(np.subtract(one, other, dtype=float)).mean() for one, other in pairs]))

    assert error(distilled) < error(plain)
    assert (
        sum(colour in {thing.colour for thing in look(image)} for colour, image in zip(COLOURS, distilled, strict=True))
        >= 3
    )


def test_regions(tmp_path: Path) -> None:
    """Each thing in its mask, of scenes that were never trained on: 93 % of 200."""
    out = tmp_path / "regions"
    given = ("--model", "zimg-tiny-qwen", "--lora", "zimg-tiny-qwen-eligen", "--out", out)
    assert invoke(main, "build", *given, "--quiet").code == 0
    cases = accuracy(out, task="regions", captions=10)
    assert sum(case.right for case in cases) >= 8
    # The page of the documentation: a cell is its masks and what is drawn, each thing in the colour of its prompt.
    page = tmp_path / "page.png"
    table = Path(__file__).parents[2] / "docs" / "demo-regions.csv"
    prompts, inputs = rows_of(table)
    draw_sheet(prompts, page, {}, bundles=[out], inputs=inputs, columns=1)
    pixels = np.asarray(Image.open(page).convert("RGB")).astype(int)
    masks = np.asarray(Image.open(table.parent / "pictures" / "region-left.png"))
    cell = pixels[MARGIN : MARGIN + 128, MARGIN:]
    assert np.array_equal(cell[:, :128, 0] > 128, masks)
    drawn = cell[:, 2 * (128 + GAP) :][:, :128]
    assert (drawn[:, :64] @ [2, -1, -1]).max() > 300 and (drawn[:, 64:] @ [-1, -1, 2]).max() > 200


@pytest.mark.parametrize("lora", demo_models.LORAS)
def test_their_files(lora: str) -> None:
    """In DiffSynth's keys, small, and said to be what they are."""
    path = demo_models.locate_lora(lora)
    assert path.stat().st_size <= 310_000
    assert all(".lora_A.default.weight" in key or ".lora_B.default.weight" in key for key in read_header(path))
    found = lora_summary(lora)
    assert found["families"] == [{"z": "z-image", "qwen": "qwen-image"}[lora.split("-")[2]]]


def test_carried_models_stay_as_they_are() -> None:
    invoke(main, "swap-lora", "zimg-tiny-z", "--lora", "zimg-tiny-z-bolt").assert_refused("comes with zimgkit", 2)
