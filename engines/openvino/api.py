"""The ``openvino`` package: found, new enough, and silent."""

from __future__ import annotations

import functools
import sys
from importlib import import_module
from types import ModuleType

from zimgkit.engines.errors import BackendError, install

OLDEST = (2026, 0)
"""The first release that reads all that a graph of a bundle has."""
TELEMETRY = "openvino_telemetry"


@functools.cache
def load() -> ModuleType:
    """Import OpenVINO without its telemetry, which notes every import in a folder of the user and sends it.

    Raises:
        BackendError: it is not installed, does not load, or is too old.
    """
    known = TELEMETRY in sys.modules
    # Then it takes a stub of its own; what others import later is not touched.
    if not known:
        sys.modules[TELEMETRY] = None  # type: ignore[assignment]
    try:
        openvino = import_module("openvino")
        version = str(openvino.__version__)
    except ImportError as error:
        missing = "openvino is not installed" if error.name == "openvino" else f"openvino does not load ({error})"
        raise BackendError(missing, install("openvino")) from None
    finally:
        if not known:
            del sys.modules[TELEMETRY]
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise BackendError(f"openvino {version} is too old: {oldest} or newer is needed", install("openvino"))
    return openvino
