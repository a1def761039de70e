from __future__ import annotations

from pathlib import Path

import pytest

from zimgkit.runtime import demo_models
from zimgkit.training.checkpoint import derive_checkpoint


@pytest.mark.parametrize("name", demo_models.NAMES)
def test_what_is_derived_of_a_bundle_is_a_checkpoint_and_no_bundle(name: str, tmp_path: Path) -> None:
    """Its graphs would draw with the old weights beside the new ones, and its card tells of the old model."""
    source, made = demo_models.locate(name), tmp_path / "made"
    derive_checkpoint(source, made, {})
    parts = {"scheduler", "text_encoder", "tokenizer", "transformer", "vae"}
    assert {path.name for path in made.iterdir()} == parts | {"model_index.json"}
    for file in (path for path in made.rglob("*") if path.is_file()):
        assert file.read_bytes() == (source / file.relative_to(made)).read_bytes()
