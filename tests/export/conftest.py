"""Bundles of all networks that read pictures, with random weights, made once for all workers."""

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
def picture_networks() -> Callable[[str], dict[str, nn.Module]]:
    """``picture_networks(family)``: component or variant -> its network, in float32, weights as in the bundle."""

    def make(family: str) -> dict[str, nn.Module]:
        from tests.reference import randomize

        made, found = {}, {}
        for name, part in PARTS[family]().items():
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
def picture_bundle(
    shared_folder: Path, picture_networks: Callable[[str], dict[str, nn.Module]]
) -> Callable[[str], Bundle]:
    """``picture_bundle(family)``: a bundle of them in bfloat16, with the float32 graphs that every such bundle has."""

    def make(family: str) -> Bundle:
        from tests.parts import write_parts

        folder = shared_folder / f"pictures-{family}"
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                parts = PARTS[family]()
                weights = {}
                for name, network in picture_networks(family).items():
                    if name in parts:
                        weights |= {key: value.numpy() for key, value in network.state_dict().items()}
                write_parts(folder, parts, weights, family=family)
        return Bundle.open(folder, verify=False)

    return make


def _qwen_image() -> dict[str, Part]:
    """All parts and variants there are, in tiny: heads of 16 and 32, windows of 16 patches."""
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
    masked = [
        qwen_image_variants.edit_entity_parts(TINY | {"zero_cond_t": is_zero})["denoiser"].variants["masked_conditions"]
        for is_zero in (False, True)
    ]
    variants = {
        **denoiser.variants, **plain, "conditions-at-zero": at_zero["conditions"],
        "masked_conditions": masked[0], "masked_conditions-at-zero": masked[1],
    }  # fmt: skip
    return {**text_encoder.edit_parts(config), "denoiser": replace(denoiser, variants=variants)}


def _z_image() -> dict[str, Part]:
    """Those that draw from text alone have not."""
    from tests.export.networks.test_siglip import TINY as SIGLIP
    from tests.export.networks.test_z_image import TINY
    from zimgkit.export.networks import siglip, z_image_omni

    found = z_image_omni.edit_parts(TINY | {"siglip_feat_dim": 32})
    tower = siglip.parts(SIGLIP | {"hidden_size": 32})
    return {**tower, "denoiser": found["denoiser"].variants["conditions"]}


PARTS = {"qwen-image": _qwen_image, "z-image": _z_image}
