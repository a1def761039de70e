"""LoRAs in the weights that are trained on: held there, to be taken off at use, or the adapters to go on from."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zimgkit.engines.errors import LoraError, UsageError
from zimgkit.engines.tensors.safetensors import SafetensorsError, read_header
from zimgkit.export.checkpoints.checkpoint import Checkpoint
from zimgkit.export.lora.merge import BACKBONE, merge, read_loras
from zimgkit.export.lora.names import names_of
from zimgkit.export.lora.source import find_lora
from zimgkit.export.weights.addends import Addend, Matrix, merged
from zimgkit.training.lora import LoraLinear

ADAPTER = re.compile(r"(?:transformer\.|diffusion_model\.)?(?P<module>.+)\.(?P<part>lora_[AB])(?:\.default)?\.weight")


def hold_lora(transformer: Any, checkpoint: Checkpoint, lora: str) -> None:
    """Add a LoRA to a transformer's weights, as building a bundle with it would.

    Args:
        transformer: of diffusers, of the checkpoint.
        checkpoint: whose names the LoRA's modules are looked up in.
        lora: as ``zimg-export build --lora`` takes it.

    Raises:
        LoraError: there is none, it is of another family or size, or it changes more than the transformer.
    """
    found = merge(read_loras([lora]), names_of(checkpoint), checkpoint.family)
    if others := sorted(found.addends.keys() - {BACKBONE}):
        raise LoraError(
            f"{lora} changes the {others[0]} too", f"one that is held while training changes the {BACKBONE} alone"
        )
    parameters = dict(transformer.named_parameters())
    with torch.no_grad():
        for name, addends in found.addends.get(BACKBONE, {}).items():
            parameters[name].copy_(_with(parameters[name], addends))


def _with(weight: Tensor, addends: Sequence[Addend]) -> Tensor:
    base: Matrix = weight.float().reshape(len(weight), -1).cpu().numpy()

    def read(start: int, stop: int) -> Matrix:
        return base[start:stop]

    return torch.from_numpy(merged(read, [(0, len(base))], addends)(0, len(base))).reshape(weight.shape)


def read_adapters(lora: str) -> tuple[dict[str, dict[str, Tensor]], int]:
    """The matrices of a LoRA in the keys that this trainer writes, DiffSynth's, or in diffusers' or ComfyUI's.

    Returns:
        Module -> ``"lora_A"`` (rank, in) and ``"lora_B"`` (out, rank), float32; and the rank.

    Raises:
        LoraError: there is no such file, or it has other keys or several ranks.
    """
    from safetensors.torch import load_file

    path: Path = find_lora(lora).path
    try:
        header = read_header(path)
    except (OSError, SafetensorsError) as error:
        raise LoraError(f"{path} cannot be read ({error})", "fetch it again") from None
    hint = "training goes on from LoRAs of one rank in DiffSynth's keys, diffusers' or ComfyUI's, without alphas"
    modules: dict[str, dict[str, Tensor]] = {}
    tensors = load_file(path)
    for key in header:
        match = ADAPTER.fullmatch(key)
        if match is None:
            raise LoraError(f"{path}: {key!r} is no key of an adapter", hint)
        modules.setdefault(match["module"], {})[match["part"]] = tensors[key].float()
    ranks = {parts["lora_A"].shape[0] if len(parts) == 2 else 0 for parts in modules.values()}
    if len(ranks) != 1 or 0 in ranks:
        raise LoraError(f"{path} has no single rank", hint)
    return modules, ranks.pop()


def begin_with(transformer: Any, modules: dict[str, dict[str, Tensor]]) -> None:
    """Give adapters the matrices of a file.

    Args:
        transformer: with an adapter beside each of these modules.
        modules: as :func:`read_adapters` gives them.

    Raises:
        UsageError: shapes do not fit.
    """
    with torch.no_grad():
        for name, parts in modules.items():
            adapter: nn.Module = transformer.get_submodule(name)
            if not isinstance(adapter, LoraLinear):
                raise UsageError(
                    f"--lora_checkpoint adapts {name}, which has no adapter here", "train it for this model"
                )
            for part, value in parts.items():
                parameter: nn.Parameter = getattr(adapter, part)
                if parameter.shape != value.shape:
                    raise UsageError(
                        f"--lora_checkpoint: {name} has {part} {tuple(value.shape)}, not {tuple(parameter.shape)}",
                        "it was trained for a model of another size",
                    )
                parameter.copy_(value)
