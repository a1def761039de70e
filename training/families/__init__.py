"""What training has to know of each family: one module each, called as the family is, found here by its name."""

from __future__ import annotations

from importlib import import_module

from zimgkit.export.networks.registry import row
from zimgkit.training.families.base import Configs, TrainingFamily

__all__ = ["Configs", "TrainingFamily", "family"]


def family(name: str) -> TrainingFamily:
    """What training has to know of a family.

    Args:
        name: as the table of families has it.

    Raises:
        CheckpointError: no such family.
    """
    module = import_module(f"{__name__}.{row(name).name.replace('-', '_')}")
    found: TrainingFamily = module.FAMILY
    return found
