"""Reference bundles of a checkpoint, in float32 and in bfloat16, that a quantized one is compared with."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import gettempdir

from zimgkit.engines.bundle import Bundle
from zimgkit.engines.errors import OutputError, UsageError
from zimgkit.engines.files import temporary_folder
from zimgkit.export.build import export
from zimgkit.export.checkpoints.checkpoint import Checkpoint, open_checkpoint, origins
from zimgkit.export.lora.merge import NOTHING, Merge
from zimgkit.export.quality.cost import References
from zimgkit.runtime.progress import Report, silent


@contextmanager
def references(
    checkpoint: Checkpoint, merged: Merge, beside: Path, given: Sequence[Path] = (), report: Report = silent
) -> Iterator[References]:
    """Open the reference bundles that were given, and build the others for the time of the context.

    If all weights of the checkpoint are bfloat16, one bundle serves as both.

    Args:
        checkpoint: an open checkpoint.
        merged: the LoRAs that are merged into it.
        beside: the bundle that is compared; temporary bundles are built beside it.
        given: bundles of the checkpoint in fp32 or bf16.
        report: called with (stage, done, total).

    Raises:
        UsageError: a given bundle is quantized, of another checkpoint, or has other LoRAs.
        BundleError: a given folder is not a bundle.
        OutputError: the disk is full.
    """
    found: dict[str, Bundle] = {}
    for path in given:
        bundle = Bundle.open(path)
        _check(bundle, checkpoint, merged)
        found[bundle.manifest.precision] = bundle
    weights = [info for component in checkpoint.components for info in checkpoint.tensors(component).values()]
    same = not merged.loras and not merged.positive and all(info.dtype == "bfloat16" for info in weights)
    with temporary_folder(beside, "references") as folder:
        for precision in ("bfloat16", "float32"):
            if precision not in found:
                built = same and found.get("bfloat16")
                found[precision] = built or _build(checkpoint, merged, folder / precision, report)
        yield References(found["float32"], found["bfloat16"])


@contextmanager
def temporary_bundle(
    model: str, revision: str | None = None, source: str = "huggingface", report: Report = silent
) -> Iterator[Bundle]:
    """Build a bundle of a checkpoint in bfloat16, in the working folder if it can be written, while the context lasts.

    Raises:
        CheckpointError: the checkpoint is missing, broken, or none zimgkit serves.
        OutputError: the disk is full.
    """
    checkpoint = open_checkpoint(model, revision=revision, source=source)
    place = Path.cwd() if os.access(Path.cwd(), os.W_OK) else Path(gettempdir())
    with temporary_folder(place / "zimgkit", "references") as folder:
        yield _build(checkpoint, NOTHING, folder / "bfloat16", report)


def _build(checkpoint: Checkpoint, merged: Merge, folder: Path, report: Report) -> Bundle:
    """Build a bundle in the precision that its folder is named for, ``float32`` or ``bfloat16``."""
    try:
        folder.mkdir()
        export(checkpoint, folder, folder.name, report, merged=merged)
    except OSError as error:
        message = f"a bundle to compare with cannot be written to {folder} ({error.strerror or error})"
        raise OutputError(message, "free some space, or name one with --reference") from None
    return Bundle.open(folder, verify=False)


def _check(bundle: Bundle, checkpoint: Checkpoint, merged: Merge) -> None:
    """Check that a bundle can serve as a reference."""
    manifest = bundle.manifest
    if manifest.quantization is not None:
        raise UsageError(f"{bundle.root} is quantized", "a reference is a bundle of --precision fp32 or bf16")
    if (manifest.family, origins(manifest.sources)) != (checkpoint.family, origins(checkpoint.sources)):
        raise UsageError(f"{bundle.root} is of another checkpoint", "a reference is a bundle of the same one")
    own, asked = (
        [[(lora.sha256, lora.scale) for lora in loras] for loras in (has.loras, has.positive_loras)]
        for has in (manifest, merged)
    )
    if own != asked:
        raise UsageError(f"{bundle.root} has other LoRAs", "a reference has the same ones")
