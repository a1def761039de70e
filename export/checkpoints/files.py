"""Weight files of every format: what tensors one holds, by their stored names. No weight is read here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from zimgkit.engines.errors import CheckpointError
from zimgkit.engines.tensors.safetensors import SafetensorsError, read_header
from zimgkit.export.checkpoints.gguf import MAGIC, read_gguf
from zimgkit.export.checkpoints.stored import Stored

SUFFIXES = (".safetensors", ".gguf")
"""What the names of weight files end in."""

Reader = Callable[[Path], Mapping[str, Stored]]

READERS: dict[bytes, Reader] = {MAGIC: read_gguf}
"""What a file of a format begins with -> what reads it. All others are safetensors."""


def read_file(path: Path) -> Mapping[str, Stored]:
    """The tensors of a weight file by their stored names, in the order of the file.

    Raises:
        CheckpointError: it is missing, cut short, or of no format that zimgkit reads.
    """
    try:
        with path.open("rb") as file:
            begin = file.read(8)
    except OSError:
        begin = b""
    for magic, reader in READERS.items():
        if begin.startswith(magic):
            return reader(path)
    try:
        return read_header(path)
    except SafetensorsError as error:
        raise CheckpointError(error.message, error.hint) from None
