"""What ``--lora`` names: a file, a folder or a file on a hub, and a scale."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

from zimgkit.engines.errors import LoraError, UsageError
from zimgkit.export.checkpoints.named_files import (
    SUFFIX,
    address_of,
    fetch_file,
    is_within,
    only_file_in,
    refuse_pickle,
)
from zimgkit.export.checkpoints.urls import PICKLES
from zimgkit.runtime import demo_models

USUAL = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
"""What diffusers and peft call the file in a folder that they save."""
HINT = "name a file, a folder, a hub's owner/name/file.safetensors or its URL, and a scale after a colon if any"


@dataclass(frozen=True)
class LoraFile:
    """A LoRA's file on this machine."""

    path: Path
    source: str
    """The path, or how its hub calls it."""
    scale: float = 1.0


def find_lora(argument: str, hub_name: str = "huggingface") -> LoraFile:
    """Find the file that an argument names, and fetch it if it is on a hub.

    Args:
        argument: ``FILE``, ``FOLDER``, ``owner/name/file.safetensors``, ``owner/name:file.safetensors``, the URL of a
            file on a hub, or the name of one that zimgkit carries; and ``:SCALE`` after it for another scale than 1.
            What exists as a path is one.
        hub_name: ``"huggingface"`` or ``"modelscope"``.

    Raises:
        UsageError: the scale is no finite number.
        LoraError: there is no such file, it is a pickle, or a folder holds several.
        DownloadError: it cannot be fetched.
    """
    name, scale = _split_scale(argument)
    path = _expanded(name)
    if path.is_dir():
        path = only_file_in(path, USUAL, LoraError, HINT)
    elif not path.is_file():
        if (found := address_of(name, hub_name)) is None:
            raise LoraError(f"there is no LoRA {name!r}", HINT)
        address, name = found
        refuse_pickle(address.path, LoraError)
        if not is_within(address):
            raise LoraError(f"{name!r} does not exist, and on a hub a LoRA is a {SUFFIX} file", HINT)
        if (file := fetch_file(address)) is None:
            raise LoraError(f"{address.model_id} has no file {address.path!r}", "check the name of both")
        return LoraFile(file, name, scale)
    refuse_pickle(path.name, LoraError)
    return LoraFile(path, str(path.absolute()), scale)


def _expanded(name: str) -> Path:
    return Path(name).expanduser() if name.startswith("~/") else demo_models.locate_lora(name)


def _split_scale(argument: str) -> tuple[str, float]:
    head, colon, tail = argument.rpartition(":")
    if not colon or os.path.lexists(_expanded(argument)):
        return argument, 1.0
    try:
        scale = float(tail)
    except ValueError:
        if tail.startswith("//") or (tail.endswith((SUFFIX, *PICKLES)) and not os.path.lexists(_expanded(head))):
            return argument, 1.0
        raise UsageError(f"the scale of {head} is {tail!r}, which is no number", f"such as {head}:0.8") from None
    if not math.isfinite(scale):
        raise UsageError(f"the scale of {head} is {tail}", "give a finite number")
    return head, scale
