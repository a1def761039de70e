"""The checkpoints zimgkit knows by name: which family each is of, where it lives, and what it recommends.

The defaults are those of the model cards and official scripts, in diffusers' convention of the guidance scale:
https://github.com/Tongyi-MAI/Z-Image (Turbo: 8 steps, no guidance), https://github.com/QwenLM/Qwen-Image
(50 steps, true guidance 4.0, 1328x1328, a single space as the negative prompt).
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zimgkit.engines.bundle import Defaults
from zimgkit.engines.errors import CheckpointError
from zimgkit.runtime import demo_models


@dataclass(frozen=True)
class Entry:
    """A checkpoint that zimgkit serves. Its short name is the last part of its hub id."""

    hub_id: str
    """The same on Hugging Face and on ModelScope; a name alone for what comes with zimgkit."""
    family: str
    defaults: Defaults

    @property
    def name(self) -> str:
        """The short name, such as ``"Z-Image-Turbo"``."""
        return _last(self.hub_id)


SERVED = (
    Entry("Tongyi-MAI/Z-Image-Turbo", "z-image", Defaults(8, 0.0, 1024, 1024)),
    Entry("Tongyi-MAI/Z-Image", "z-image", Defaults(50, 4.0, 1024, 1024)),
    Entry("Qwen/Qwen-Image", "qwen-image", Defaults(50, 4.0, 1328, 1328, " ")),
    # Its authors use a list of unwanted qualities, in Chinese, as the negative prompt; a space is the neutral choice.
    Entry("Qwen/Qwen-Image-2512", "qwen-image", Defaults(50, 4.0, 1328, 1328, " ")),
)
"""In each family the base checkpoint's name is the family's own, and its defaults are the family's."""

CARRIED = (
    Entry(demo_models.NAMES[0], "z-image", Defaults(20, 0.5, 128, 128)),
    Entry(demo_models.NAMES[1], "qwen-image", Defaults(20, 1.5, 128, 128, " ")),
)
"""The small models that come with zimgkit; they are on no hub."""

PLANNED = (
    "Qwen/Qwen-Image-Edit",
    "Qwen/Qwen-Image-Edit-2509",
    "Qwen/Qwen-Image-Edit-2511",
    "Qwen/Qwen-Image-Layered",
    "DiffSynth-Studio/Qwen-Image-EliGen",
    "DiffSynth-Studio/Qwen-Image-EliGen-V2",
    "DiffSynth-Studio/Qwen-Image-EliGen-Poster",
    "DiffSynth-Studio/Qwen-Image-Distill-Full",
    "DiffSynth-Studio/Qwen-Image-Distill-LoRA",
    "DiffSynth-Studio/Qwen-Image-Blockwise-ControlNet-Canny",
    "DiffSynth-Studio/Qwen-Image-Blockwise-ControlNet-Depth",
    "DiffSynth-Studio/Qwen-Image-Blockwise-ControlNet-Inpaint",
    "DiffSynth-Studio/Qwen-Image-In-Context-Control-Union",
    "DiffSynth-Studio/Qwen-Image-Edit-Lowres-Fix",
    "Tongyi-MAI/Z-Image-Omni-Base",
    "Tongyi-MAI/Z-Image-Edit",
    "DiffSynth-Studio/Z-Image-i2L",
    "DiffSynth-Studio/Z-Image-Omni-Base-i2L",
    "DiffSynth-Studio/Z-Image-Turbo-DistillPatch",
    "PAI/Z-Image-Turbo-Fun-Controlnet-Union-2.1",
)
"""Hub ids of relatives of these models that zimgkit will serve later."""


def resolve(model: str) -> str:
    """The hub id that a short name or a hub id stands for, in any case of letters.

    Args:
        model: a short name such as ``"z-image-turbo"``, or a hub id. A hub id the catalog does not know is taken as is.

    Raises:
        CheckpointError: a short name that is not known, or a model that zimgkit does not serve yet.
    """
    wanted = model.casefold()
    names = ", ".join(entry.name for entry in SERVED)
    for hub_id in (*(entry.hub_id for entry in SERVED), *PLANNED):
        if wanted in (hub_id.casefold(), _last(hub_id).casefold()):
            if hub_id in PLANNED:
                raise CheckpointError(f"zimgkit does not serve {_last(hub_id)} yet", f"it serves {names}")
            return hub_id
    if "/" in model:
        return model
    known = {_last(hub_id).casefold(): _last(hub_id) for hub_id in (*PLANNED, *(entry.hub_id for entry in SERVED))}
    close = [known[match] for match in difflib.get_close_matches(wanted, known, n=3)]
    guess = f"did you mean {' or '.join(close)}? " if close else ""
    raise CheckpointError(
        f"no checkpoint is called {model!r}", f"{guess}name a local folder, a hub id (owner/name), or one of {names}"
    )


def short_name(folder: str | os.PathLike[str]) -> str:
    """What to call the checkpoint in a folder: the folder's name, or the model's in the cache of a hub.

    ``.../models--Qwen--Qwen-Image/snapshots/0b1c`` and ``.../Qwen--Qwen-Image/snapshots/master`` are the caches of
    huggingface_hub and of modelscope.
    """
    path = Path(os.path.normpath(Path(folder).absolute()))
    in_cache = path.parent.name == "snapshots" and "--" in path.parent.parent.name
    name = path.parent.parent.name.rpartition("--")[2] if in_cache else path.name
    return next((entry.name for entry in SERVED if entry.name.casefold() == name.casefold()), name)


def defaults_for(folder: str | os.PathLike[str], family: str, scheduler_config: Mapping[str, Any]) -> Defaults:
    """The defaults of the known checkpoint that a folder holds or most likely derives from.

    Args:
        folder: the checkpoint's folder or short name.
        family: ``"z-image"`` or ``"qwen-image"``.
        scheduler_config: its ``scheduler_config.json``. Where the name says nothing, a Z-Image checkpoint with a
            ``shift`` of 3.0 counts as a Turbo (the base has 6.0).
    """
    name = short_name(folder)
    family_entries = {entry.name: entry for entry in (*SERVED, *CARRIED) if entry.family == family}
    if name not in family_entries:
        base = {"z-image": "Z-Image", "qwen-image": "Qwen-Image"}[family]
        name = "Z-Image-Turbo" if family == "z-image" and scheduler_config.get("shift") == 3.0 else base
    return family_entries[name].defaults


def _last(hub_id: str) -> str:
    return hub_id.rpartition("/")[2]
