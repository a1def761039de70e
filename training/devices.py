"""What training runs on, and what it tells others of itself."""

from __future__ import annotations

import os
import resource
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from zimgkit.engines.errors import BackendError, UsageError
from zimgkit.runtime.memory.amounts import gigabytes

DEVICES = ("cpu", "cuda", "npu")
TRACKERS = ("tensorboard",)


def accelerator_of(device: str, mixed_precision: str, report_to: str, run: Path, *, compiles: bool = False) -> Any:
    """The accelerate library on a device: it moves modules and spreads batches over processes.

    Args:
        device: ``"cpu"``, ``"cuda"``, ``"npu"`` (Huawei's Ascend, through torch_npu), or nothing for the best there is.
        mixed_precision: ``"no"`` or ``"bf16"``.
        report_to: ``"tensorboard"``, or nothing.
        run: the folder for its files.
        compiles: networks are to be compiled there.

    Raises:
        UsageError: no such device or tracker is known, or there is nothing to compile with.
        BackendError: it is not there.
    """
    from accelerate import Accelerator
    from accelerate.utils import is_npu_available

    if device not in ("", *DEVICES):
        raise UsageError(f"there is no device {device!r} to train on", f"choose of {', '.join(DEVICES)}")
    if report_to not in ("", *TRACKERS):
        raise UsageError(f"nothing reports to {report_to!r}", f"choose of {', '.join(TRACKERS)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise BackendError("PyTorch finds no NVIDIA GPU", "leave --device out, or install PyTorch for CUDA")
    if device == "npu" and not is_npu_available():
        lack = "torch_npu is not installed" if not find_spec("torch_npu") else "torch_npu finds no NPU"
        raise BackendError(lack, "pip install torch_npu, of PyTorch's version, beside CANN; or leave --device out")
    if report_to and not (find_spec("tensorboard") or find_spec("tensorboardX")):
        raise BackendError("tensorboard is not installed", "pip install tensorboard, or leave --report-to out")
    accelerator = Accelerator(
        cpu=device == "cpu",
        mixed_precision=mixed_precision,
        log_with=report_to or None,
        project_dir=run,
    )
    if device not in ("", accelerator.device.type):
        raise BackendError(f"accelerate runs on {accelerator.device.type}", f"hide that device to train on {device}")
    compiler = os.environ.get("CXX", "g++")
    if compiles and accelerator.device.type == "cpu" and not shutil.which(compiler):
        raise UsageError(f"--compile needs a C++ compiler, and there is no {compiler}", "install one, or leave it out")
    if report_to:
        accelerator.init_trackers("tensorboard")
    return accelerator


def is_main() -> bool:
    """Whether this process is the first of those that train, or the only one: it alone writes what was made."""
    from accelerate import PartialState

    found: bool = PartialState().is_main_process
    return found


def peak_memory(device: torch.device) -> str:
    """The most memory that was taken so far, of the device, or on the CPU of this process: ``"1.2 GB"``."""
    if device.type == "cpu":
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return gigabytes(used if sys.platform == "darwin" else used * 1024)
    return gigabytes(getattr(torch, device.type).max_memory_allocated())
