"""The prompts that calibrations and costs are measured on where none are named, in words that the model knows."""

from __future__ import annotations

from importlib import resources

from zimgkit.export.quality.judged import is_known


def calibration_prompts(name: str) -> tuple[str, ...]:
    """A dozen prompts in English and Chinese, of all kinds.

    Args:
        name: the checkpoint's; the demo models know shapes and colours alone.
    """
    return _read(name, "calibration")


def cost_prompts(name: str) -> tuple[str, ...]:
    """A few prompts, none of which a calibration uses by default.

    Args:
        name: as for :func:`calibration_prompts`.
    """
    return _read(name, "cost")


def _read(name: str, purpose: str) -> tuple[str, ...]:
    file = f"{'demo_' if is_known(name) else ''}{purpose}_prompts.txt"
    return tuple((resources.files("zimgkit.export.quantization") / "recipes" / file).read_text("utf-8").splitlines())
