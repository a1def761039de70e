"""Recipes: which linears of a quantized bundle stay unquantized, why, and what error is acceptable.

A recipe is a TOML file; those of the families are data of this package::

    [[keep]]
    component = "denoiser"
    tensors = ["t_embedder.*", "layers.-1.*"]   # glob patterns; a negative block number counts from the end
    reason = "the time embedding steers every block"
    source = "where that was found"
    precisions = ["fp8", "int8"]                # all if left out
    deeper_than = 12                            # only in networks of more blocks than this

    [bounds.fp8]
    cosine = 0.999                              # the smallest cosine of a velocity with the float32 network's
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
from zimgkit.export.networks.registry import is_carried
from zimgkit.export.quantization.formats import SCHEMES

BLOCK_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
"""The number of a block in the name of a tensor, such as 17 in ``layers.17.attention.to_q.weight``."""


class Keep(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A rule: linears that are not quantized."""

    component: str
    tensors: tuple[str, ...]
    """Glob patterns of the names of their weights."""
    reason: str
    source: str = ""
    """Where the reason was found: a measurement or a publication."""
    precisions: tuple[str, ...] = tuple(SCHEMES)
    """The precisions that the rule is for."""
    deeper_than: int = 0
    """The rule is only for networks of more blocks than this."""


class Bounds(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The error of a bundle's denoiser that is acceptable."""

    cosine: float
    """The smallest acceptable cosine of a velocity and that of the float32 network."""


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A recipe file."""

    keep: tuple[Keep, ...] = ()
    bounds: dict[str, Bounds] = {}
    """Precision -> its bounds."""

    def unquantized(self, precision: str, component: str, linears: Sequence[str]) -> dict[str, str]:
        """Find the linears of a component that stay unquantized.

        Args:
            precision: a key of :data:`zimgkit.export.quantization.formats.SCHEMES`.
            component: its name.
            linears: the names of the weights of all its linears.

        Returns:
            Name of a weight -> the reason why it is not quantized.

        Raises:
            UsageError: a pattern matches none of them; the hint has the nearest names.
        """
        reasons: dict[str, str] = {}
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
                    reasons |= dict.fromkeys(found, rule.reason)
        return reasons

    def check_components(self, components: Iterable[str]) -> None:
        """Check that the components of all rules can be quantized.

        Raises:
            UsageError: one cannot.
        """
        known = tuple(components)
        for rule in self.keep:
            if rule.component not in known:
                raise UsageError(f"the recipe names the component {rule.component!r}", f"it can be {', '.join(known)}")


def _blocks(names: Iterable[str]) -> dict[str, int]:
    """Count the blocks of each list of blocks, such as ``layers.``: prefix -> number of blocks."""
    counts: dict[str, int] = {}
    for name in names:
        for match in BLOCK_NUMBER.finditer(name):
            prefix = name[: match.start()]
            counts[prefix] = max(counts.get(prefix, 0), int(match[0]) + 1)
    return counts


def _from_the_end(pattern: str, blocks: Mapping[str, int]) -> str:
    """Replace a negative block number, which counts from the end, by the number from the start."""
    match = re.search(r"(?<![^.])-\d+(?![^.])", pattern)
    if match is None:
        return pattern
    prefix = pattern[: match.start()]
    return f"{prefix}{blocks.get(prefix, 0) + int(match[0])}{pattern[match.end() :]}"


def family_recipe(family: str, name: str = "") -> Recipe:
    """Read the recipe of a family or a model that comes with the package.

    Args:
        family: of the checkpoint.
        name: of the checkpoint. Those that come with zimgkit have recipes of their own, for they have few later blocks
            to even out an error of earlier ones.
    """
    file = name if is_carried(name) else family
    text = (resources.files("zimgkit.export.quantization") / "recipes" / f"{file}.toml").read_text("utf-8")
    return msgspec.convert(tomllib.loads(text), Recipe)


def read_recipe(path: Path) -> Recipe:
    """Read a recipe file.

    Raises:
        UsageError: the file is missing, not TOML, or has fields that no recipe has.
    """
    try:
        found: dict[str, Any] = tomllib.loads(path.read_text("utf-8"))
        recipe = msgspec.convert(found, Recipe)
    except OSError as error:
        raise UsageError(f"the recipe {path} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        message = f"the recipe {path} is not a recipe ({str(error).splitlines()[0]})"
        raise UsageError(message, "docs/quantization.md shows how one looks") from None
    for precision in (*recipe.bounds, *(name for rule in recipe.keep for name in rule.precisions)):
        if precision not in SCHEMES:
            raise UsageError(f"the recipe {path} names the precision {precision!r}", f"there are {', '.join(SCHEMES)}")
    return recipe
