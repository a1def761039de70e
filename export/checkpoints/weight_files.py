"""Which files of a component's folder hold its weights: whole, in shards with an index, or under other usual names."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from zimgkit.engines.decoding import read_json
from zimgkit.engines.errors import CheckpointError
from zimgkit.export.checkpoints.files import SUFFIXES
from zimgkit.export.checkpoints.urls import PICKLES

STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
"""What weight files are called by the libraries that write them."""
VARIANTS = ("bf16", "fp16", "fp32")
"""Variants in the order in which they are taken, where there is no file without one; others follow."""
VISION = "mmproj"
"""What names of llama.cpp's files have that hold a vision tower alone, beside the file of its language model."""
INDEX = ".safetensors.index"
SHARD = re.compile(r"-\d+-of-(\d+)\.safetensors$")


def weight_files(folder: Path, stem: str) -> dict[Path, tuple[str, ...]]:
    """The weight files of a component, each with the tensors that an index places there; none where there is no index.

    Args:
        folder: of the component.
        stem: what its files are called usually.

    Raises:
        CheckpointError: there are none, or a shard is missing.
    """
    names = {path.name for path in folder.iterdir()}
    for own in dict.fromkeys((stem, *STEMS)):
        for variant in _variants(own, names):
            dotted = f".{variant}" if variant else ""
            index, single = folder / f"{own}{INDEX}{dotted}.json", folder / f"{own}{dotted}.safetensors"
            if index.name in names:
                shards = _read_index(index)
                if missing := [shard for shard in shards if not shard.is_file()]:
                    # The index of what was saved here before, beside the file that was saved last.
                    if single.name in names:
                        return {single: ()}
                    raise CheckpointError(f"{missing[0]} is missing", "fetch the checkpoint again")
                return shards
            if single.name in names:
                return {single: ()}
    others = sorted(name for name in names if name.endswith(SUFFIXES))
    if parts := [match for name in others if (match := SHARD.search(name))]:
        if len(parts) < int(parts[0][1]):
            found = f"{len(parts)} of {int(parts[0][1])} shards, and no index"
            raise CheckpointError(f"{folder} has {found}", "fetch the files that are missing")
        return {folder / match.string: () for match in parts}
    if len([name for name in others if VISION not in name.lower()]) == 1:
        return {folder / name: () for name in others}
    if others:
        hint = f"name the one that is meant {stem}.safetensors"
        raise CheckpointError(f"{folder} has several weight files and no index ({others[0]}, {others[1]})", hint)
    pickles = sorted(name for name in names if name.endswith(PICKLES))
    if pickles:
        raise CheckpointError(
            f"{folder} holds a pickle ({pickles[0]}) where {stem}.safetensors belongs, and zimgkit never opens pickles",
            "convert it to safetensors",
        )
    raise CheckpointError(
        f"{folder} has neither {stem}.safetensors nor {stem}{INDEX}.json", "fetch the files that are missing"
    )


def _variants(stem: str, names: set[str]) -> list[str]:
    """The variants of which there is a file or an index, the plain one first."""
    pattern = rf"{re.escape(stem)}(?:(?:\.(\w+))?\.safetensors|{re.escape(INDEX)}(?:\.(\w+))?\.json)"
    found = {match[1] or match[2] or "" for name in names if (match := re.fullmatch(pattern, name))}
    order = ("", *VARIANTS)
    return sorted(found, key=lambda variant: (order.index(variant) if variant in order else len(order), variant))


def _read_index(index: Path) -> dict[Path, tuple[str, ...]]:
    weight_map = read_json(index, CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{index} has no readable weight_map", "fetch the file again")
    if not weight_map:
        raise CheckpointError(f"{index} names no file", "fetch the file again")
    files: dict[Path, tuple[str, ...]] = {}
    for shard in dict.fromkeys(weight_map.values()):
        # Not resolved: the caches of hubs link to their files from outside.
        if PurePosixPath(shard).name != shard or "\\" in shard or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{index} names {shard!r}, which is no safetensors file beside it", "do not trust it")
        files[index.parent / shard] = tuple(name for name, file in weight_map.items() if file == shard)
    return files
