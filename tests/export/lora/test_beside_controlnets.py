"""LoRAs for the branch of the prompt alone and ControlNets in one bundle are refused, in either order."""

from __future__ import annotations

import shutil

import pytest

from zimgkit.engines.errors import UsageError
from zimgkit.export.build import build
from zimgkit.export.controls.change import add
from zimgkit.runtime import demo_models


def test_both_are_refused(tmp_path):
    lora = str(demo_models.locate_lora("zimg-tiny-z-bolt"))
    told = "cannot be in one bundle"
    with pytest.raises(UsageError, match=told):
        build("zimg-tiny-z", tmp_path / "both", positive_only_loras=[lora], controlnets=["net.safetensors"])
    assert not (tmp_path / "both").exists()
    bundle = build("zimg-tiny-z", tmp_path / "bundle", positive_only_loras=[lora]).root
    with pytest.raises(UsageError, match=told):
        add(bundle, ["net.safetensors"])
    shutil.rmtree(bundle)
