"""The checkpoints zimgkit knows by name: where each lives, and what it recommends."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zimgkit.engines.bundle import Defaults
from zimgkit.engines.errors import CheckpointError
from zimgkit.export.networks.registry import FAMILIES

SERVED = tuple(entry for family in FAMILIES.values() for entry in family.served)
"""The checkpoints that zimgkit serves."""
PLANNED = tuple(hub_id for family in FAMILIES.values() for hub_id in family.planned)
"""Hub ids of relatives of theirs that zimgkit will serve later."""
GENERATORS = {file.rpartition("/")[0]: name for family in FAMILIES.values() for name, file in family.generators.items()}
"""Hub ids of what makes LoRAs of pictures -> the short name of the checkpoint that those are for."""
LORAS = {hub_id: name for family in FAMILIES.values() for hub_id, name in family.loras.items()}
"""Hub ids of LoRAs -> the short name of the checkpoint they are for."""
CONTROLNETS = {known.hub_id: known for family in FAMILIES.values() for known in reversed(family.known_controls)}
"""Likewise of ControlNets -> the first of its files."""


def resolve(model: str) -> str:
    """The hub id that a short name or a hub id stands for, in any case of letters.

    Args:
        model: a short name or a hub id. A hub id the catalog does not know is taken as is.

    Raises:
        CheckpointError: a short name that is not known, no checkpoint, or a model that zimgkit does not serve yet.
    """
    wanted = model.casefold()
    for hub_id, checkpoint in LORAS.items():
        if wanted in (hub_id.casefold(), _last(hub_id).casefold()):
            hint = f"build it with --model {checkpoint} --lora {hub_id}/model.safetensors"
            raise CheckpointError(f"{_last(hub_id)} is a LoRA", hint)
    for hub_id, known in CONTROLNETS.items():
        if wanted in (*(one.casefold() for one in known.ids), _last(hub_id).casefold()):
            hint = f"build it with --model {known.checkpoint} --controlnet {hub_id}/{known.file}"
            raise CheckpointError(f"{_last(hub_id)} is a ControlNet", hint)
    for hub_id, checkpoint in GENERATORS.items():
        if wanted in (hub_id.casefold(), _last(hub_id).casefold()):
            hint = f"make one with: zimg-export i2l {checkpoint} PICTURE --out style.safetensors"
            raise CheckpointError(f"{_last(hub_id)} makes LoRAs of pictures", hint)
    names = ", ".join(entry.name for entry in SERVED)
    for hub_id in (*(entry.hub_id for entry in SERVED), *PLANNED):
        if wanted in (hub_id.casefold(), _last(hub_id).casefold()):
            if hub_id in PLANNED:
                raise CheckpointError(f"zimgkit does not serve {_last(hub_id)} yet", f"it serves {names}")
            return hub_id
    if "/" in model:
        return model
    short = {_last(hub_id).casefold(): _last(hub_id) for hub_id in (*PLANNED, *(entry.hub_id for entry in SERVED))}
    close = [short[match] for match in difflib.get_close_matches(wanted, short, n=3)]
    guess = f"did you mean {' or '.join(close)}? " if close else ""
    raise CheckpointError(
        f"no checkpoint is called {model!r}", f"{guess}name a local folder, a hub id (owner/name), or one of {names}"
    )


def short_name(folder: str | os.PathLike[str]) -> str:
    """What to call the checkpoint in a folder: the folder's name, or the model's in the cache of a hub.

    ``.../models--owner--name/snapshots/0b1c`` and ``.../owner--name/snapshots/master`` are the caches of
    huggingface_hub and of modelscope.
    """
    path = Path(os.path.normpath(Path(folder).absolute()))
    in_cache = path.parent.name == "snapshots" and "--" in path.parent.parent.name
    name = path.parent.parent.name.rpartition("--")[2] if in_cache else path.name
    return next((entry.name for entry in SERVED if entry.name.casefold() == name.casefold()), name)


def defaults_for(
    folder: str | os.PathLike[str], family: str, scheduler_config: Mapping[str, Any], pipeline: str = ""
) -> Defaults:
    """The defaults of the known checkpoint that a folder holds or most likely derives from.

    Args:
        folder: the checkpoint's folder or short name.
        family: its name.
        scheduler_config: its ``scheduler_config.json``, whose ``shift`` tells where the name says nothing.
        pipeline: what diffusers calls its pipeline.
    """
    row = FAMILIES[family]
    known = {entry.name: entry.defaults for entry in (*row.served, row.carried)}
    known |= {name: editor.defaults for name, editor in row.small_editors.items()}
    name = short_name(folder)
    if name not in known:
        name = row.bases.get(pipeline) or row.shifts.get(scheduler_config.get("shift", 0.0), row.base)
    return known[name]


def _last(hub_id: str) -> str:
    return hub_id.rpartition("/")[2]
