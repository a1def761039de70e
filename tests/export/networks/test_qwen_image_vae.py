"""Qwen-Image's autoencoder in its two-dimensional form against diffusers' ``AutoencoderKLQwenImage``."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from diffusers import AutoencoderKLQwenImage

from tests.reference import randomize
from zimgkit.engines.errors import CheckpointError
from zimgkit.engines.tensors import safetensors
from zimgkit.export.graphs.assemble import assemble
from zimgkit.export.graphs.plan import record
from zimgkit.export.networks.qwen_image_vae import (
    ChannelNorm,
    QwenImageVAEDecoder,
    QwenImageVAEEncoder,
    halves,
    last_slice,
    parts,
    read_config,
    video_shapes,
)
from zimgkit.export.networks.registry import is_unused

TINY = {
    "base_dim": 8, "z_dim": 4, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1, "attn_scales": [],
    "temperal_downsample": [False, True, True], "input_channels": 3,
}  # fmt: skip
CONFIGS = {
    "tiny": TINY,
    "wide": TINY | {"base_dim": 12, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "z_dim": 16},
    "rgba": TINY | {"input_channels": 4, "z_dim": 8},
    "flat": TINY | {"dim_mult": [1, 1, 1, 1], "temperal_downsample": [True, True, False], "num_res_blocks": 3},
    "odd": TINY | {"base_dim": 6, "dim_mult": [2, 1, 3, 1], "temperal_downsample": [False, False, False]},
}
CASES = [
    ("tiny", 4, 4, 1, 0),
    ("tiny", 5, 7, 2, 1),
    ("tiny", 1, 3, 1, 2),
    ("wide", 6, 3, 1, 3),
    ("wide", 9, 8, 2, 4),
    ("rgba", 4, 6, 2, 5),
    ("flat", 3, 5, 1, 6),
    ("odd", 8, 2, 2, 7),
]


def reference(config, seed):
    model = AutoencoderKLQwenImage(**config).eval()
    randomize(model, seed)
    torch.manual_seed(seed)  # for the inputs
    return model


def weights(network, model):
    """The reference's tensors, with those cut that have a time axis."""
    state, cut = model.state_dict(), video_shapes(network)
    assert all(tuple(state[name].shape) == shape for name, shape in cut.items())
    return {
        name: torch.from_numpy(last_slice(state[name].numpy()).copy()) if name in cut else state[name]
        for name in network.state_dict()
    }


def ours(kind, config, model):
    network = kind(read_config(config))
    network.load_state_dict(weights(network, model), strict=True)
    return network.eval()


def decode(model, latents):
    """The reference's picture before it is clamped."""
    return model.decoder(model.post_quant_conv(latents.unsqueeze(2))).squeeze(2)


def encode(model, image):
    return model.encode(image.unsqueeze(2)).latent_dist.parameters.squeeze(2)


def relative_error(found, expected):
    assert found.shape == expected.shape
    return float((torch.as_tensor(found) - expected).abs().max() / expected.abs().max())


def rms_error(found, expected):
    return float((found - expected).square().mean().sqrt())


def store(state, folder):
    """Write parameters as a bundle does."""
    values = {name: value.detach().numpy() for name, value in state.items()}
    shapes = {name: ("float32", value.shape) for name, value in values.items()}
    return safetensors.write(folder / "vae.safetensors", shapes, {name: [value] for name, value in values.items()})


@pytest.mark.parametrize(("name", "height", "width", "batch", "seed"), CASES)
@torch.inference_mode()
def test_decoder_matches_diffusers(name, height, width, batch, seed):
    model = reference(CONFIGS[name], seed)
    latents = torch.randn(batch, CONFIGS[name]["z_dim"], height, width)
    found = ours(QwenImageVAEDecoder, CONFIGS[name], model)(latents)
    assert relative_error(found, decode(model, latents)) < 1e-5
    assert relative_error(found.clamp(-1, 1), model.decode(latents.unsqueeze(2)).sample.squeeze(2)) < 1e-5


@pytest.mark.parametrize(("name", "height", "width", "batch", "seed"), CASES)
@torch.inference_mode()
def test_encoder_matches_diffusers(name, height, width, batch, seed):
    model = reference(CONFIGS[name], seed)
    image = torch.rand(batch, CONFIGS[name]["input_channels"], 8 * height, 8 * width) * 2 - 1
    found = ours(QwenImageVAEEncoder, CONFIGS[name], model)(image)
    assert relative_error(found, encode(model, image)) < 1e-5


@torch.inference_mode()
def test_pixel_of_zeros_stays_zero():
    norm = ChannelNorm(8)
    x = torch.randn(2, 8, 3, 3)
    x[0, :, 1, 1] = 0
    found = norm(x)
    assert found.isfinite().all()
    assert found[0, :, 1, 1].abs().max() == 0


def test_every_tensor_is_used_or_unused():
    for config in CONFIGS.values():
        with torch.device("meta"):
            state = AutoencoderKLQwenImage(**config).state_dict()
        checkpoint = {name: tuple(value.shape) for name, value in state.items()}
        part = parts(config)["vae_decoder"]
        stored, shapes = part.stored_shapes(), part.parameters()
        assert stored.items() <= checkpoint.items()
        assert all(is_unused("qwen-image", "vae", config, name) for name in checkpoint.keys() - stored.keys())
        assert not any(is_unused("qwen-image", "vae", config, name) for name in stored)
        for name, transform in part.transforms.items():
            assert transform(np.zeros(stored[name], np.float32)).shape == shapes[name]


@torch.inference_mode()
def test_bfloat16_is_as_near_as_diffusers():
    """The norms compute in float32, so ours is no further from the float32 picture than the reference's bfloat16."""
    model = reference(TINY, 0)
    latents = torch.randn(1, 4, 12, 12, generator=torch.Generator().manual_seed(0))
    exact = decode(model, latents)
    network = ours(QwenImageVAEDecoder, TINY, model).bfloat16()
    theirs = decode(model.bfloat16(), latents.bfloat16()).float()
    found = network(latents)
    assert found.dtype == torch.float32
    assert rms_error(found, exact) < 1.2 * rms_error(theirs, exact)


@torch.inference_mode()
def test_decoder_graph(tmp_path):
    model = reference(TINY, 3)
    part = parts(TINY)["vae_decoder"]
    infos = store(weights(part.build(torch.float32), model), tmp_path)
    assembled = assemble(record(part.build(torch.float32), part.inputs, part.outputs, part.sizes), infos)
    graph = assembled.model
    assert assembled.outputs["image"].shape == ("batch", 3, "8*height", "8*width")
    kinds = Counter(node.op_type for function in graph.functions.values() for node in function)
    assert kinds["Attention"] == 1
    assert max(len(function) for function in graph.functions.values()) < 50
    ir.save(graph, tmp_path / "vae_decoder.onnx")
    session = ort.InferenceSession(tmp_path / "vae_decoder.onnx")
    for shape in ((1, 4, 5, 7), (3, 4, 8, 4), (2, 4, 10, 14)):
        latents = torch.randn(shape)
        found = session.run(["image"], {"latents": latents.numpy()})[0]
        assert relative_error(found, decode(model, latents)) < 1e-5


@torch.no_grad()
def test_encoder_exports_with_dynamic_dimensions(tmp_path):
    model = reference(TINY, 4)
    dynamic = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    example = torch.zeros(2, 3, 48, 80)
    program = torch.export.export(ours(QwenImageVAEEncoder, TINY, model), (example,), dynamic_shapes=(dynamic,))
    torch.onnx.export(program, dynamo=True, opset_version=23, verbose=False).save(tmp_path / "vae_encoder.onnx")
    session = ort.InferenceSession(tmp_path / "vae_encoder.onnx")
    for shape in ((1, 3, 40, 56), (3, 3, 64, 16)):
        pixels = torch.rand(shape) * 2 - 1
        found = session.run(None, {"image": pixels.numpy()})[0]
        assert relative_error(found, encode(model, pixels)) < 1e-5


def test_missing_keys_have_the_defaults_of_diffusers():
    with torch.device("meta"):
        expected = {name for name in AutoencoderKLQwenImage().state_dict() if ".time_conv." not in name}
        found = {name for half in halves({}) for name in half.state_dict()}
    assert found == expected


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attn_scales", [1.0]),
        ("is_residual", True),
        ("patch_size", 2),
        ("decoder_base_dim", 256),
        ("dim_mult", [1, 2, 4]),
        ("dim_mult", [1, 2, 0, 4]),
        ("dim_mult", 4),
        ("temperal_downsample", [True, True]),
        ("base_dim", "96"),
        ("z_dim", 0),
        ("num_res_blocks", None),
    ],
)
@pytest.mark.parametrize("make", [halves, parts])
def test_refuses_other_configs(make, key, value):
    with pytest.raises(CheckpointError, match=key) as error:
        make(TINY | {key: value})
    assert "\n" not in str(error.value)
