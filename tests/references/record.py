"""Make the recordings anew and compare them with those that are kept; run by ``make references``.

With ``--write`` they replace those. Words after it say which: ``record.py --write qwen-image-inpaint``.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import library

from tests.references import recordings
from tests.references.cases import CASES, Case
from tests.references.recordings import LEVELS, Recording

BOUND = 2e-5
"""How far arrays may be from those that are kept, beside their own size where it is above 1."""


def declare_operators() -> None:
    """Let torchvision, which is built for CUDA, be imported beside a torch for CPUs.

    Its transforms need none of its operators, which are not found there; but two are looked up by name.
    """
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def record(case: Case, folder: Path) -> Recording:
    """Draw a case's picture with DiffSynth-Studio.

    Args:
        case: the call.
        folder: where checkpoints are kept between cases.
    """
    from tests.references import checkpoints, i2l
    from tests.references.diffsynth_pipelines import PIPELINES, observe

    checkpoint = folder / case.checkpoint
    if not checkpoint.exists():
        checkpoints.write(case.checkpoint, checkpoint)
    pipe = PIPELINES[checkpoints.CHECKPOINTS[case.checkpoint].family](checkpoint)
    with contextlib.redirect_stdout(io.StringIO()):
        call, made = dict(case.call), {}
        if case.pictures:
            made, lora = i2l.made_of(list(case.pictures), checkpoint, folder / f"{case.checkpoint}-i2l")
            if case.is_positive_only:
                pipe.dit = pipe.enable_lora_hot_loading(pipe.dit)
                call["positive_only_lora"] = lora
            else:
                pipe.load_lora(pipe.dit, state_dict=lora)
        if case.lora:
            lora = checkpoints.write_lora(case.lora, checkpoint, folder / f"{case.lora}.safetensors")
            pipe.load_lora(pipe.dit, str(lora))
        arrays = observe(pipe, call, case.tensors) | made
        return Recording(case.checkpoint, case.lora, case.said, arrays)


def differences(name: str, made: Recording) -> Iterator[str]:
    """What of a recording is not as it is kept."""
    kept = recordings.read(name)
    if (made.checkpoint, made.lora, made.call) != (kept.checkpoint, kept.lora, kept.call):
        yield "the call"
    for key in sorted(made.arrays.keys() | kept.arrays.keys()):
        if key not in made.arrays or key not in kept.arrays:
            yield f"{key}, which only one of them has"
            continue
        ours, theirs = made.arrays[key], kept.arrays[key]
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            yield f"{key}: {ours.dtype} {ours.shape}, kept as {theirs.dtype} {theirs.shape}"
            continue
        scale = LEVELS if key == "pixels" else 1
        ours, theirs = (array.astype(np.float64) / scale for array in (ours, theirs))
        off = np.abs(ours - theirs) / np.maximum(1, np.abs(theirs))
        if not off.max(initial=0) <= BOUND:
            yield f"{key} by {off.max():.1e}"


def main() -> int:
    """Returns 1 where a recording is not as it is kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="keep what is made")
    parser.add_argument("systems", nargs="*", help="what the names of the recordings begin with")
    options = parser.parse_args()
    torch.set_num_threads(1)
    declare_operators()
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for name, case in CASES.items():
            if options.systems and not name.startswith(tuple(options.systems)):
                continue
            made = record(case, Path(folder))
            if options.write:
                recordings.write(name, made)
            found = list(differences(name, made))
            failed += bool(found)
            print(f"{name}: {'differs in ' + '; '.join(found) if found else 'as it is kept'}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
