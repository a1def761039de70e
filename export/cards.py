"""Which precision suits which card. docs/quantization.md says why."""

from __future__ import annotations

from zimg.engines import cuda
from zimg.engines.errors import BackendError

CARDS = {"rtx4090": "sm89", "h100": "sm90"}
"""Name on the command line -> architecture."""
PRECISIONS = {"sm89": "int8", "sm90": "fp8"}
"""Architecture -> the precision it multiplies fastest at the least loss; bf16 for all others."""
OTHERWISE = "bf16"


def precision_for(card: str | None) -> tuple[str, str]:
    """The precision for a card.

    Args:
        card: a key of :data:`CARDS`; the first GPU of this machine where None.

    Returns:
        The precision, and what it was chosen for.
    """
    if card is not None:
        return PRECISIONS[CARDS[card]], card
    try:
        device = cuda.open_device()
    except BackendError as error:
        return OTHERWISE, error.message
    return PRECISIONS.get(device.architecture, OTHERWISE), f"{device.name}, {device.architecture}"
