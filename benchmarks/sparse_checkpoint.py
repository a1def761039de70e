"""Write a checkpoint of the real size that takes no disk: true configs, names, shapes and shards, holes for weights.

Every weight reads as zero. The tokenizer is the byte-level one of the tests.

    python benchmarks/sparse_checkpoint.py FAMILY FOLDER
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import common
import families

from zimgkit.export.networks.registry import FAMILIES, WEIGHT_FILES

Shapes = dict[str, tuple[int, ...]]


def write(
    family: str, folder: Path, *, stored: str = "bfloat16", overrides: Mapping[str, Mapping[str, Any]] | None = None
) -> int:
    """Write a checkpoint in the diffusers layout.

    Args:
        family: its name.
        folder: an empty or new folder.
        stored: the element type of the transformer, ``"bfloat16"`` or ``"float32"``; the rest is bfloat16.
        overrides: component -> what its config has instead of the real one's, such as fewer layers.

    Returns:
        How many bytes of weights it seems to have.
    """
    own = families.family(family)
    configs = {name: {**config, **(overrides or {}).get(name, {})} for name, config in own.configs.items()}
    total = 0
    for component, config in configs.items():
        name = "scheduler_config.json" if component == "scheduler" else "config.json"
        _write_json(folder / component / name, config)
        if component in WEIGHT_FILES:
            dtype = stored if component == "transformer" else "bfloat16"
            path = folder / component / f"{WEIGHT_FILES[component]}.safetensors"
            total += write_holes(path, dtype, shapes_of(component, config), own.shards[component])
    common.reference().tokenizer().save_pretrained(folder / "tokenizer")
    _write_json(folder / "model_index.json", {"_class_name": own.pipeline})
    return total


def shapes_of(component: str, config: Mapping[str, Any]) -> Shapes:
    """The names and shapes of a component's tensors as they are stored, from its reference class on the meta device."""
    import diffusers
    import torch
    import transformers

    with torch.device("meta"):
        if component == "text_encoder":
            kind = getattr(transformers, config["architectures"][0])
            module = kind(kind.config_class.from_dict(dict(config)))
        else:
            kind = getattr(diffusers, config["_class_name"])
            module = kind(**families.arguments(config))
    shapes = {_stored_name(name): tuple(value.shape) for name, value in module.state_dict().items()}
    if config.get("tie_word_embeddings"):
        del shapes["lm_head.weight"]
    return shapes


def _stored_name(name: str) -> str:
    """The files of Qwen2.5-VL have the names of older transformers."""
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


def write_holes(path: Path, dtype: str, shapes: Shapes, shards: int) -> int:
    """Write safetensors headers, and files as long as the tensors would be.

    Args:
        path: the file, where one shard is all; shards and their index are named after it.
        dtype: the element type.
        shapes: name -> shape.
        shards: how many files.

    Returns:
        How many bytes of weights the files seem to have.
    """
    from zimgkit.engines.tensors.safetensors import layout

    weight_map: dict[str, str] = {}
    total = 0
    for index, names in enumerate(_split(shapes, shards), start=1):
        file = path if shards == 1 else path.with_name(f"{path.stem}-{index:05d}-of-{shards:05d}{path.suffix}")
        header, infos = layout(file, {name: (dtype, shapes[name]) for name in names}, {"format": "pt"})
        size = sum(info.nbytes for info in infos.values())
        with file.open("wb") as out:
            out.write(header)
            out.truncate(len(header) + size)
        weight_map |= dict.fromkeys(names, file.name)
        total += size
    if shards > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(path.with_name(path.name + ".index.json"), index)
    return total


def _split(shapes: Shapes, shards: int) -> Iterator[list[str]]:
    """The names in order, in as many runs of about equal weight."""
    total = sum(math.prod(shape) for shape in shapes.values())
    runs: list[list[str]] = [[] for _ in range(shards)]
    done = 0
    for name, shape in shapes.items():
        runs[min(shards - 1, done * shards // total)].append(name)
        done += math.prod(shape)
    yield from runs


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2))


def main() -> None:
    """The script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--stored", choices=["bf16", "fp32"], default="bf16", help="element type of the transformer")
    options = parser.parse_args()
    stored = {"bf16": "bfloat16", "fp32": "float32"}[options.stored]
    print(write(options.family, options.folder, stored=stored))


if __name__ == "__main__":
    main()
