"""``zimg-run list``: the bundles that are on this machine, by their manifests alone."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from zimgkit.engines.bundle import MANIFEST, Bundle
from zimgkit.engines.errors import ZimgError
from zimgkit.runtime import demo_models
from zimgkit.runtime.commands.inspect import size_text


def list_bundles(folders: Sequence[Path] = ()) -> list[dict[str, Any]]:
    """Find bundles, and describe each; no weights are read.

    Args:
        folders: where to look, in each and in its children. By default the current folder, after the bundles that come
            with zimgkit and before those in the caches of hubs.

    Returns:
        ``path``, ``name``, ``family``, ``precision`` and ``bytes`` of each, or ``path`` and ``error`` of a broken one.
    """
    places = near(folders or (Path(),))
    if not folders:
        places = [*map(demo_models.locate, demo_models.ALL), *places, *in_caches()]
    found: dict[Path, Path] = {}
    for place in places:
        if os.path.lexists(place / MANIFEST):
            found.setdefault(place.resolve(), place)
    return [_described(place) for place in found.values()]


def near(folders: Iterable[Path]) -> list[Path]:
    """The folders and their children, sorted by name; what cannot be read has none."""
    places: list[Path] = []
    for folder in folders:
        places.append(folder)
        try:
            places += sorted(Path(entry.path) for entry in os.scandir(folder) if not entry.name.startswith("."))
        except OSError:
            continue
    return places


def in_caches() -> Iterator[Path]:
    """Folders in the caches of huggingface_hub and of modelscope that may be bundles: models, and folders in them."""
    variables = os.environ
    hugging_face = variables.get("HF_HUB_CACHE") or f"{variables.get('HF_HOME') or '~/.cache/huggingface'}/hub"
    modelscope = variables.get("MODELSCOPE_CACHE") or "~/.cache/modelscope/hub"
    # pathlib's expanduser raises where a user has no home.
    for cache, models in ((hugging_face, "models--*/snapshots/*"), (modelscope, "models/*/*")):
        for depth in ("", "*/"):
            yield from sorted(
                path.parent
                for path in Path(os.path.expanduser(cache)).glob(f"{models}/{depth}{MANIFEST}")  # noqa: PTH111
            )


def _described(place: Path) -> dict[str, Any]:
    try:
        manifest = Bundle.open(place, verify=False).manifest
    except ZimgError as error:
        return {"path": str(place.absolute()), "error": str(error)}
    except OSError as error:
        return {"path": str(place.absolute()), "error": error.strerror or str(error)}
    return {
        "path": str(place.absolute()),
        "name": manifest.name,
        "family": manifest.family,
        "precision": manifest.quantized or manifest.precision,
        "bytes": sum(record.size for record in manifest.files.values()),
    }


def list_text(bundles: Sequence[dict[str, Any]]) -> str:
    """The bundles for people: a line each, broken ones with what is wrong."""
    rows = [
        (entry["name"], entry["family"], entry["precision"], size_text(entry["bytes"]), entry["path"])
        for entry in bundles
        if "error" not in entry
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join([*lines, *(f"broken: {entry['error']}" for entry in bundles if "error" in entry)])
