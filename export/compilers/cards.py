"""Which precision a GPU multiplies fastest, and which it cannot multiply. docs/quantization.md says why."""

from __future__ import annotations

from zimgkit.engines.errors import BackendError
from zimgkit.engines.tensorrt import cuda

CARDS = {"rtx4090": "sm89", "h100": "sm90"}
"""Name on the command line -> architecture."""
PRECISIONS = {"sm89": "int8", "sm90": "fp8"}
"""Architecture -> the precision it multiplies fastest at the least loss."""
DEFAULT_PRECISION = "bf16"
"""Of all other architectures, and where there is no GPU."""
FP8_FROM = 89
"""Ten times the compute capability of the first GPUs that multiply FP8: Ada, then Hopper."""


def precision_for(card: str | None) -> tuple[str, str]:
    """Choose a precision for a card.

    Args:
        card: a key of :data:`CARDS`; the first GPU of this machine where None.

    Returns:
        The precision, and what it was chosen for: the card, or why no GPU could be asked.
    """
    if card is not None:
        return PRECISIONS[CARDS[card]], card
    try:
        device = cuda.open_device()
    except BackendError as error:
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
