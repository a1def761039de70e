"""Z-Image's autoencoder against diffusers' ``AutoencoderKL``."""

from __future__ import annotations

from collections import Counter

import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from diffusers import AutoencoderKL

from tests.reference import randomize
from zimgkit.engines.errors import CheckpointError
from zimgkit.engines.tensors import safetensors
from zimgkit.export.graphs.assemble import assemble
from zimgkit.export.graphs.plan import record
from zimgkit.export.networks.autoencoder_kl import (
    AutoencoderKLDecoder,
    AutoencoderKLEncoder,
    GroupNorm,
    halves,
    parts,
    read_config,
)
from zimgkit.export.networks.registry import is_unused

TINY = {
    "in_channels": 3, "out_channels": 3, "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4, "block_out_channels": (8, 8, 16, 16), "layers_per_block": 1,
    "latent_channels": 16, "norm_num_groups": 8, "use_quant_conv": False, "use_post_quant_conv": False,
}  # fmt: skip
CONFIGS = {
    "tiny": TINY,
    "wide": TINY | {"block_out_channels": (16, 24, 32, 48), "layers_per_block": 2, "norm_num_groups": 4},
    "quant": TINY | {"use_quant_conv": True, "use_post_quant_conv": True, "latent_channels": 4},
    "no attention": TINY | {"mid_block_add_attention": False, "norm_num_groups": 2, "layers_per_block": 3},
    "other channels": TINY | {"in_channels": 4, "out_channels": 1, "block_out_channels": (32, 16, 16, 8)},
}
CASES = [
    ("tiny", 4, 4, 1, 0),
    ("tiny", 5, 7, 2, 1),
    ("tiny", 1, 3, 1, 2),
    ("wide", 6, 3, 1, 3),
    ("wide", 9, 8, 2, 4),
    ("quant", 4, 6, 2, 5),
    ("no attention", 3, 5, 1, 6),
    ("other channels", 8, 2, 2, 7),
]


def reference(config, seed):
    model = AutoencoderKL(**config).eval()
    randomize(model, seed)
    torch.manual_seed(seed)  # for the inputs
    return model


def ours(kind, config, model):
    """Our half of the autoencoder, with the reference's weights of this half and no others."""
    halves = ("decoder.", "post_quant_conv.") if kind is AutoencoderKLDecoder else ("encoder.", "quant_conv.")
    network = kind(read_config(config))
    network.load_state_dict({k: v for k, v in model.state_dict().items() if k.startswith(halves)}, strict=True)
    return network.eval()


def relative_error(found, expected):
    assert found.shape == expected.shape
    return float((torch.as_tensor(found) - expected).abs().max() / expected.abs().max())


def rms_error(found, expected):
    return float((found - expected).square().mean().sqrt())


def store(state, folder):
    """Write parameters as a checkpoint does."""
    values = {name: value.detach().numpy() for name, value in state.items()}
    shapes = {name: ("float32", value.shape) for name, value in values.items()}
    return safetensors.write(folder / "vae.safetensors", shapes, {name: [value] for name, value in values.items()})


@pytest.mark.parametrize(("name", "height", "width", "batch", "seed"), CASES)
@torch.inference_mode()
def test_decoder_matches_diffusers(name, height, width, batch, seed):
    model = reference(CONFIGS[name], seed)
    latents = torch.randn(batch, CONFIGS[name]["latent_channels"], height, width)
    found = ours(AutoencoderKLDecoder, CONFIGS[name], model)(latents)
    assert relative_error(found, model.decode(latents).sample) < 1e-5


@pytest.mark.parametrize(("name", "height", "width", "batch", "seed"), CASES)
@torch.inference_mode()
def test_encoder_matches_diffusers(name, height, width, batch, seed):
    model = reference(CONFIGS[name], seed)
    image = torch.rand(batch, CONFIGS[name]["in_channels"], 8 * height, 8 * width) * 2 - 1
    found = ours(AutoencoderKLEncoder, CONFIGS[name], model)(image)
    assert relative_error(found, model.encode(image).latent_dist.parameters) < 1e-5


def test_every_tensor_is_used_or_unused():
    for config in CONFIGS.values():
        with torch.device("meta"):
            checkpoint = {name: tuple(value.shape) for name, value in AutoencoderKL(**config).state_dict().items()}
        part = parts(config)["vae_decoder"]
        assert part.stored_shapes().items() <= checkpoint.items()
        assert not part.transforms
        assert all(
            is_unused("z-image", "vae", config, name) for name in checkpoint.keys() - part.stored_shapes().keys()
        )
        assert not any(is_unused("z-image", "vae", config, name) for name in part.stored_shapes())


@torch.inference_mode()
def test_bfloat16_is_as_near_as_diffusers():
    """The norms compute in float32, so ours is no further from the float32 picture than the reference's bfloat16."""
    model = reference(TINY, 0)
    latents = torch.randn(1, 16, 12, 12)
    exact = model.decode(latents).sample
    theirs = model.bfloat16().decode(latents.bfloat16()).sample.float()
    found = ours(AutoencoderKLDecoder, TINY, model).bfloat16()(latents)
    assert found.dtype == torch.float32
    assert rms_error(found, exact) < 1.2 * rms_error(theirs, exact)


@torch.inference_mode()
def test_decoder_graph(tmp_path):
    model = reference(TINY, 3)
    part = parts(TINY)["vae_decoder"]
    infos = store({name: model.state_dict()[name] for name in part.parameters()}, tmp_path)
    assembled = assemble(record(part.build(torch.float32), part.inputs, part.outputs, part.sizes), infos)
    graph = assembled.model
    assert assembled.outputs["image"].shape == ("batch", 3, "8*height", "8*width")
    kinds = Counter(node.op_type for function in graph.functions.values() for node in function)
    assert kinds["Attention"] == 1
    assert kinds["GroupNormalization"] == 0
    assert max(len(function) for function in graph.functions.values()) < 50
    ir.save(graph, tmp_path / "vae_decoder.onnx")
    session = ort.InferenceSession(tmp_path / "vae_decoder.onnx")
    for shape in ((1, 16, 5, 7), (3, 16, 8, 4), (2, 16, 10, 14)):
        latents = torch.randn(shape)
        found = session.run(["image"], {"latents": latents.numpy()})[0]
        assert relative_error(found, model.decode(latents).sample) < 1e-5


@torch.no_grad()
def test_encoder_exports_with_dynamic_dimensions(tmp_path):
    model = reference(TINY, 4)
    dynamic = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    example = torch.zeros(2, 3, 48, 80)
    program = torch.export.export(ours(AutoencoderKLEncoder, TINY, model), (example,), dynamic_shapes=(dynamic,))
    torch.onnx.export(program, dynamo=True, opset_version=23, verbose=False).save(tmp_path / "vae_encoder.onnx")
    session = ort.InferenceSession(tmp_path / "vae_encoder.onnx")
    for shape in ((1, 3, 40, 56), (3, 3, 64, 16)):
        pixels = torch.rand(shape) * 2 - 1
        found = session.run(None, {"image": pixels.numpy()})[0]
        assert relative_error(found, model.encode(pixels).latent_dist.parameters) < 1e-5


@torch.no_grad()
def test_group_norm_of_inputs_far_from_zero(tmp_path):
    """A variance as E[x²] - E[x]², which ONNX Runtime makes of GroupNormalization, is off by 1e-4 here."""
    norm = GroupNorm(4, 16).eval()
    x = torch.randn(2, 16, 32, 32) + 10
    torch.onnx.export(norm, (x,), dynamo=True, opset_version=23, verbose=False).save(tmp_path / "norm.onnx")
    found = ort.InferenceSession(tmp_path / "norm.onnx").run(None, {"x": x.numpy()})[0]
    assert relative_error(found, torch.nn.functional.group_norm(x.double(), 4, eps=1e-6)) < 1e-5


@pytest.mark.parametrize("key", ["use_quant_conv", "mid_block_add_attention", "act_fn", "norm_num_groups"])
def test_missing_keys_have_the_defaults_of_diffusers(key):
    config = TINY | {"block_out_channels": (32, 32, 32, 32)}
    config.pop(key, None)
    with torch.device("meta"):
        expected = AutoencoderKL(**config).state_dict().keys()
        found = {name for half in halves(config) for name in half.state_dict()}
    assert found == expected


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("act_fn", "relu"),
        ("down_block_types", ["DownEncoderBlock2D"] * 3 + ["AttnDownEncoderBlock2D"]),
        ("up_block_types", ["AttnUpDecoderBlock2D"] * 4),
        ("up_block_types", ["UpDecoderBlock2D"] * 3),
        ("block_out_channels", [8, 16]),
        ("block_out_channels", "8, 8, 16, 16"),
        ("block_out_channels", [8, 8, 16, 0]),
        ("norm_num_groups", 3),
        ("norm_num_groups", None),
        ("layers_per_block", -1),
        ("latent_channels", 16.0),
    ],
)
@pytest.mark.parametrize("make", [halves, parts])
def test_refuses_other_configs(make, key, value):
    with pytest.raises(CheckpointError, match=key) as error:
        make(TINY | {key: value})
    assert "\n" not in str(error.value)
