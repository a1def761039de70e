"""A bundle as a folder in the diffusers layout, which diffusers, ComfyUI's loaders of folders and zimgkit itself read.

https://huggingface.co/docs/diffusers/using-diffusers/other-formats
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zimgkit.engines.bundle import Bundle, Manifest
from zimgkit.engines.errors import CheckpointError
from zimgkit.export.checkpoints.checkpoint import PREPROCESSOR, Checkpoint
from zimgkit.export.networks import registry
from zimgkit.export.publishing.held import config_of
from zimgkit.runtime.families import family

PREFIXES = {"text_encoder": "model.", "siglip": "vision_model."}
"""A component -> what transformers' names of its tensors begin with."""
WITHOUT_PREFIX = ("visual.", "lm_head.")
"""What names of a text encoder's tensors begin with that have none."""
END_OF_TEXT, END_OF_TURN = "<|endoftext|>", "<|im_end|>"
"""Special tokens of the text encoders' vocabulary."""


def stored_name(component: str, name: str) -> str:
    """What a tensor is called in a component's files, by its canonical name."""
    prefix = "" if name.startswith(WITHOUT_PREFIX) else PREFIXES.get(component, "")
    return prefix + name


def write_rest(bundle: Bundle, checkpoint: Checkpoint | None, folder: Path) -> None:
    """Write all of a checkpoint but its weights: from the checkpoint itself, or what follows from the bundle.

    Args:
        bundle: an open bundle.
        checkpoint: the one it was built from, where that is here.
        folder: where to.
    """
    manifest = bundle.manifest
    sources = registry.sources(manifest.family, manifest.tasks)
    configs = {source: config_of(bundle, checkpoint, source) for source in sources}
    for source, config in configs.items():
        _write_json(folder / source / "config.json", config)
    _write_json(folder / "scheduler" / "scheduler_config.json", manifest.scheduler)
    processor = registry.row(manifest.family).processor
    extras = ("tokenizer", *([processor] if manifest.references else ()))
    for name in extras:
        if checkpoint is not None and (checkpoint.root / name).is_dir():
            shutil.copytree(checkpoint.root / name, folder / name)
        elif name == "tokenizer":
            _write_tokenizer(bundle, folder / name)
        else:
            _write_json(folder / name / PREPROCESSOR, manifest.config[name])
            _write_tokenizer(bundle, folder / name)
    if checkpoint is not None and (checkpoint.root / "model_index.json").is_file():
        shutil.copyfile(checkpoint.root / "model_index.json", folder / "model_index.json")
    else:
        _write_json(folder / "model_index.json", _model_index(manifest, configs, processor))


def _model_index(manifest: Manifest, configs: Mapping[str, dict[str, Any]], processor: str) -> dict[str, Any]:
    """Which classes of diffusers and transformers the components are."""
    index: dict[str, Any] = {"_class_name": registry.pipeline_of(manifest)}
    for source, config in configs.items():
        if "_class_name" in config:
            index[source] = ["diffusers", config["_class_name"]]
        elif config.get("architectures"):
            index[source] = ["transformers", config["architectures"][0]]
        else:
            raise CheckpointError(
                f"the bundle does not say of which class its {source} is", "name its checkpoint: --model"
            )
    scheduler = manifest.scheduler.get("_class_name", "FlowMatchEulerDiscreteScheduler")
    index |= {"scheduler": ["diffusers", scheduler], "tokenizer": ["transformers", "Qwen2Tokenizer"]}
    if manifest.references:
        config = manifest.config[processor]
        kind = config.get("processor_class") or config.get("image_processor_type") or "Qwen2VLProcessor"
        index[processor] = ["transformers", kind]
    return index


def _write_tokenizer(bundle: Bundle, folder: Path) -> None:
    """The tokenizer as transformers reads it, with the prompt's template as its chat template where one is used."""
    folder.mkdir(exist_ok=True)
    shutil.copyfile(bundle.file("tokenizer/tokenizer.json"), folder / "tokenizer.json")
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "pad_token": END_OF_TEXT,
        "unk_token": END_OF_TEXT,
        "eos_token": END_OF_TURN,
    }
    if family(bundle.manifest.family).USES_CHAT_TEMPLATE:
        prefix, suffix = (
            f"{{{{ {json.dumps(text)} }}}}" for text in (bundle.manifest.text.prefix, bundle.manifest.text.suffix)
        )
        config["chat_template"] = f"{prefix}{{{{ messages[0]['content'] }}}}{suffix}"
    _write_json(folder / "tokenizer_config.json", config)


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
