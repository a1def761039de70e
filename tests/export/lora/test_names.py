"""What trainers write before and between the words of a module's name changes nothing of what it means."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from safetensors.torch import load_file

from tests.export.lora import lora_files
from tests.export.lora.lora_files import TARGETS, found_by, merged_by, write
from zimgkit.engines.errors import LoraError
from zimgkit.export.checkpoints.checkpoint import open_checkpoint
from zimgkit.export.checkpoints.layouts import LAYOUTS, squash
from zimgkit.export.lora.names import Names, names_of

DOTTED = ("unet.", "dit.", "net.", "pipe.", "module.", "_orig_mod.", "model.", "transformer.", "diffusion_model.",
          "base_model.model.")  # fmt: skip
UNDERSCORED = ("lora_unet_", "lora_dit_", "lora_prior_unet_", "lora_transformer_", "lycoris_")
OF_TEXT = ("text_encoder.", "model.", "language_model.", "module.", "_orig_mod.", "base_model.model.", "lora_te_",
           "lora_te1_", "text_encoder.model.language_model.", "base_model.model.model.",
           "text_encoder._orig_mod.model.")  # fmt: skip
TEXT_MODULES = ("0.self_attn.q_proj", "1.mlp.down_proj")


@pytest.fixture(scope="module", params=["z-image", "qwen-image"])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def checkpoint(family, checkpoint_of):
    return checkpoint_of(family)


@pytest.fixture(scope="module")
def modules(family, checkpoint):
    """Component -> the weights of some of its linears, by canonical names."""
    ends = {"transformer": TARGETS[family], "text_encoder": TEXT_MODULES}
    opened = open_checkpoint(str(checkpoint))
    found = {}
    for component, own in ends.items():
        infos = opened.tensors(component)
        stored = load_file(next((checkpoint / component).glob("*.safetensors")))
        found[component] = lora_files.modules({name: stored[info.name] for name, info in infos.items()}, own)
    return found


def named(prefix, found):
    """The same under other names; what ends in an underscore goes on with underscores."""
    return {prefix + (squash(name) if prefix.endswith("_") else name): pair for name, pair in found.items()}


@pytest.mark.parametrize(
    "component, prefixes", [("transformer", DOTTED + UNDERSCORED), ("text_encoder", OF_TEXT)], ids=["dit", "text"]
)
def test_a_prefix_changes_no_bit(checkpoint, modules, tmp_path, component, prefixes):
    pairs = lora_files.pairs(modules[component])
    plain = write(tmp_path / "plain.safetensors", lora_files.lightx2v(pairs))
    expected = merged_by(checkpoint, plain, component=component)
    assert expected.keys() == {f"{name}.weight" for name in pairs}
    for prefix in prefixes:
        path = write(tmp_path / "lora.safetensors", lora_files.lightx2v(named(prefix, pairs)))
        found = merged_by(checkpoint, path, component=component)
        assert found.keys() == expected.keys(), prefix
        assert all(torch.equal(found[name], value) for name, value in expected.items()), prefix


def test_any_combination_of_them(checkpoint):
    """Three in a row, before every module of the transformer."""
    opened = open_checkpoint(str(checkpoint))
    names = names_of(opened)
    tensors = opened.tensors("transformer")
    weights = [name for name, info in tensors.items() if len(info.shape) == 2 and name.endswith(".weight")]
    plain = [name.removesuffix(".weight") for name in weights]
    for prefix in map("".join, itertools.product(DOTTED, DOTTED, DOTTED)):
        for module in plain[::7]:
            assert names.find(prefix + module) == names.find(module) is not None, prefix + module
    for prefix in UNDERSCORED:
        for module in plain:
            assert names.find(prefix + squash(module)) == names.find(module) is not None, prefix + module


def test_a_prefix_that_nobody_writes(checkpoint):
    names = names_of(open_checkpoint(str(checkpoint)))
    module = "layers.0.attention.to_q" if "context_refiner" in str(names.nearest("context")) else "img_in"
    assert names.find(f"decoder.{module}") is None


@pytest.mark.parametrize("of", ["matrices", "alphas"])
def test_alphas_may_be_spelled_otherwise(checkpoint, modules, tmp_path, of):
    """``to_q.alpha`` beside ``to.q.lora.down.weight``, or the other way round."""
    pairs = lora_files.pairs(modules["transformer"])
    stored = lora_files.lightx2v(pairs)
    expected = merged_by(checkpoint, write(tmp_path / "plain.safetensors", stored))
    dotted = {key: key.partition(".lora_")[0].removesuffix(".alpha").replace("_", ".") for key in stored}
    other = {
        key.replace(key.removesuffix(".alpha").partition(".lora_")[0], dotted[key])
        if key.endswith(".alpha") == (of == "alphas")
        else key: value
        for key, value in stored.items()
    }
    assert other.keys() != stored.keys()
    found = merged_by(checkpoint, write(tmp_path / "lora.safetensors", other))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_alphas_under_another_name_of_the_module(checkpoint, modules, tmp_path, prefix):
    chosen = {name: value for name, value in modules["transformer"].items() if name.endswith("to_out.0")}
    stored = lora_files.lightx2v(lora_files.pairs(chosen))
    expected = merged_by(checkpoint, write(tmp_path / "plain.safetensors", stored))
    other = {
        prefix + key.replace("to_out.0", "to_out") if key.endswith("alpha") else key: value
        for key, value in stored.items()
    }
    found = merged_by(checkpoint, write(tmp_path / "lora.safetensors", other))
    assert expected
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_an_alpha_of_nothing(checkpoint, modules, tmp_path):
    first, second = list(modules["transformer"])[:2]
    stored = lora_files.lightx2v(lora_files.pairs({first: modules["transformer"][first]}))
    path = write(tmp_path / "lora.safetensors", stored | {f"{second}.alpha": torch.tensor(1.0)})
    with pytest.raises(LoraError, match=f"{second} has alpha and no up"):
        found_by(checkpoint, path)


def test_two_spellings_of_one_matrix(checkpoint, modules, tmp_path):
    name = next(name for name in modules["transformer"] if name.endswith("to_q"))
    pairs = lora_files.pairs({name: modules["transformer"][name]})
    both = {key: pair for key in (name, name.replace("to_q", "to.q")) for pair in pairs.values()}
    path = write(tmp_path / "lora.safetensors", {k: v.clone() for k, v in lora_files.letters("")(both).items()})
    with pytest.raises(LoraError, match=r"has two (down|up) matrices \('.*', '.*'\)"):
        found_by(checkpoint, path)


@pytest.mark.parametrize("layout", [own for own in LAYOUTS if own.component == "transformer"], ids=lambda own: own.name)
def test_loras_may_have_the_names_of_any_layout(layout):
    for rename in layout.renames:
        # A name that the pattern stands for, with a block's number.
        stored = re.sub(r"\(\.\+\)|\(\\w\+\\\.\\d\+\\\.attention\)", "layers.0.attention", rename.old)
        stored = re.sub(r"\(\?!.*?\)", "", stored).replace("\\.", ".")
        match = re.match(rf"(?:{rename.old})(?=\.|$)", stored)
        assert match, stored
        found = [f"{match.expand(new)}{end}" for new in rename.names for end in ("", ".linear")]
        known = Names({"transformer": {f"{name}.weight": (4, 4) for name in found}})
        for end in ("", ".linear"):
            expected = [name for name in found if name.endswith(".linear") == bool(end)]
            for name in (stored + end, f"diffusion_model.{stored}{end}", f"lora_unet_{squash(stored + end)}"):
                meaning = known.find(name)
                assert meaning is not None, name
                assert [row.tensor.removesuffix(".weight") for row in meaning.targets] == expected, name
