"""A checkpoint that edits, of one that does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import QwenImageEditPlusPipeline
from safetensors.torch import load_file
from transformers import AutoTokenizer

from tests.commands import invoke
from zimgkit.engines.errors import UsageError
from zimgkit.export.checkpoints.checkpoint import open_checkpoint
from zimgkit.runtime import demo_models
from zimgkit.runtime.text.edit_prompts import EDIT
from zimgkit.training.cli import main
from zimgkit.training.editor import as_editor

TEXT = "text_encoder/model.safetensors"
EMBEDDING = "embed_tokens.weight"


def test_it_is_a_pipeline_of_diffusers(tmp_path: Path) -> None:
    """With the same weights; of an editor one can be made again."""
    base = demo_models.locate("zimg-tiny-qwen")
    as_editor(open_checkpoint(str(base)), tmp_path / "one")
    as_editor(open_checkpoint(str(tmp_path / "one")), tmp_path / "two")
    for folder in ("one", "two"):
        assert (tmp_path / folder / TEXT).read_bytes() == (base / TEXT).read_bytes()
    index = (tmp_path / "two" / "model_index.json").read_text()
    assert index == (tmp_path / "one" / "model_index.json").read_text()
    assert QwenImageEditPlusPipeline.__name__ in index


def test_words_of_its_prompts_are_tokens(tmp_path: Path) -> None:
    """Their embeddings are the means of their pieces', and all other weights stay."""
    base = open_checkpoint(str(demo_models.locate("zimg-tiny-qwen")))
    as_editor(base, tmp_path / "editor", ["remove the star", "move it"])
    old, new = (AutoTokenizer.from_pretrained(root / "tokenizer") for root in (base.root, tmp_path / "editor"))
    before, after = load_file(base.root / TEXT), load_file(tmp_path / "editor" / TEXT)
    assert before.keys() == after.keys()
    for name, value in before.items():
        grown = after[name]
        assert grown.dtype == value.dtype == torch.bfloat16
        if not name.endswith(EMBEDDING):
            assert torch.equal(grown, value), name
            continue
        assert torch.equal(grown[: len(value)], value)
        assert len(grown) == len(new)
        for word in ("remove", "move", " it"):
            (token,) = new(word)["input_ids"]
            expected = value[old(word)["input_ids"]].float().mean(0).bfloat16()
            torch.testing.assert_close(grown[token], expected)
    assert len(new(EDIT.prefix)["input_ids"]) == EDIT.drop
    modes = {file.stat().st_mode for file in (tmp_path / "editor" / "text_encoder").iterdir()}
    assert len(modes) == 1


def test_who_has_no_pipeline_that_edits(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(demo_models.locate("zimg-tiny-z")))
    with pytest.raises(UsageError, match="has no pipeline that edits"):
        as_editor(checkpoint, tmp_path / "editor")
    assert not (tmp_path / "editor").exists()
    done = invoke(main, "editor", "zimg-tiny-qwen", tmp_path / "editor", "--prompts-of", tmp_path / "nothing")
    assert done.code == 1 and done.err.count("\n") == 1, done.err
    assert not (tmp_path / "editor").exists()
