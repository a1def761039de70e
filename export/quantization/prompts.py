"""The default prompts of calibrations and of cost measurements: the demo models know other words than large ones."""

from __future__ import annotations

from importlib import resources

from zimgkit.export.networks.registry import is_carried


def calibration_prompts(name: str) -> tuple[str, ...]:
    """Read the calibration prompts: a dozen in English and Chinese, of all kinds.

    Args:
        name: the checkpoint's; the demo models have prompts of their own.
    """
    return _read(name, "calibration")


def cost_prompts(name: str) -> tuple[str, ...]:
    """Read the prompts of cost measurements: a few, none of which a calibration uses by default.

    Args:
        name: as for :func:`calibration_prompts`.
    """
    return _read(name, "cost")


def _read(name: str, purpose: str) -> tuple[str, ...]:
    file = f"{'demo_' if is_carried(name) else ''}{purpose}_prompts.txt"
    return tuple((resources.files("zimgkit.export.quantization") / "recipes" / file).read_text("utf-8").splitlines())
