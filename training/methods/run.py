"""The tasks by their names: a first stage, a second stage, or one after the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from zimgkit.engines.bundle import MANIFEST
from zimgkit.engines.errors import UsageError
from zimgkit.export.checkpoints.checkpoint import Checkpoint, open_checkpoint
from zimgkit.runtime import demo_models
from zimgkit.runtime.progress import Report, silent
from zimgkit.training import families
from zimgkit.training.checkpoint import derive_checkpoint, load_component
from zimgkit.training.dataset import Dataset, read_dataset
from zimgkit.training.devices import is_main
from zimgkit.training.loop import Log, Settings, train
from zimgkit.training.lora import add_adapters, write_lora
from zimgkit.training.methods.cache import Cache, is_cache, open_cache
from zimgkit.training.methods.held import begin_with, hold_lora, read_adapters
from zimgkit.training.methods.process import METHODS, SERVES, SFT, FewSteps, process
from zimgkit.training.methods.tasks import task_of
from zimgkit.training.stages import LORA, processes_of, refuse_existing, run_of
from zimgkit.training.storage import checkpoint_activations, store_in_float8

DATA_PROCESS, TRAIN = ":data_process", ":train"
TASKS = tuple(method + stage for method in METHODS for stage in ("", DATA_PROCESS, TRAIN))
"""Of DiffSynth-Studio, whose trajectory imitation has no stages of its own."""
FULL = replace(LORA, learning_rate=2e-4)
"""How a whole transformer is trained on by default."""
SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Method:
    """What is trained, beside how long and how fast."""

    task: str = SFT
    student: FewSteps = field(default_factory=FewSteps)
    teacher: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the teacher's calls, where they are not its bundle's defaults."""
    bundle: str | None = None
    """What encodes, or teaches; by default the model itself, where it is a bundle too."""
    backend: str = "auto"
    bundle_device: str | None = None
    lora_rank: int = 8
    lora_target_modules: str | None = None
    """Ends of names of linears, by commas; by default those DiffSynth adapts."""
    lora_checkpoint: str | None = None
    """A LoRA whose adapters the new ones begin as."""
    preset_lora_path: str | None = None
    """A LoRA that is held in the weights while the new one is trained."""
    precision: str = "float32"
    """Of frozen weights and of texts."""
    use_gradient_checkpointing: bool = False
    use_gradient_checkpointing_offload: bool = False
    fp8_models: str | None = None
    """``"dit"``, as DiffSynth calls it, or ``"transformer"``: its frozen weights are stored in 8 bits."""

    @property
    def name(self) -> str:
        """The task without its stage."""
        return self.task.partition(":")[0]

    @property
    def loras(self) -> list[str]:
        """Those in the weights when training begins."""
        return [lora for lora in (self.preset_lora_path, self.lora_checkpoint) if lora]


def run_method(
    model: str,
    data: Path,
    out: Path,
    method: Method,
    settings: Settings,
    *,
    resume: bool = False,
    report: Report = silent,
    log: Log | None = None,
) -> None:
    """Train a checkpoint's transformer, or adapters of it, by one of :data:`TASKS`.

    Args:
        model: a checkpoint: a folder in the diffusers layout, a hub id or a short name.
        data: a dataset's folder; of a task that ends in ``:train``, the cache that ``:data_process`` made.
        out: a safetensors file for a LoRA, or a folder for a checkpoint; of ``:data_process``, for the cache.
        method: what.
        settings: how.
        resume: go on with a run that was broken off. A first stage always goes on.
        report: called with (stage, done, total).
        log: given a line now and then.

    Raises:
        ZimgError: whatever went wrong, in one line.
    """
    if method.task not in TASKS:
        raise UsageError(f"there is no task {method.task!r}", f"choose of {', '.join(TASKS)}")
    if method.task.endswith(DATA_PROCESS):
        _first_stage(model, read_dataset(data), out, method, settings.seed, report)
        return
    refuse_existing(out)
    is_lora = out.suffix == SUFFIX
    _check(method, is_lora=is_lora)
    if is_cache(data) and not method.task.endswith(TRAIN):
        raise UsageError(f"{data} is a cache", f"give --task {method.name}{TRAIN}, or a dataset")
    if not is_cache(data) and method.task.endswith(TRAIN):
        raise UsageError(f"{data} is no cache", f"make one with --task {method.name}{DATA_PROCESS}")
    checkpoint = open_checkpoint(model)
    run = run_of(out)
    if is_cache(data):
        cache = open_cache(data)
    else:
        with processes_of(settings, out).main_process_first():  # The others find it made.
            cache = _first_stage(model, read_dataset(data), run / "cache", method, settings.seed, report)
    _refuse_others(cache, checkpoint, method, data)
    transformer = _transformer(checkpoint, method, settings.seed, is_lora=is_lora)
    task = task_of(method.name, cache, families.family(checkpoint.family), transformer, checkpoint.config("scheduler"))
    about = {
        "cache": cache.index.of,
        "rank": method.lora_rank if is_lora else 0,
        "targets": method.lora_target_modules,
        "held": method.loras,
        "precision": method.precision,
        "fp8": method.fp8_models is not None,
        "torch": torch.__version__.partition("+")[0],
    }
    weights = train(task, run, settings, about=about, resume=resume, report=report, log=log)
    if is_lora and is_main():
        write_lora(out, weights)
    elif is_main():
        scheduler = {**checkpoint.config("scheduler"), **cache.index.scheduler}
        derive_checkpoint(checkpoint.root, out, {"transformer": transformer}, configs={"scheduler": scheduler})


def _first_stage(model: str, dataset: Dataset, out: Path, method: Method, seed: int, report: Report) -> Cache:
    return process(
        method.bundle or _bundle_of(model),
        dataset,
        out,
        method.name,
        # The teacher is what is trained on, as it begins.
        loras=method.loras if method.name != SFT else (),
        student=method.student,
        teacher=method.teacher,
        seed=seed,
        precision=method.precision,
        backend=method.backend,
        device=method.bundle_device,
        report=report,
    )


def _bundle_of(model: str) -> str:
    folder = demo_models.locate(model)
    if not (folder / MANIFEST).is_file():
        raise UsageError(
            f"{model} is no bundle", f"zimg-export build --model {model} --out BUNDLE, and give --bundle BUNDLE"
        )
    return model


def _check(method: Method, *, is_lora: bool) -> None:
    if unknown := set((method.fp8_models or "dit").split(",")) - {"dit", "transformer"}:
        raise UsageError(f"--fp8_models names {min(unknown)!r}", "the one model in memory is called dit")
    for option in ("lora_checkpoint", "fp8_models"):
        if getattr(method, option) and not is_lora:
            raise UsageError(f"--{option} is given, and a whole model is trained", "let OUT end in .safetensors")


def _refuse_others(cache: Cache, checkpoint: Checkpoint, method: Method, data: Path) -> None:
    index = cache.index
    if method.name not in (served := SERVES[index.task]):
        tasks = " or ".join(one + TRAIN for one in served)
        raise UsageError(f"{data} is a cache of {index.task}", f"give --task {tasks}")
    if index.family != checkpoint.family:
        raise UsageError(
            f"{data} is a cache of {index.family}, and the model is of {checkpoint.family}", "make another"
        )


def _transformer(checkpoint: Checkpoint, method: Method, seed: int, *, is_lora: bool) -> Any:
    """The transformer with what is trained of it; the rest is frozen."""
    family = families.family(checkpoint.family)
    dtype = getattr(torch, method.precision) if is_lora else torch.float32
    transformer = load_component(checkpoint, "transformer", dtype)
    if method.use_gradient_checkpointing or method.use_gradient_checkpointing_offload:
        checkpoint_activations(transformer, offload=method.use_gradient_checkpointing_offload)
    if method.preset_lora_path:
        hold_lora(transformer, checkpoint, method.preset_lora_path)
    if not is_lora:
        for name in family.unused_modules(transformer):
            transformer.get_submodule(name).requires_grad_(False)
        return transformer
    targets, rank, begun = method.lora_target_modules or family.lora_targets, method.lora_rank, None
    if method.lora_checkpoint:
        begun, rank = read_adapters(method.lora_checkpoint)
        targets = ",".join(begun)
    add_adapters(transformer, family, targets, rank, seed)
    if begun:
        begin_with(transformer, begun)
    if method.fp8_models:
        store_in_float8(transformer)
    return transformer
