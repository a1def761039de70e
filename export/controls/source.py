"""What ``--controlnet`` names: a file, a folder or a net on a hub, and what it shall be called."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zimgkit.engines.bundle import PIECES
from zimgkit.engines.decoding import read_json
from zimgkit.engines.errors import CheckpointError, UsageError
from zimgkit.export.checkpoints.named_files import SUFFIX, only_file_in, refuse_pickle
from zimgkit.export.checkpoints.urls import Address, parse_url
from zimgkit.export.networks.registry import FAMILIES, KnownControl
from zimgkit.runtime import demo_models, hub

USUAL = ("diffusion_pytorch_model.safetensors", "model.safetensors")
"""What diffusers and DiffSynth call the file in a folder."""
CONFIG = "config.json"
NAME = re.compile(r"[a-z0-9]\w{0,39}", re.ASCII | re.IGNORECASE)
ON_HUB = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:[/:]([\w][^:\\]*))?")
HINT = "name a file, a folder, a hub's owner/name or owner/name/file.safetensors, or its URL"
KNOWN = tuple(known for family in FAMILIES.values() for known in family.known_controls)


@dataclass(frozen=True)
class ControlFile:
    """A ControlNet's file on this machine."""

    name: str
    """What it is called in the bundle."""
    path: Path
    source: str
    """The path, or how its hub calls it."""
    config: Mapping[str, Any]
    """What lies beside it, as diffusers writes it; empty where nothing does."""


def find_control(argument: str, hub_name: str = "huggingface") -> ControlFile:
    """Find the file that an argument names, and fetch it if it is on a hub.

    Args:
        argument: ``[NAME=]`` and a file, a folder, ``owner/name``, ``owner/name/file.safetensors``, the URL of one of
            these, the last part of a known net's id, or the name of one that comes with zimgkit. What exists as a path
            is one.
        hub_name: ``"huggingface"`` or ``"modelscope"``.

    Raises:
        UsageError: the name is none that a net can have.
        CheckpointError: there is no such file, it is a pickle, or a folder holds several.
        DownloadError: it cannot be fetched.
    """
    name, place = _split_name(argument)
    path = demo_models.locate_controlnet(place).expanduser()
    if path.is_dir():
        path, source = only_file_in(path, USUAL, CheckpointError, HINT), str(path.absolute())
    elif path.is_file():
        refuse_pickle(path.name, CheckpointError)
        source = str(path.absolute())
    else:
        path, source = _fetched(place, hub_name)
    config = read_json(path.parent / CONFIG, CheckpointError) if (path.parent / CONFIG).is_file() else {}
    return ControlFile(name or _short_name(source), path, source, config)


def _split_name(argument: str) -> tuple[str, str]:
    head, equals, tail = argument.partition("=")
    if not equals or Path(argument).expanduser().exists():
        return "", argument
    if not NAME.fullmatch(head) or head in PIECES:
        raise UsageError(f"a ControlNet cannot be called {head!r}", "take letters, digits and _, 40 at most")
    return head, tail


def _fetched(place: str, hub_name: str) -> tuple[Path, str]:
    """A file on a hub, after fetching it, and how its hub calls it."""
    known = next((one for one in KNOWN if _is_name_of(place, one)), None)
    match = ON_HUB.fullmatch(place)
    address = Address(hub_name, known.id_on(hub_name), path=known.file) if known else parse_url(place, hub_name)
    if address is None and match and not Path(place).is_absolute():
        address = Address(hub_name, match[1], path=match[2] or "")
    if address is None:
        raise CheckpointError(f"there is no ControlNet {place!r}", HINT)
    refuse_pickle(address.path, CheckpointError)
    if address.path and (not address.path.endswith(SUFFIX) or ".." in address.path.split("/")):
        raise CheckpointError(f"{place!r} does not exist, and on a hub a ControlNet is a {SUFFIX} file", HINT)
    wanted = [address.path, CONFIG] if address.path else [*USUAL, CONFIG]
    folder = hub.fetch(address.model_id, revision=address.revision, source=address.source, allow=wanted)
    if address.path and not (folder / address.path).is_file():
        raise CheckpointError(f"{address.model_id} has no file {address.path!r}", "check the name of both")
    if not folder.is_dir():
        raise CheckpointError(f"{address.model_id} has no {' nor '.join(USUAL)}", "name one of its files")
    if address.path:
        return folder / address.path, address.file
    return only_file_in(folder, USUAL, CheckpointError, HINT), address.model


def _is_name_of(place: str, known: KnownControl) -> bool:
    wanted = place.casefold()
    alone = not any(known.hub_id == other.hub_id and known != other for other in KNOWN)
    ids = {Path(known.file).stem}
    for hub_id in known.ids:
        ids |= {f"{hub_id}/{known.file}", *([hub_id, hub_id.rpartition("/")[2]] if alone else [])}
    return wanted in {one.casefold() for one in ids - {"model", "diffusion_pytorch_model"}}


def _short_name(source: str) -> str:
    """What a net is called where the user does not say."""
    for known in KNOWN:
        if any(hub_id in source for hub_id in known.ids) and (known.file in source or known.file in USUAL):
            return known.name
    end = Path(source)
    word = end.parent.name if end.name in USUAL else end.name.removesuffix(SUFFIX)
    word = word.rpartition("-")[2] if end.stem in demo_models.CONTROLNETS else word
    tail = re.sub(r"[^a-z0-9_]+", "_", re.split(r"controlnet-?", word.lower())[-1] or word.lower()).strip("_")
    return tail[:40] or "control"
