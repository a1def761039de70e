"""A file of a model that a user names: here, or on a hub."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from zimgkit.engines.errors import ZimgError
from zimgkit.export.checkpoints.urls import PICKLES, Address, parse_url
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


def only_file_in(folder: Path, usual: Collection[str], refusal: type[ZimgError], hint: str) -> Path:
    """The safetensors file of a folder: the only one, or the only one that is called as usual.

    Args:
        folder: where to look.
        usual: what programs call the file that they save.
        refusal: the error to raise.
        hint: of it, where there is none.

    Raises:
        refusal: there is none, there are several, or there is a pickle.
    """
    files = sorted(path for path in folder.iterdir() if path.suffix == SUFFIX)
    named = [path for path in files if path.name in usual]
    if len(files) == 1 or len(named) == 1:
        return (named or files)[0]
    if files:
        names = ", ".join(path.name for path in files[:4])
        raise refusal(f"{folder} holds {len(files)} safetensors files ({names})", "name one of them")
    for path in sorted(folder.iterdir()):
        refuse_pickle(path.name, refusal)
    raise refusal(f"{folder} holds no safetensors file", hint)


def refuse_pickle(name: str, refusal: type[ZimgError]) -> None:
    """Refuse a file that could run code when it is opened.

    Raises:
        refusal: it is one.
    """
    if name.endswith(PICKLES):
        raise refusal(f"{name} is a pickle, which zimgkit never opens", "convert it to safetensors")
