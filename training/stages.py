"""The stages of training, each from a checkpoint and a dataset to what it makes; a run's state lies beside that."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from zimgkit.engines.errors import OutputError, UsageError
from zimgkit.export.checkpoints.checkpoint import Checkpoint, open_checkpoint
from zimgkit.runtime.progress import Report, silent
from zimgkit.training import families
from zimgkit.training.beside import check_extras, encoded_columns
from zimgkit.training.checkpoint import derive_checkpoint, start_checkpoint
from zimgkit.training.control import control_task, write_net
from zimgkit.training.dataset import Dataset, read_dataset
from zimgkit.training.devices import accelerator_of, is_main
from zimgkit.training.diffusion import denoiser_task
from zimgkit.training.families import Configs
from zimgkit.training.frozen_text import transformer_task
from zimgkit.training.latents import Latents, cache_latents
from zimgkit.training.loop import STATE, Log, Settings, train
from zimgkit.training.lora import lora_task, write_lora
from zimgkit.training.tokenizer import LEARNED_TOKENS, train_tokenizer
from zimgkit.training.vae import AutoencoderTask, measure, stored_autoencoder

LORA = Settings(steps=600, batch_size=16, learning_rate=1e-3, weight_decay=0.0, ema=0.99, warmup=50, save_every=200)
"""How adapters are trained by default: minutes on two cores for those of a small model."""


CONTROL = Settings(steps=4000, batch_size=16, learning_rate=3e-3, weight_decay=0.0, ema=0.995, warmup=100)
"""Likewise ControlNets."""


@dataclass(frozen=True)
class Table:
    """Which of a dataset's columns are used, in the words of DiffSynth-Studio."""

    files: tuple[str, ...] = ("image",)
    """Columns that name pictures."""
    extras: tuple[str, ...] = ()
    """Columns that a network takes beside image and prompt."""
    path: Path | None = None
    """Of the table; by default the one in the folder."""
    max_pixels: int | None = None
    """What larger pictures are reduced to."""
    repeat: int = 1
    """How often an epoch sees each row."""
    epochs: int | None = None
    """How many, in the place of the number of steps."""

    def paced(self, settings: Settings, dataset: Dataset) -> Settings:
        """Settings with the steps that so many epochs of a dataset take."""
        if self.epochs is None:
            return settings
        return replace(settings, steps=-(-len(dataset.rows) * self.repeat * self.epochs // settings.batch_size))

    def read(self, root: Path) -> Dataset:
        """The dataset in a folder.

        Raises:
            UsageError: columns that make no sense.
            DatasetError: it is broken.
        """
        check_extras(self.extras, self.files)
        return read_dataset(root, table=self.path, files=self.files, extras=self.extras, max_pixels=self.max_pixels)


def run_of(out: Path) -> Path:
    """Where the state of the run that makes a file or folder lies: beside it."""
    return out.with_name(f"{out.name}.run")


def train_model_tokenizer(
    data: Path, out: Path, family: str, *, configs: Configs | None = None, seed: int = 0, overwrite: bool = False
) -> None:
    """Begin a demo model: learn a tokenizer from a dataset's captions and write an untrained checkpoint around it.

    Args:
        data: the dataset's folder.
        out: the checkpoint's folder.
        family: the name of its architecture.
        configs: of the components, by default the demo model's.
        seed: of the weights.
        overwrite: replace a checkpoint that is there.

    Raises:
        DatasetError: the dataset is broken.
        OutputError: the folder exists or cannot be written.
    """
    tokenizer = train_tokenizer((row.prompt for row in read_dataset(data).rows), LEARNED_TOKENS)
    own = families.family(family)
    start_checkpoint(out, own, tokenizer, configs or own.configs, seed=seed, overwrite=overwrite)


def train_vae(
    model: str | Path,
    data: Path,
    out: Path,
    settings: Settings | None = None,
    *,
    with_encoder: bool = True,
    resume: bool = False,
    report: Report = silent,
    log: Log | None = None,
) -> None:
    """Train a checkpoint's autoencoder; write the checkpoint with it, and with its latents' mean and deviation.

    Args:
        model: a folder in the diffusers layout, a hub id or a short name.
        data: a dataset's folder.
        out: the new checkpoint's folder.
        settings: how, by default that of the family.
        with_encoder: train the encoder too. Without it latents stay what they are, and a transformer that was trained
            on them draws with the new decoder.
        resume: go on with a run that was broken off.
        report: called with (stage, done, total).
        log: given a line now and then.

    Raises:
        ZimgError: whatever went wrong, in one line.
    """
    refuse_existing(out)
    checkpoint, dataset = open_checkpoint(str(model)), read_dataset(data)
    family = families.family(checkpoint.family)
    settings = settings or family.vae_settings
    task = AutoencoderTask(checkpoint, dataset, with_encoder=with_encoder)
    about = _about(checkpoint, dataset)
    train(task, run_of(out), settings, about=about, resume=resume, report=report, log=log)
    if not is_main():
        return
    statistics = measure(task.module, dataset, family) if with_encoder else {}
    derive_checkpoint(checkpoint.root, out, {"vae": stored_autoencoder(checkpoint, task.module, statistics)})


def train_diffusion(
    model: str | Path,
    data: Path,
    out: Path,
    settings: Settings | None = None,
    *,
    with_text: bool = True,
    table: Table = Table(),
    resume: bool = False,
    report: Report = silent,
    log: Log | None = None,
) -> None:
    """Train a checkpoint's transformer, and its text model along with it; write the checkpoint with them.

    Args:
        model: a folder in the diffusers layout, a hub id or a short name.
        data: a dataset's folder.
        out: the new checkpoint's folder.
        settings: how, by default those of the family.
        with_text: train the text model too.
        table: which columns of the dataset are used; a text model that is trained takes none beside.
        resume: go on with a run that was broken off.
        report: called with (stage, done, total).
        log: given a line now and then.

    Raises:
        ZimgError: whatever went wrong, in one line.
    """
    refuse_existing(out)
    if with_text and table.extras:
        raise UsageError("--extra-inputs is given, and the text model is trained", "add --trainable-models dit")
    checkpoint, dataset = open_checkpoint(str(model)), table.read(data)
    settings = table.paced(settings or families.family(checkpoint.family).diffusion_settings, dataset)
    latents = _latents(checkpoint, dataset, out, settings, table, report)
    if with_text:
        task = denoiser_task(checkpoint, dataset, latents)
        parts = {"transformer": task.module.transformer, "text_encoder": task.module.text_encoder}
    else:
        task = transformer_task(checkpoint, dataset, latents, table.extras)
        parts = {"transformer": task.module.transformer}
    about = _about(checkpoint, dataset)
    train(task, run_of(out), settings, about=about, resume=resume, report=report, log=log)
    if is_main():
        derive_checkpoint(checkpoint.root, out, parts)


def train_lora(
    model: str,
    data: Path,
    out: Path,
    settings: Settings = LORA,
    *,
    rank: int = 8,
    targets: str | None = None,
    precision: str = "float32",
    table: Table = Table(),
    held: str | None = None,
    begin: str | None = None,
    gradient_checkpointing: bool = False,
    resume: bool = False,
    report: Report = silent,
    log: Log | None = None,
) -> None:
    """Train adapters of a checkpoint's transformer; write them to a safetensors file.

    Args:
        model: a folder in the diffusers layout, a hub id or a short name.
        data: a dataset's folder.
        out: the file.
        settings: how.
        rank: of the adapters.
        targets: ends of names of linears, separated by commas; by default those DiffSynth adapts.
        precision: the element type of the frozen weights, ``"float32"`` or ``"bfloat16"``.
        table: which columns of the dataset are used.
        held: a LoRA to hold in the weights meanwhile, and to take off at use.
        begin: a LoRA to go on from, of which targets and rank are taken.
        gradient_checkpointing: compute activations twice rather than keep them.
        resume: go on with a run that was broken off.
        report: called with (stage, done, total).
        log: given a line now and then.

    Raises:
        ZimgError: whatever went wrong, in one line.
    """
    _refuse_unnamed(out)
    checkpoint, dataset = open_checkpoint(model), table.read(data)
    settings = table.paced(settings, dataset)
    latents = _latents(checkpoint, dataset, out, settings, table, report)
    task = lora_task(
        checkpoint,
        dataset,
        latents,
        targets=targets,
        rank=rank,
        seed=settings.seed,
        precision=precision,
        extras=table.extras,
        held=held,
        begin=begin,
        gradient_checkpointing=gradient_checkpointing,
    )
    about = _about(checkpoint, dataset) | {"rank": rank, "targets": targets, "precision": precision}
    about |= {name: value for name, value in {"held": held, "begin": begin}.items() if value}
    weights = train(task, run_of(out), settings, about=about, resume=resume, report=report, log=log)
    if is_main():
        write_lora(out, weights)


def train_control(
    model: str,
    data: Path,
    out: Path,
    settings: Settings = CONTROL,
    *,
    kind: str | None = None,
    begin: Path | None = None,
    precision: str = "float32",
    table: Table = Table(("image", "control_image"), ("control_image",)),
    gradient_checkpointing: bool = False,
    resume: bool = False,
    report: Report = silent,
    log: Log | None = None,
) -> None:
    """Train a ControlNet of a checkpoint's transformer, which stays as it is; write it to a safetensors file.

    Args:
        model: a folder in the diffusers layout, a hub id or a short name.
        data: a dataset's folder.
        out: the file.
        settings: how.
        kind: the architecture, one of the family's; by default its usual one.
        begin: a file with the weights to begin with; without one, a net that does nothing.
        precision: the element type of the frozen weights, ``"float32"`` or ``"bfloat16"``.
        table: which columns of the dataset are used.
        gradient_checkpointing: compute activations twice rather than keep them.
        resume: go on with a run that was broken off.
        report: called with (stage, done, total).
        log: given a line now and then.

    Raises:
        ZimgError: whatever went wrong, in one line.
    """
    _refuse_unnamed(out)
    checkpoint, dataset = open_checkpoint(model), table.read(data)
    settings = table.paced(settings, dataset)
    latents = _latents(checkpoint, dataset, out, settings, table, report)
    task = control_task(
        checkpoint,
        dataset,
        latents,
        kind=kind,
        begin=begin,
        seed=settings.seed,
        precision=precision,
        extras=table.extras,
        gradient_checkpointing=gradient_checkpointing,
    )
    about = _about(checkpoint, dataset) | {"kind": kind, "begin": begin and begin.name, "precision": precision}
    weights = train(task, run_of(out), settings, about=about, resume=resume, report=report, log=log)
    if is_main():
        write_net(out, weights)


def train_demo(
    family: str,
    out: Path,
    *,
    make_data: Callable[[Path], None],
    configs: Configs | None = None,
    vae: Settings | None = None,
    diffusion: Settings | None = None,
    seed: int = 0,
    resume: bool = False,
    report: Report = silent,
    log: Log | None = None,
) -> None:
    """Make a demo model from nothing: pictures, tokenizer, autoencoder, then transformer and text model.

    Everything but the finished checkpoint lies in ``<out>.run``: ``data``, ``begun``, ``with-vae`` and their runs.

    Args:
        family: the name of its architecture.
        out: the checkpoint's folder.
        make_data: writes the dataset into a folder.
        configs: of the components, by default the demo model's.
        vae: how its autoencoder is trained.
        diffusion: how its transformer and text model are.
        seed: of everything.
        resume: go on where a call before this one stopped.
        report: called with (stage, done, total).
        log: given a line now and then.

    Raises:
        ZimgError: whatever went wrong, in one line.
    """
    refuse_existing(out)
    run = run_of(out)
    if run.exists() and not resume:
        raise OutputError(f"{run} holds a run already", "add --resume to go on with it, or remove the folder")
    data, begun, with_vae = run / "data", run / "begun", run / "with-vae"
    if not data.exists():
        part = run / "data.part"
        shutil.rmtree(part, ignore_errors=True)
        make_data(part)
        part.rename(data)
    if not begun.exists():
        train_model_tokenizer(data, begun, family, configs=configs, seed=seed)
    if not with_vae.exists():
        train_vae(
            begun,
            data,
            with_vae,
            replace(vae or families.family(family).vae_settings, seed=seed),
            resume=_has_state(with_vae),
            report=report,
            log=log,
        )
    finished = run / "finished"
    if not finished.exists():
        train_diffusion(
            with_vae,
            data,
            finished,
            replace(diffusion or families.family(family).demo_settings, seed=seed),
            resume=_has_state(finished),
            report=report,
            log=log,
        )
    derive_checkpoint(finished, out, {})


def processes_of(settings: Settings, out: Path) -> Any:
    """What the loop will find, before anything is encoded for it."""
    return accelerator_of(settings.device, settings.mixed_precision, "", run_of(out), compiles=settings.compile)


def _latents(
    checkpoint: Checkpoint, dataset: Dataset, out: Path, settings: Settings, table: Table, report: Report
) -> Latents:
    """Those of a run's pictures; of several processes the first makes them, and the others find them made."""
    with processes_of(settings, out).main_process_first():
        return cache_latents(checkpoint, dataset, run_of(out), report, columns=encoded_columns(table.extras))


def _has_state(out: Path) -> bool:
    """Whether a stage was begun that can go on: one that was stopped before its first state begins anew."""
    return (run_of(out) / STATE).exists()


def refuse_existing(out: Path) -> None:
    """Better said before the first step than after the last."""
    if out.exists():
        raise OutputError(f"{out} exists already", "name another, or remove it")


def _refuse_unnamed(out: Path) -> None:
    if out.suffix != ".safetensors":
        raise UsageError(f"{out} is to be a safetensors file", "let its name end in .safetensors")
    refuse_existing(out)


def _about(checkpoint: Checkpoint, dataset: Dataset) -> dict[str, Any]:
    """What a run was of, so that it goes on with the same."""
    rows = hashlib.sha256("\n".join(f"{row.image.name} {row.size} {row.prompt}" for row in dataset.rows).encode())
    configs = {name: checkpoint.config(name) for name in ("transformer", "text_encoder", "vae", "scheduler")}
    model = hashlib.sha256(repr(configs).encode())
    return {
        "family": checkpoint.family,
        "dataset": rows.hexdigest()[:16],
        "model": model.hexdigest()[:16],
        "torch": torch.__version__.partition("+")[0],
    }
