"""Every layout gives the tensors of the diffusers folder that holds the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file, save_file

from zimgkit.engines.errors import CheckpointError
from zimgkit.engines.tensors.dtypes import to_float32
from zimgkit.engines.tensors.safetensors import read_header
from zimgkit.export.checkpoints.checkpoint import open_checkpoint, read_component
from zimgkit.export.checkpoints.stored import Stored, row_count, tensor_rows


def values(tensor: Stored, step: int = 3) -> np.ndarray[Any, Any]:
    """A tensor in float32, read a few rows at a time."""
    rows = row_count(tensor.shape)
    pieces = [tensor_rows(tensor, start, min(start + step, rows)) for start in range(0, rows, step)]
    return to_float32(np.concatenate(pieces), tensor.dtype).reshape(tensor.shape)


def same(found: dict[str, Stored], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(values(found[name]), tensor.float().numpy(), name)


def read(path: Path, component: str, tensors: dict[str, torch.Tensor], **metadata: str) -> dict[str, Stored]:
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path, metadata or None)
    return read_component([path], component)


@pytest.fixture(scope="module")
def weights(checkpoint_of):
    """Family, component -> its tensors by canonical names."""

    def load(family: str, component: str) -> dict[str, torch.Tensor]:
        file = next((checkpoint_of(family) / component).glob("*.safetensors"))
        opened = open_checkpoint(str(checkpoint_of(family))).tensors(component)
        stored = load_file(file)
        return {name: stored[info.name] for name, info in opened.items()}

    return load


def original(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A transformer in the names of its first release."""
    names = {".to_out.0.": ".out.", ".norm_q.": ".q_norm.", ".norm_k.": ".k_norm."}
    names |= {"all_x_embedder.2-1.": "x_embedder.", "all_final_layer.2-1.": "final_layer."}
    found = {}
    for name, tensor in tensors.items():
        if ".attention.to_" in name and ".to_out" not in name:
            block = name.partition(".to_")[0]
            found[f"{block}.qkv.weight"] = torch.cat([tensors[f"{block}.to_{part}.weight"] for part in "qkv"])
            continue
        renamed = name
        for new, old in names.items():
            renamed = renamed.replace(new, old)
        found[renamed] = tensor
    return found


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model.", "module.", "_orig_mod.",
                                    "base_model.model.", "transformer."])  # fmt: skip
def test_original_names(weights, tmp_path, prefix):
    tensors = weights("z-image", "transformer")
    stored = original(tensors)
    reference = single_file_utils.convert_z_image_transformer_checkpoint_to_diffusers(dict(stored))
    assert set(reference) == set(tensors) and all(torch.equal(reference[name], tensors[name]) for name in tensors)
    junk = {"norm_final.weight": torch.full((4,), torch.nan)}
    found = read(tmp_path / "a.safetensors", "transformer", {prefix + k: v for k, v in (stored | junk).items()})
    same(found, tensors)


def test_all_in_one(weights, tmp_path):
    own = {component: weights("z-image", component) for component in ("transformer", "text_encoder", "vae")}
    marks = {"transformer": "model.diffusion_model.", "text_encoder": "text_encoders.qwen3_4b.transformer.model.",
             "vae": "vae."}  # fmt: skip
    stored = {marks[part] + name: tensor for part, tensors in own.items() for name, tensor in tensors.items()}
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, tmp_path / "a.safetensors")
    for component, tensors in own.items():
        same(read_component([tmp_path / "a.safetensors"], component), tensors)


LDM = (
    (r"mid_block.resnets.0.", "mid.block_1."), ("mid_block.resnets.1.", "mid.block_2."),
    ("mid_block.attentions.0.to_q.", "mid.attn_1.q."), ("mid_block.attentions.0.to_k.", "mid.attn_1.k."),
    ("mid_block.attentions.0.to_v.", "mid.attn_1.v."), ("mid_block.attentions.0.to_out.0.", "mid.attn_1.proj_out."),
    ("mid_block.attentions.0.group_norm.", "mid.attn_1.norm."), ("conv_norm_out.", "norm_out."),
    ("conv_shortcut.", "nin_shortcut."), (".downsamplers.0.", ".downsample."), (".upsamplers.0.", ".upsample."),
    ("encoder.down_blocks.", "encoder.down."), (".resnets.", ".block."),
)  # fmt: skip


def test_ldm_names(tmp_path):
    """Against diffusers' own converter, on a network of four levels."""
    from diffusers import AutoencoderKL

    config = {"block_out_channels": (8, 8, 16, 16), "norm_num_groups": 2, "latent_channels": 4}
    config |= {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    tensors = {k: torch.randn_like(v) for k, v in AutoencoderKL(**config).state_dict().items()}
    stored = {}
    for name, tensor in tensors.items():
        old = name
        for level in range(4):
            old = old.replace(f"decoder.up_blocks.{level}.", f"decoder.up.{3 - level}.")
        for new, ldm in LDM:
            old = old.replace(new, ldm)
        is_matrix = ".attn_1." in old and tensor.ndim == 2
        stored[old] = tensor[:, :, None, None] if is_matrix else tensor
    reference = single_file_utils.convert_ldm_vae_checkpoint(dict(stored), AutoencoderKL(**config).config)
    assert set(reference) == set(tensors)
    same(read(tmp_path / "ae.safetensors", "vae", stored), tensors)
    same(read(tmp_path / "b.safetensors", "vae", {f"first_stage_model.{k}": v for k, v in stored.items()}), tensors)


def test_old_attention_names(tmp_path, weights):
    tensors = weights("z-image", "vae")
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    stored = {}
    for name, tensor in tensors.items():
        renamed = name
        for new, old in names.items():
            renamed = renamed.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        stored[renamed] = tensor
    assert set(stored) != set(tensors)
    same(read(tmp_path / "a.safetensors", "vae", stored), tensors)


def test_wan_names(tmp_path):
    """Against diffusers' own converter, over the names of the whole network."""
    from diffusers import AutoencoderKLQwenImage

    tensors = AutoencoderKLQwenImage(base_dim=8, z_dim=4).state_dict()
    stored = wan(tensors)
    reference = single_file_utils.convert_wan_vae_to_diffusers(dict(stored))
    assert set(reference) == set(tensors)
    same(read(tmp_path / "qwen_image_vae.safetensors", "vae", stored), {k: reference[k] for k in tensors})


def wan(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    residual = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6"}
    found = {}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        if part in ("quant_conv", "post_quant_conv"):
            found[{"quant_conv": "conv1", "post_quant_conv": "conv2"}[part] + "." + rest] = tensor
            continue
        if rest.startswith(("down_blocks", "up_blocks", "mid_block.resnets")):
            for new, old in residual.items():
                rest = rest.replace(f".{new}.", f".{old}.")
        rest = rest.replace("conv_shortcut", "shortcut").replace("down_blocks.", "downsamples.")
        if rest.startswith("up_blocks."):
            _, level, kind, number, *others = rest.split(".")
            place = 4 * int(level) + (int(number) if kind == "resnets" else 3)
            rest = ".".join(["upsamples", str(place), *others])
        for new, old in {"mid_block.resnets.0": "middle.0", "mid_block.attentions.0": "middle.1",
                         "mid_block.resnets.1": "middle.2", "norm_out": "head.0", "conv_out": "head.2",
                         "conv_in": "conv1"}.items():  # fmt: skip
            rest = rest.replace(f"{new}.", f"{old}.") if rest.startswith(new) else rest
        found[f"{part}.{rest}"] = tensor
    return found


@pytest.mark.parametrize("prefix", ["", "model.", "language_model.", "model.language_model."])
def test_text_encoders(weights, tmp_path, prefix):
    tensors = weights("qwen-image", "text_encoder")
    stored = {("" if name.startswith("lm_head") else prefix) + name: value for name, value in tensors.items()}
    same(read(tmp_path / "qwen_2.5_vl_7b.safetensors", "text_encoder", stored), tensors)


def test_what_trainings_leave_is_not_read(tmp_path):
    own = {"a.weight": torch.ones(2, 2)}
    left = {"ema.decay": torch.ones(1), "a.weight_ema": torch.zeros(2, 2), "optimizer.state": torch.ones(3),
            "model_ema.a": torch.ones(1)}  # fmt: skip
    same(read(tmp_path / "a.safetensors", "transformer", own | left), own)


def test_a_tensor_twice(tmp_path):
    both = {"a.weight": torch.ones(2, 2), "module.a.weight": torch.ones(2, 2)}
    with pytest.raises(CheckpointError, match=r"'module\.a\.weight' and 'a\.weight' are both the transformer's"):
        read(tmp_path / "a.safetensors", "transformer", both)


def test_rows_that_do_not_divide(tmp_path):
    with pytest.raises(CheckpointError, match="has 4 rows, and holds 3 tensors"):
        read(tmp_path / "a.safetensors", "transformer", {"layers.0.attention.qkv.weight": torch.ones(4, 2)})


def test_an_unmerged_adapter(tmp_path):
    torch.manual_seed(0)
    weight, up, down = torch.randn(5, 7), torch.randn(5, 2), torch.randn(2, 7)
    stored = {"base_model.model.l.base_layer.weight": weight, "base_model.model.l.base_layer.bias": torch.ones(5),
              "base_model.model.l.lora_A.default.weight": down, "base_model.model.l.lora_B.default.weight": up,
              "base_model.model.n.weight": torch.ones(3)}  # fmt: skip
    found = read(tmp_path / "a.safetensors", "transformer", stored)
    assert set(found) == {"l.weight", "l.bias", "n.weight"}
    torch.testing.assert_close(torch.from_numpy(values(found["l.weight"])), weight + up @ down)
    for change, message in (
        ({"base_model.model.l.lora_A.other.weight": down}, "several adapters"),
        ({"base_model.model.l.lora_magnitude_vector.default.weight": torch.ones(5)}, "no LoRA"),
        ({"base_model.model.l.lora_A.default.weight": torch.ones(2, 6)}, "differ in shape"),
    ):
        with pytest.raises(CheckpointError, match=message):
            read(tmp_path / "b.safetensors", "transformer", stored | change)


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"r": 2, "lora_alpha": 6}, 3.0),
        ({"r": 2, "lora_alpha": 6, "use_rslora": True}, 6 / 2**0.5),
        ({"r": 2, "lora_alpha": 6, "alpha_pattern": {"l": 1}}, 0.5),
        ({"r": 2}, None),
        (None, None),
    ],
)
def test_the_scale_of_an_unmerged_adapter(checkpoint_of, tmp_path, config, scale):
    torch.manual_seed(0)
    weight, up, down = torch.randn(5, 7), torch.randn(5, 2), torch.randn(2, 7)
    stored = {"l.base_layer.weight": weight, "l.lora_A.weight": down, "l.lora_B.weight": up}
    if config is not None:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    found = read(tmp_path / "a.safetensors", "transformer", stored)
    torch.testing.assert_close(torch.from_numpy(values(found["l.weight"])), weight + (scale or 1) * (up @ down))
    checkpoint = open_checkpoint(str(checkpoint_of("z-image")))
    checkpoint._tensors["transformer"] = found
    notes = checkpoint.notes(["transformer", "vae"])
    assert [str(tmp_path / "a.safetensors") in note and "lora_alpha" in note for note in notes] == [True] * (not scale)


def test_what_is_unchanged_is_linked(weights, tmp_path):
    """Only what is a part of another tensor has to be decoded; the rest stays where it is."""
    path = tmp_path / "a.safetensors"
    stored = {f"model.diffusion_model.{k}": v for k, v in weights("qwen-image", "transformer").items()}
    found = read(path, "transformer", stored)
    assert {info.name: info for info in found.values()} == read_header(path)


def test_index(tmp_path):
    """An index may be of what lay here before, and shards may hold more than it says."""
    tensors = {"a.weight": torch.ones(2, 2), "b.weight": torch.zeros(2)}
    save_file(tensors | {"optimizer.state": torch.ones(1)}, tmp_path / "m-1.safetensors")
    index = {"weight_map": {"a.weight": "m-1.safetensors", "gone": "m-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    from zimgkit.export.checkpoints.weight_files import weight_files

    same(read_component(weight_files(tmp_path, "model"), "transformer"), tensors)


@pytest.mark.parametrize(
    "names, chosen",
    [
        (["model.safetensors", "model.fp16.safetensors"], "model.safetensors"),
        (["model.fp16.safetensors", "model.bf16.safetensors"], "model.bf16.safetensors"),
        (["diffusion_pytorch_model.safetensors"], "diffusion_pytorch_model.safetensors"),
        (["qwen_3_4b.safetensors", "note.txt"], "qwen_3_4b.safetensors"),
    ],
)
def test_names_of_files(tmp_path, names, chosen):
    from zimgkit.export.checkpoints.weight_files import weight_files

    for name in names:
        (tmp_path / name).write_bytes(b"")
    assert [file.name for file in weight_files(tmp_path, "model")] == [chosen]


def test_two_files_that_nothing_tells_apart(tmp_path):
    from zimgkit.export.checkpoints.weight_files import weight_files

    for name in ("one.safetensors", "two.safetensors"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match="several weight files and no index"):
        weight_files(tmp_path, "model")
