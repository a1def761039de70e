"""The models that zimgkit carries, as who has just installed it meets them."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.commands import invoke
from zimgkit.engines.bundle import Bundle
from zimgkit.engines.errors import BundleError
from zimgkit.export.cli.main import main
from zimgkit.runtime import Pipeline, demo_models
from zimgkit.runtime.commands.cli import main as run
from zimgkit.runtime.diffusion.latents import normalize
from zimgkit.runtime.inputs import read_input
from zimgkit.training.judge import Present, Related, judge
from zimgkit.training.world.drawing import draw
from zimgkit.training.world.sampling import sample

PROMPT = "a red circle left of a blue square"
CLAIMS = [
    Present(("circle", "red")),
    Present(("square", "blue")),
    Related(("circle", "red"), "left of", ("square", "blue")),
]
WITHOUT_TORCH = """
import sys
for name in ("torch", "transformers", "diffusers", "onnx", "huggingface_hub"):
    sys.modules[name] = None
from zimgkit.runtime.commands.cli import main
main()
"""


def test_a_name_is_a_model_where_no_path_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in demo_models.NAMES:
        assert Bundle.open(demo_models.locate(name)).manifest.name == name
    assert demo_models.locate("some/bundle") == Path("some/bundle")
    (tmp_path / "zimg-tiny-z").mkdir()
    assert demo_models.locate("zimg-tiny-z") == Path("zimg-tiny-z")
    with pytest.raises(BundleError, match="is not a bundle"):
        Pipeline.open("zimg-tiny-z")


@pytest.mark.parametrize("given", ["edit", "strength", "mask", "from"])
def test_a_picture_is_edited_where_nothing_says_otherwise(given: str, tmp_path: Path) -> None:
    """Where no bundle is named, by the small model that edits, and without PyTorch."""
    Image.new("RGB", (128, 128), "white").save(tmp_path / "photo.png")
    options = {
        "edit": (),
        "strength": ("--strength", "0.6"),
        "mask": ("--mask", "photo.png"),
        "from": ("--from-image", "made.png"),
    }[given]
    call = [
        "generate",
        "add a red circle in the top left corner",
        "--seed",
        "0",
        "--num-inference-steps",
        "2",
        "--json",
    ]
    if given == "from":
        invoke(run, *call[:-1], "--bundle", "zimg-tiny-qwen", "-o", tmp_path / "made.png")
    else:
        options = ("--image", "photo.png", *options)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *call, *options],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    drawn = {"edit": "zimg-tiny-qwen-edit", "from": "zimg-tiny-qwen"}.get(given, "zimg-tiny-z")
    assert json.loads(done.stdout)["parameters"]["model"] == drawn


@pytest.mark.parametrize("bundle", [(), ("--bundle", "zimg-tiny-qwen")])
def test_it_draws_what_it_is_asked_for_without_torch(bundle: tuple[str, ...], tmp_path: Path) -> None:
    command = ["generate", *bundle, "--prompt", PROMPT, "--seed", "0", "--json"]
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *command], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    seconds = time.monotonic() - started
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["parameters"]["model"] == (bundle[1] if bundle else "zimg-tiny-z")
    verdict = judge(Image.open(tmp_path / "out.png"), CLAIMS)
    assert verdict.right, verdict
    assert seconds < 30  # Under 5 on an idle machine; tests share theirs.


@pytest.mark.parametrize("name", demo_models.NAMES)
@pytest.mark.parametrize("size", [(128, 192), (192, 128), (160, 128)])
def test_other_aspect_ratios(name: str, size: tuple[int, int]) -> None:
    with Pipeline.open(name) as pipeline:
        negative = pipeline.bundle.manifest.defaults.negative_prompt
        picture = pipeline("a green star", height=size[0], width=size[1], seed=1, negative_prompt=negative).images[0]
    assert picture.size == size[::-1]
    assert judge(picture, [Present(("star", "green"))]).right


@pytest.mark.parametrize("name", demo_models.NAMES)
def test_a_negative_prompt_drives_away_what_it_names_the_more_the_stronger_guidance_is(name: str) -> None:
    """Where nothing is asked for, pictures are bluer with red things as the negative prompt than with blue ones."""
    with Pipeline.open(name) as pipeline:

        def redness(colour: str, cfg_scale: float) -> float:
            negative = f"a large {colour} square"
            pictures = pipeline(
                "", cfg_scale=cfg_scale, seed=0, negative_prompt=negative, num_images_per_prompt=6
            ).images
            red, _, blue = np.mean([np.asarray(picture, float) for picture in pictures], axis=(0, 1, 2))
            return float(red - blue)

        none, some, much = (redness("blue", scale) - redness("red", scale) for scale in (1.0, 1.5, 2.0))
    assert none == 0
    assert some > 10
    assert much > some + 5


@pytest.mark.parametrize("name", demo_models.NAMES)
def test_it_is_a_checkpoint_too(name: str) -> None:
    """The reference's own pipelines load the same folder, and draw the same picture."""
    import torch
    from diffusers import DiffusionPipeline

    reference = DiffusionPipeline.from_pretrained(demo_models.locate(name), torch_dtype=torch.float32)
    reference.set_progress_bar_config(disable=True)
    with Pipeline.open(name) as pipeline:
        scale = pipeline.bundle.manifest.defaults.guidance_scale
        key = "guidance_scale" if name == "zimg-tiny-z" else "true_cfg_scale"
        call = {"num_inference_steps": 6, "height": 128, "width": 128, key: scale, "negative_prompt": " "}
        own = pipeline(PROMPT, seed=0, output_type="np", **call).images
    theirs = reference(PROMPT, generator=torch.Generator().manual_seed(0), output_type="np", **call).images
    # A bundle in bfloat16 keeps Qwen-Image's modulation table in it, which shows at the edges of things.
    largest, mean = (1e-4, 1e-6) if name == "zimg-tiny-z" else (2e-2, 1e-4)
    assert np.abs(own - theirs).max() < largest
    assert np.abs(own - theirs).mean() < mean


@pytest.mark.parametrize(("backend", "bound"), [("onnxruntime", 1e-5), ("torch", 1e-5), ("openvino", 2e-2)])
@pytest.mark.parametrize("name", demo_models.NAMES)
@pytest.mark.usefixtures("torch_in_float32")
def test_its_encoder_too(name: str, backend: str, bound: float) -> None:
    """What the reference's autoencoder makes of a picture, on the same weights."""
    import torch
    from diffusers import AutoencoderKL, AutoencoderKLQwenImage

    kind = AutoencoderKL if name == "zimg-tiny-z" else AutoencoderKLQwenImage
    reference = kind.from_pretrained(demo_models.locate(name), subfolder="vae", torch_dtype=torch.float32)
    picture = draw(sample(0, "test", count=2, size=(192, 128)))
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1
    with Pipeline.open(name, backend=backend, device="cpu") as pipeline, torch.no_grad():
        found = pipeline.session.encoder.encode(read_input(picture, "image"), 128, 192, "cpu")
        distribution = reference.encode(pixels[:, :, None] if kind is AutoencoderKLQwenImage else pixels).latent_dist
        own = pipeline.session.family.normalization
        expected = normalize(distribution.mean.reshape(1, 16, 16, 24).numpy(), own)
    expected = pipeline.session.family.from_noise(expected.reshape(1, *pipeline.session.family.noise_shape(128, 192)))
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < bound


def test_they_are_small() -> None:
    """With the LoRAs, as a wheel carries them."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as wheel:
        for file in demo_models.FOLDER.rglob("*.*"):
            wheel.write(file)
    assert len(packed.getvalue()) <= 14e6


def test_carried_models_stay_as_they_are() -> None:
    invoke(main, "swap-lora", "zimg-tiny-z", "--lora", "any.safetensors").assert_refused("comes with zimgkit", 2)
