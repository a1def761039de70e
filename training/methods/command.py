"""``python -m zimgkit.training train``: all tasks, with the names that DiffSynth-Studio's scripts have for options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import click

from zimgkit.engines.base import BACKENDS

TASKS = tuple(
    method + stage
    for method in ("sft", "direct_distill", "trajectory_imitation")
    for stage in ("", ":data_process", ":train")
)
PATH = click.Path(path_type=Path)


def with_dashes(name: str) -> str:
    """An option's name as it is here, for one as DiffSynth-Studio spells it; the names of tasks are its own."""
    return name if name in TASKS else name.replace("_", "-")


def options(command: Callable[..., None]) -> Callable[..., None]:
    """Those of the methods."""
    for option in (
        click.option("--use-gradient-checkpointing", is_flag=True, help="Slower, in less memory."),
        click.option("--use-gradient-checkpointing-offload", is_flag=True, help="What is kept goes to the host's."),
        click.option("--fp8-models", metavar="dit", help="Store its frozen weights in 8 bits."),
        click.option(
            "--precision", type=click.Choice(["float32", "bfloat16"]), help="Of frozen weights. [default: float32]"
        ),
        click.option("--preset-lora-path", help="A LoRA to hold in the weights meanwhile, and to take off at use."),
        click.option("--lora-checkpoint", help="A LoRA to go on from."),
        click.option("--lora-target-modules", help="Ends of the names of linears, by commas. [default: DiffSynth's]"),
        click.option("--lora-rank", type=int, help="Of the adapters. [default: 8]"),
        click.option("--teacher-cfg-scale", type=float, help="Of the teacher's guidance. [default: the bundle's]"),
        click.option("--teacher-num-inference-steps", type=int, help="Of the teacher. [default: the bundle's]"),
        click.option("--shift", type=float, help="Of the student's schedule, for all sizes. [default: the model's]"),
        click.option("--num-inference-steps", type=int, help="Of the student. [default: 4]"),
        click.option("--bundle-device", help="Of the bundle."),
        click.option("--backend", type=click.Choice(list(BACKENDS)), help="Of the bundle."),
        click.option("--bundle", help="What encodes, or teaches. [default: MODEL, if it is one too]"),
        click.option("--task", type=click.Choice(TASKS), default="sft", show_default=True, help="What for."),
    ):
        command = option(command)
    return command


def method_of(given: dict[str, Any]) -> Any:
    """The method that options ask for; takes them out of what is given."""
    from zimgkit.training.methods.process import FewSteps
    from zimgkit.training.methods.run import Method

    given["student"] = FewSteps(**_taken(given, FewSteps))
    teacher = {name: given.pop(f"teacher_{name}", None) for name in ("num_inference_steps", "cfg_scale")}
    given["teacher"] = {name: value for name, value in teacher.items() if value is not None}
    return Method(**_taken(given, Method))


def settings_for(out: Path, given: dict[str, Any]) -> Any:
    """How it is trained: the defaults of adapters, or of a whole transformer, and what else is given."""
    from zimgkit.training.methods.run import FULL, SUFFIX
    from zimgkit.training.stages import LORA

    defaults = LORA if out.suffix == SUFFIX else FULL
    return replace(defaults, **_taken(given, type(defaults)))


def _taken(given: dict[str, Any], kind: Any) -> dict[str, Any]:
    found = {one.name: given.pop(one.name, None) for one in fields(kind)}
    return {name: value for name, value in found.items() if value is not None}
