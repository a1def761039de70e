"""A file of a model that a user names: here, or on a hub."""

from __future__ import annotations

import re
from pathlib import Path

from zimgkit.export.checkpoints.urls import Address, parse_url
from zimgkit.runtime import hub

SUFFIX = ".safetensors"
ON_HUB = re.compile(r"(\w[\w.-]*/\w[\w.-]*)[/:]([\w][^:\\]*)")
"""``owner/name/path/in/it.safetensors`` or ``owner/name:path/in/it.safetensors``."""


def address_of(name: str, hub_name: str) -> tuple[Address, str] | None:
    """The file on a hub that a name means, and the shortest text for it; None where it means none.

    Args:
        name: a URL, ``owner/name/file.safetensors`` or ``owner/name:file.safetensors``.
        hub_name: the hub of one that names none, ``"huggingface"`` or ``"modelscope"``.

    Raises:
        UsageError: it is a URL, and none of a model on a known hub.
    """
    if address := parse_url(name, hub_name):
        return address, address.file
    match = ON_HUB.fullmatch(name)
    return (Address(hub_name, match[1], path=match[2]), name) if match and not Path(name).is_absolute() else None


def is_within(address: Address) -> bool:
    """Whether an address is of a safetensors file, and does not lead out of its model."""
    return address.path.endswith(SUFFIX) and ".." not in address.path.split("/")


def fetch_file(address: Address) -> Path | None:
    """The file on this machine, fetched where it is not in the cache; None where its model has no such file.

    Raises:
        DownloadError: it cannot be fetched.
    """
    folder = hub.fetch(address.model_id, revision=address.revision, source=address.source, allow=[address.path])
    return file if (file := folder / address.path).is_file() else None
