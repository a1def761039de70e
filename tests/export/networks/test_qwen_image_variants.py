"""The Qwen-Image denoiser beside other pictures and with a mask, against diffusers' transformer, in float32."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.models.transformers import transformer_qwenimage

from tests.export.networks.test_qwen_image import TINY, WIDE, modulation
from tests.reference import randomize
from zimgkit.export.networks.qwen_image import QwenImageConditioner, QwenImageDenoiser, modulation_tensors, read_config
from zimgkit.export.networks.qwen_image_variants import (
    ConditionedDenoiser,
    MaskedConditionedDenoiser,
    MaskedDenoiser,
    MaskedZeroConditionedDenoiser,
    ZeroConditionedDenoiser,
    edit_entity_parts,
    edit_parts,
    entity_parts,
)
from zimgkit.export.quantization.quantize import linear_weights

LAYERED = {"use_layer3d_rope": True, "use_additional_t_cond": True}


def reference(config, seed):
    model = QwenImageTransformer2DModel(**config).eval()
    randomize(model, seed)
    return model


def inputs_of(model, config, shapes, tokens, sigma, seed, batch=1):
    """What both take: the pictures' tokens, the prompt's rows; and, of the reference itself, tables and modulation."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [frames * height * width for frames, height, width in shapes]
    target = torch.randn(batch, lengths[0], config["in_channels"], generator=generator)
    condition = torch.randn(1, sum(lengths[1:]), config["in_channels"], generator=generator)
    embeds = torch.randn(1, tokens, config["joint_attention_dim"], generator=generator)
    image, text = model.pos_embed([shapes] * batch, max_txt_seq_len=tokens, device=torch.device("cpu"))
    tables = torch.cat([text, image])
    return target, condition, embeds, tables.real.contiguous(), tables.imag.contiguous()


def run_reference(model, shapes, target, condition, embeds, sigma, **given):
    batch = len(target)
    out = model(
        hidden_states=torch.cat([target, condition.expand(batch, -1, -1)], dim=1),
        encoder_hidden_states=embeds.expand(batch, -1, -1),
        timestep=torch.full((batch,), sigma),
        img_shapes=[shapes] * batch,
        return_dict=False,
        **given,
    )[0]
    return out[:, : target.shape[1]].numpy()


def ours(kind, model, config):
    network, state = kind(read_config(config)).eval(), model.state_dict()
    network.load_state_dict({name: state[name] for name in network.state_dict()})
    return network


def close(found, expected):
    return found.shape == expected.shape and np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


CASES = [
    (TINY, [(1, 4, 6), (1, 4, 6)], 5, 1, 1.0, 0),
    (TINY, [(1, 1, 1), (1, 3, 50), (1, 7, 2), (1, 1, 1)], 1, 2, 0.02, 1),
    (TINY, [(1, 9, 5), (1, 33, 31)], 300, 1, 0.7, 2),
    (WIDE, [(1, 10, 7), (1, 8, 8), (1, 5, 11)], 12, 3, 0.4, 3),
]


@pytest.mark.parametrize(("config", "shapes", "tokens", "batch", "sigma", "seed"), CASES)
@pytest.mark.parametrize("zero_cond_t", [False, True])
@torch.inference_mode()
def test_conditions(config, shapes, tokens, batch, sigma, seed, zero_cond_t):
    config = config | {"zero_cond_t": zero_cond_t}
    model = reference(config, seed)
    target, condition, embeds, cos, sin = inputs_of(model, config, shapes, tokens, sigma, seed, batch)
    expected = run_reference(model, shapes, target, condition, embeds, sigma)
    text, rows = ours(QwenImageConditioner, model, config)(embeds), modulation(model, sigma)
    plain = ours(ConditionedDenoiser, model, config)(target, condition, text, rows, cos, sin).numpy()
    if not zero_cond_t:
        assert close(plain, expected)
        return
    network = ours(ZeroConditionedDenoiser, model, config)
    found = network(target, condition, text, rows, modulation(model, 0.0), cos, sin).numpy()
    assert close(found, expected)
    assert np.abs(plain - expected).max() > 1e-3
    # Without conditions it is as any other.
    image_and_text = model.pos_embed([shapes[:1]], max_txt_seq_len=tokens, device=torch.device("cpu"))
    tables = torch.cat(image_and_text[::-1])
    alone = ours(QwenImageDenoiser, model, config)(target, text, rows, tables.real, tables.imag).numpy()
    assert close(alone, run_reference(model, shapes[:1], target, condition[:, :0], embeds, sigma))


@pytest.mark.parametrize("layers", [1, 3])
@torch.inference_mode()
def test_layers(layers):
    """Layered's target is several pictures, its positions are on three axes, and its time has a row more."""
    config, shapes = TINY | LAYERED, [(1, 4, 6)] * (layers + 2)
    model = reference(config, layers)
    pictures, condition, embeds, cos, sin = inputs_of(model, config, shapes, 9, 0.6, layers)
    tokens = torch.cat([pictures, condition], dim=1)
    target, condition = tokens[:, : 24 * (layers + 1)], tokens[:, 24 * (layers + 1) :]
    expected = run_reference(model, shapes, target, condition, embeds, 0.6, additional_t_cond=torch.tensor([0]))
    text = ours(QwenImageConditioner, model, config)(embeds)
    rows = modulation(model, 0.6, torch.tensor([0]))
    found = ours(ConditionedDenoiser, model, config)(target, condition, text, rows, cos, sin).numpy()
    assert close(found, expected)


def random_mask(size, seed):
    """A mask, and diffusers' attention with it."""
    mask = torch.rand(size, size, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask |= torch.eye(len(mask), dtype=torch.bool)
    dispatch = transformer_qwenimage.dispatch_attention_fn
    return mask, lambda *given, **named: dispatch(*given, **(named | {"attn_mask": mask[None, None]}))


@pytest.mark.parametrize("zero_cond_t", [False, True])
@torch.inference_mode()
def test_a_mask_and_conditions(zero_cond_t, monkeypatch):
    config, shapes, tokens = TINY | {"zero_cond_t": zero_cond_t}, [(1, 5, 6), (1, 5, 6), (1, 3, 7)], 9
    model = reference(config, 3)
    target, condition, embeds, cos, sin = inputs_of(model, config, shapes, tokens, 0.5, 3, batch=2)
    mask, masked = random_mask(tokens + 81, 3)
    monkeypatch.setattr(transformer_qwenimage, "dispatch_attention_fn", masked)
    expected = run_reference(model, shapes, target, condition, embeds, 0.5)
    text, rows = ours(QwenImageConditioner, model, config)(embeds), [modulation(model, 0.5)]
    kind = MaskedZeroConditionedDenoiser if zero_cond_t else MaskedConditionedDenoiser
    rows += [modulation(model, 0.0)] if zero_cond_t else []
    found = ours(kind, model, config)(target, condition, text, *rows, cos, sin, mask).numpy()
    assert close(found, expected)


@pytest.mark.parametrize(("tokens", "seed"), [(7, 0), (40, 1)])
@torch.inference_mode()
def test_a_mask(tokens, seed, monkeypatch):
    """Diffusers passes on a mask that it is handed; here each token sees itself and half of the others."""
    model, shapes = reference(TINY, seed), [(1, 5, 6)]
    target, condition, embeds, cos, sin = inputs_of(model, TINY, shapes, tokens, 0.5, seed, batch=2)
    mask, masked = random_mask(tokens + 30, seed)
    text, rows = ours(QwenImageConditioner, model, TINY)(embeds), modulation(model, 0.5)
    network = ours(MaskedDenoiser, model, TINY)
    unmasked = run_reference(model, shapes, target, condition, embeds, 0.5)
    assert close(network(target, text, rows, cos, sin, torch.ones_like(mask)).numpy(), unmasked)
    monkeypatch.setattr(transformer_qwenimage, "dispatch_attention_fn", masked)
    expected = run_reference(model, shapes, target, condition, embeds, 0.5)
    assert close(network(target, text, rows, cos, sin, mask).numpy(), expected)
    assert np.abs(expected - unmasked).max() > 1e-3


@pytest.mark.parametrize("change", [{}, {"zero_cond_t": True}, LAYERED])
def test_variants_have_the_denoisers_parameters(change):
    config = TINY | change
    with torch.device("meta"):
        whole = {name: tuple(value.shape) for name, value in QwenImageTransformer2DModel(**config).state_dict().items()}
    assert modulation_tensors(read_config(config)).items() <= whole.items()
    for parts in (edit_parts(config), entity_parts(config), edit_entity_parts(config)):
        assert {name: shape for part in parts.values() for name, shape in part.stored_shapes().items()} == whole
        (variant,) = parts["denoiser"].variants.values()
        assert variant.parameters() == parts["denoiser"].parameters()
        assert variant.outputs == parts["denoiser"].outputs
        # Of linears alone: an addition to the time is none.
        assert not [name for name in linear_weights(parts["modulation"]) if "addition" in name]
