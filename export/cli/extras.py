"""Check that the packages of an optional extra are installed, before a command imports them."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from zimgkit.engines.errors import ZimgError, install


def need_export() -> None:
    """Check for the packages that trace and write graphs.

    Raises:
        ZimgError: some are missing; the hint is the line that installs them.
    """
    need("exporting", ("torch", "transformers", "onnxscript", "onnx_ir", "filelock"), "export")


def need(what: str, modules: Sequence[str], extra: str) -> None:
    """Check for the packages that a command needs.

    Args:
        what: the work that needs them, for the message.
        modules: their import names.
        extra: the extra of ``zimgkit`` that installs them.

    Raises:
        ZimgError: some are missing; the hint is the line that installs them.
    """
    if missing := [name for name in modules if not find_spec(name)]:
        raise ZimgError(f"{what} needs {', '.join(missing)}", install(extra))
