"""Recipes: the families' own on names of the real depth, patterns, and what is refused."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import pytest

from zimgkit.engines.errors import UsageError
from zimgkit.export.networks.registry import FAMILIES, QUANTIZED, parts
from zimgkit.export.quantization.formats import SCHEMES
from zimgkit.export.quantization.quantize import linear_weights
from zimgkit.export.quantization.recipe import Keep, Recipe, family_recipe, read_recipe

NAMES = [f"layers.{i}.{what}.weight" for i in range(4) for what in ("attention.to_q", "feed_forward.w2")] + [
    "t_embedder.mlp.0.weight",
    "all_x_embedder.2-1.weight",
]
SHARE = {
    # Family, component, precision -> the part of the linears' weights that is quantized, at least.
    ("z-image", "denoiser", "fp8"): 0.85,
    ("z-image", "denoiser", "int8-weights"): 0.95,
    ("z-image", "text_encoder", "fp8"): 0.75,
    ("z-image", "text_encoder", "int4-weights"): 1.0,
    ("qwen-image", "denoiser", "fp8"): 0.75,
    ("qwen-image", "denoiser", "int8-weights"): 0.99,
    ("qwen-image", "denoiser", "int4-weights"): 0.9,
    ("qwen-image", "text_encoder", "int8"): 1.0,
    ("qwen-image", "modulation", "fp8"): 0.99,
}


@cache
def real_linears(family: str) -> dict[str, dict[str, int]]:
    """The linears of a family's full-size components, and how many weights each has."""
    sys.path.append(str(Path(__file__).resolve().parents[3] / "benchmarks"))
    from families import family as benchmark_family

    found = {}
    for source in ("text_encoder", "transformer"):
        for name, part in parts(family, source, benchmark_family(family).configs[source]).items():
            if name in QUANTIZED:
                shapes = part.parameters()
                found[name] = {key: shapes[key][0] * shapes[key][1] for key in linear_weights(part)}
    return found


@pytest.mark.parametrize("precision", SCHEMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_families_recipes_fit_the_real_networks(family, precision):
    recipe = family_recipe(family)
    recipe.check_components(QUANTIZED)
    assert set(recipe.bounds) == set(SCHEMES)
    assert all(rule.reason and rule.source for rule in recipe.keep)
    for component, sizes in real_linears(family).items():
        kept = recipe.unquantized(precision, component, list(sizes))
        share = 1 - sum(sizes[name] for name in kept) / sum(sizes.values())
        assert share >= SHARE.get((family, component, precision), 0.7)


def test_ends_of_deep_networks():
    sizes = real_linears("qwen-image")["denoiser"]
    kept = family_recipe("qwen-image").unquantized("fp8", "denoiser", list(sizes))
    blocks = {name.split(".")[1] for name in kept if name.endswith("attn.to_q.weight")}
    assert blocks == {"0", "1", "58", "59"}


def recipe(*patterns: str, **changes: object) -> Recipe:
    return Recipe((Keep("denoiser", patterns, "because", **changes),))


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("layers.-1.*", ["layers.3.attention.to_q.weight", "layers.3.feed_forward.w2.weight"]),
        ("layers.-4.attention.*", ["layers.0.attention.to_q.weight"]),
        ("layers.2.feed_forward.w2.weight", ["layers.2.feed_forward.w2.weight"]),
        ("*.w2.weight", [f"layers.{i}.feed_forward.w2.weight" for i in range(4)]),
        ("all_x_embedder.*", ["all_x_embedder.2-1.weight"]),
        ("all_x_embedder.2-1.weight", ["all_x_embedder.2-1.weight"]),
        ("t_embedder.mlp.-1.weight", ["t_embedder.mlp.0.weight"]),
    ],
)
def test_patterns(pattern, names):
    assert recipe(pattern).unquantized("fp8", "denoiser", NAMES) == dict.fromkeys(names, "because")


def test_rules_for_some_precisions_components_and_depths():
    assert not recipe("*", precisions=("int8",)).unquantized("fp8", "denoiser", NAMES)
    assert not recipe("*").unquantized("fp8", "text_encoder", NAMES)
    assert not recipe("*", deeper_than=4).unquantized("fp8", "denoiser", NAMES)
    assert len(recipe("*", deeper_than=3).unquantized("fp8", "denoiser", NAMES)) == len(NAMES)
    assert not recipe("layers.-9.*", deeper_than=12).unquantized("fp8", "denoiser", NAMES)


@pytest.mark.parametrize("pattern", ["layers.9.attention.to_q.weight", "layers.0.atention.to_q.weight", "layers.-5.*"])
def test_a_name_that_is_not_there(pattern):
    with pytest.raises(UsageError, match=r"which has no such linear; the nearest are layers\.\d") as caught:
        recipe(pattern).unquantized("fp8", "denoiser", NAMES)
    assert pattern in str(caught.value)


def test_a_component_that_is_not_quantized():
    with pytest.raises(UsageError, match="names the component 'vae'; it can be text_encoder, modulation, "):
        Recipe((Keep("vae", ("*",), "why"),)).check_components(QUANTIZED)


GOOD = '[[keep]]\ncomponent = "denoiser"\ntensors = ["*"]\nreason = "r"\n'


def test_a_file(tmp_path: Path):
    (tmp_path / "r.toml").write_text(GOOD + "[bounds]\nfp8 = { cosine = 0.99 }\n")
    found = read_recipe(tmp_path / "r.toml")
    assert found.keep == (Keep("denoiser", ("*",), "r"),)
    assert found.bounds["fp8"].cosine == 0.99


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[keep]\n", "is not a recipe"),
        ('[[keep]]\ncomponent = "denoiser"\n', "is not a recipe .*missing required field"),
        (GOOD + 'tensor = ["x"]\n', "is not a recipe .*unknown field"),
        (GOOD + 'precisions = ["fp4"]\n', "names the precision 'fp4'; there are fp8"),
        ("bounds = 3\n", "is not a recipe"),
        ("\0", "is not a recipe"),
    ],
)
def test_a_file_that_is_none(text, said, tmp_path: Path):
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(UsageError, match=said) as caught:
        read_recipe(tmp_path / "r.toml")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_missing_or_no_text(tmp_path: Path):
    with pytest.raises(UsageError, match=r"cannot be read \(No such file"):
        read_recipe(tmp_path / "r.toml")
    with pytest.raises(UsageError, match=r"cannot be read \(Is a directory"):
        read_recipe(tmp_path)
    (tmp_path / "r.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="is not a recipe"):
        read_recipe(tmp_path / "r.toml")
