"""Peft's own account of a LoRA: its rank and alpha, beside the weights or in their header.

Names of modules in it are regular expressions, written by whoever trained the LoRA: they are given little time, for
some take a time that is exponential in the length of the name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import msgspec

from zimgkit.engines.decoding import Number, Width, decoded, read_json
from zimgkit.engines.errors import LoraError

CONFIG = "adapter_config.json"
DIFFUSERS_CONFIG = "lora_adapter_metadata"
"""The key in the header under which diffusers keeps it, with a prefix before its keys."""
PLAIN = re.compile(r"[\w.]+")
"""A name as it is; diffusers writes hundreds of them, one a module."""
SECONDS = 0.1
"""For one pattern and one name, of which each common one takes a thousandth."""


class PeftConfig(msgspec.Struct, frozen=True):
    """What is read of ``adapter_config.json``."""

    r: Width | None = None
    lora_alpha: Number | None = None
    alpha: Number | None = None
    """What LoKr and LoHa call it."""
    alpha_pattern: dict[str, Number] | None = None
    """A module's name, or a pattern of the end of some -> their alpha."""
    use_rslora: bool | None = False

    def alpha_of(self, module: str) -> float | None:
        """What a module's change is multiplied by, before the division by the rank; None where nothing says.

        Raises:
            LoraError: a pattern is no regular expression, or takes too long.
        """
        for pattern, alpha in (self.alpha_pattern or {}).items():
            if _fits(pattern, module):
                return alpha
        return self.alpha if self.lora_alpha is None else self.lora_alpha


def read_peft_config(path: Path, metadata: Mapping[str, str], *, beside_any: bool = False) -> PeftConfig | None:
    """The config that belongs to a file, if there is one.

    Args:
        path: the LoRA's file.
        metadata: the strings in its header.
        beside_any: whether the one beside it belongs to it whatever its name is.

    Raises:
        LoraError: it is no JSON object, or a key is of another type; naming the key and its value.
    """
    where, beside = f"{path}: its peft config", path.parent / CONFIG
    if DIFFUSERS_CONFIG in metadata:
        try:
            found = json.loads(metadata[DIFFUSERS_CONFIG])
        except (ValueError, RecursionError) as error:
            raise LoraError(f"{where} cannot be read ({error})", "fetch the file again") from None
        if isinstance(found, dict):
            found = {key.removeprefix("transformer."): value for key, value in found.items()}
    elif (beside_any or path.name == "adapter_model.safetensors") and beside.is_file():
        where, found = f"{beside}, a peft config", read_json(beside, LoraError)
    else:
        return None
    return decoded(found, PeftConfig, where, LoraError, "correct it, or fetch the file again")


def _fits(pattern: str, name: str) -> bool:
    """Whether a name, or its end after a dot, is what the pattern says, as ``get_pattern_key`` of peft decides it."""
    if PLAIN.fullmatch(pattern):
        return name == pattern or name.endswith(f".{pattern}")
    import regex  # Few LoRAs need it, and what describes one does without the rest of the extra.

    try:
        return regex.fullmatch(rf"(.*\.)?({pattern})", name, timeout=SECONDS) is not None
    except TimeoutError:
        problem = "takes too long to match"
    except (regex.error, RecursionError, OverflowError, MemoryError) as error:
        problem = f"is no regular expression ({error})"
    raise LoraError(f"the pattern {pattern[:80]!r} of a peft config {problem}", "write the module's name in its place")
