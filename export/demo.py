"""Tiny checkpoints with random weights, in the diffusers layout, so that everything runs with no download.

The architectures are the real ones. Their pictures are patterns, for nothing was trained; they show that text, noise,
network and decoder are put together.
"""

from __future__ import annotations

import json
import zlib
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zimgkit.engines.bundle import atomic_folder
from zimgkit.engines.errors import UsageError
from zimgkit.engines.tensors import safetensors
from zimgkit.export.networks.parts import Shapes
from zimgkit.export.networks.registry import FAMILIES, WEIGHT_FILES, module, sources

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
"""Those of Qwen's tokenizers that templates use; the vocabulary before them is the 256 bytes."""
ROLES = {"unk_token": "<|endoftext|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_demo_checkpoint(folder: Path, family: str, *, seed: int = 0, overwrite: bool = False) -> None:
    """Write a tiny random checkpoint, float32, the same for the same seed.

    Args:
        folder: where; diffusers and ``zimg-export build`` both read it.
        family: a name in :data:`zimgkit.export.networks.registry.FAMILIES`.
        seed: of the weights.
        overwrite: replace a checkpoint that is there.

    Raises:
        UsageError: no such family.
        OutputError: the folder exists or cannot be written.
    """
    if family not in FAMILIES:
        raise UsageError(f"no family is called {family!r}", f"choose one of {', '.join(FAMILIES)}")
    configs = import_module(FAMILIES[family].demo).CONFIGS
    with atomic_folder(folder.expanduser().absolute(), overwrite=overwrite, known_by="model_index.json") as work:
        _write_json(work / "model_index.json", configs["model_index"])
        _write_json(work / "scheduler" / "scheduler_config.json", configs["scheduler"])
        _write_tokenizer(work / "tokenizer")
        for component in sources(family):
            shapes: Shapes = module(family, component).checkpoint_shapes(configs[component])
            _write_json(work / component / "config.json", configs[component])
            safetensors.write(
                work / component / f"{WEIGHT_FILES[component]}.safetensors",
                {name: ("float32", shape) for name, shape in shapes.items()},
                {name: [_random(name, shape, seed)] for name, shape in shapes.items()},
                {"format": "pt"},
            )


def _random(name: str, shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
    """Weights that keep activations near one: linears and convolutions by fan-in, norms at one, biases small."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    values = rng.standard_normal(shape, dtype=np.float32)
    if "pad_token" in name:
        return values
    if name.endswith("bias"):
        return np.float32(0.1) * values
    if len(shape) == 1 or "gamma" in name:
        return np.float32(1) + np.float32(0.1) * values
    return values / np.float32(np.sqrt(np.prod(shape[1:])))


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")


def _write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer with Qwen's special tokens and no merges: a token is a byte."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    vocabulary = {character: index for index, character in enumerate(sorted(ByteLevel.alphabet()))}
    vocabulary |= {token: len(vocabulary) + index for index, token in enumerate(SPECIAL_TOKENS)}
    tokenizer: Any = Qwen2Tokenizer(
        vocab=vocabulary,
        merges=[],
        **ROLES,
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
