"""The compiled kernels of an operator, and how each wants to be launched: ``kernels/manifest.json`` in its folder."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import msgspec

FOLDER = "kernels"
MANIFEST = "manifest.json"
SOURCE = "triton.py"
PTX = "ptx"
"""What a portable kernel is compiled to, in the place of architectures."""


class KernelError(RuntimeError):
    """A kernel is broken or cannot be launched."""


class Parameter(msgspec.Struct, frozen=True, array_like=True):
    """One parameter of a kernel."""

    name: str
    type: str
    """``"pointer"``, ``"int32"`` or ``"float32"``."""
    multiple: int = 1
    """What it was compiled to be a multiple of; of a pointer, in bytes."""


class Compiled(msgspec.Struct, frozen=True):
    """A kernel for one architecture."""

    file: str
    threads: int
    shared: int
    """Bytes of shared memory of a block."""


class Kernel(msgspec.Struct, frozen=True):
    """A kernel, for some element types, on all architectures."""

    symbol: str
    parameters: tuple[Parameter, ...]
    grid: tuple[tuple[str, int], ...]
    """Of each dimension: the parameter that it follows, and how much of it one block does."""
    limits: dict[str, int]
    """Parameter -> the largest value that it may have."""
    compiled: dict[str, Compiled]
    """Architecture, such as ``"sm90"`` -> file."""

    def blocks(self, values: Mapping[str, float]) -> tuple[int, ...]:
        """How many blocks there are in each dimension."""
        sizes = [-(-int(values[name]) // each) for name, each in self.grid]
        return (*sizes, *[1] * (3 - len(sizes)))

    def takes(self, values: Mapping[str, float]) -> bool:
        """Whether the arguments are what it was compiled for."""
        return (
            all(values[name] <= limit for name, limit in self.limits.items())
            and all(not values[each.name] % each.multiple for each in self.parameters if each.multiple > 1)
            and all(-(2**31) <= values[each.name] < 2**31 for each in self.parameters if each.type == "int32")
        )

    def fitting(self, capability: tuple[int, int]) -> Compiled | None:
        """What runs on a device of a compute capability: compiled for it, or for an earlier one of its generation."""
        major, minor = capability
        found = (self.compiled.get(f"sm{major}{lower}") for lower in range(minor, -1, -1))
        return next((each for each in found if each is not None), None)


class Manifest(msgspec.Struct, frozen=True):
    """All kernels of an operator."""

    source: str
    """The hash of the source that they were compiled from."""
    compiler: str
    kernels: dict[str, Kernel]


def folder_of(operator: str) -> Path:
    """The folder of an operator."""
    return Path(__file__).parent / operator


def source_hash(operator: str) -> str:
    """The SHA-256 of the kernels' source."""
    return hashlib.sha256((folder_of(operator) / SOURCE).read_bytes()).hexdigest()


@cache
def read_manifest(operator: str) -> Manifest:
    """The kernels that an operator has.

    Raises:
        KernelError: the manifest is missing or broken.
    """
    path = folder_of(operator) / FOLDER / MANIFEST
    try:
        return msgspec.json.decode(path.read_bytes(), type=Manifest)
    except (OSError, msgspec.DecodeError) as error:
        raise KernelError(f"{path} cannot be read ({error}): install zimgkit again") from None
