"""Which precision a GPU multiplies fastest, and which it cannot multiply. docs/quantization.md says why."""

from __future__ import annotations

from zimgkit.engines.cpu import adds_integers_exactly
from zimgkit.engines.errors import BackendError
from zimgkit.engines.tensorrt import cuda

CPU = "cpu"
CARDS = {"rtx4090": "sm89", "h100": "sm90", CPU: CPU}
"""Name on the command line -> architecture."""
PRECISIONS = {"sm89": "int8", "sm90": "fp8", CPU: "int8-dynamic"}
"""Architecture -> the precision it multiplies fastest at the least loss; of CPUs without a calibration."""
DEFAULT_PRECISION = "bf16"
"""Of all other architectures, and of CPUs without products of 8-bit integers."""
FP8_FROM = 89
"""Ten times the compute capability of the first GPUs that multiply FP8: Ada, then Hopper."""


def precision_for(card: str | None) -> tuple[str, str]:
    """Choose a precision for a card.

    Args:
        card: a key of :data:`CARDS`; the first GPU of this machine where None.

    Returns:
        The precision, and what it was chosen for: the card, or why no GPU could be asked and what the CPU can do.
    """
    if card is not None:
        return PRECISIONS[CARDS[card]], card
    try:
        device = cuda.open_device()
    except BackendError as error:
        if adds_integers_exactly():
            return PRECISIONS[CPU], f"{error.message}, and this CPU multiplies 8-bit integers; for GPUs name a --card"
        return DEFAULT_PRECISION, error.message
    return PRECISIONS.get(device.architecture, DEFAULT_PRECISION), f"{device.name}, {device.architecture}"


def check_compiles(precision: str) -> None:
    """Check that a compiler can serve a precision.

    Raises:
        BackendError: it cannot.
    """
    if precision == "int8-dynamic":
        message = "int8-dynamic takes a scale for each token as it comes, and compilers need scales that stay"
        raise BackendError(message, "build the bundle with --precision int8, which calibrates, or int8-weights")


def check_multiplies(precision: str, architecture: str, name: str) -> None:
    """Check that a GPU can run engines of a precision.

    Args:
        precision: of the bundle.
        architecture: of the GPU, such as ``"sm90"``, or ``"any"``, which is not checked.
        name: of the GPU, for the message.

    Raises:
        BackendError: it cannot.
    """
    if precision == "fp8" and architecture != "any" and int(architecture.removeprefix("sm")) < FP8_FROM:
        message = f"{name} ({architecture}) does not multiply FP8, which begins with Ada (sm{FP8_FROM})"
        raise BackendError(message, "build the bundle with --precision int8")
