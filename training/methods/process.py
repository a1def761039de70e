"""The first stage: texts and pictures encoded, or drawn by the teacher, by a bundle's engines, without PyTorch's."""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zimgkit.engines.bundle import MANIFEST
from zimgkit.engines.errors import UsageError
from zimgkit.export.lora.swap import swap
from zimgkit.runtime import Pipeline, demo_models
from zimgkit.runtime.progress import Report, silent
from zimgkit.training import families
from zimgkit.training.dataset import Dataset, load_pictures
from zimgkit.training.methods.cache import Cache, Index, make_cache, open_cache, rows_of
from zimgkit.training.methods.teacher import draw_trajectory, scheduler_with, sigmas_of, student_scheduler

SFT, DISTILL, IMITATE = "sft", "direct_distill", "trajectory_imitation"
METHODS = (SFT, DISTILL, IMITATE)
"""DiffSynth-Studio's names."""
SERVES = {SFT: (SFT,), DISTILL: (DISTILL,), IMITATE: (IMITATE, DISTILL)}
"""What a cache is of -> the methods that can be trained on it."""


@dataclass(frozen=True)
class FewSteps:
    """How a student draws: without guidance, and in few steps."""

    num_inference_steps: int = 4
    shift: float | None = None
    """Of its schedule, for all sizes; the checkpoint's schedule where there is none."""


def process(
    bundle: str,
    dataset: Dataset,
    out: Path,
    method: str,
    *,
    loras: Sequence[str] = (),
    student: FewSteps | None = None,
    teacher: Mapping[str, Any] | None = None,
    seed: int = 0,
    precision: str = "float32",
    backend: str = "auto",
    device: str | None = None,
    report: Report = silent,
) -> Cache:
    """Make, or go on with, the cache that a method trains on.

    Args:
        bundle: as :meth:`zimgkit.runtime.Pipeline.open` takes it. Of ``sft`` it encodes, else it is the teacher.
        dataset: the captions; of its pictures a teacher takes the sizes alone.
        out: the cache's folder.
        method: of :data:`METHODS`.
        loras: what is merged into the bundle for this, as ``zimg-export swap-lora`` takes them.
        student: how it will draw, where it is distilled.
        teacher: arguments of the teacher's calls, where they are not the bundle's defaults.
        seed: of the noise of the first row; the others count on.
        precision: the element type of texts.
        backend: of the bundle.
        device: of the bundle.
        report: called with (stage, done, total).

    Raises:
        ZimgError: whatever went wrong, in one line.
    """
    student = student or FewSteps()
    if student.num_inference_steps < 1:
        raise UsageError(f"--num_inference_steps is {student.num_inference_steps}", "give 1 or more")
    with _with_loras(bundle, loras, report) as place, Pipeline.open(place, backend=backend, device=device) as pipeline:
        manifest, session = pipeline.bundle.manifest, pipeline.session
        if method == SFT and "vae_encoder" not in manifest.components:
            raise UsageError(f"{bundle} encodes no pictures", "build it with --tasks text-to-image,image-to-image")
        family = families.family(manifest.family)
        changes = {} if method == SFT else student_scheduler(manifest.scheduler, student.shift)
        scheduler = scheduler_with(manifest.scheduler, changes)
        levels = {
            size: sigmas_of(session.family, scheduler, student.num_inference_steps, size)
            for size in (dataset.buckets() if method != SFT else ())
        }
        settings = {"teacher": dict(teacher or {}), "seed": seed, "precision": precision}
        index = Index(
            method,
            manifest.family,
            _digest(pipeline, loras, dataset, settings if method != SFT else {"precision": precision}),
            rows_of(dataset),
            len(family.no_prompts),
            {f"{height}x{width}": tuple(map(float, found)) for (height, width), found in levels.items()},
            changes,
        )
        dtype = getattr(torch, precision)

        def make(row: int) -> dict[str, Tensor]:
            past = row - len(dataset.rows)
            prompt = family.no_prompts[past] if past >= 0 else dataset.rows[row].prompt
            found = {"text": torch.from_numpy(pipeline.encode_prompt(prompt)[0]).to(dtype)}
            if past >= 0:
                return found
            own = dataset.rows[row]
            if method == SFT:
                pixels = load_pictures([own.image]).numpy()
                latents = session.encoder.encode_pixels(pixels, session.device_of("vae_encoder"))
                # As many bits as the one-stage run keeps of them.
                return found | {"latents": torch.from_numpy(latents[0]).bfloat16()}
            through = levels[own.size] if method == IMITATE else None
            passed = draw_trajectory(pipeline, prompt, own.size, seed + row, through, teacher or {})
            return found | {"trajectory": torch.from_numpy(passed)}

        make_cache(out, index, make, report)
    return open_cache(out)


@contextlib.contextmanager
def _with_loras(bundle: str, loras: Sequence[str], report: Report) -> Iterator[str]:
    """The bundle, or a passing one with LoRAs."""
    if not loras:
        yield bundle
        return
    with tempfile.TemporaryDirectory(prefix="zimgkit-") as folder:
        yield str(swap(demo_models.locate(bundle), loras, out=Path(folder) / "bundle", report=report).bundle.root)


def _digest(pipeline: Pipeline, loras: Sequence[str], dataset: Dataset, settings: Mapping[str, Any]) -> str:
    manifest = pipeline.bundle.manifest
    digest = hashlib.sha256()
    if loras:  # Its files are called otherwise each time.
        digest.update(repr((manifest.name, manifest.sources, manifest.loras)).encode())
    else:
        digest.update((pipeline.bundle.root / MANIFEST).read_bytes())
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for row in dataset.rows:
        digest.update(f"{row.image.name} {row.image.stat().st_size} {row.prompt}".encode())
    return digest.hexdigest()[:16]
