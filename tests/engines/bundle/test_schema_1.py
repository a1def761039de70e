"""A bundle as zimgkit 0.1.0 wrote it: its manifest is kept beside this file, its files are those of a carried model.

That model was trained on since, so what the manifest says of each file's bytes is said of those that are there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from zimgkit.engines.bundle import MANIFEST, SCHEMA_VERSION, Bundle, Source
from zimgkit.engines.errors import BundleError
from zimgkit.runtime import Pipeline, demo_models

KEPT = Path(__file__).parent / "schema_1" / MANIFEST


def kept() -> dict[str, Any]:
    """The manifest of schema 1."""
    written: dict[str, Any] = json.loads(KEPT.read_bytes())
    now = json.loads((demo_models.locate("zimg-tiny-z") / MANIFEST).read_bytes())["files"]
    return written | {"files": {name: now[name] for name in written["files"]}}


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A whole bundle of schema 1."""
    carried, root = demo_models.locate("zimg-tiny-z"), tmp_path / "old"
    for name in kept()["files"]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes((carried / name).read_bytes())
    (root / MANIFEST).write_text(json.dumps(kept()))
    return root


def test_it_opens_as_schema_2(old: Path) -> None:
    written = kept()
    assert (written["schema_version"], SCHEMA_VERSION) == (1, 2)
    manifest = Bundle.open(old).manifest
    assert (manifest.schema_version, manifest.zimgkit_version) == (2, "0.1.0")
    assert manifest.tasks == ("text-to-image",)
    assert manifest.sources == {"checkpoint": Source(**written["source"])}
    assert manifest.checkpoint.model == "zimg-tiny-z"
    assert not any(component.variant_of for component in manifest.components.values())
    # Those that come with zimgkit now have more: the components of old ones are among theirs.
    now = Bundle.open(demo_models.locate("zimg-tiny-z")).manifest
    components = {name: now.components[name] for name in manifest.components}
    files = {name: now.files[name] for name in manifest.files}
    changes = {"tasks": manifest.tasks, "components": components, "files": files}
    same = msgspec.structs.replace(now, **changes, sources=manifest.sources, controls=())
    assert msgspec.to_builtins(manifest) == msgspec.to_builtins(same)


def test_it_draws_the_same_picture(old: Path) -> None:
    pictures = []
    for root in (old, demo_models.locate("zimg-tiny-z")):
        with Pipeline.open(root) as pipeline:
            picture = pipeline("a red circle", height=64, width=64, num_inference_steps=2, seed=3, output_type="np")
            pictures.append(picture.images[0])
    assert pictures[0].std() > 0.05 and np.array_equal(*pictures)


def test_what_was_not_quantized(old: Path) -> None:
    written = kept()
    written["quantization"] = {"precision": "fp8", "kept": {"denoiser": {"a.weight": "why"}}}
    (old / MANIFEST).write_text(json.dumps(written))
    found = Bundle.open(old).manifest.quantization
    assert found is not None and found.unquantized == {"denoiser": {"a.weight": "why"}}


@pytest.mark.parametrize(
    "changes", [{"source": 5}, {"source": None}, {"zimg_version": 1}, {"quantization": 3}], ids=str
)
def test_malformed(old: Path, changes: dict[str, object]) -> None:
    (old / MANIFEST).write_text(json.dumps(kept() | changes))
    with pytest.raises(BundleError, match="is not a manifest zimgkit can read"):
        Bundle.open(old)
