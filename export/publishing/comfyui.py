"""A bundle as ComfyUI has models: a file for each loader, in a folder as its ``models``, or one file of all.

Names are those that ComfyUI's own loaders tell models by: of transformers the original ones or diffusers', of VAEs
LDM's or Wan's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

from numpy.typing import NDArray

from zimgkit.engines.errors import UsageError
from zimgkit.export.publishing.diffusers import stored_name
from zimgkit.export.publishing.held import HeldTensor, Tensors

FOLDERS = {
    "transformer": "diffusion_models",
    "text_encoder": "text_encoders",
    "vae": "vae",
    "siglip": "clip_vision",
}
"""A component -> the folder of ``models`` that it belongs in."""
MARKS = {"transformer": "model.diffusion_model.", "text_encoder": "text_encoders.{}.transformer.", "vae": "vae."}
"""A component -> what its names begin with in a file of all."""
TEXT_ENCODERS = {"qwen3": "qwen3_4b", "qwen2_5_vl": "qwen25_7b", "qwen2_5_vl_text": "qwen25_7b"}
"""``model_type`` -> what a file of all calls a text encoder."""

ORIGINAL = "all_x_embedder."
"""What a name of a transformer begins with that has original names."""
FUSED = re.compile(r"(.+\.attention)\.to_(q|k|v)\.weight")
TRANSFORMER = (
    (r"(.+\.attention)\.to_out\.0\.", r"\1.out."),
    (r"(.+\.attention)\.norm_(q|k)\.", r"\1.\2_norm."),
    (r"all_x_embedder\.2-1\.", "x_embedder."),
    (r"all_final_layer\.2-1\.", "final_layer."),
)
LDM = (
    (r"(\w+)\.mid_block\.resnets\.0\.", r"\1.mid.block_1."),
    (r"(\w+)\.mid_block\.resnets\.1\.", r"\1.mid.block_2."),
    (r"(\w+)\.mid_block\.attentions\.0\.group_norm\.", r"\1.mid.attn_1.norm."),
    (r"(\w+)\.mid_block\.attentions\.0\.to_(q|k|v)\.", r"\1.mid.attn_1.\2."),
    (r"(\w+)\.mid_block\.attentions\.0\.to_out\.0\.", r"\1.mid.attn_1.proj_out."),
    (r"encoder\.down_blocks\.(\d+)\.resnets\.", r"encoder.down.\1.block."),
    (r"encoder\.down_blocks\.(\d+)\.downsamplers\.0\.", r"encoder.down.\1.downsample."),
    # There the last level comes first.
    *((rf"decoder\.up_blocks\.{i}\.resnets\.", f"decoder.up.{3 - i}.block.") for i in range(4)),
    *((rf"decoder\.up_blocks\.{i}\.upsamplers\.0\.", f"decoder.up.{3 - i}.upsample.") for i in range(4)),
    (r"(.+)\.conv_shortcut\.", r"\1.nin_shortcut."),
    (r"(\w+)\.conv_norm_out\.", r"\1.norm_out."),
)
KERNEL = re.compile(r".+\.attn_1\.(q|k|v|proj_out)\.weight")
"""Matrices that lie in files with LDM's names as kernels, (out, in, 1, 1)."""
WAN = (
    # First: below, what is outside of a residual block becomes a conv1 too.
    *(
        (rf"(.+)\.{name}\.", rf"\1.residual.{i}.")
        for i, name in ((0, "norm1"), (2, "conv1"), (3, "norm2"), (6, "conv2"))
    ),
    (r"(\w+)\.mid_block\.resnets\.0\.", r"\1.middle.0."),
    (r"(\w+)\.mid_block\.attentions\.0\.", r"\1.middle.1."),
    (r"(\w+)\.mid_block\.resnets\.1\.", r"\1.middle.2."),
    (r"(\w+)\.norm_out\.", r"\1.head.0."),
    (r"(\w+)\.conv_out\.", r"\1.head.2."),
    (r"(\w+)\.conv_in\.", r"\1.conv1."),
    (r"quant_conv\.", "conv1."),
    (r"post_quant_conv\.", "conv2."),
    (r"encoder\.down_blocks\.", "encoder.downsamples."),
    # Four levels of three blocks each, and an upsampler between them.
    *((rf"decoder\.up_blocks\.{i}\.upsamplers\.0\.", f"decoder.upsamples.{4 * i + 3}.") for i in range(3)),
    *(
        (rf"decoder\.up_blocks\.{i}\.resnets\.{j}\.", f"decoder.upsamples.{4 * i + j}.")
        for i in range(4)
        for j in range(3)
    ),
    (r"(.+)\.conv_shortcut\.", r"\1.shortcut."),
)


def named(component: str, tensors: Mapping[str, HeldTensor]) -> Tensors:
    """A component's tensors as ComfyUI's files call and cut them.

    Args:
        component: the checkpoint's.
        tensors: all of them, by canonical names.

    Raises:
        UsageError: its network has other blocks than those names are for.
    """
    if component == "transformer":
        is_original = any(name.startswith(ORIGINAL) for name in tensors)
        found = _renamed(_fused(tensors), TRANSFORMER) if is_original else dict(tensors)
    elif component == "vae":
        is_wan = "decoder.norm_out.gamma" in tensors
        found = _renamed(tensors, WAN if is_wan else LDM)
        found = {name: _kernel(tensor) if KERNEL.fullmatch(name) else tensor for name, tensor in found.items()}
    else:
        found = {stored_name(component, name): tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    return found


def of_all(components: Mapping[str, Tensors], text_encoder: Mapping[str, Any]) -> Tensors:
    """The tensors of one file with all components, from :func:`named` ones.

    Args:
        components: component -> its tensors.
        text_encoder: its config.

    Raises:
        UsageError: a component has no place in such a file.
    """
    found: Tensors = {}
    for component, tensors in components.items():
        if component not in MARKS:
            raise UsageError(f"no single file for ComfyUI holds a {component}", "name a folder: --out FOLDER")
        mark = MARKS[component].format(TEXT_ENCODERS[text_encoder["model_type"]])
        found |= {mark + name: tensor for name, tensor in tensors.items()}
    return found


def _renamed(tensors: Mapping[str, HeldTensor], renames: tuple[tuple[str, str], ...]) -> Tensors:
    found: Tensors = {}
    for name, tensor in tensors.items():
        new = name
        for old, template in renames:
            new = re.sub(rf"^{old}", template, new)
        if new in found or new.startswith("decoder.up_blocks."):
            raise UsageError(f"ComfyUI has no name for {name!r}", "write it for diffusers: --format diffusers")
        found[new] = tensor
    return found


def _fused(tensors: Mapping[str, HeldTensor]) -> Tensors:
    """Tensors with those of q, k and v of an attention in one."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        match = FUSED.fullmatch(name)
        if match is None:
            found[name] = tensor
        elif match[2] == "q":
            found[f"{match[1]}.qkv.weight"] = _joined([tensors[f"{match[1]}.to_{key}.weight"] for key in "qkv"])
    return found


def _joined(parts: list[HeldTensor]) -> HeldTensor:
    """Matrices one below the other."""

    def made() -> Iterator[NDArray[Any]]:
        return chain.from_iterable(part.pieces() for part in parts)

    return HeldTensor(parts[0].dtype, (sum(part.shape[0] for part in parts), *parts[0].shape[1:]), made)


def _kernel(tensor: HeldTensor) -> HeldTensor:
    return HeldTensor(tensor.dtype, (*tensor.shape, 1, 1), tensor.pieces)
