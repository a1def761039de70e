"""LoRAs with random numbers in every format, and what they do to the weights of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from zimgkit.export.checkpoints.checkpoint import open_checkpoint
from zimgkit.export.lora.merge import Merge, merge, read_loras
from zimgkit.export.lora.names import names_of
from zimgkit.export.weights.stream import Wanted, pieces

Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Module -> down (rank, in) and up (out, rank)."""

TARGETS = {
    "z-image": ("to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3", "adaLN_modulation.0"),
    "qwen-image": ("to_q", "add_k_proj", "to_out.0", "to_add_out", "img_mlp.net.0.proj", "txt_mlp.net.2", "img_mod.1",
                   "txt_mod.1", "img_in", "proj_out", "norm_out.linear"),
}  # fmt: skip


def modules(state: Mapping[str, torch.Tensor], ends: Iterable[str]) -> dict[str, torch.Tensor]:
    """Those linears of a state dict whose names end so."""
    return {
        name.removesuffix(".weight"): value
        for name, value in state.items()
        if value.ndim == 2 and name.removesuffix(".weight").endswith(tuple(ends))
    }


def pairs(weights: Mapping[str, torch.Tensor], rank: int = 4, seed: int = 0) -> Pairs:
    """Random matrices, as large together as the weights."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / rank**0.5

    return {
        name: (random(rank, value.shape[1]) * value.shape[1] ** -0.25, random(value.shape[0], rank) * 0.3)
        for name, value in weights.items()
    }


def alpha_of(index: int) -> float:
    """Other than any rank, and another one for each module."""
    return 1.0 + index % 3


def kohya(found: Pairs) -> dict[str, torch.Tensor]:
    """``lora_unet_…`` with alpha."""
    state = {}
    for index, (name, (down, up)) in enumerate(found.items()):
        key = "lora_unet_" + name.replace(".", "_")
        state |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        state[f"{key}.alpha"] = torch.tensor(alpha_of(index))
    return state


def lightx2v(found: Pairs) -> dict[str, torch.Tensor]:
    """Bare names, down and up, alpha."""
    state = {}
    for index, (name, (down, up)) in enumerate(found.items()):
        state |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        state[f"{name}.alpha"] = torch.tensor(alpha_of(index))
    return state


def letters(prefix: str, adapter: str = "") -> Callable[[Pairs], dict[str, torch.Tensor]]:
    """``lora_A`` and ``lora_B`` after a prefix, perhaps with an adapter's name."""

    def write(found: Pairs) -> dict[str, torch.Tensor]:
        state = {}
        for name, (down, up) in found.items():
            state[f"{prefix}{name}.lora_A{adapter}.weight"] = down
            state[f"{prefix}{name}.lora_B{adapter}.weight"] = up
        return state

    return write


def comfy_with_alpha(found: Pairs) -> dict[str, torch.Tensor]:
    """``diffusion_model.`` and alpha."""
    alphas = {f"diffusion_model.{n}.alpha": torch.tensor(alpha_of(i)) for i, n in enumerate(found)}
    return letters("diffusion_model.")(found) | alphas


def dots(found: Pairs) -> dict[str, torch.Tensor]:
    """``diffusion_model.….to.q.lora.down.weight``, and ``qkv`` and ``out`` that say the same once more."""
    state = {}
    for bare, (down, up) in found.items():
        name = dotted = f"diffusion_model.{bare}"
        for letter in "qkv":
            dotted = dotted.replace(f".to_{letter}", f".to.{letter}")
        state |= {f"{dotted}.lora.down.weight": down, f"{dotted}.lora.up.weight": up}
        if name.endswith("to_out.0"):
            out = name.replace("to_out.0", "out")
            state |= {f"{out}.lora.down.weight": down.clone(), f"{out}.lora.up.weight": up.clone()}
        if name.endswith("to_q"):
            fused = name.replace("to_q", "qkv")
            state |= {f"{fused}.lora.down.weight": down.clone(), f"{fused}.lora.up.weight": torch.cat([up] * 3)}
    return state


FORMATS: dict[str, Callable[[Pairs], dict[str, torch.Tensor]]] = {
    "diffusers": letters("transformer."),
    "DiffSynth": letters("", ".default"),
    "kohya": kohya,
    "lightx2v": lightx2v,
    "ComfyUI": letters("diffusion_model."),
    "ComfyUI with alpha": comfy_with_alpha,
}


def write(path: Path, state: Mapping[str, torch.Tensor], **metadata: object) -> Path:
    """A safetensors file; metadata that is no string becomes JSON."""
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    save_file({key: value.contiguous() for key, value in state.items()}, path, texts or None)
    return path


def found_by(checkpoint: Path, *arguments: object, **options: bool) -> Merge:
    """What LoRAs do to a checkpoint."""
    opened = open_checkpoint(str(checkpoint))
    loras = read_loras([str(argument) for argument in arguments])
    return merge(loras, names_of(opened), opened.family, **options)


def merged_by(checkpoint: Path, *arguments: object, component: str = "transformer") -> dict[str, torch.Tensor]:
    """The tensors that LoRAs change, merged, by their canonical names."""
    addends = found_by(checkpoint, *arguments).addends.get(component, {})
    infos = open_checkpoint(str(checkpoint)).tensors(component)
    result = {}
    for name, own in addends.items():
        want = Wanted(infos[name], infos[name].shape, addends=own)
        values = np.concatenate([*pieces(want, "float32")]).reshape(want.shape)
        result[name] = torch.from_numpy(values)
    return result


def assert_near(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], bound: float = 1e-5) -> None:
    """The same tensors, each within a relative error."""
    assert sorted(found) == sorted(expected)
    for name, value in expected.items():
        error = (found[name] - value).norm() / value.norm()
        assert error < bound, (name, float(error))
