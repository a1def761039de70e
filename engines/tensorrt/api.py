"""Which TensorRT is installed, and what it has to say. Both products have one Python API."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

from zimgkit.engines.errors import BackendError, install

MODULES = ("tensorrt", "tensorrt_rtx")
"""TensorRT, and TensorRT for RTX, which compiles ahead on a machine without a GPU. The first one found is used."""

NOISE = ("already exists, the output tensors of this new instance", "Make sure input", "CUDA lazy loading")
"""Warnings that tell a user nothing: functions are called many times, inputs are bound as they are declared, and lazy
loading is the driver's default."""


def load() -> ModuleType:
    """The installed module.

    Raises:
        BackendError: neither is installed, or its libraries do not load.
    """
    for name in MODULES:
        try:
            return import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise BackendError(f"{name} needs {error.name}", install("tensorrt")) from None
        except (ImportError, OSError) as error:
            reason = " ".join(str(error).split())
            raise BackendError(f"{name} is installed, and does not load: {reason}", "install it again") from None
    raise BackendError(
        "TensorRT is not installed",
        f"{install('tensorrt')}, or for a GeForce or RTX card also: pip install tensorrt-rtx",
    )


def name(module: ModuleType) -> str:
    """``"tensorrt"`` or ``"tensorrt_rtx"``."""
    return module.__name__


def version(module: ModuleType) -> str:
    """Its version, such as ``"11.4.0.106"``."""
    return str(module.__version__)


def make_logger(module: ModuleType) -> Any:
    """A logger of this module that keeps what is said instead of printing it.

    Its ``errors`` and ``warnings`` are lists of lines; ``layers`` are the lines of the layer list, which the compiler
    says where it was asked for details.
    """

    class Log(module.ILogger):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []
            self.layers: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity in (module.ILogger.INTERNAL_ERROR, module.ILogger.ERROR):
                self.errors.append(" ".join(msg.split()))
            elif severity == module.ILogger.WARNING:
                if not any(part in msg for part in NOISE):
                    self.warnings.append(" ".join(msg.split()))
            elif "LayerType: " in msg:
                self.layers.extend(line for line in msg.splitlines() if "LayerType: " in line)

    return Log()
