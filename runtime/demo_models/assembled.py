"""The small model that edits: another one's weights and a difference, put together where it is first asked for.

So it takes half of the room. Carried are its own files, which are graphs and configs, and the difference: eight
bits a weight, with a factor for each row.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import shutil
import tempfile
from pathlib import Path

import numpy as np
from platformdirs import user_cache_path

from zimgkit.engines.bundle import MANIFEST
from zimgkit.engines.errors import OutputError
from zimgkit.engines.files import temporary_folder
from zimgkit.engines.tensors.dtypes import bfloat16_to_float32, float32_to_bfloat16
from zimgkit.engines.tensors.safetensors import read_header, view

DIFFERENCE = "difference.safetensors"
"""Of a matrix ``<tensor>`` int8 (out, in) and ``<tensor>.scale`` float32 (out,). Any other tensor is there itself,
bfloat16."""
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
"""What it is of, in both models: bfloat16."""
SCALE = ".scale"


def assemble(own: Path, base: Path) -> Path:
    """The folder of a model in the user's cache, or in a temporary one where that cannot be written.

    Args:
        own: the folder of what is not as in the other model; its name is the model's.
        base: the other model's folder.

    Raises:
        OutputError: it can be written nowhere.
    """
    target = place_of(own)
    if (target / MANIFEST).is_file():
        return target
    with contextlib.suppress(OSError):
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(target, "part") as work:
            put_together(work, own, base)
            with contextlib.suppress(OSError):
                work.rename(target)  # Unless another process was faster.
        if (target / MANIFEST).is_file():
            return target
    try:
        parent = Path(tempfile.mkdtemp(prefix="zimgkit-"))
        atexit.register(shutil.rmtree, parent, ignore_errors=True)
        put_together(parent / own.name, own, base)
    except OSError as error:
        message = f"{own.name} is put together when it is first used, and {target} cannot be written ({error})"
        raise OutputError(message, "free some space, or let XDG_CACHE_HOME name a folder that can be written") from None
    return parent / own.name


def place_of(own: Path) -> Path:
    """Where :func:`assemble` puts a model, if it can: another version of it lies elsewhere."""
    key = hashlib.sha256((own / MANIFEST).read_bytes()).hexdigest()[:16]
    return user_cache_path("zimgkit") / "models" / key / own.name


def put_together(target: Path, own: Path, base: Path) -> None:
    """Write a model into a folder: the files of both, its own where both have one, and its weights.

    Raises:
        OSError: it cannot be written.
    """
    for folder in (base, own):
        for file in (path for path in folder.rglob("*") if path.is_file() and path.name != DIFFERENCE):
            copy = target / file.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)  # Without its rights: what is installed may be read-only.
    add_difference(target / WEIGHTS, own / DIFFERENCE)


def add_difference(weights: Path, difference: Path) -> None:
    """Add a difference to the tensors of a file, in place.

    W + scale q, in float32: two roundings for each number, so that the bits are the same on all machines.

    Args:
        weights: safetensors, bfloat16.
        difference: see :data:`DIFFERENCE`.
    """
    stored, header = read_header(difference), read_header(weights)
    with weights.open("r+b") as file:
        for name in (name for name in stored if not name.endswith(SCALE)):
            new = view(stored[name])
            if name + SCALE in stored:
                change = view(stored[name + SCALE])[:, None] * new.astype(np.float32)
                new = float32_to_bfloat16(bfloat16_to_float32(view(header[name])) + change)
            file.seek(header[name].offset)
            file.write(new.tobytes())
