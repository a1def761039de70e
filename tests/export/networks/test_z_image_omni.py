"""The Z-Image networks beside pictures, against diffusers' transformer in its omni mode, in float32."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import ZImageTransformer2DModel

from tests.export.networks.test_z_image import TINY, WIDE
from tests.reference import randomize
from zimgkit.engines.errors import CheckpointError
from zimgkit.export.networks.z_image import ZImageConditioner, read_config
from zimgkit.export.networks.z_image_omni import OmniDenoiser, PictureConditioner, edit_parts
from zimgkit.runtime.families.z_image import time_embedding


def ours(kind, model, config):
    network, state = kind(read_config(config)).eval(), model.state_dict()
    network.load_state_dict({name: state[name] for name in network.state_dict()})
    return network


def tables(model, positions):
    found = model.rope_embedder(positions)
    return found.real.contiguous(), found.imag.contiguous()


@pytest.mark.parametrize(
    ("config", "sizes", "grids", "captions", "time", "seed"),
    [
        (TINY, [(8, 12), (6, 6)], [(6, 9)], [4, 10, 2], 0.3, 0),
        (TINY, [(16, 4), (8, 8), (20, 22)], [(3, 3), (1, 7)], [40, 1, 32, 5], 0.0, 1),
        (WIDE, [(2, 2), (8, 32)], [(8, 8)], [1, 70, 3], 0.9, 2),
    ],
)
@torch.inference_mode()
def test_matches_diffusers(config, sizes, grids, captions, time, seed):
    """The last of the sizes is that of the picture which is drawn."""
    config = config | {"siglip_feat_dim": 24}
    model = ZImageTransformer2DModel(**config).eval()
    randomize(model, seed)
    generator = torch.Generator().manual_seed(seed)
    x = [torch.randn(16, 1, *size, generator=generator) for size in sizes]
    embeds = [torch.randn(length, config["cap_feat_dim"], generator=generator) for length in captions]
    rows = [*(torch.randn(*grid, 24, generator=generator) for grid in grids), None]
    noisy = [*(0 for _ in grids), 1]
    expected = model([x], torch.tensor([time]), [embeds], False, None, [rows], [noisy])[0][0]

    pieces = model.patchify_and_embed_omni([x], [embeds], [rows], 2, 1, [noisy])
    patches, caption, picture = (piece[0] for piece in pieces[:3])
    positions, pads, is_noisy = ([piece[0] for piece in pieces[i : i + 3]] for i in (4, 7, 11))
    # Theirs: caption, pictures, target, SigLIP2's. Ours: target, pictures, caption, SigLIP2's.
    target = -(-(sizes[-1][0] * sizes[-1][1] // 4) // 32) * 32
    order = [*range(len(patches) - target, len(patches)), *range(len(patches) - target)]
    patches, positions[0], pads[0] = patches[order], positions[0][order], pads[0][order]
    # A caption's pieces have more positions than tokens in the reference, which takes the first of all.
    positions[1] = positions[1][: len(caption)]
    clean = 1 - torch.tensor([*np.array(is_noisy[0])[order], *is_noisy[1], *is_noisy[2]])
    conditioner, picture_conditioner = (ours(kind, model, config) for kind in (ZImageConditioner, PictureConditioner))
    text = conditioner(caption[None], *tables(model, positions[1]), pads[1])
    seen = picture_conditioner(picture[None], *tables(model, positions[2]), pads[2])
    sinusoids, at_one = (torch.from_numpy(time_embedding(np.array([t], np.float32), 1000.0)) for t in (time, 1.0))
    found = ours(OmniDenoiser, model, config)(
        patches[None, :target], patches[None, target:], sinusoids, at_one, text, seen,
        *tables(model, torch.cat(positions)), pads[0][:target], pads[0][target:], clean.bool(),
    )  # fmt: skip
    height, width = sizes[-1]
    found = found[0, : height * width // 4].reshape(height // 2, width // 2, 2, 2, 16).permute(4, 0, 2, 1, 3)
    found, expected = found.reshape(16, height, width).numpy(), expected[:, 0].numpy()
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def test_takes_all_that_a_checkpoint_has():
    config = TINY | {"siglip_feat_dim": 24}
    whole = {name: tuple(value.shape) for name, value in ZImageTransformer2DModel(**config).state_dict().items()}
    parts = edit_parts(config)
    assert {name: shape for part in parts.values() for name, shape in part.stored_shapes().items()} == whole
    assert parts["denoiser"].variants["conditions"].parameters() == parts["denoiser"].parameters()
    with pytest.raises(CheckpointError, match="takes no pictures"):
        edit_parts(TINY)
