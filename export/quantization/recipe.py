"""Recipes: which linears a quantized bundle keeps in its base precision, why, and what error is acceptable.

A recipe is a TOML file; those of the families are data of this package::

    [[keep]]
    component = "denoiser"
    tensors = ["t_embedder.*", "layers.-1.*"]   # patterns; a number below zero counts blocks from the end
    reason = "the time embedding steers every block"
    source = "where that was found"
    precisions = ["fp8", "int8"]                # all where it is left out
    deeper_than = 12                            # only in networks of more blocks

    [bounds.fp8]
    cosine = 0.999                              # of a step's velocity and the float32 network's, at least
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec

from zimgkit.engines.errors import UsageError
from zimgkit.export.quantization.formats import SCHEMES

OWN = ("zimg-tiny-z", "zimg-tiny-qwen")
"""Checkpoints that need more than their family: these have few later blocks to even out an error of earlier ones."""
DIGITS = re.compile(r"(?<![^.])\d+(?![^.])")


class Keep(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Tensors that are not quantized."""

    component: str
    tensors: tuple[str, ...]
    reason: str
    source: str = ""
    precisions: tuple[str, ...] = tuple(SCHEMES)
    deeper_than: int = 0


class Bounds(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a bundle's denoiser may cost."""

    cosine: float
    """Of a step's velocity and that of the float32 network: at least this."""


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A recipe file."""

    keep: tuple[Keep, ...] = ()
    bounds: dict[str, Bounds] = {}

    def kept(self, precision: str, component: str, linears: Sequence[str]) -> dict[str, str]:
        """The linears of a component that stay as they are, and why.

        Args:
            precision: a key of :data:`zimgkit.export.quantization.formats.SCHEMES`.
            component: of the bundle.
            linears: the names of all weights of its linears.

        Raises:
            UsageError: a pattern fits none of them; the nearest names are given.
        """
        kept: dict[str, str] = {}
        blocks = _blocks(linears)
        depth = max(blocks.values(), default=0)
        for rule in self.keep:
            if rule.component != component or (rule.deeper_than and depth <= rule.deeper_than):
                continue
            for pattern in rule.tensors:
                exact = _from_the_end(pattern, blocks)
                found = [name for name in linears if fnmatchcase(name, exact)]
                if not found:
                    near = get_close_matches(exact, linears, 3, 0) or list(linears[:3])
                    message = f"the recipe keeps {pattern!r} of {component}, which has no such linear"
                    raise UsageError(message, f"the nearest are {', '.join(near)}")
                if precision in rule.precisions:
                    kept |= dict.fromkeys(found, rule.reason)
        return kept

    def check_components(self, components: Iterable[str]) -> None:
        """Check that all rules are for components that are quantized.

        Raises:
            UsageError: one is not.
        """
        known = tuple(components)
        for rule in self.keep:
            if rule.component not in known:
                raise UsageError(f"the recipe names the component {rule.component!r}", f"it can be {', '.join(known)}")


def _blocks(names: Iterable[str]) -> dict[str, int]:
    """How many blocks each list of blocks has, by what stands before the number."""
    counts: dict[str, int] = {}
    for name in names:
        for match in DIGITS.finditer(name):
            prefix = name[: match.start()]
            counts[prefix] = max(counts.get(prefix, 0), int(match[0]) + 1)
    return counts


def _from_the_end(pattern: str, blocks: Mapping[str, int]) -> str:
    """Replace a block's number below zero by its number from the start."""
    match = re.search(r"(?<![^.])-\d+(?![^.])", pattern)
    if match is None:
        return pattern
    prefix = pattern[: match.start()]
    return f"{prefix}{blocks.get(prefix, 0) + int(match[0])}{pattern[match.end() :]}"


def family_recipe(family: str, name: str = "") -> Recipe:
    """The recipe that comes with the package.

    Args:
        family: of the checkpoint.
        name: of the checkpoint; one of :data:`OWN` has a recipe of its own.
    """
    file = name if name in OWN else family
    text = (resources.files("zimgkit.export.quantization") / "recipes" / f"{file}.toml").read_text("utf-8")
    return msgspec.convert(tomllib.loads(text), Recipe)


def read_recipe(path: Path) -> Recipe:
    """Read a recipe file.

    Raises:
        UsageError: it is missing, no TOML, or has what no recipe has.
    """
    try:
        found: dict[str, Any] = tomllib.loads(path.read_text("utf-8"))
        recipe = msgspec.convert(found, Recipe)
    except OSError as error:
        raise UsageError(f"the recipe {path} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        message = f"the recipe {path} is not one ({str(error).splitlines()[0]})"
        raise UsageError(message, "docs/quantization.md shows how one looks") from None
    for precision in (*recipe.bounds, *(name for rule in recipe.keep for name in rule.precisions)):
        if precision not in SCHEMES:
            raise UsageError(f"the recipe {path} names the precision {precision!r}", f"there are {', '.join(SCHEMES)}")
    return recipe
