"""Calibrate: run an unquantized bundle over prompts, and collect statistics of the inputs of its linears.

The whole pipeline runs, with all steps and both branches of guidance, on the PyTorch interpreter of the bundle's
graphs, which calls an observer with the input of a node. The statistics are saved after each prompt, so a calibration
that was interrupted continues with the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from zimgkit.engines.bundle import CHECKPOINT, Bundle, MergedLora, Source
from zimgkit.engines.errors import OutputError, UsageError, ZimgError
from zimgkit.engines.tensors.safetensors import SafetensorsError
from zimgkit.engines.torch.engine import TorchEngine, find_device, open_engine
from zimgkit.engines.torch.graph import load
from zimgkit.export.networks.registry import QUANTIZED, WEIGHT_FILES
from zimgkit.export.quantization.linears import named_linears
from zimgkit.export.quantization.prompts import calibration_prompts
from zimgkit.export.quantization.statistics import BINS, LARGEST, InputStatistics, Statistics
from zimgkit.runtime import demo_models
from zimgkit.runtime.pipeline import Pipeline
from zimgkit.runtime.progress import Report, silent
from zimgkit.runtime.text.prompts import read_prompts as prompts_in

FEWEST_PROMPTS = 4
"""The largest values over fewer prompts do not bound those of other prompts."""


class CalibrationSet(msgspec.Struct, frozen=True):
    """The prompts, sizes and steps that a calibration runs."""

    prompts: tuple[str, ...] = ()
    """The default prompts of :func:`calibration_prompts` where empty."""
    sizes: tuple[tuple[int, int], ...] = ()
    """Width and height in pixels; each prompt is run at each size. The model's default size where empty."""
    steps: int | None = None
    """Denoising steps of each run; the model's default where None."""
    pictures: tuple[str, ...] = ()
    """Files of pictures for a bundle that edits; each prompt takes the next one."""

    def filled(self, name: str) -> CalibrationSet:
        """Fill in the default prompts for a checkpoint of this name, if there are none."""
        return msgspec.structs.replace(self, prompts=self.prompts or calibration_prompts(name))


def read_prompts(path: Path, fewest: int = FEWEST_PROMPTS) -> tuple[str, ...]:
    """Read the different prompts of a file of :func:`zimgkit.runtime.text.prompts.read_prompts`.

    Args:
        path: the file.
        fewest: how many prompts it must have.

    Raises:
        UsageError: the file cannot be read, or has fewer prompts.
    """
    prompts = tuple(dict.fromkeys(prompts_in(path)))
    if len(prompts) < fewest:
        message = f"{path} has {len(prompts)} different prompts, and this needs {fewest}"
        raise UsageError(message, "give one prompt a line, a dozen of all kinds")
    return prompts


def statistics_path(bundle: Path) -> Path:
    """The file of a bundle's calibration statistics: beside its folder, or here for one that comes with zimgkit."""
    bundle = Path(bundle.name) if demo_models.is_carried(bundle) else bundle
    return bundle.with_name(f"{bundle.name}.calibration.safetensors")


def load_finished(
    store: Path, source: Any, loras: Sequence[MergedLora], calibration_set: CalibrationSet
) -> Statistics | None:
    """Load statistics if the calibration was finished, with the same checkpoint, LoRAs and calibration set; or None."""
    found = _load(store, (source, loras), calibration_set)
    return found if found and found.made["done"] == len(calibration_set.prompts) else None


def calibrate(
    bundle: Bundle, calibration_set: CalibrationSet, store: Path, *, device: str | None = None, report: Report = silent
) -> Statistics:
    """Run a bundle over prompts, and collect the statistics of the inputs of its linears.

    Args:
        bundle: an unquantized bundle.
        calibration_set: the prompts, the sizes and the steps. Prompt n starts from the noise of seed n.
        store: the file of the statistics; an interrupted calibration of the same set in it is continued.
        device: as torch names devices.
        report: called with (stage, done, total).

    Raises:
        UsageError: the bundle is quantized, there are too few prompts, or it edits and there are no pictures.
        ZimgError: an input has NaN, Inf or almost that; the message names the linear.
        OutputError: the statistics cannot be written.
    """
    if bundle.manifest.quantization is not None:
        raise UsageError(f"{bundle.root} is quantized", "calibrate a bundle of --precision bf16 or fp32")
    calibration_set = calibration_set.filled(bundle.manifest.name)
    if len(calibration_set.prompts) < FEWEST_PROMPTS:
        raise UsageError(f"a calibration needs {FEWEST_PROMPTS} prompts, not {len(calibration_set.prompts)}")
    pictures = calibration_set.pictures
    takes, layers = bundle.manifest.references, bundle.manifest.layers
    if not pictures and (layers is not None or (takes is not None and takes.least)):
        raise UsageError("a checkpoint that edits is calibrated on pictures", "name some with --calibration-image")
    # Both branches are observed in one component, whose scales they share.
    bundle = replace(bundle, manifest=bundle.manifest.for_both())
    source = (of_calibration(bundle.manifest.sources), bundle.manifest.loras)
    statistics = _load(store, source, calibration_set) or Statistics(made=_made(source, calibration_set, 0))
    opener = partial(_open_observed, statistics)
    with Pipeline(bundle, backend="torch", device=device, warn=lambda _: None, opener=opener) as pipeline:
        for index in range(statistics.made["done"], len(calibration_set.prompts)):
            report("calibrate", index, len(calibration_set.prompts))
            for width, height in calibration_set.sizes or ((None, None),):
                pipeline(
                    calibration_set.prompts[index],
                    width=width,
                    height=height,
                    num_inference_steps=calibration_set.steps,
                    negative_prompt=bundle.manifest.defaults.negative_prompt,  # Without one some families do not guide.
                    seed=index,
                    image=pictures[index % len(pictures)] if pictures else None,
                    output_type="latent",
                )
            statistics.made = _made(source, calibration_set, index + 1)
            try:
                statistics.save(store)
            except OSError as error:
                raise OutputError(f"{store} cannot be written ({error.strerror or error})", "free some space") from None
    report("calibrate", len(calibration_set.prompts), len(calibration_set.prompts))
    return statistics


def of_calibration(sources: Mapping[str, Source]) -> Source | dict[str, Source]:
    """What statistics are of, among sources: the checkpoint, and the files that stand for its components."""
    own = {name: source for name, source in sources.items() if name in (CHECKPOINT, *WEIGHT_FILES)}
    return own if len(own) > 1 else own[CHECKPOINT]


def _made(of: tuple[Any, Sequence[MergedLora]], calibration_set: CalibrationSet, done: int) -> dict[str, Any]:
    """Describe what statistics are of: checkpoint, LoRAs and calibration set, and how many of its prompts are done."""
    source, loras = of
    # Stored in calibration files and manifests: the key of the calibration set is "plan".
    plan = msgspec.to_builtins(calibration_set)
    if not calibration_set.pictures:
        del plan["pictures"]  # Files from before there were any have none.
    made = {"source": msgspec.to_builtins(source), "plan": plan, "done": done}
    # LoRAs are compared by content: the same file may have another path.
    return made | ({"loras": [[lora.sha256, lora.scale] for lora in loras]} if loras else {})


def _load(store: Path, source: tuple[Any, Sequence[MergedLora]], calibration_set: CalibrationSet) -> Statistics | None:
    """Load statistics of the same checkpoint, LoRAs and calibration set, finished or not; None if there are none."""
    if not store.exists():
        return None
    try:
        found = Statistics.load(store)
    except (SafetensorsError, UsageError):
        return None
    wanted = _made(source, calibration_set, 0)
    # Compared as JSON, which the file holds: tuples have become lists in it.
    same = msgspec.json.encode(found.made | {"done": 0}, order="sorted") == msgspec.json.encode(wanted, order="sorted")
    done = found.made.get("done")
    return found if same and isinstance(done, int) and 0 <= done <= len(calibration_set.prompts) else None


def _open_observed(statistics: Statistics, bundle: Bundle, component: str, _: str, device: str | None) -> TorchEngine:
    """Open a component with observers on the inputs of its linears, if it is one that is quantized."""
    engine = open_engine(bundle, component, device, "float32" if find_device(device).type == "cpu" else None)
    component = component.partition(".")[0]  # A variant has its weights.
    if component in QUANTIZED:
        inputs = statistics.inputs.setdefault(component, {})
        readers = statistics.readers.setdefault(component, {})
        observers: dict[str, Callable[[Tensor], None]] = {}
        for linear in named_linears(load(bundle, engine.graph)):
            readers[linear.weight] = linear.first_reader
            if linear.first_reader == linear.weight:
                observers[linear.label] = partial(_observe, inputs, component, linear.first_reader)
        engine.watch(observers)
    return engine


def _observe(inputs: dict[str, InputStatistics], component: str, name: str, values: Tensor) -> None:
    """Add one input (..., in) of a linear to the statistics."""
    magnitudes = values.detach().reshape(-1, values.shape[-1]).abs().float()
    channels = magnitudes.amax(0).cpu().numpy()
    if not (channels <= LARGEST).all():
        met = f"a magnitude of {channels.max():.3g}" if np.isfinite(channels).all() else "NaN or Inf"
        message = f"calibration met {met} in the input of {name} ({component})"
        raise ZimgError(message, "check the checkpoint: zimg-export verify")
    entry = inputs.setdefault(name, InputStatistics.empty(len(channels)))
    entry.add(channels, lambda top: torch.histc(magnitudes, BINS, 0, top).cpu().numpy().astype(np.float64))
