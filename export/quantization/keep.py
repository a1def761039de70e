"""``--precision keep``: the precision that a checkpoint's own files have, so that nothing is rounded a second time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from zimgkit.engines.errors import UsageError
from zimgkit.export.checkpoints.stored import Decoded, Stored

KEEP = "keep"
"""Name on the command line."""
BY_BITS = {8: "int8-weights", 4: "int4-weights"}
"""Bits of a file's integers -> the precision that has them."""
NEAREST = {"Q8_0": 8}
"""What files are in whose blocks no precision has -> the bits of what is nearest, to which they are rounded again."""
HINT = "name a precision: --precision bf16, int8-weights or int4-weights"


def form_of(tensor: Stored) -> str:
    """What a tensor is stored in, for people."""
    return tensor.encoding or tensor.stored[0].dtype if isinstance(tensor, Decoded) else tensor.dtype


def bits_of(tensor: Stored) -> int:
    """The bits of the integers that a tensor becomes; 0 where it is a float, or in what no precision is near."""
    if not isinstance(tensor, Decoded):
        return 0
    return tensor.integers.bits if tensor.integers else NEAREST.get(tensor.encoding, 0)


def kept_precision(linears: Mapping[str, Iterable[Stored]]) -> tuple[str, str]:
    """The precision that most of a checkpoint's quantized weights have, or its floats where none is quantized.

    Args:
        linears: component -> the weights of its linears, as they are stored.

    Returns:
        The precision, and what it means for these weights, for people.

    Raises:
        UsageError: no precision has what they are stored in.
    """
    weights = [tensor for tensors in linears.values() for tensor in tensors]
    count: Counter[int] = Counter()
    forms: Counter[str] = Counter()
    for tensor in weights:
        count[bits_of(tensor)] += tensor.nbytes
        forms[form_of(tensor)] += tensor.nbytes
    if found := [bits for bits, _ in count.most_common() if bits]:
        own = {form_of(tensor) for tensor in weights if bits_of(tensor) == found[0]}
        return BY_BITS[found[0]], f"the files have {_words(own)}"
    # What is decoded to bfloat16 is exactly that.
    odd = [tensor for tensor in weights if isinstance(tensor, Decoded) and _is_packed(tensor)]
    if odd:
        raise UsageError(f"{odd[0].file} is in {form_of(odd[0])}, which no precision keeps", HINT)
    said = f"the files have {_words(forms)}"
    if forms.keys() & {"float32", "float64"} and forms.most_common(1)[0][0] in ("float32", "float64"):
        return "fp32", said
    if "float16" in forms:
        said += "; float16 has three more bits than bfloat16, which --precision fp32 keeps"
    return "bf16", said


def _is_packed(tensor: Decoded) -> bool:
    """Whether its values are no floats of the file."""
    return tensor.dtype == "float32" and any(
        info.dtype in ("uint8", "int8") or "float8" in info.dtype for info in tensor.stored
    )


def _words(names: Iterable[str]) -> str:
    return " and ".join(sorted(names))
