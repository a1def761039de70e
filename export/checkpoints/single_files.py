"""Weight files by themselves: which components one holds, and which checkpoint has the rest."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from zimgkit.engines.errors import CheckpointError
from zimgkit.export.checkpoints.catalog import SERVED
from zimgkit.export.checkpoints.files import SUFFIXES, read_file
from zimgkit.export.checkpoints.kinds import kind_of
from zimgkit.export.checkpoints.layouts import canonical, own_names
from zimgkit.export.networks.registry import FAMILIES

SIGNS = {"text_encoder": r"layers\.0\.self_attn\.q_proj\.(base_layer\.)?weight", "vae": r"decoder\.(conv_in|conv1)\."}
"""Component -> a pattern that some of its canonical or stored names begin with; families have those of transformers."""


def is_file(model: str) -> bool:
    """Whether this names a weight file that is there."""
    path = Path(model).expanduser()
    return path.name.endswith(SUFFIXES) and path.is_file()


def components_in(path: Path) -> dict[str, Path]:
    """The components that a file holds, each with the file.

    Raises:
        CheckpointError: it is no weight file, or holds none.
    """
    names = [*read_file(path)]
    transformers = "|".join(sign for row in FAMILIES.values() for sign in row.signs)
    signs = {"transformer": transformers, **SIGNS}
    found = {name: path for name, sign in signs.items() if any(re.match(sign, own) for own in _names(name, names))}
    if not found:
        kind = kind_of(names) or "of a model that zimgkit does not know"
        raise CheckpointError(f"{path} is {kind}", f"zimgkit serves {' and '.join(FAMILIES)}")
    return found


def guess_base(path: Path, names: Iterable[str]) -> str:
    """The short name of the checkpoint that a transformer most likely derives from.

    Args:
        path: its file, whose name tells checkpoints of one network apart.
        names: of its tensors, as they are stored.
    """
    own = _names("transformer", names)
    matched = ((sign, base) for row in FAMILIES.values() for sign, base in row.signs.items())
    base = next((base for sign, base in matched if any(re.match(sign, name) for name in own)), "")
    if not base:
        raise CheckpointError(f"{path} holds no transformer", "give a part alone with --text-encoder or --vae")
    row = next(row for row in FAMILIES.values() if base in {entry.name for entry in row.served})
    said = _plain(path.name)
    fitting = [entry.name for entry in SERVED if entry in row.served and _plain(entry.name) in said]
    return max(fitting, key=len) if fitting and base == row.base else base


def _names(component: str, stored: Iterable[str]) -> list[str]:
    return [canonical(component, name) for name in own_names(component, stored)]


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.casefold())
