"""What whoever asks for a picture should know before it is drawn, in words."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from zimgkit.runtime.families import Family
from zimgkit.runtime.request import Request
from zimgkit.runtime.sigmas import as_read

LORA_TAG = re.compile(r"<(lora|lyco|hypernet):[^>]*>")
"""How web UIs ask for a LoRA within a prompt."""
CONTEXT_PREFIX = "Context_Control."
"""What prompts begin with where another picture controls what is drawn."""


def cautions(request: Request, family: Family, sigmas: NDArray[np.float32]) -> Iterator[str]:
    """What of a request with these noise levels, float32 (steps + 1,), may not be meant so."""
    if not request.is_guided and family.is_guided(request.guidance_scale):
        yield (
            "guidance is off, for there is no negative prompt; "
            "give one (the models' authors use ' '), or a guidance_scale of 1"
        )
    if request.unused_negative_prompt:
        off = family.guidance_scale(1.0)
        yield f"the negative prompt is not read, for guidance is off; give a guidance_scale above {off:g}"
    if request.is_guided and not as_read(request, sigmas).is_guided:
        levels = f"{sigmas[0]:.3g} to {sigmas[-2]:.3g}"
        yield f"no step is guided: cfg_truncation, guidance_low and guidance_high leave out all noise levels, {levels}"
    if any(LORA_TAG.search(prompt) for prompt in request.prompts):
        yield "<lora:...> in a prompt is read as words; LoRAs are merged by zimg-export swap-lora"
    if request.inputs.context_image and not all(text.startswith(CONTEXT_PREFIX) for text in request.prompts):
        yield f"LoRAs for context images were trained on prompts that begin with {CONTEXT_PREFIX!r}"
