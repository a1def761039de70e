"""The schedule of flow matching: at which noise levels (sigmas) the network is asked, and the step between two.

Sigma is the share of noise in the latents, 1 at the start and 0 at the end. The formulas are those of diffusers'
``FlowMatchEulerDiscreteScheduler`` and are computed in its order and precision, so that the numbers are the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

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


def calculate_mu(image_seq_len: int, scheduler: Mapping[str, Any]) -> float:
    """The shift ``mu`` for a size: a straight line through two points, as the pipelines of diffusers draw it.

    Args:
        image_seq_len: image tokens of the picture, without those of condition images.
        scheduler: ``scheduler_config.json``; missing keys take the pipelines' defaults 256, 4096, 0.5 and 1.15.

    Raises:
        CheckpointError: a key holds no number, or both points lie at the same length.
    """
    base_len = _number(scheduler, "base_image_seq_len", 256)
    max_len = _number(scheduler, "max_image_seq_len", 4096)
    base_shift = _number(scheduler, "base_shift", 0.5)
    max_shift = _number(scheduler, "max_shift", 1.15)
    if base_len == max_len:
        raise CheckpointError(f"scheduler: base_image_seq_len and max_image_seq_len are both {max_len}")
    slope = (max_shift - base_shift) / (max_len - base_len)
    return image_seq_len * slope + (base_shift - slope * base_len)


def linspace_float32(num_inference_steps: int) -> list[float]:
    """``torch.linspace(1, 1 / N, N)`` to the last bit, which ``ZImagePipeline`` passes as its ``sigmas``.

    Torch measures the first half from the start and the second from the end, with a step in float32 and one
    rounding (fused multiply-add).

    Raises:
        UsageError: fewer than one step.
    """
    steps = _steps(num_inference_steps)
    end = np.float32(1.0 / steps)
    step = np.float64((end - np.float32(1.0)) / np.float32(max(steps - 1, 1)))
    index = np.arange(steps)
    # An exact product in float64, one rounding to float32 at the end: what a fused multiply-add does.
    from_start, from_end = 1.0 + step * index, np.float64(end) - step * (steps - 1 - index)
    values = np.where(index < steps // 2, from_start, from_end).astype(np.float32)
    return [float(value) for value in values]


def flow_match_sigmas(
    num_inference_steps: int,
    scheduler: Mapping[str, Any],
    *,
    mu: float | None,
    sigmas: Sequence[float] | None = None,
) -> NDArray[np.float32]:
    """The noise levels of a run: the given ones shifted, stretched to the terminal value, and a 0 appended.

    With one step and ``shift_terminal``, the stretch divides zero by zero and diffusers gives NaN. Here it is
    left out, so that the one sigma stays 1.

    Args:
        num_inference_steps: how many steps N; 1 or more.
        scheduler: ``scheduler_config.json``.
        mu: the shift where ``use_dynamic_shifting`` is set (see :func:`calculate_mu`), otherwise unused.
        sigmas: the noise levels before the shift, each in 0 ... 1; their number is then the number of steps.
            By default N equal steps from 1 down to 1 / N, as ``QwenImagePipeline`` has them.

    Returns:
        float32 (N + 1,), from the first sigma down to 0.

    Raises:
        UsageError: fewer than one step, a sigma out of range, or no mu where one is needed.
        CheckpointError: the config asks for something else than these formulas; the message names the key.
    """
    check_scheduler(scheduler)
    steps = _steps(num_inference_steps)
    values = _given(sigmas) if sigmas is not None else np.linspace(1.0, 1.0 / steps, steps).astype(np.float32)
    if scheduler.get("use_dynamic_shifting"):
        values = _dynamic_shift(values, scheduler.get("time_shift_type", "exponential"), mu)
    else:
        shift = _number(scheduler, "shift", 1.0)
        values = np.float32(shift) * values / (1 + np.float32(shift - 1) * values)
    if scheduler.get("shift_terminal"):
        values = _stretch(values, _number(scheduler, "shift_terminal", 0.0))
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
    if not 0 <= terminal < 1:
        raise CheckpointError(f"scheduler: shift_terminal is {terminal}, not between 0 and 1")
    signal = np.float32(1) - values
    if signal[-1] == 0:
        return values
    stretched: NDArray[np.float32] = np.float32(1) - signal / (signal[-1] / np.float32(1 - terminal))
    return stretched


def check_scheduler(scheduler: Mapping[str, Any]) -> None:
    """Refuse a scheduler config that asks for something else than the formulas of this file.

    Raises:
        CheckpointError: naming the key.
    """
    name = scheduler.get("_class_name", CLASS_NAME)
    if name != CLASS_NAME:
        raise CheckpointError(f"scheduler: _class_name is {name!r}", f"zimgkit runs {CLASS_NAME} only")
    for key in REFUSED_FLAGS:
        if scheduler.get(key):
            raise CheckpointError(f"scheduler: {key} is set", "zimgkit runs plain flow-match Euler steps only")
    kind = scheduler.get("time_shift_type", "exponential")
    if kind not in {"exponential", "linear"}:
        raise CheckpointError(f"scheduler: time_shift_type is {kind!r}", "zimgkit knows 'exponential' and 'linear'")
    train = scheduler.get("num_train_timesteps", NUM_TRAIN_TIMESTEPS)
    if train != NUM_TRAIN_TIMESTEPS:
        raise CheckpointError(f"scheduler: num_train_timesteps is {train!r}", f"zimgkit knows {NUM_TRAIN_TIMESTEPS}")


def _number(scheduler: Mapping[str, Any], key: str, default: float) -> float:
    value = scheduler.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise CheckpointError(f"scheduler: {key} is {value!r}, not a number")
    return value


def _steps(num_inference_steps: int) -> int:
    if num_inference_steps < 1:
        raise UsageError(f"num_inference_steps is {num_inference_steps}", "give 1 or more")
    return num_inference_steps


def timesteps(sigmas: Sigmas) -> Sigmas:
    """Sigmas in thousandths, as schedulers, callbacks and DiffSynth count time; one or an array of any shape."""
    return sigmas * np.float32(NUM_TRAIN_TIMESTEPS)


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
