from __future__ import annotations

from zimgkit.engines.errors import UsageError, ZimgError, install


def test_a_hint_is_told_in_the_same_line() -> None:
    assert str(ZimgError("steps is 0", "give 1 or more")) == "steps is 0; give 1 or more"
    assert str(ZimgError("steps is 0")) == "steps is 0"
    assert (ZimgError.exit_code, UsageError.exit_code) == (1, 2)


def test_how_an_extra_is_installed() -> None:
    """From a clone, as long as the package index has no zimgkit."""
    assert install("tensorrt-rtx") == "in a clone of zimgkit: pip install '.[tensorrt-rtx]'"
