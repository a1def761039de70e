"""A checkpoint that edits pictures, to be trained to do so, of one that does not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch

from zimgkit.engines.bundle import atomic_folder
from zimgkit.engines.errors import UsageError
from zimgkit.export.checkpoints.checkpoint import Checkpoint
from zimgkit.training import families
from zimgkit.training.checkpoint import MARK, component_folders, load_component, save_component
from zimgkit.training.vocabulary import extend


def as_editor(source: Checkpoint, target: Path, prompts: Iterable[str] = ()) -> None:
    """Write a checkpoint that is another one, on the same weights, but for what it says it draws from.

    Args:
        source: the checkpoint, in the diffusers layout.
        target: where. What bundles take of its pictures may depend on this name.
        prompts: those it is to be trained with. Where there are any, each of their words and of the template's becomes
            one token, if it is not one yet: prompts become shorter, and words that the text model never saw are told
            apart by more than the order of their pieces.

    Raises:
        UsageError: the family has no pipeline that edits.
        CheckpointError: the text model cannot be loaded.
        OutputError: the folder exists or cannot be written.
    """
    family = families.family(source.family)
    if family.editor is None:
        raise UsageError(f"{family.name} has no pipeline that edits", "name a model whose text model reads pictures")
    index = json.loads((source.root / MARK).read_text())
    index |= {"_class_name": family.editor.pipeline, "processor": ["transformers", "Qwen2VLProcessor"]}
    with atomic_folder(target.expanduser().absolute(), overwrite=False, known_by=MARK) as work:
        for name in component_folders(source.root):
            shutil.copytree(source.root / name, work / name)
        (work / "processor").mkdir(exist_ok=True)
        config = json.dumps(dict(family.editor.processor), indent=2)
        (work / "processor" / "preprocessor_config.json").write_text(config + "\n")
        (work / MARK).write_text(json.dumps(index, indent=2) + "\n")
        if prompts := list(prompts):
            _add_words(work, source, [*family.editor.texts, *prompts])


def _add_words(folder: Path, checkpoint: Checkpoint, texts: Iterable[str]) -> None:
    """Make every word of some texts one token; a new token's embedding is the mean of those of its pieces."""
    file = folder / "tokenizer" / "tokenizer.json"
    settings = json.loads(file.read_text())
    pieces = extend(settings, texts)
    if not pieces:
        return
    text_encoder = load_component(checkpoint, "text_encoder", torch.bfloat16)
    rows = text_encoder.get_input_embeddings().weight.detach()
    text_encoder.resize_token_embeddings(max(len(rows), max(pieces) + 1), mean_resizing=False)
    grown = text_encoder.get_input_embeddings().weight.data
    for token, parts in pieces.items():
        grown[token] = rows[parts].float().mean(0)
    save_component(text_encoder, folder / "text_encoder", "bfloat16")
    file.write_text(json.dumps(settings, ensure_ascii=False) + "\n")
