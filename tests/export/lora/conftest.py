"""LoRAs for the tiny checkpoints, and copies of bundles to swap them in."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from filelock import FileLock
from safetensors.torch import load_file

from tests.export.lora import lora_files

TEXT = "text_encoder.layers.0.self_attn.q_proj"


@pytest.fixture(scope="session")
def loras_of(shared_folder, checkpoint_of):
    """``loras_of(family)``: three LoRAs, the first for the transformer and the text encoder."""

    def make(family: str) -> list[Path]:
        folder = shared_folder / f"loras-{family}"
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                (file,) = (checkpoint_of(family) / "transformer").glob("*.safetensors")
                state, ends = load_file(file), lora_files.TARGETS[family]
                folder.mkdir()
                for seed, own in enumerate((ends, ends[1:4], ends[2:])):
                    found = lora_files.pairs(lora_files.modules(state, own), seed=seed)
                    stored = lora_files.letters("transformer.")(found)
                    if not seed:
                        stored |= lora_files.letters("")(lora_files.pairs({TEXT: state_of(checkpoint_of(family))}))
                    lora_files.write(folder / f"{seed}.safetensors", stored)
        return sorted(folder.glob("*.safetensors"))

    return make


def state_of(checkpoint):
    (file,) = (checkpoint / "text_encoder").glob("*.safetensors")
    return next(value for name, value in load_file(file).items() if name.endswith("0.self_attn.q_proj.weight"))


@pytest.fixture
def copy_of(tmp_path):
    def copy(bundle: Path, name: str = "bundle") -> Path:
        return Path(shutil.copytree(bundle, tmp_path / name, copy_function=os.link))

    return copy
