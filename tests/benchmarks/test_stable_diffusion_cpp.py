from __future__ import annotations

import sys

import numpy as np
import pytest
import stable_diffusion_cpp as benchmark
from clock import COMPONENTS, WHOLE, Spent
from safetensors.numpy import load_file, save_file

LOG = """\
[INFO ] stable-diffusion.cpp:219  - loading diffusion model from 'transformer.gguf'
[INFO ] stable-diffusion.cpp:3367 - generate_image 64x64
[INFO ] stable-diffusion.cpp:3168 - get_learned_condition completed, taking 0.10s
[INFO ] stable-diffusion.cpp:3401 - generating image: 1/1 - seed 0
  |==================================================| 1/1 - 1.00s/it
[INFO ] stable-diffusion.cpp:3432 - sampling completed, taking 1.00s
[INFO ] stable-diffusion.cpp:3450 - generating 1 latent images completed, taking 1.01s
[INFO ] stable-diffusion.cpp:3208 - latent 1 decoded, taking 0.40s
[INFO ] stable-diffusion.cpp:3212 - decode_first_stage completed, taking 0.40s
[INFO ] stable-diffusion.cpp:3591 - generate_image completed in 1.52s
[INFO ] main.cpp:800 - save result image to 'picture.png'
"""
"""As the program of July 2026 writes it."""
PROGRAM = f"""#!{sys.executable}
import sys
from pathlib import Path
from PIL import Image

option = dict(zip(sys.argv[1:], sys.argv[2:]))
if option.get("-M") == "convert":
    assert Path(option["-m"]).exists()
    Path(option["-o"]).write_text(option["--type"])
else:
    print({LOG!r})
    Image.new("RGB", (int(option["-W"]), int(option["-H"])), (255, 0, 51)).save(option["-o"])
"""


@pytest.fixture
def program(tmp_path):
    def write(text):
        path = tmp_path / "sd-cli"
        path.write_text(text)
        path.chmod(0o755)
        return path

    return write


def checkpoint(folder):
    rows = {"to_q": 0.0, "to_k": 1.0, "to_v": 2.0, "to_out.0": 3.0, "norm_q": 4.0}
    tensors = {f"layers.0.attention.{name}.weight": np.full((2, 3), value, np.float32) for name, value in rows.items()}
    parts = {
        "transformer/diffusion_pytorch_model": tensors,
        "text_encoder/model": {"embed_tokens.weight": np.ones((4, 3), np.float32)},
        "vae/diffusion_pytorch_model": {"decoder.bias": np.zeros(2, np.float32)},
    }
    for name, part in parts.items():
        path = folder / f"{name}.safetensors"
        path.parent.mkdir(parents=True)
        save_file(part, path)
    return folder


def test_times_are_taken_from_the_log():
    lines = LOG.splitlines()
    found = benchmark.components((line, Spent(10 + index, 100 + 2 * index)) for index, line in enumerate(lines))
    assert found == {
        "text encoder": Spent(1, 2),
        "denoising step": Spent(3, 6),
        "VAE decoder": Spent(3, 6),
        WHOLE: Spent(8, 16),
    }


@pytest.mark.parametrize("kind", benchmark.TYPES)
def test_a_checkpoint_is_converted_once(kind, program, tmp_path):
    model = checkpoint(tmp_path / "checkpoint")
    files = benchmark.convert(program(PROGRAM), model, tmp_path, kind)
    fused = load_file(tmp_path / "transformer-f32.safetensors")
    names = [f"layers.0.attention.{name}.weight" for name in ("norm_q", "qkv", "to_out.0")]
    assert sorted(fused) == names
    np.testing.assert_array_equal(fused[names[1]], np.repeat(np.float32([[0, 1, 2]]).T, [2, 2, 2], 0) * np.ones(3))
    assert list(load_file(tmp_path / "text_encoder-f32.safetensors")) == ["model.embed_tokens.weight"]
    assert files["vae"] == model / "vae" / "diffusion_pytorch_model.safetensors"
    if kind != "f32":
        assert [files[part].read_text() for part in benchmark.PREFIXES] == [kind] * 2
    again = benchmark.convert(program("#!/bin/false\n"), model, tmp_path, kind)
    assert again == files


def test_a_picture_and_its_times(program, tmp_path):
    model = checkpoint(tmp_path / "checkpoint")
    files = benchmark.convert(program(PROGRAM), model, tmp_path, "q8_0")
    image, spent = benchmark.draw(tmp_path / "sd-cli", files, "a", 64, 1)
    assert image.shape == (1, 64, 64, 3)
    np.testing.assert_allclose(image[0, 0, 0], (1, 0, 0.2))
    assert set(spent) == {*COMPONENTS, WHOLE}
    assert all(times.seconds >= 0 and times.cpu_seconds >= 0 for times in spent.values())


def test_a_program_that_fails_is_quoted(program, tmp_path):
    files = {"transformer": tmp_path / "transformer.gguf"}
    with pytest.raises(RuntimeError, match=r"sd-cli ended with 1: \[ERROR\] wrong shape"):
        benchmark.draw(program("#!/bin/sh\necho '[ERROR] wrong shape' >&2; exit 1\n"), files, "a", 64, 1)
    with pytest.raises(RuntimeError, match="sd-cli ended with 0: something new"):
        benchmark.draw(program("#!/bin/sh\necho 'something new'\n"), files, "a", 64, 1)
