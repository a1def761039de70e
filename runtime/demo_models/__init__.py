"""The small models that zimgkit carries, so that it draws with no download: their names, and where they lie.

Each folder is a checkpoint in the diffusers layout and a bundle made from it at once; they share their weights. Beside
them lie LoRAs of both, and what makes of the second one a third, which edits.
"""

from __future__ import annotations

import os
from pathlib import Path

NAMES = ("zimg-tiny-z", "zimg-tiny-qwen")
"""One of each family."""
DEFAULT = NAMES[0]
EDITOR = f"{NAMES[1]}-edit"
"""The one that edits pictures: the second one trained on, see :mod:`.assembled`."""
ALL = (*NAMES, EDITOR)
LORAS = (
    *(f"{name}-{lora}" for name in NAMES for lora in ("outlined", "bolt")),
    *(f"{NAMES[1]}-{lora}" for lora in ("4steps", "eligen")),
)
"""A style, outlines alone, and a concept, a shape that the models do not know, for each of them; and for the second one
that lets it draw in four steps without guidance, and one for prompts with regions."""
EDGES = "edges"
"""What a ControlNet is called that draws things where edges are."""
CONTROLNETS = {f"{name}-{EDGES}": name for name in NAMES}
"""ControlNet -> the model whose bundle has it."""
FOLDER = Path(__file__).resolve().parent


def locate(model: str | os.PathLike[str]) -> Path:
    """The folder of a model by its path or, where nothing has that path, by the name of one that zimgkit carries.

    >>> locate("zimg-tiny-z").name
    'zimg-tiny-z'
    >>> locate("there-is-no-such-folder")
    PosixPath('there-is-no-such-folder')

    Raises:
        OutputError: the one that edits is to be put together first, and can be written nowhere.
    """
    name = os.fspath(model)
    if name not in ALL or os.path.lexists(name):
        return Path(name)
    if name in NAMES:
        return FOLDER / name
    from zimgkit.runtime.demo_models.assembled import assemble

    return assemble(FOLDER / EDITOR, FOLDER / NAMES[1])


def locate_lora(name: str) -> Path:
    """The file of a LoRA that zimgkit carries, by its name, unless something has that path.

    >>> locate_lora("zimg-tiny-z-bolt").name
    'zimg-tiny-z-bolt.safetensors'
    >>> locate_lora("there/is/none")
    PosixPath('there/is/none')
    """
    return FOLDER / "loras" / f"{name}.safetensors" if name in LORAS and not os.path.lexists(name) else Path(name)


def locate_controlnet(name: str) -> Path:
    """Likewise of a ControlNet.

    >>> locate_controlnet("zimg-tiny-z-edges").name
    'zimg-tiny-z-edges.safetensors'
    """
    if name not in CONTROLNETS or os.path.lexists(name):
        return Path(name)
    return FOLDER / CONTROLNETS[name] / "control" / EDGES / f"{name}.safetensors"


def is_carried(path: Path) -> bool:
    """Whether a folder is one of those that come with zimgkit, which stay as they are."""
    path = path.resolve()
    if path.parent == FOLDER or path.name != EDITOR:
        return path.parent == FOLDER
    from zimgkit.runtime.demo_models.assembled import place_of

    return path == place_of(FOLDER / EDITOR).resolve()
