"""A bundle of all networks that read pictures, with random weights, made once for all workers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock
from torch import nn

from zimgkit.engines.bundle import Bundle
from zimgkit.export.networks.parts import Part


@pytest.fixture(scope="session")
def picture_networks() -> Callable[[], dict[str, nn.Module]]:
    """``picture_networks()``: component or variant -> its network, in float32, weights as in the bundle."""

    def make() -> dict[str, nn.Module]:
        from tests.reference import randomize

        made, found = {}, {}
        for name, part in _parts().items():
            for key, own in {name: part, **{f"{name}.{key}": own for key, own in part.variants.items()}}.items():
                assert own.network is not None
                found[key] = network = own.network().eval()
                if key == name:
                    randomize(network, len(made))
                    made[name] = {n: value.bfloat16().float() for n, value in network.state_dict().items()}
                network.load_state_dict({n: made[name][n] for n in network.state_dict()})
                network.requires_grad_(requires_grad=False)
        return found

    return make


@pytest.fixture(scope="session")
def picture_bundle(shared_folder: Path, picture_networks: Callable[[], dict[str, nn.Module]]) -> Bundle:
    """A bundle of them in bfloat16, with the float32 graphs that every such bundle has."""
    from tests.parts import write_parts

    folder = shared_folder / "pictures"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            parts = _parts()
            weights = {}
            for name, network in picture_networks().items():
                if name in parts:
                    weights |= {key: value.numpy() for key, value in network.state_dict().items()}
            write_parts(folder, parts, weights)
    return Bundle.open(folder, verify=False)


def _parts() -> dict[str, Part]:
    """All parts and variants there are, in tiny: heads of 16, windows of 16 patches."""
    from transformers import Qwen2_5_VLConfig

    from tests.export.networks.test_qwen_image import TINY
    from tests.export.networks.test_text_encoder import QWEN2
    from zimgkit.export.networks import qwen_image_variants, text_encoder

    vision = {
        "depth": 2, "hidden_size": 64, "intermediate_size": 96, "num_heads": 2, "out_hidden_size": 64, "patch_size": 6,
        "window_size": 24, "fullatt_block_indexes": [1],
    }  # fmt: skip
    rope = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6}}
    config = Qwen2_5_VLConfig(text_config=QWEN2 | {"hidden_size": 64} | rope, vision_config=vision).to_dict()
    denoiser = qwen_image_variants.entity_parts(TINY)["denoiser"]
    plain = qwen_image_variants.edit_parts(TINY)["denoiser"].variants
    at_zero = qwen_image_variants.edit_parts(TINY | {"zero_cond_t": True})["denoiser"].variants
    variants = {**denoiser.variants, **plain, "conditions-at-zero": at_zero["conditions"]}
    return {**text_encoder.edit_parts(config), "denoiser": replace(denoiser, variants=variants)}
