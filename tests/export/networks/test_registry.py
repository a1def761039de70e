"""The table of families: light, whole, and true of what the networks say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import zimgkit.export
from zimgkit.engines.errors import CheckpointError
from zimgkit.export.checkpoints.layouts import canonical
from zimgkit.export.networks import registry
from zimgkit.export.networks.parts import stored_shapes

FAMILIES = tuple(registry.FAMILIES)
ROOT = Path(zimgkit.export.__file__).parent
SPELLINGS = re.compile(r"(?<![a-z])(z[-_ ]?image|qwen[-_ ]?image)", re.IGNORECASE)
"""A family's name, in any of its spellings."""
OWN = ("z_image*.py", "qwen_image*.py", "autoencoder_kl.py", "text_encoder.py", "registry.py")
"""The files of ``networks`` that may name one."""


def test_it_needs_none_of_the_heavy_packages() -> None:
    code = """if True:
        import sys
        import zimgkit.export.checkpoints.checkpoint, zimgkit.export.lora.merge, zimgkit.export.networks.registry
        print(*sys.modules)
    """
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert not {"torch", "onnx", "onnx_ir", "transformers"} & set(loaded.stdout.split())


def test_no_other_file_names_a_family() -> None:
    named = [
        path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py") if SPELLINGS.search(path.read_text("utf-8"))
    ]
    own = {path.relative_to(ROOT).as_posix() for pattern in OWN for path in (ROOT / "networks").glob(pattern)}
    assert {"networks/registry.py", "networks/z_image.py"} <= set(named) <= own


@pytest.mark.parametrize("family", FAMILIES)
def test_components_come_from_where_it_says(family: str) -> None:
    configs = registry.import_module(registry.row(family).demo).CONFIGS
    for source in registry.sources(family):
        for name, part in registry.parts(family, source, configs[source]).items():
            entry = registry.COMPONENTS[name]
            assert entry.source == source == part.source
            assert entry.on_the_host == (part.network is None)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_is_used_or_unused(family: str) -> None:
    configs = registry.import_module(registry.row(family).demo).CONFIGS
    for source in registry.sources(family):
        component, config = registry.row(family).components[source], configs[source]
        whole = registry.module(family, source).checkpoint_shapes(config)
        parts = registry.parts(family, source, config)
        used = stored_shapes({name: part for name, part in parts.items() if registry.is_needed(name, ())}).keys()
        names = {canonical(source, name) for name in whole}
        unused = {name for name in names if registry.is_unused(family, source, config, name)}
        assert used == names - unused
        assert bool(unused) == bool(component.unused)


def test_unused_tensors_of_the_text_encoder() -> None:
    def unused(family: str, name: str, **config: object) -> bool:
        return registry.is_unused(family, "text_encoder", config, name)

    assert unused("z-image", "layers.2.mlp.up_proj.weight", num_hidden_layers=3)
    assert unused("z-image", "layers.2.", num_hidden_layers=3)
    assert not unused("z-image", "layers.1.mlp.up_proj.weight", num_hidden_layers=3)
    assert unused("z-image", "norm.weight") and unused("z-image", "lm_head.weight")
    assert not unused("qwen-image", "norm.weight")
    assert not unused("qwen-image", "layers.2.mlp.up_proj.weight", text_config={"num_hidden_layers": 3})
    assert unused("qwen-image", "visual.blocks.0.attn.qkv.weight")


def test_classes_of_diffusers() -> None:
    assert registry.family_of_class("ZImagePipeline") == "z-image"
    assert registry.family_of_class("QwenImageTransformer2DModel") == "qwen-image"
    assert registry.family_of_class("FluxPipeline") is None


def test_no_such_family() -> None:
    with pytest.raises(CheckpointError, match=r"no family is called 'flux'; zimgkit serves z-image, qwen-image"):
        registry.row("flux")


def test_what_a_checkpoint_is_for() -> None:
    assert registry.tasks_of("z-image", "ZImagePipeline", ("inpaint",)) == ("text-to-image", "inpaint")
    assert registry.tasks_of("z-image", "ZImageOmniPipeline", ()) == ("text-to-image", "edit")
    assert registry.tasks_of("qwen-image", "QwenImageEditPipeline", ("edit",)) == ("edit",)
    assert "siglip" in registry.sources("z-image", ("edit",))
    assert "siglip" not in registry.sources("z-image", ("text-to-image", "inpaint"))
