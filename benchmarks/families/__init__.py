"""What the benchmarks have to know of each family: one module each, called as the family is, found here by its name."""

from __future__ import annotations

from importlib import import_module

from families.base import BenchmarkFamily, Configs, Controlling, Editing, arguments

__all__ = ["BenchmarkFamily", "Configs", "Controlling", "Editing", "arguments", "family"]


def family(name: str) -> BenchmarkFamily:
    """What the benchmarks have to know of a family, by its name in the table of families."""
    found: BenchmarkFamily = import_module(f"{__name__}.{name.replace('-', '_')}").FAMILY
    return found
