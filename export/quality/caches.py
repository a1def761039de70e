"""Masks for block caching that suit a bundle, and what they cost: chosen, measured, and written into it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import msgspec

from zimgkit.engines.bundle import CACHE_NAME, Bundle, CacheMask, Manifest, write_manifest
from zimgkit.engines.bundle.locks import only_writer_of
from zimgkit.engines.errors import UsageError
from zimgkit.export.networks.registry import is_carried
from zimgkit.export.quality.cache_cost import Pictures
from zimgkit.export.quality.judged import CAPTIONS, accuracy
from zimgkit.export.quality.runs import Trial
from zimgkit.export.quality.step_errors import StepErrors, step_errors
from zimgkit.export.quality.step_masks import best_mask, fewest, total
from zimgkit.runtime.caching import cached_share
from zimgkit.runtime.diffusion.caching import PATTERNS, RESIDUAL, REUSED, SHORTEST, VELOCITY, pattern
from zimgkit.runtime.progress import Report, silent

SPEEDS, ERRORS = (1.0, 100.0), (1.0, 200.0)
"""What a target may be: times as fast, and dB."""
LEAST = 3
"""Steps: the first and the last are full."""
ANYTHING = Trial()


@dataclass(frozen=True)
class Aim:
    """What a mask is chosen for; where neither is given, as many full steps as ``balanced`` has."""

    speed: float | None = None
    """How many times as fast the steps shall be, as :func:`reckoned_speed` has it."""
    error: float | None = None
    """The PSNR in dB that pictures shall have at least, beside those without a cache."""

    def check(self, steps: int) -> None:
        """Refuse what cannot be aimed at in so many steps.

        Raises:
            UsageError: naming it.
        """
        if self.speed is not None and self.error is not None:
            raise UsageError("--target-speed and --target-error name two aims", "leave one of them out")
        for option, value, (low, high) in (
            ("--target-speed", self.speed, SPEEDS),
            ("--target-error", self.error, ERRORS),
        ):
            if value is not None and not low < value <= high:
                raise UsageError(f"{option} is {value:g}", f"give a number above {low:g}, and at the most {high:g}")
        if steps < LEAST:
            raise UsageError(f"of {steps} steps none can be left out", f"give --num-inference-steps of {LEAST} or more")
        if steps <= SHORTEST and self == Aim():
            message = f"of {steps} steps 'balanced' leaves none out, which a mask is to be compared with"
            raise UsageError(message, "give a --target-speed or a --target-error")


def calibrate_cache(
    path: Path,
    trial: Trial = ANYTHING,
    aim: Aim = Aim(),
    *,
    name: str = "calibrated",
    order: int = 1,
    captions: int | None = None,
    backend: str = "onnxruntime",
    device: str | None = None,
    report: Report = silent,
) -> dict[str, CacheMask]:
    """Choose a mask for a bundle, measure what it and the patterns cost, and write them into the manifest.

    Args:
        path: the bundle's folder.
        trial: the pictures that are drawn, with the bundle's defaults where it has none.
        aim: what the mask is for.
        name: what calls say for it.
        order: of the extrapolation, of all masks.
        captions: how many pictures are judged with each; None is :data:`.judged.CAPTIONS` of a demo model, and none of
            other checkpoints.
        backend: what runs the bundle.
        device: as the backend names devices.
        report: called with (stage, done, total).

    Returns:
        Name -> what was written: ``balanced`` and ``fast`` where they leave steps out, and the mask.

    Raises:
        UsageError: an aim cannot be reached, or the bundle does not take the trial.
        BackendError: the backend cannot run the bundle; the manifest is unchanged, whatever is raised.
        OutputError: the bundle is of links or read-only, or another process is writing it.
    """
    if not CACHE_NAME.fullmatch(name):
        hint = "begin it with a small letter; small letters, digits, '.', '_' and '-' may follow, 64 in all"
        raise UsageError(f"no mask can be called {name[:80]!r}", hint)
    Bundle.read(path).check_changeable()
    with only_writer_of(path):
        bundle = Bundle.open(path)
        manifest, trial = bundle.manifest, trial.filled(bundle.manifest)
        steps = trial.steps or 0
        aim.check(steps)
        trial.check(manifest)
        if manifest.layers is not None:
            raise UsageError(f"{manifest.name} takes pictures apart, of which no mask is measured", "write one by hand")
        fulls = _full_steps(manifest, steps, aim)
        found = step_errors(bundle, trial, order, backend=backend, device=device, report=report)
        chosen = _best(found, fulls, steps, order)
        with Pictures(bundle, trial, backend=backend, device=device, report=report) as pictures:
            if aim.error is not None:
                reused = [str(chosen.reuse)]
                chosen = _near_enough(
                    lambda full: _best(found, dict.fromkeys(reused, full), steps, order),
                    steps,
                    pictures.psnr,
                    aim.error,
                )
            masks = {**_patterns(found, steps, order), name: chosen}
            costs = pictures.costs(masks)
        if captions is None:
            captions = CAPTIONS if is_carried(manifest.name) else 0
        if captions:
            call = {"num_inference_steps": steps, "cache_order": order}
            judged = {(mask.steps, mask.reuse) for mask in masks.values()} | {("off", None)}
            shares = {
                one: accuracy(bundle.root, captions, backend, report, cache=one[0], cache_reuse=one[1], **call)
                for one in sorted(judged, key=str)
            }
            off = shares["off", None]
            for key, mask in masks.items():
                own = shares[mask.steps, mask.reuse]
                costs[key] = msgspec.structs.replace(costs[key], captions=captions, accuracy=own, uncached_accuracy=off)
        masks = {key: msgspec.structs.replace(mask, cost=costs[key]) for key, mask in masks.items()}
        write_manifest(bundle.root, msgspec.structs.replace(manifest, caches={**manifest.caches, **masks}))
    return masks


def reckoned_speed(manifest: Manifest, steps: int, full: int, reused: str) -> float:
    """How many times as fast so many steps are where only some are full, by the weights that each part reads.

    Time would say it of this machine alone; a mask is for all.
    """
    cached = cached_share(manifest) if reused == RESIDUAL else 0.0
    return steps / (full + (steps - full) * cached)


def _full_steps(manifest: Manifest, steps: int, aim: Aim) -> dict[str, int]:
    """What may be taken over -> how many steps may be full then, at the most.

    Raises:
        UsageError: not even the fewest are fast enough.
    """
    least, reused = fewest(steps), REUSED if manifest.pieces("denoiser") else (VELOCITY,)
    if aim.error is not None:
        return dict.fromkeys(reused, max(least, steps // 2))
    if aim.speed is None:
        return dict.fromkeys(reused, sum(pattern(*PATTERNS["balanced"], steps)))
    speeds = {(one, full): reckoned_speed(manifest, steps, full, one) for one in reused for full in range(least, steps)}
    found = {one: full for (one, full), speed in speeds.items() if speed >= aim.speed}
    if not found:
        most = int(100 * max(speeds.values())) / 100
        raise UsageError(f"no mask of {steps} steps makes them {aim.speed:g} times as fast", f"{most:g} is the most")
    return found


def _best(found: StepErrors, fulls: Mapping[str, int], steps: int, order: int) -> CacheMask:
    """The mask whose errors add up to the least, of so many full steps for each that may be taken over."""
    own = {one: full for one, full in fulls.items() if one in found.errors}
    masks = {one: best_mask(found.errors[one], steps, full, order) for one, full in own.items()}
    reused = min(masks, key=lambda one: masks[one][1])
    return _mask(masks[reused][0], order, reused, found.change)


def _mask(steps: str, order: int, reused: str, change: tuple[float, ...] = ()) -> CacheMask:
    return CacheMask(steps, order=order, reuse=cast("Literal['residual', 'velocity']", reused), change=change)


def _near_enough(
    mask_of: Callable[[int], CacheMask], steps: int, psnr: Callable[[CacheMask], float], least: float
) -> CacheMask:
    """The mask of the fewest full steps whose pictures have this PSNR, by halving.

    Raises:
        UsageError: none has.
    """
    low, high = fewest(steps), steps
    while low < high:
        middle = (low + high) // 2
        if psnr(mask_of(middle)) >= least:
            high = middle
        else:
            low = middle + 1
    if low == steps:
        nearest = psnr(mask_of(steps - 1))
        raise UsageError(f"no mask of {steps} steps keeps {least:g} dB", f"{nearest:.1f} dB is the most")
    return mask_of(low)


def _patterns(found: StepErrors, steps: int, order: int) -> dict[str, CacheMask]:
    """The masks that there are for every checkpoint, where they leave steps out, with what is best taken over."""
    masks = {}
    for name, kind in PATTERNS.items() if steps > SHORTEST else ():
        mask = "".join("01"[full] for full in pattern(*kind, steps))
        sums = {one: total(mask, errors, order) for one, errors in found.errors.items()}
        masks[name] = _mask(mask, order, min(sums, key=sums.__getitem__))
    return masks
