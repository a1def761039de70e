"""Every error a user can meet.

::

    ZimgError                 one line: what was wrong, where, and what to do
    |-- UsageError            an argument is missing or out of its range          (exit code 2)
    |-- CheckpointError       a checkpoint is missing, broken or of another family
    |   |-- DownloadError     a hub cannot be reached, or has no such model
    |   `-- LoraError         a LoRA is missing, broken, of another family, or changes no weight of the model
    |-- BundleError           a bundle is missing, changed, unfinished or too new
    |-- SafetensorsError      a file is not the safetensors file it should be (in ``safetensors.py``)
    |-- BackendError          a backend is not installed or cannot run this
    |   `-- OutOfMemoryError  the device has too little memory for it
    |-- OutputError           the target exists, is busy, or the disk is full
    `-- CancelledError        a picture was asked for, and not wanted any more

All but :class:`UsageError` end a command with exit code 1.
"""

from __future__ import annotations


class ZimgError(Exception):
    """The base of all errors zimgkit raises on purpose.

    Args:
        message: what was wrong and where, in one line.
        hint: what to do about it, in one line; appended to the message.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        self.message = message
        self.hint = hint
        super().__init__(f"{message}; {hint}" if hint else message)


def install(extra: str) -> str:
    """How an extra of zimgkit is installed: the hint of every error about a missing package.

    From a clone, because zimgkit is not on the package index yet; when it is, this line is all that changes.
    """
    return f"in a clone of zimgkit: pip install '.[{extra}]'"


class UsageError(ZimgError):
    """An argument is missing or out of its range."""

    exit_code = 2


class CheckpointError(ZimgError):
    """A checkpoint is missing, broken or of another family."""


class DownloadError(CheckpointError):
    """A hub cannot be reached, or has no such model."""


class LoraError(CheckpointError):
    """A LoRA is missing, broken, of another family, or changes no weight of the model."""


class BundleError(ZimgError):
    """A bundle is missing, changed, unfinished or written by a newer zimgkit."""


class BackendError(ZimgError):
    """A backend is not installed, or cannot run what it was asked to run."""


class OutOfMemoryError(BackendError):
    """The device has too little free memory. Closing other engines on it may help."""


class OutputError(ZimgError):
    """The target exists, is being written by another process, or its disk is full."""


class CancelledError(ZimgError):
    """A picture was cancelled before it was finished."""


OUT_OF_MEMORY = (
    "out of memory",
    "outofmemory",
    "failed to allocate",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "bad_alloc",
    "alloc_failed",
    "memoryallocation",
)
"""What the C++ library, ONNX Runtime, OpenVINO, torch, TensorRT and CUDA's libraries say, in lower case."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether something that a library raised means that memory ran out."""
    return isinstance(error, MemoryError) or says_out_of_memory(str(error))


def says_out_of_memory(text: str) -> bool:
    """Whether that is what a library's words mean."""
    return any(sign in text.lower() for sign in OUT_OF_MEMORY)
