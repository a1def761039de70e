"""The schedule of flow matching: at which noise levels (sigmas) the network is asked, and the step between two.

Sigma is the share of noise in the latents, 1 at the start and 0 at the end. The formulas are those of diffusers'
``FlowMatchEulerDiscreteScheduler`` and are computed in its order and precision, so that the numbers are the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from zimgkit.engines.decoding import Number, Positive, decoded
from zimgkit.engines.errors import CheckpointError, UsageError

CLASS_NAME = "FlowMatchEulerDiscreteScheduler"
REFUSED_FLAGS = (
    "invert_sigmas",
    "stochastic_sampling",
    "use_beta_sigmas",
    "use_exponential_sigmas",
    "use_karras_sigmas",
)
NUM_TRAIN_TIMESTEPS = 1000
"""Schedulers count time in thousandths."""

Sigmas = TypeVar("Sigmas", np.float32, NDArray[np.float32])


class Scheduler(msgspec.Struct, frozen=True, rename={"class_name": "_class_name"}):
    """What the formulas read of ``scheduler_config.json``; the defaults are those of diffusers and its pipelines."""

    class_name: str = CLASS_NAME
    num_train_timesteps: float = NUM_TRAIN_TIMESTEPS
    shift: Positive = 1.0
    use_dynamic_shifting: bool | None = False
    time_shift_type: str = "exponential"
    base_image_seq_len: Number = 256
    max_image_seq_len: Number = 4096
    base_shift: Number = 0.5
    max_shift: Number = 1.15
    shift_terminal: Number | bool | None = None
    invert_sigmas: bool | None = False
    stochastic_sampling: bool | None = False
    use_beta_sigmas: bool | None = False
    use_exponential_sigmas: bool | None = False
    use_karras_sigmas: bool | None = False


def read_scheduler(config: Mapping[str, Any], where: str = "scheduler") -> Scheduler:
    """Check a scheduler's config.

    Args:
        config: ``scheduler_config.json``.
        where: how messages call it.

    Raises:
        CheckpointError: it asks for something else than the formulas of this file; naming the key.
    """
    scheduler = decoded(config, Scheduler, where, CheckpointError)
    if scheduler.class_name != CLASS_NAME:
        raise CheckpointError(f"{where}: _class_name is {scheduler.class_name!r}", f"zimgkit runs {CLASS_NAME} only")
    for key in REFUSED_FLAGS:
        if getattr(scheduler, key):
            raise CheckpointError(f"{where}: {key} is set", "zimgkit runs plain flow-match Euler steps only")
    kind, train, terminal = scheduler.time_shift_type, scheduler.num_train_timesteps, scheduler.shift_terminal
    if kind not in {"exponential", "linear"}:
        raise CheckpointError(f"{where}: time_shift_type is {kind!r}", "zimgkit knows 'exponential' and 'linear'")
    if train != NUM_TRAIN_TIMESTEPS:
        raise CheckpointError(f"{where}: num_train_timesteps is {train:g}", f"zimgkit knows {NUM_TRAIN_TIMESTEPS}")
    if terminal is True or not 0 <= (terminal or 0) < 1:
        raise CheckpointError(f"{where}: shift_terminal is {terminal}, not between 0 and 1")
    if scheduler.base_image_seq_len == scheduler.max_image_seq_len:
        both = "base_image_seq_len and max_image_seq_len"
        raise CheckpointError(f"{where}: {both} are both {scheduler.max_image_seq_len:g}")
    return scheduler


def calculate_mu(image_seq_len: int, scheduler: Scheduler) -> float:
    """The shift ``mu`` for a size: a straight line through two points, as the pipelines of diffusers draw it.

    Args:
        image_seq_len: image tokens of the picture, without those of condition images.
        scheduler: the checkpoint's.
    """
    base_len, base_shift = scheduler.base_image_seq_len, scheduler.base_shift
    slope = (scheduler.max_shift - base_shift) / (scheduler.max_image_seq_len - base_len)
    return image_seq_len * slope + (base_shift - slope * base_len)


def layered_mu(image_seq_len: int) -> float:
    """The shift ``mu`` for the tokens of a picture that is taken apart, as ``QwenImageLayeredPipeline`` has it."""
    return math.sqrt(image_seq_len / 256)


def linspace(start: float, end: float, count: int) -> NDArray[np.float32]:
    """``torch.linspace(start, end, count)`` to the last bit.

    Torch measures the first half from the start and the second from the end, with a step in float32 and one
    rounding (fused multiply-add).

    Args:
        start: the first number, exact in float32.
        end: the last.
        count: how many there are, 1 or more.

    Returns:
        float32 (count,).
    """
    first, last = np.float32(start), np.float32(end)
    step = np.float64((last - first) / np.float32(max(count - 1, 1)))
    index = np.arange(count)
    # An exact product in float64, one rounding to float32 at the end: what a fused multiply-add does.
    from_start, from_end = np.float64(first) + step * index, np.float64(last) - step * (count - 1 - index)
    found: NDArray[np.float32] = np.where(index < max(count // 2, 1), from_start, from_end).astype(np.float32)
    return found


def linspace_float32(num_inference_steps: int) -> list[float]:
    """``torch.linspace(1, 1 / N, N)``, which ``ZImagePipeline`` passes as its ``sigmas``.

    Raises:
        UsageError: fewer than one step.
    """
    steps = _steps(num_inference_steps)
    return [float(value) for value in linspace(1.0, 1.0 / steps, steps)]


def flow_match_sigmas(
    num_inference_steps: int,
    scheduler: Scheduler,
    *,
    mu: float | None,
    sigmas: Sequence[float] | None = None,
) -> NDArray[np.float32]:
    """The noise levels of a run: the given ones shifted, stretched to the terminal value, and a 0 appended.

    With one step and ``shift_terminal``, the stretch divides zero by zero and diffusers gives NaN. Here it is
    left out, so that the one sigma stays 1.

    Args:
        num_inference_steps: how many steps N; 1 or more.
        scheduler: the checkpoint's.
        mu: the shift where ``use_dynamic_shifting`` is set (see :func:`calculate_mu`), otherwise unused.
        sigmas: the noise levels before the shift, each in 0 ... 1; their number is then the number of steps.
            By default N equal steps from 1 down to 1 / N, as ``QwenImagePipeline`` has them.

    Returns:
        float32 (N + 1,), from the first sigma down to 0.

    Raises:
        UsageError: fewer than one step, a sigma out of range, or no mu where one is needed.
    """
    steps = _steps(num_inference_steps)
    values = _given(sigmas) if sigmas is not None else np.linspace(1.0, 1.0 / steps, steps).astype(np.float32)
    if scheduler.use_dynamic_shifting:
        values = _dynamic_shift(values, scheduler.time_shift_type, mu)
    else:
        values = np.float32(scheduler.shift) * values / (1 + np.float32(scheduler.shift - 1) * values)
    if scheduler.shift_terminal:
        values = _stretch(values, scheduler.shift_terminal)
    return np.append(values, np.float32(0))


def _given(sigmas: Sequence[float]) -> NDArray[np.float32]:
    hint = "or leave them out"
    try:
        values = np.asarray(sigmas, np.float32)
    except (TypeError, ValueError):
        raise UsageError(f"sigmas {sigmas!r} are not a list of numbers", hint) from None
    # Written so that NaN fails too.
    if values.ndim != 1 or not values.size or not bool(np.all((values >= 0) & (values <= 1))):
        raise UsageError("sigmas must be one or more numbers between 0 and 1", hint)
    return values


def _dynamic_shift(values: NDArray[np.float32], kind: str, mu: float | None) -> NDArray[np.float32]:
    if mu is None:
        raise UsageError("this schedule is shifted by mu, and none was given")
    # Beyond e^(+-80) float32 knows no such weight.
    if not (abs(mu) <= 80 if kind == "exponential" else 0 < mu < math.inf):
        raise UsageError(f"mu {mu} is out of range", "the families' own values lie between 0.4 and 4")
    weight = np.float32(math.exp(mu) if kind == "exponential" else mu)
    with np.errstate(divide="ignore"):  # sigma 0 goes through infinity to 0
        return weight / (weight + (np.float32(1) / values - np.float32(1)))


def _stretch(values: NDArray[np.float32], terminal: float) -> NDArray[np.float32]:
    """Stretch 1 - sigma so that the last sigma becomes ``terminal``; the first stays if it is 1."""
    signal = np.float32(1) - values
    if signal[-1] == 0:
        return values
    stretched: NDArray[np.float32] = np.float32(1) - signal / (signal[-1] / np.float32(1 - terminal))
    return stretched


def _steps(num_inference_steps: int) -> int:
    if num_inference_steps < 1:
        raise UsageError(f"num_inference_steps is {num_inference_steps}", "give 1 or more")
    return num_inference_steps


def timesteps(sigmas: Sigmas) -> Sigmas:
    """Sigmas in thousandths, as schedulers, callbacks and DiffSynth count time; one or an array of any shape."""
    return sigmas * np.float32(NUM_TRAIN_TIMESTEPS)


def sigmas_from(denoising_strength: float, num_inference_steps: int) -> list[float]:
    """Noise levels before the shift of a run that starts from a picture, as DiffSynth's ``denoising_strength`` has it.

    Source: ``FlowMatchScheduler`` of DiffSynth-Studio 2.1, ``linspace(strength, 0, N + 1)`` without its end.
    """
    return [float(sigma) for sigma in np.linspace(denoising_strength, 0.0, num_inference_steps + 1)[:-1]]


def add_noise(clean: NDArray[np.float32], noise: NDArray[np.float32], sigma: float) -> NDArray[np.float32]:
    """Latents at a noise level: ``sigma noise + (1 - sigma) clean``; float32 arrays of one shape.

    Source: ``FlowMatchEulerDiscreteScheduler.scale_noise`` of diffusers.
    """
    level = np.float32(sigma)
    noisy: NDArray[np.float32] = level * noise + (np.float32(1) - level) * clean
    return noisy


def euler_step(
    latents: NDArray[np.float32], velocity: NDArray[np.float32], sigma: float, sigma_next: float
) -> NDArray[np.float32]:
    """One Euler step along the velocity, from noise level ``sigma`` to ``sigma_next``.

    Args:
        latents: float32, any shape.
        velocity: float32 of the same shape: d latents / d sigma.
        sigma: the noise level of the latents.
        sigma_next: the noise level to reach.

    Returns:
        float32 of the same shape.
    """
    return latents + (np.float32(sigma_next) - np.float32(sigma)) * velocity
