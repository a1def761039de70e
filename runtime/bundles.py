"""A bundle by what a user calls it: its folder, the name of one that zimgkit carries, or where it lies on a hub.

Of a bundle on a hub the manifest is fetched, then the files that a backend needs, into the cache of the hub's client.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from zimgkit.engines.bundle import MANIFEST, Bundle, Manifest
from zimgkit.engines.choice import AUTO, choose_backend
from zimgkit.engines.errors import BundleError, DownloadError
from zimgkit.runtime import demo_models, hub

ON_A_HUB = re.compile(
    r"(?:(?P<source>huggingface|modelscope):)?(?P<id>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>[\w./-]+))?"
)


class Place(NamedTuple):
    """Where a bundle lies on a hub."""

    model_id: str
    """``owner/name``."""
    source: str
    revision: str | None


def place_of(bundle: str | os.PathLike[str]) -> Place | None:
    """Where a bundle lies on a hub, from its name; None where it is a path.

    A path is what exists, or lies in a folder that exists; so a misspelt path is not looked for on a hub.

    >>> place_of("owner/name@v1")
    Place(model_id='owner/name', source='huggingface', revision='v1')
    >>> place_of("./owner/name"), place_of("name"), place_of("modelscope:owner/name").source
    (None, None, 'modelscope')
    """
    name = os.fspath(bundle)
    match = ON_A_HUB.fullmatch(name)
    if match is None or os.path.lexists(name):
        return None
    source, revision = match["source"], match["revision"]
    if not source and not revision and Path(name).parent.exists():
        return None
    return Place(match["id"], source or "huggingface", revision)


def open_bundle(
    bundle: str | os.PathLike[str],
    *,
    verify: bool = True,
    backend: str = AUTO,
    device: str | Mapping[str, str] | None = None,
) -> Bundle:
    """Open a bundle, after fetching what is missing of it where it lies on a hub.

    Args:
        bundle: its folder, the name of one that zimgkit carries, or ``owner/name``, ``owner/name@revision`` or
            ``modelscope:owner/name``.
        verify: as for :meth:`Bundle.open`.
        backend: what will run it.
        device: likewise.

    Raises:
        BundleError: it is no bundle, or was changed, or is of a newer zimgkit.
        DownloadError: it can neither be fetched nor is it in the cache.
    """
    place = place_of(bundle)
    if place is None:
        return Bundle.open(demo_models.locate(bundle), verify=verify)
    root = _fetch(place, [MANIFEST])
    if not (root / MANIFEST).is_file():
        hint = f"if it is a checkpoint, make a bundle of it: zimg-export build --model {place.model_id} --out FOLDER"
        raise BundleError(f"{place.model_id} is not a bundle: it has no {MANIFEST}", hint)
    if root.parent.name == "snapshots":
        place = place._replace(revision=root.name)  # The same commit, should the branch move meanwhile.
    manifest = Bundle.read(root).manifest
    names = needed(manifest, choose_backend(manifest, device).backend if backend == AUTO else backend)
    root = _fetch(place, [MANIFEST, *names])
    for name in names:
        if not os.path.lexists(root / name):
            message = f"{place.model_id} lacks {name[:200]!r}, which its {MANIFEST} lists"
            hint = "it was not uploaded whole; or, offline, only a part of it is in the cache: try it with a network"
            raise DownloadError(message, hint)
    return Bundle.open(root, verify=verify, names=names)


def needed(manifest: Manifest, backend: str) -> tuple[str, ...]:
    """The files of a bundle that a backend needs: all but engines of others, and what only a swap of LoRAs reads."""
    bases = {component.base for component in manifest.components.values()}
    others = {file for engine in manifest.engines if engine.backend != backend for file in engine.files}
    own = {file for engine in manifest.engines if engine.backend == backend for file in engine.files}
    return tuple(name for name in manifest.files if name not in bases and name not in others - own)


def _fetch(place: Place, names: list[str]) -> Path:
    try:
        patterns = [glob.escape(name) for name in names]
        return hub.fetch(place.model_id, revision=place.revision, source=place.source, allow=patterns)
    except DownloadError as error:
        message = f"there is no folder {place.model_id}, and {error.message}"
        raise DownloadError(message if not place.revision else error.message, error.hint) from None
