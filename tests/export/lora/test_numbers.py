"""LoRAs whose numbers are none, or become none when they are merged: each is named, with its file and module."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.commands import invoke
from tests.export.lora import lora_files
from tests.export.lora.lora_files import assert_near, found_by, merged_by, write
from tests.export.lora.swapping import states
from zimgkit.engines.errors import LoraError
from zimgkit.engines.tensors.safetensors import read_header
from zimgkit.export.cli.main import main
from zimgkit.export.lora.deltas import Addend, LowRank, Magnitude
from zimgkit.export.weights.stream import Wanted, pieces

MODULE = {"z-image": "layers.0.attention.to_q", "qwen-image": "transformer_blocks.0.attn.to_q"}
NAN, INF = float("nan"), float("inf")


@pytest.fixture(params=MODULE)
def family(request):
    return request.param


@pytest.fixture
def lora(family, checkpoint_of, tmp_path):
    """``lora(factor, **parts)``: a file for one module with these parts more; and the module's name in it."""
    (file,) = (checkpoint_of(family) / "transformer").glob("*.safetensors")
    name = MODULE[family]

    def make(factor: float = 1.0, **parts: torch.Tensor):
        pairs = lora_files.pairs({name: load_file(file)[f"{name}.weight"]})
        stored = lora_files.letters("transformer.")({name: (factor * pairs[name][0], factor * pairs[name][1])})
        stored |= {f"transformer.{name}.{part}": value for part, value in parts.items()}
        return write(tmp_path / "lora.safetensors", stored), f"transformer.{name}"

    return make


def refused(checkpoint, path, *said):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(LoraError) as caught:
            merged_by(checkpoint, path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
    for words in said:
        assert words in str(caught.value), caught.value


@pytest.mark.parametrize("alpha", [NAN, INF, -INF])
def test_alpha(family, checkpoint_of, lora, alpha):
    path, name = lora(alpha=torch.tensor(alpha))
    refused(checkpoint_of(family), path, f"{name}.alpha has 1 value that is NaN or infinite")


def test_alpha_beyond_float32(family, checkpoint_of, lora):
    path, name = lora(alpha=torch.tensor(1e300, dtype=torch.float64))
    refused(checkpoint_of(family), path, f"{name} is multiplied by 2.5e+299 (alpha 1e+300 and rank 4)")


def test_an_alpha_of_zero_changes_nothing(family, checkpoint_of, lora):
    path, _ = lora(alpha=torch.tensor(0.0))
    refused(checkpoint_of(family), path, "changes nothing: every alpha in it is 0")


def test_rank_zero(family, checkpoint_of, tmp_path):
    name = MODULE[family]
    empty = {name: (torch.zeros(0, 48), torch.zeros(48, 0))}
    path = write(tmp_path / "lora.safetensors", lora_files.letters("")(empty))
    refused(checkpoint_of(family), path, f"the matrices of {name} are of rank 0")


@pytest.mark.parametrize("with_norms", [False, True])
def test_a_product_that_overflows(family, checkpoint_of, lora, with_norms):
    path, name = lora(1e25, **({"lora_magnitude_vector": torch.ones(48)} if with_norms else {}))
    refused(checkpoint_of(family), path, f"{name} changes '{MODULE[family]}.weight' to 2,304 values")


def test_a_factor_that_overflows(family, checkpoint_of, lora):
    path, name = lora(1e10, alpha=torch.tensor(1e38))
    refused(checkpoint_of(family), path, f"{name} changes '{MODULE[family]}.weight' to")


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_matrices_count_what_is_none(family, checkpoint_of, lora, part):
    path, name = lora()
    stored = load_file(path)
    stored[f"{name}.{part}.weight"].reshape(-1)[[0, 5, 9]] = torch.tensor([NAN, INF, -INF])
    write(path, stored)
    refused(checkpoint_of(family), path, f"{name}.{part}.weight has 3 values that are NaN or infinite")


def test_what_no_picture_needs_may_be_no_number(checkpoint_of, lora, family):
    """The last layer of Qwen3 in Z-Image; keys that are left out."""
    path, _ = lora()
    expected = merged_by(checkpoint_of(family), path)
    stored = load_file(path) | {"some.key": torch.tensor([NAN])}
    if family == "z-image":
        stored |= {
            f"text_encoder.layers.2.mlp.up_proj.lora_{letter}.weight": torch.full((4, 4), NAN) for letter in "AB"
        }
    write(path, stored)
    found = found_by(checkpoint_of(family), path, allow_unmatched=True).addends["transformer"]
    assert found.keys() == expected.keys()


def test_a_build_and_a_swap_leave_nothing(family, checkpoint_of, bundle_of, copy_of, lora, tmp_path):
    path, name = lora(1e25)
    said = f"zimg-export: error: {path}: {name} changes '{MODULE[family]}.weight' to 2,304 values that are NaN or"
    options = ("--precision", "fp32", "--quiet", "--lora", path)
    before = sorted(tmp_path.iterdir())
    invoke(main, "build", "--model", checkpoint_of(family), "--out", tmp_path / "new", *options).assert_refused(said, 1)
    assert sorted(tmp_path.iterdir()) == before
    bundle = copy_of(bundle_of(family))
    files = states(bundle)
    invoke(main, "swap-lora", bundle, "--lora", path, "--quiet").assert_refused(said, 1)
    assert states(bundle) == files


class TestZerosOfDora:
    """Peft divides by their norm, and gets NaN."""

    @pytest.fixture
    def merged(self, tmp_path):
        """``merged(weight, magnitude)``: with a DoRA whose change is 0, as when its training begins."""

        def make(weight, magnitude):
            rank = {"up": torch.zeros(len(weight), 2), "down": torch.ones(2, weight.shape[1])}
            write(tmp_path / "lora.safetensors", rank | {"weight": weight, "magnitude": magnitude})
            infos = read_header(tmp_path / "lora.safetensors")
            norms = Magnitude(infos["magnitude"], of_columns=len(magnitude) == 1)
            addend = Addend(LowRank(infos["up"], infos["down"], 1.0), 1.0, norms, "lora: module")
            want = Wanted(infos["weight"], tuple(weight.shape), addends=(addend,))
            return torch.from_numpy(np.concatenate([*pieces(want, "float32")]).reshape(want.shape))

        return make

    @pytest.mark.parametrize("axis", [0, 1])
    def test_zeros_stay_zeros(self, merged, axis):
        weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
        weight.transpose(0, axis)[[1, 4]] = 0
        norms = 2 * weight.norm(dim=1 - axis, keepdim=True)
        assert_near({"w": merged(weight, norms)}, {"w": 2 * weight}, 1e-6)

    @pytest.mark.parametrize("axis, kind", [(0, "row"), (1, "column")])
    def test_another_norm_is_refused(self, merged, axis, kind, monkeypatch):
        from zimgkit.export.weights import stream

        monkeypatch.setattr(stream, "MERGED_PIECE", 8)
        weight = torch.ones(6, 8)
        weight.transpose(0, axis)[4] = 0
        with pytest.raises(
            LoraError, match=rf"lora: module: its DoRA gives 1 {kind} of zeros .* \(the first is {kind} 4\)"
        ):
            merged(weight, torch.ones((6, 1) if axis == 0 else (1, 8)))

    def test_as_peft_where_peft_has_numbers(self, merged):
        peft = pytest.importorskip("peft", reason="the reference is peft")
        linear = torch.nn.Sequential(torch.nn.Linear(8, 6, bias=False))
        linear[0].weight.data[2] = 0
        found = peft.get_peft_model(linear, peft.LoraConfig(r=2, use_dora=True, target_modules=["0"]))
        layer = found.base_model.model[0]
        weight, norms = layer.weight.detach().clone(), 3 * layer.lora_magnitude_vector["default"].weight.detach()
        layer.lora_magnitude_vector["default"].weight.data = norms
        expected = found.merge_and_unload()[0].weight.detach()
        own = merged(weight, norms[:, None])
        assert expected[2].isnan().all()
        assert not own[2].any()
        rest = [0, 1, 3, 4, 5]
        assert_near({"w": own[rest]}, {"w": expected[rest]}, 1e-6)
