"""The noise levels of a call, and what of it they leave unread."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from zimgkit.runtime.diffusion.schedule import Scheduler, calculate_mu, flow_match_sigmas, layered_mu, sigmas_from
from zimgkit.runtime.families import Family
from zimgkit.runtime.inputs import first_step
from zimgkit.runtime.parameters import MULTIPLE
from zimgkit.runtime.request import Request


def sigmas_of(request: Request, family: Family, scheduler: Scheduler) -> NDArray[np.float32]:
    """The noise levels of a request's steps, as its size, its own numbers and the picture it starts from have them.

    Returns:
        float32 (steps + 1,), the last one 0.

    Raises:
        UsageError: they cannot be shifted.
    """
    tokens = (request.height // MULTIPLE) * (request.width // MULTIPLE)
    mu = layered_mu(tokens) if request.layers else calculate_mu(tokens, scheduler)
    steps, inputs = request.num_inference_steps, request.inputs
    base = request.sigmas or family.base_sigmas(steps)
    if inputs.denoising_strength is not None:
        base = sigmas_from(inputs.denoising_strength, steps)
    sigmas = flow_match_sigmas(steps, scheduler, mu=mu, sigmas=base)
    return sigmas if inputs.strength is None else sigmas[first_step(steps, inputs.strength) :]


def as_read(request: Request, sigmas: NDArray[np.float32]) -> Request:
    """What encoders read of a request with these noise levels: no negative prompts where no step is guided."""
    if any(map(request.guides_at, sigmas[:-1].tolist())):
        return request
    return replace(request, negative_prompts=None, negative_prompt_embeds=None)
