"""The table against what diffusers' transformer computes inside, caught by hooks while it runs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel

from zimgkit.engines.bundle import (
    Bundle,
    Component,
    Defaults,
    Manifest,
    Source,
    TextConfig,
    record_files,
    write_manifest,
)
from zimgkit.engines.errors import BundleError, UsageError
from zimgkit.engines.tensors import safetensors
from zimgkit.engines.tensors.dtypes import float32_to_bfloat16, round_to
from zimgkit.runtime.diffusion import modulation
from zimgkit.runtime.diffusion.modulation import ModulationTable
from zimgkit.runtime.families.qwen_image import MODULATION, network_time, time_embedding

SCHEDULES = {
    "qwen": {"use_dynamic_shifting": True, "shift_terminal": 0.02},
    "layered": {"use_dynamic_shifting": True, "time_shift_type": "linear"},
    "static": {"shift": 3.0},
}


def modulation_table(bundle, sigmas, **options) -> ModulationTable:
    embedding = time_embedding(network_time(np.asarray(sigmas, np.float32)))
    return modulation.modulation_table(bundle, MODULATION, sigmas, embedding, **options)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("ZIMG_CACHE_LIMIT", raising=False)
    return tmp_path / "cache" / "zimgkit" / "modulation"


def transformer(layers=2, heads=3, head_dim=16, seed=0, **more):
    torch.manual_seed(seed)
    axes = (head_dim - 8, 4, 4)
    return QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=layers, attention_head_dim=head_dim,
        num_attention_heads=heads, joint_attention_dim=16, axes_dims_rope=axes, **more,
    ).eval()  # fmt: skip


def weights_of(model):
    parts = ("time_text_embed.", ".img_mod.", ".txt_mod.", "norm_out.")
    state = model.state_dict()
    return {name: value.float().numpy() for name, value in state.items() if any(part in name for part in parts)}


def write_bundle(root, weights, precision="float32"):
    root.mkdir()
    spec = {name: (precision, values.shape) for name, values in weights.items()}
    stored = {k: [float32_to_bfloat16(v) if precision == "bfloat16" else v] for k, v in weights.items()}
    safetensors.write(root / "modulation.safetensors", spec, stored)
    manifest = Manifest(
        schema_version=2, zimgkit_version="0", tasks=(), family="qwen-image", name="tiny", precision=precision,
        sources={"checkpoint": Source("tiny")}, text=TextConfig("", "", 0, 8, 8), defaults=Defaults(2, 1.0, 32, 32),
        scheduler={}, config={},
        components={"modulation": Component(weights=("modulation.safetensors",))}, files=record_files(root),
    )  # fmt: skip
    write_manifest(root, manifest)
    return Bundle.open(root)


def sigmas_of(schedule, steps, mu=0.7):
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(SCHEDULES[schedule])
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=mu)
    return scheduler.sigmas.numpy()[:-1], scheduler.timesteps


@torch.no_grad()
def diffusers_table(model, timesteps, **given):
    """Run the model on a batch of all timesteps and collect what its modulation linears give, in the rows' order."""
    caught = []
    modules = [module for block in model.transformer_blocks for module in (block.img_mod, block.txt_mod)]
    modules.append(model.norm_out.linear)
    hooks = [module.register_forward_hook(lambda module, inputs, out: caught.append(out)) for module in modules]
    steps = len(timesteps)
    model(
        hidden_states=torch.zeros(steps, 4, 16),
        encoder_hidden_states=torch.zeros(steps, 3, 16),
        timestep=timesteps / 1000,
        img_shapes=[[(1, 2, 2)]],
        **given,
    )
    for hook in hooks:
        hook.remove()
    return torch.cat(caught, dim=1).reshape(steps, -1, model.inner_dim).numpy()


def full(table):
    return np.stack([table[step] for step in range(len(table))])


def relative_error(ours, expected):
    return np.abs(ours - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize(("layers", "heads", "head_dim"), [(1, 1, 16), (2, 3, 16), (5, 2, 32), (2, 2, 128)])
@pytest.mark.parametrize(
    ("seed", "schedule", "steps"), [(0, "qwen", 2), (1, "layered", 7), (2, "static", 20), (3, "qwen", 50)]
)
def test_equal_to_diffusers(tmp_path, layers, heads, head_dim, seed, schedule, steps):
    model = transformer(layers, heads, head_dim, seed)
    sigmas, timesteps = sigmas_of(schedule, steps, mu=0.4 + seed / 7)
    table = modulation_table(write_bundle(tmp_path / "bundle", weights_of(model)), sigmas)
    expected = diffusers_table(model, timesteps)
    assert table.shape == expected.shape == (steps, 12 * layers + 2, heads * head_dim)
    assert len(table) == steps
    assert table[0].dtype == np.float32
    assert relative_error(full(table), expected) < 5e-6  # By how CPUs compute exponentials and sums.


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_time_embedding_with_an_addition(tmp_path, precision):
    model = transformer(use_additional_t_cond=True).bfloat16().float()
    sigmas, timesteps = sigmas_of("layered", 3)
    table = modulation_table(write_bundle(tmp_path / "bundle", weights_of(model), precision), sigmas)
    expected = diffusers_table(model, timesteps, additional_t_cond=torch.zeros(3, dtype=torch.int64))
    assert relative_error(full(table), expected) < (5e-6 if precision == "float32" else 2**-8)


def test_large_weights(tmp_path):
    """As trained models have them: silu far from its linear part."""
    model = transformer(seed=9)
    with torch.no_grad():
        for parameter in model.time_text_embed.parameters():
            parameter.mul_(20)
    sigmas, timesteps = sigmas_of("qwen", 10)
    table = modulation_table(write_bundle(tmp_path / "bundle", weights_of(model)), sigmas)
    assert relative_error(full(table), diffusers_table(model, timesteps)) < 5e-6


def test_bfloat16(tmp_path, cache):
    model = transformer().bfloat16().float()
    sigmas, timesteps = sigmas_of("qwen", 6)
    bundle = write_bundle(tmp_path / "bundle", weights_of(model), "bfloat16")
    expected = diffusers_table(model, timesteps)
    for _ in range(2):
        ours = full(modulation_table(bundle, sigmas))
        np.testing.assert_array_equal(ours, round_to(ours, "bfloat16"))
        np.testing.assert_allclose(ours, expected, rtol=2**-8, atol=1e-6)
    (entry,) = cache.iterdir()
    assert entry.stat().st_size < 6 * 26 * 48 * 2 + 200


def test_pieces_of_a_weight(tmp_path, monkeypatch):
    sigmas, _ = sigmas_of("qwen", 3)
    bundle = write_bundle(tmp_path / "bundle", weights_of(transformer()))
    whole = full(modulation_table(bundle, sigmas))
    monkeypatch.setattr(modulation, "PIECE", 48 * 7)
    monkeypatch.setenv("ZIMG_CACHE_LIMIT", "0")
    np.testing.assert_allclose(full(modulation_table(bundle, sigmas)), whole, rtol=0, atol=1e-6)


def test_second_call_comes_from_the_cache(tmp_path, cache):
    sigmas, _ = sigmas_of("qwen", 3)
    bundle = write_bundle(tmp_path / "bundle", weights_of(transformer()))
    calls = []
    first = full(modulation_table(bundle, sigmas, progress=lambda *done: calls.append(done)))
    assert calls == [(i, 5) for i in range(1, 6)]
    second = modulation_table(bundle, sigmas, progress=lambda *done: calls.append(done))
    assert len(calls) == 5
    np.testing.assert_array_equal(full(second), first)
    assert [path.suffix for path in cache.iterdir()] == [".npy"]


def test_key(tmp_path, cache):
    weights = weights_of(transformer())
    bundle = write_bundle(tmp_path / "bundle", weights)
    sigmas, _ = sigmas_of("qwen", 3)
    modulation_table(bundle, sigmas)
    modulation_table(bundle, np.nextafter(sigmas, np.float32(0)))
    modulation_table(bundle, sigmas[:2])
    assert len(list(cache.iterdir())) == 3
    weights["norm_out.linear.bias"] = weights["norm_out.linear.bias"] + 1
    changed = write_bundle(tmp_path / "changed", weights)
    last = modulation_table(changed, sigmas)[0][-2:]
    np.testing.assert_allclose(last, modulation_table(bundle, sigmas)[0][-2:] + 1, atol=1e-5)
    assert len(list(cache.iterdir())) == 4


def test_a_step_reads_its_own_row(tmp_path):
    sigmas, _ = sigmas_of("qwen", 4)
    table = modulation_table(write_bundle(tmp_path / "bundle", weights_of(transformer())), sigmas)
    row = table[2]
    row[:] = 0
    assert np.abs(table[2]).max() > 0
    with pytest.raises(IndexError):
        table[4]


@pytest.mark.parametrize("missing", ["norm_out.linear.weight", "transformer_blocks.0.txt_mod.1.bias"])
def test_refuses_a_missing_tensor(tmp_path, missing, cache):
    weights = weights_of(transformer())
    del weights[missing]
    with pytest.raises(BundleError, match=missing):
        modulation_table(write_bundle(tmp_path / "bundle", weights), sigmas_of("qwen", 3)[0])
    assert not list(cache.iterdir())


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("norm_out.linear.weight", (96, 47)),
        ("norm_out.linear.bias", (95,)),
        ("transformer_blocks.1.img_mod.1.weight", (48, 48)),
        ("time_text_embed.timestep_embedder.linear_1.weight", (48, 128)),
    ],
)
def test_refuses_other_shapes(tmp_path, name, shape):
    weights = weights_of(transformer()) | {name: np.zeros(shape, np.float32)}
    with pytest.raises(BundleError, match=name.rpartition(".")[0]):
        modulation_table(write_bundle(tmp_path / "bundle", weights), sigmas_of("qwen", 3)[0])


def test_refuses_a_bad_limit(tmp_path, monkeypatch):
    monkeypatch.setenv("ZIMG_CACHE_LIMIT", "2GiB")
    with pytest.raises(UsageError, match="ZIMG_CACHE_LIMIT"):
        modulation_table(write_bundle(tmp_path / "bundle", weights_of(transformer())), sigmas_of("qwen", 3)[0])
