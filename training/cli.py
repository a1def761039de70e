"""``python -m zimgkit.training``: the demo models, and adapters of any checkpoint; the work is in ``stages.py``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import click

import zimgkit
from zimgkit.engines.base import BACKENDS
from zimgkit.engines.bundle import TEXT_TO_IMAGE
from zimgkit.engines.errors import UsageError, ZimgError, install
from zimgkit.export.cli.options import TASKS
from zimgkit.export.networks.registry import FAMILIES
from zimgkit.runtime.commands import console
from zimgkit.runtime.commands.options import call_options
from zimgkit.runtime.parameters import PARAMETERS, Picture
from zimgkit.training.methods import command as methods
from zimgkit.training.options import (
    FOLDER,
    PRECISION,
    RANK,
    RECOMPUTE,
    TARGETS,
    Underscores,
    columns,
    names_of,
    validation,
)

FAMILY = click.option("--family", type=click.Choice(list(FAMILIES)), required=True, help="Which architecture.")
OF_TRIALS = (
    *("prompt", "height", "width", "num_images_per_prompt", "seed", "keep_unmasked", "layers", "resolution"),
    *("edit_image_auto_resize", "edit_rope_interpolation", "eligen_enable_on_negative"),
    *(parameter.name for parameter in PARAMETERS if parameter.type is Picture),
)
"""Parameters of a call that what is judged has of its own, or that no model that is judged takes."""


def settings(command: Callable[..., None]) -> Callable[..., None]:
    """The options of a stage; where one is left out, the stage's own default holds."""
    for option in (
        click.option("--quiet", is_flag=True, help="No progress."),
        click.option("--resume", is_flag=True, help="Go on with the run that was broken off."),
        click.option("--mixed-precision", type=click.Choice(["no", "bf16"]), help="bf16 is for GPUs."),
        click.option("--device", type=click.Choice(["cpu", "cuda", "npu"]), help="To train on. [default: the best]"),
        click.option("--report-to", type=click.Choice(["tensorboard"]), help="Where losses go, beside loss.png."),
        click.option("--compile", is_flag=True, default=None, help="Compile networks: minutes, then faster steps."),
        click.option("--gradient-accumulation-steps", type=int, help="Batches a step, in the memory of one."),
        click.option("--save-every", type=int, help="Steps between two saved states."),
        click.option("--seed", type=int, help="Of everything that is random."),
        click.option("--ema", type=float, help="Decay of the moving average of the weights."),
        click.option("--warmup", type=int, help="Steps until the full learning rate."),
        click.option("--decay", type=float, help="The share of the steps, the last ones, the rate falls over."),
        click.option("--restart", type=int, help="A step the rate falls towards, to begin anew from there."),
        click.option("--muon-learning-rate", type=float, help="The same for the matrices that Muon trains."),
        click.option("--learning-rate", type=float, help="After the warmup."),
        click.option("--batch-size", type=int, help="Pictures a step."),
        click.option("--steps", type=int, help="How many."),
    ):
        command = option(command)
    return command


def trainable(*choices: str, note: str) -> Callable[[Any], Any]:
    """The option for what is trained: the first of the choices, if nothing is said."""
    return click.option(
        "--trainable-models",
        type=click.Choice(choices),
        default=choices[0],
        show_default=True,
        help=f"What is trained; {note}.",
    )


@click.group("zimg-training", cls=Underscores, context_settings={"max_content_width": 110})
@click.version_option(zimgkit.__version__, message="%(version)s")
def cli() -> None:
    """Train small models from nothing, and adapters of any."""


@cli.command()
@FAMILY
@click.argument("data", type=FOLDER)
@click.argument("out", type=FOLDER)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the weights.")
def tokenizer(family: str, data: Path, out: Path, seed: int) -> None:
    """Learn a tokenizer from the captions of DATA; write an untrained checkpoint OUT around it."""
    _need_train()
    from zimgkit.training.stages import train_model_tokenizer

    train_model_tokenizer(data, out, family, seed=seed)
    click.echo(out)


@cli.command()
@click.argument("model")
@click.argument("data", type=FOLDER)
@click.argument("out", type=FOLDER)
@trainable("encoder,decoder", "decoder", note="with the decoder alone, latents stay what they are")
@settings
def vae(model: str, data: Path, out: Path, trainable_models: str, **options: Any) -> None:
    """Train the autoencoder of MODEL on the pictures of DATA; write the checkpoint OUT."""
    _need_train()
    from zimgkit.export.checkpoints.checkpoint import open_checkpoint
    from zimgkit.training import families, stages

    defaults = families.family(open_checkpoint(model).family).vae_settings
    own = {"with_encoder": "encoder" in trainable_models}
    _stage(stages.train_vae, defaults, options, model, data, out, **own)


@cli.command()
@click.argument("model")
@click.argument("data", type=FOLDER)
@click.argument("out", type=FOLDER)
@trainable("dit,text_encoder", "dit", note="dit is the transformer")
@columns
@validation
@settings
def diffusion(model: str, data: Path, out: Path, trainable_models: str, **options: Any) -> None:
    """Train the transformer and the text model of MODEL on DATA; write the checkpoint OUT."""
    _need_train()
    from zimgkit.export.checkpoints.checkpoint import open_checkpoint
    from zimgkit.training import families, stages

    defaults = families.family(open_checkpoint(model).family).diffusion_settings
    own = {"with_text": "text_encoder" in trainable_models, "table": _table(options, stages.Table())}
    _stage(stages.train_diffusion, defaults, options, model, data, out, **own)


@cli.command()
@click.argument("model")
@click.argument("data", type=FOLDER)
@click.argument("out", type=FOLDER)
@RANK
@TARGETS
@PRECISION
@RECOMPUTE
@click.option("--lora-base-model", type=click.Choice(["dit"]), expose_value=False, help="What is adapted.")
@click.option("--lora-checkpoint", help="A LoRA to go on from.")
@click.option("--preset-lora-path", help="A LoRA to hold in the weights meanwhile, and to take off at use.")
@click.option("--preset-lora-model", type=click.Choice(["dit"]), expose_value=False, help="What has it.")
@columns
@validation
@settings
def lora(
    model: str,
    data: Path,
    out: Path,
    rank: int,
    targets: str | None,
    precision: str,
    gradient_checkpointing: bool,
    lora_checkpoint: str | None,
    preset_lora_path: str | None,
    **options: Any,
) -> None:
    """Train adapters of MODEL, any checkpoint zimgkit serves, on DATA; write the safetensors file OUT."""
    _need_train()
    from zimgkit.training import stages

    own = {
        "rank": rank,
        "targets": targets,
        "precision": precision,
        "gradient_checkpointing": gradient_checkpointing,
        "table": _table(options, stages.Table()),
        "held": preset_lora_path,
        "begin": lora_checkpoint,
    }
    _stage(stages.train_lora, stages.LORA, options, model, data, out, **own)


@cli.command(context_settings={"token_normalize_func": methods.with_dashes})
@click.argument("model")
@click.argument("data", type=FOLDER)
@click.argument("out", type=FOLDER)
@methods.options
@settings
def train(model: str, data: Path, out: Path, resume: bool, quiet: bool, **given: Any) -> None:
    """Train MODEL on DATA by a task: adapters where OUT is a safetensors file, else its transformer.

    A task is two stages, which may be taken apart: TASK:data_process writes what a bundle's engines make of DATA into
    the folder OUT, and TASK:train takes that folder for DATA. Names are DiffSynth's.
    """
    _need_train()
    from zimgkit.training.methods.run import run_method

    with _progress(quiet=quiet) as ways:
        method, how = methods.method_of(given), methods.settings_for(out, given)
        run_method(model, data, out, method, how, resume=resume, **ways)
    click.echo(out)


@cli.command()
@click.argument("model")
@click.argument("data", type=FOLDER)
@click.argument("out", type=FOLDER)
@click.option("--kind", help="The architecture: blockwise or fun. [default: the family's]")
@click.option("--begin", type=FOLDER, help="A net to go on from. [default: one that does nothing]")
@PRECISION
@RECOMPUTE
@columns
@validation
@settings
def control(
    model: str,
    data: Path,
    out: Path,
    kind: str | None,
    begin: Path | None,
    precision: str,
    gradient_checkpointing: bool,
    **options: Any,
) -> None:
    """Train a ControlNet of MODEL on DATA, whose column control_image has what it sees; write the file OUT."""
    _need_train()
    from zimgkit.training import stages

    own = {
        "kind": kind,
        "begin": begin,
        "precision": precision,
        "gradient_checkpointing": gradient_checkpointing,
        "table": _table(options, stages.Table(("image", "control_image"), ("control_image",))),
    }
    _stage(stages.train_control, stages.CONTROL, options, model, data, out, **own)


@cli.command()
@FAMILY
@click.argument("out", type=FOLDER)
@click.option("--pictures", type=int, default=30000, show_default=True, help="How many to learn from.")
@click.option("--vae-steps", type=int, help="Of the autoencoder.")
@click.option("--steps", type=int, help="Of transformer and text model.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of everything that is random.")
@click.option("--resume", is_flag=True, help="Go on where it was broken off.")
@click.option("--quiet", is_flag=True, help="No progress.")
def demo(
    family: str,
    out: Path,
    pictures: int,
    vae_steps: int | None,
    steps: int | None,
    seed: int,
    resume: bool,
    quiet: bool,
) -> None:
    """Make a demo model OUT from nothing: its pictures, tokenizer, autoencoder, transformer and text model."""
    _need_train()
    from zimgkit.training import families, stages

    own = families.family(family)

    def make_data(folder: Path) -> None:
        import subprocess
        import sys

        command = [sys.executable, "-m", "zimgkit.training.world", str(folder)]
        done = subprocess.run([*command, "--count", str(pictures), "--seed", str(seed)], check=False)
        if done.returncode:
            raise ZimgError(f"the pictures in {folder} could not be made", "the lines above say why")

    with _progress(quiet=quiet) as ways:
        stages.train_demo(
            family,
            out,
            make_data=make_data,
            vae=replace(own.vae_settings, **_given({"steps": vae_steps})),
            diffusion=replace(own.demo_settings, **_given({"steps": steps})),
            seed=seed,
            resume=resume,
            **ways,
        )
    click.echo(out)


@cli.command()
@click.argument("model")
@click.argument("out", type=FOLDER)
@click.option("--prompts-of", type=FOLDER, help="A dataset: each word of its prompts becomes one token.")
def editor(model: str, out: Path, prompts_of: Path | None) -> None:
    """Write MODEL, whose text model reads pictures, as a checkpoint OUT that edits pictures, to be trained to do so."""
    _need_train()
    from zimgkit.export.checkpoints.checkpoint import open_checkpoint
    from zimgkit.runtime import demo_models
    from zimgkit.training.dataset import read_dataset
    from zimgkit.training.editor import as_editor

    prompts = [row.prompt for row in read_dataset(prompts_of).rows] if prompts_of else []
    as_editor(open_checkpoint(str(demo_models.locate(model))), out, prompts)
    click.echo(out)


@cli.command()
@click.argument("checkpoint", type=FOLDER)
@click.argument("out", type=FOLDER)
@TASKS
@click.option("--overwrite", is_flag=True, help="Replace a folder that is there.")
@click.option("--quiet", is_flag=True, help="No progress.")
def ship(checkpoint: Path, out: Path, tasks: tuple[str, ...], overwrite: bool, quiet: bool) -> None:
    """Make CHECKPOINT, in bfloat16, a bundle and a checkpoint in one folder OUT, as those of zimgkit are."""
    _need_train()
    from zimgkit.runtime.progress import bar
    from zimgkit.training import ship as work

    with bar(enabled=not quiet) as report:
        work.ship(checkpoint, out, tasks=tasks, overwrite=overwrite, report=report)
    click.echo(out)


@cli.command("ship-editor")
@click.argument("checkpoint", type=FOLDER)
@click.argument("base")
@click.argument("out", type=FOLDER)
@click.option("--overwrite", is_flag=True, help="Replace a folder that is there.")
@click.option("--quiet", is_flag=True, help="No progress.")
def ship_editor(checkpoint: Path, base: str, out: Path, overwrite: bool, quiet: bool) -> None:
    """Write into the folder OUT what makes CHECKPOINT of BASE, which ``ship`` made: of weights the difference."""
    _need_train()
    from zimgkit.runtime import demo_models
    from zimgkit.runtime.progress import bar
    from zimgkit.training import ship as work

    source = demo_models.locate(base)
    with bar(enabled=not quiet) as report:
        work.ship_editor(checkpoint, source, out, overwrite=overwrite, report=report)
    click.echo(out)


@cli.command("ship-controlnet")
@click.argument("net", type=click.Path(path_type=Path, dir_okay=False))
@click.argument("bundle", type=FOLDER)
@click.argument("out", type=FOLDER)
@click.option("--name", default="edges", show_default=True, help="What calls name it.")
@click.option("--overwrite", is_flag=True, help="Replace a folder that is there.")
@click.option("--quiet", is_flag=True, help="No progress.")
def ship_controlnet(net: Path, bundle: Path, out: Path, name: str, overwrite: bool, quiet: bool) -> None:
    """Copy BUNDLE, which ``ship`` made, to the folder OUT, with the ControlNet of a file."""
    _need_train()
    from zimgkit.runtime import demo_models
    from zimgkit.runtime.progress import bar
    from zimgkit.training import ship as work

    source = demo_models.locate(bundle)
    with bar(enabled=not quiet) as report:
        work.ship_controlnet(net, source, out, name, overwrite=overwrite, report=report)
    click.echo(out)


@cli.command()
@click.argument("bundle")
@click.argument("data", type=FOLDER)
@click.argument("out", type=FOLDER)
@click.option("--columns", callback=names_of, default="", help="What rows give beside image and prompt, by commas.")
@click.option("--table", type=FOLDER, help="The table. [default: the folder's metadata.*]")
@click.option("--quiet", is_flag=True, help="No progress.")
def page(bundle: str, data: Path, out: Path, columns: tuple[str, ...], table: Path | None, quiet: bool) -> None:
    """Draw a few rows of the dataset DATA with BUNDLE, and write them as one PNG file OUT."""
    from zimgkit.runtime.progress import bar
    from zimgkit.training.page import draw_page

    with bar(enabled=not quiet) as report:
        draw_page(bundle, data, out, columns, table, report)
    click.echo(out)


@cli.command()
@click.argument("bundle")
@click.option(
    "--task",
    type=click.Choice([TEXT_TO_IMAGE, "image-to-image", "inpaint", "control", "regions", "edit"]),
    default=TEXT_TO_IMAGE,
    show_default=True,
    help="What to ask for.",
)
@click.option("--captions", type=int, default=200, show_default=True, help="Half of one thing, half of two.")
@call_options(leave_out=OF_TRIALS)
@click.option("--backend", type=click.Choice(list(BACKENDS)), default="onnxruntime", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print every case as JSON.")
@click.option("--quiet", is_flag=True, help="No progress.")
def judge(bundle: str, task: str, captions: int, backend: str, as_json: bool, quiet: bool, **call: Any) -> None:
    """Draw scenes that were held out of training with BUNDLE; say how many pictures show what was asked for.

    From a picture, one thing's shape or colour is to change in its place. Within a mask, one thing is to become
    another, and a picture is right only where all else is as it was, to one level of 255. By edges, BUNDLE's ControlNet
    is to put things where these are; by regions, each thing is to lie in its mask. Of edits, the change that is asked
    for has to be made, and the rest left as it was.
    """
    from dataclasses import asdict

    from zimgkit.runtime.progress import bar
    from zimgkit.training.accuracy import accuracy, share

    if captions < 1:
        raise UsageError(f"captions is {captions}", "give 1 or more")
    with bar(enabled=not quiet) as report:
        cases = accuracy(bundle, task=task, captions=captions, backend=backend, report=report, **_given(call))
    shares = {"one": share(cases, 1), "two": share(cases, 2), "all": sum(case.right for case in cases) / len(cases)}
    if as_json:
        console.print_json({"shares": shares, "cases": [asdict(case) for case in cases]})
        return
    for case in cases:
        if not case.right:
            click.echo(f"seed {case.seed}: {case.caption}: shows {case.seen or 'nothing'}", err=True)
    kept = f"; outside the masks, levels changed at the most: {max(case.changed for case in cases)}"
    told = f"one thing: {shares['one']:.1%}; two things and how they lie: {shares['two']:.1%}"
    if task == "edit":
        told = f"edits: {shares['all']:.1%}"
    click.echo(told + (kept if task == "inpaint" else ""))


def _stage(work: Callable[..., None], defaults: Any, options: dict[str, Any], *paths: Any, **own: Any) -> None:
    names = {field.name for field in fields(defaults)}
    chosen = replace(defaults, **_given({key: value for key, value in options.items() if key in names}))
    with _progress(quiet=options["quiet"]) as ways:
        work(*paths, chosen, resume=options["resume"], **own, **ways)
        if options.get("validate"):
            model, data, out = paths
            _validate(str(model), data, out, own.get("table"), options["judge"], ways["log"])
    click.echo(paths[-1])


def _validate(model: str, data: Path, out: Path, table: Any, captions: int, log: Callable[[str], None] | None) -> None:
    """Build a bundle with what was trained, draw a page with it, and let the judge see it; all of that lies beside."""
    from zimgkit.training import validation as work
    from zimgkit.training.beside import CONTROL
    from zimgkit.training.stages import run_of

    extras = table.extras if table else ()
    kind = "checkpoint" if out.is_dir() else "controlnet" if {*CONTROL} & {*extras} else "lora"
    bundle, picture = run_of(out) / "bundle", run_of(out) / "page.png"
    work.build(model, out, bundle, kind, extras)
    work.draw_page(bundle, data, picture, extras, table.path if table else None)
    said = [f"bundle: {bundle}", f"page: {picture}"]
    if captions:
        said.append(work.judged(bundle, extras, captions))
    if log:
        log("\n".join(said))


def _table(options: dict[str, Any], default: Any) -> Any:
    names = {"files": "data_file_keys", "extras": "extra_inputs", "path": "dataset_metadata_path"}
    names |= {"max_pixels": "max_pixels", "repeat": "dataset_repeat", "epochs": "num_epochs"}
    return replace(default, **_given({key: options[name] for key, name in names.items()}))


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if value is not None}


@contextlib.contextmanager
def _progress(*, quiet: bool) -> Iterator[dict[str, Any]]:
    """What shows progress on stderr: a bar where it is a terminal, and a line for each saved state."""
    from zimgkit.runtime.progress import bar

    with bar(enabled=not quiet) as report:
        yield {"report": report, "log": None if quiet else lambda line: click.echo(line, err=True)}


def _need_train() -> None:
    """Say what to install, rather than which module is missing."""
    from importlib.util import find_spec

    if missing := [name for name in ("torch", "diffusers", "transformers", "accelerate") if not find_spec(name)]:
        raise ZimgError(f"training needs {', '.join(missing)}", install("train"))
    import diffusers.utils.logging
    import transformers.utils.logging

    for library in (diffusers, transformers):  # Their notices are for who calls them, and that is not the user.
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def main() -> None:
    """The entry point."""
    console.run(cli)
