"""The training loop all stages share: resumable to the last bit, on one device or several.

What is random in a step comes from the seed and the step's number alone, and a module's ``forward`` draws nothing. So a
run holds no state but its weights, their moving average, the optimizer's moments and the losses so far, all of which
lie in one safetensors file; a run that was broken off goes on as if it had not been.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import MISSING, asdict, dataclass, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from zimgkit.engines.errors import CheckpointError, OutputError, UsageError, ZimgError
from zimgkit.runtime.progress import Report, silent
from zimgkit.training.curve import write_curve
from zimgkit.training.devices import accelerator_of, peak_memory
from zimgkit.training.muon import Muon

STATE = "state.safetensors"
MOMENTS = {False: ("exp_avg", "exp_avg_sq"), True: ("momentum",)}
"""Whether Muon trains a parameter, else AdamW -> the running averages, by the optimizer's own names."""

Weights = dict[str, Tensor]
"""Trained parameters by name, float32."""
Log = Callable[[str], None]


class TrainingError(ZimgError):
    """A run went wrong in a way that other settings may avoid."""


@dataclass(frozen=True)
class Settings:
    """How a stage is trained."""

    steps: int
    batch_size: int
    """Of each process, and of each part of what is accumulated."""
    learning_rate: float
    """Between the warmup and the decay."""
    muon_learning_rate: float = 6e-3
    """The same for what Muon trains."""
    warmup: int = 200
    decay: float = 0.3
    """The share of the steps, the last ones, over which the rate falls to a fiftieth."""
    restart: int = 0
    """A step towards which the rate falls too, to begin anew from there; 0, or one past the end, for none."""
    weight_decay: float = 0.01
    clip: float = 1.0
    """The largest norm of the gradient."""
    ema: float = 0.999
    """How much of the moving average of the weights is kept each step, later on; less at first."""
    seed: int = 0
    save_every: int = 500
    mixed_precision: str = "no"
    """``"no"`` or ``"bf16"``."""
    gradient_accumulation_steps: int = 1
    """So many batches, all of one draw, make a step: the gradient of their mean, in the memory of one."""
    device: str = ""
    """``"cpu"``, ``"cuda"`` or ``"npu"``; the best there is where this is empty."""
    report_to: str = ""
    """``"tensorboard"``: its files go to the run's folder."""
    compile: bool = False
    """Whether networks are compiled (``torch.compile``): minutes at the start, then steps are faster."""

    def __post_init__(self) -> None:
        """Refuse numbers that cannot be trained with.

        Raises:
            UsageError: naming the first one.
        """
        for name in (
            *("steps", "batch_size", "learning_rate", "muon_learning_rate", "clip", "save_every"),
            "gradient_accumulation_steps",
        ):
            if getattr(self, name) <= 0:
                raise UsageError(f"{name} is {getattr(self, name)}", "it must be more than 0")
        if self.restart < 0:
            raise UsageError(f"restart is {self.restart}", "name a step, or 0 for none")
        for name in ("ema", "decay"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}", "it must be at least 0 and less than 1")


class Task(Protocol):
    """What a stage gives the loop."""

    name: str

    @property
    def hidden(self) -> Collection[str]:
        """The names of the matrices that Muon trains; AdamW trains the rest."""

    @property
    def module(self) -> nn.Module:
        """Called with a batch's tensors by name; returns the loss. What of it ``requires_grad`` is trained."""

    def batch(self, generator: torch.Generator, batch_size: int) -> dict[str, Any]:
        """A batch, and all that is random in the step."""

    def preview(self, path: Path) -> None:
        """Draw a picture that shows how far the weights in the module are."""


def rate_factor(settings: Settings, step: int) -> float:
    """How much of its learning rate a step has, counted from 0: a linear warmup, one, a linear decay.

    Until the decay begins it does not depend on how many steps there will be ("Scaling Laws and Compute-Optimal
    Training Beyond Fixed Training Durations", Hägele et al., 2024, https://arxiv.org/abs/2405.18392). After it, a run
    goes on from the decayed weights at the full rate, and decays again (WSD-S of "Understanding Warmup-Stable-Decay
    Learning Rates", Wen et al., 2024, https://arxiv.org/abs/2410.05192).
    """
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    restart = min(settings.restart, settings.steps)
    begin, end = (0, restart) if step < restart else (restart, settings.steps)
    left = (end - step) / max(settings.decay * (end - begin), 1)
    return 0.02 + 0.98 * min(left, 1)


PACE = ("steps", "warmup", "decay", "restart")
"""The settings that say nothing but which rate a step has."""
ANYWHERE = ("device", "report_to", "compile")
"""Those that a run may go on with others of."""


def _same_pace(run: Mapping[str, Any], settings: Settings, done: int) -> bool:
    """Whether all steps done so far are steps by these settings too, and had the same rates."""
    if done > settings.steps:
        return False
    try:
        other = replace(settings, **{name: run[name] for name in PACE if name in run})
        return all(rate_factor(other, step) == rate_factor(settings, step) for step in range(done))
    except (TypeError, ArithmeticError):
        return False  # They are no numbers.


def generator_of(*numbers: int) -> torch.Generator:
    """A generator that depends on all of these numbers and nothing else."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1))


def train(
    task: Task,
    run: Path,
    settings: Settings,
    *,
    about: Mapping[str, Any] | None = None,
    resume: bool = False,
    report: Report = silent,
    log: Log | None = None,
) -> Weights:
    """Train a task's module; at the end, its weights are their moving average.

    Args:
        task: the module, its batches and its pictures.
        run: a folder for the state (``state.safetensors``), the curve (``loss.png``) and the preview (``preview.png``).
        settings: how.
        about: what else must be the same for a run to go on: the data, the model.
        resume: go on from the state in the folder; a finished run is only read. The number of steps and the restart
            may be others as long as the steps so far had the same rates: so a run may go on for longer until its decay
            begins, and after its end with a restart there.
        report: called with (stage, done, total).
        log: given a line now and then.

    Returns:
        The moving averages of all trained parameters, by their names in the module.

    Raises:
        UsageError: settings that make no sense.
        OutputError: a state is there and ``resume`` was not asked for.
        CheckpointError: a state cannot be resumed: none is there, it is broken, or of another run.
        TrainingError: the loss is no longer finite.
    """
    accelerator = accelerator_of(
        settings.device, settings.mixed_precision, settings.report_to, run, compiles=settings.compile
    )
    identity = {"task": task.name, **asdict(settings), **(about or {}), "processes": accelerator.num_processes}
    identity = {name: value for name, value in json.loads(json.dumps(identity)).items() if name not in ANYWHERE}
    file = run / STATE
    if file.exists() and not resume:
        raise OutputError(f"{run} holds a run already", "add --resume to go on with it, or remove the folder")
    run.mkdir(parents=True, exist_ok=True)
    named = {name: p for name, p in task.module.named_parameters() if p.requires_grad}
    hidden = frozenset(task.hidden)
    for network in task.module.children() if settings.compile else ():
        network.compile(dynamic=True)  # Where it stands, for batches of any shape.
    module, *optimizers = accelerator.prepare(task.module, *_optimizers(named, hidden, settings))
    # Moved to their device, the parameters are the same objects; the averages are made beside them.
    ema = {name: p.detach().clone() for name, p in named.items()}
    losses: list[float] = _load(file, settings, identity, named, ema, hidden, optimizers) if resume else []
    started, first = time.monotonic(), len(losses)
    parts = settings.gradient_accumulation_steps
    for step in range(first, settings.steps):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * rate_factor(settings, step)
        generator = generator_of(settings.seed, step, accelerator.process_index)
        batch = task.batch(generator, settings.batch_size * parts)
        module.train()
        loss = torch.zeros((), device=accelerator.device)
        for number, part in enumerate(_split(batch, settings.batch_size, parts)):
            last = number == parts - 1
            with nullcontext() if last else accelerator.no_sync(module), accelerator.autocast():
                share = module(**{name: _to(value, accelerator.device) for name, value in part.items()}) / parts
                accelerator.backward(share)
            loss += share.detach()
        accelerator.clip_grad_norm_(list(named.values()), settings.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(accelerator.reduce(loss, "mean")))
        if not math.isfinite(losses[-1]):
            raise TrainingError(f"the loss of step {step + 1} is {losses[-1]}", "lower --learning-rate")
        # Early weights are forgotten fast: the average looks back over a tenth of the way so far.
        keep = min(settings.ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(ema.values()), [p.detach() for p in named.values()], 1 - keep)
        report(task.name, step + 1, settings.steps)
        accelerator.log({"loss": losses[-1], "learning_rate": rate_factor(settings, step)}, step=step + 1)
        done = step + 1
        if (done % settings.save_every == 0 or done == settings.steps) and accelerator.is_main_process:
            _save(file, identity, named, ema, hidden, optimizers, losses)
            write_curve(run / "loss.png", losses, task.name)
            _preview(task, named, ema, run / "preview.png")
            if log:
                pace = (time.monotonic() - started) / (done - first)
                rate = settings.batch_size * parts * accelerator.num_processes / pace
                log(f"{task.name}: {_how_far(settings, losses, pace, rate)}, {peak_memory(accelerator.device)}")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    _assign(named, ema)
    task.module.eval()
    return ema


def _how_far(settings: Settings, losses: list[float], pace: float, rate: float) -> str:
    """A line about the last steps: seconds each, and pictures a second."""
    recent, done = losses[-settings.save_every :], len(losses)
    left = timedelta(seconds=round(pace * (settings.steps - done)))
    return f"step {done} of {settings.steps}, loss {sum(recent) / len(recent):.5f}, {rate:.1f}/s, {left} left"


def _optimizers(
    named: Mapping[str, nn.Parameter], hidden: Collection[str], settings: Settings
) -> list[torch.optim.Optimizer]:
    """Matrices decay; norms, biases and single tokens do not."""
    by_muon = [p for name, p in named.items() if name in hidden]
    matrices = [p for name, p in named.items() if name not in hidden and p.ndim >= 2]
    rest = [p for name, p in named.items() if name not in hidden and p.ndim < 2]
    decay = settings.weight_decay
    groups = [{"params": matrices, "weight_decay": decay}, {"params": rest, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    made: list[torch.optim.Optimizer] = []
    if groups:
        made.append(torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.99), foreach=True))
    if by_muon:
        made.append(Muon(by_muon, settings.muon_learning_rate, weight_decay=decay))
    for optimizer in made:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return made


def _states(optimizers: Iterable[Any]) -> dict[nn.Parameter, dict[str, Any]]:
    """What the optimizers keep of each parameter."""
    return {
        parameter: optimizer.state[parameter]
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def _split(batch: Mapping[str, Any], size: int, parts: int) -> Iterator[Mapping[str, Any]]:
    """A batch in parts of so many rows; what is no tensor or list goes with each."""
    if parts == 1:
        yield batch
        return
    for part in range(parts):
        rows = slice(part * size, (part + 1) * size)
        yield {name: value[rows] if isinstance(value, Tensor | list) else value for name, value in batch.items()}


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _assign(named: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(values[name])


def _preview(task: Task, named: Mapping[str, nn.Parameter], ema: Weights, path: Path) -> None:
    """Draw with the averages in place of the weights."""
    weights = {name: p.detach().clone() for name, p in named.items()}
    _assign(named, ema)
    task.module.eval()
    with torch.no_grad():
        task.preview(path)
    _assign(named, weights)


def _save(
    file: Path,
    identity: Mapping[str, Any],
    named: Mapping[str, nn.Parameter],
    ema: Weights,
    hidden: Collection[str],
    optimizers: Iterable[Any],
    losses: list[float],
) -> None:
    """Write the state beside the old one, then take its place."""
    from safetensors.torch import save_file

    tensors = {f"weights.{name}": p.detach().contiguous().cpu() for name, p in named.items()}
    tensors |= {f"ema.{name}": value.contiguous().cpu() for name, value in ema.items()}
    states = _states(optimizers)
    for name, p in named.items():
        tensors |= {f"{kind}.{name}": states[p][kind].contiguous().cpu() for kind in MOMENTS[name in hidden]}
    # JSON keeps a float to its last bit.
    tensors["losses"] = torch.tensor(losses, dtype=torch.float64)
    part = file.with_suffix(".part")
    save_file(tensors, part, {"run": json.dumps(identity)})
    part.replace(file)


def _load(
    file: Path,
    settings: Settings,
    identity: Mapping[str, Any],
    named: Mapping[str, nn.Parameter],
    ema: Weights,
    hidden: Collection[str],
    optimizers: Iterable[Any],
) -> list[float]:
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    if not file.exists():
        raise CheckpointError(f"{file.parent} holds no run to resume", "leave --resume out to begin one")
    hint = "remove the folder to begin anew"
    try:
        with safe_open(file, "pt") as opened:
            found = json.loads((opened.metadata() or {}).get("run", "null"))
        tensors = load_file(file)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read ({error})", hint) from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} is no state of a run", hint)
    done = len(tensors.get("losses", ()))
    # What an older one had no choice of was as it is by default.
    for one in fields(Settings):
        if one.default is not MISSING and one.name not in ANYWHERE:
            found.setdefault(one.name, one.default)
    same_pace = _same_pace(found, settings, done)
    for key in {**found, **identity}:
        if key in PACE and same_pace:
            continue  # So far it makes no difference.
        if found.get(key) != identity.get(key):
            way = "ask for the same, or begin anew in another folder"
            if key == "steps" and done < settings.steps and not found.get("restart"):
                way += f"; once it has ended, --restart {found.get(key)} goes on from there"
            raise CheckpointError(
                f"{file.parent} cannot be resumed: its {key} is {found.get(key)!r}, not {identity.get(key)!r}", way
            )
    wanted = {
        f"{kind}.{name}": tuple(p.shape)
        for name, p in named.items()
        for kind in ("weights", "ema", *MOMENTS[name in hidden])
    }
    shapes = {name: tuple(value.shape) for name, value in tensors.items() if name != "losses"}
    if shapes != wanted or "losses" not in tensors:
        raise CheckpointError(f"{file} does not hold the tensors of this model", hint)
    losses: list[float] = tensors["losses"].tolist()
    _assign(named, {name: tensors[f"weights.{name}"] for name in named})
    states = _states(optimizers)
    for name, parameter in named.items():
        ema[name].copy_(tensors[f"ema.{name}"])
        states[parameter]["step"] = torch.tensor(float(len(losses)))
        for kind in MOMENTS[name in hidden]:
            states[parameter][kind] = tensors[f"{kind}.{name}"].to(parameter.device)
    return losses
