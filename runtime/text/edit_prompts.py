"""Prompts about pictures: the templates of ``QwenImageEditPipeline`` and ``QwenImageEditPlusPipeline``."""

from __future__ import annotations

from collections.abc import Sequence

from zimgkit.engines.bundle import TextConfig
from zimgkit.engines.errors import UsageError

PICTURE = "<|image_pad|>"
RESERVED = (PICTURE, "<|video_pad|>")
UNLIMITED = 1 << 20
"""The reference cuts no prompt, and cannot: pictures stand before the words."""
EDIT = TextConfig(
    prefix="<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, objects, "
    "background), then explain how the user's text instruction should alter or modify the image. Generate a new image "
    "that meets the user's requirements while maintaining consistency with the original input where appropriate."
    "<|im_end|>\n<|im_start|>user\n",
    suffix="<|im_end|>\n<|im_start|>assistant\n",
    drop=64,
    max_tokens=UNLIMITED,
    max_sequence_length=UNLIMITED,
)
"""Of both; what stands between is :func:`with_pictures`."""


def with_pictures(prompt: str, tokens: Sequence[int], numbered: bool) -> str:
    """A prompt behind its pictures, each as many image tokens as the vision tower gives for it.

    Args:
        prompt: what the user wrote.
        tokens: of each picture: its patches by ``merge_size**2``.
        numbered: whether pictures are introduced as ``Picture 1: ``, as the pipeline for several has it, for a single
            one too.

    Raises:
        UsageError: the prompt has a token that stands for a picture.
    """
    found = next((token for token in RESERVED if token in prompt), None)
    if found:
        raise UsageError(f"the prompt has {found}, which stands for a picture", "leave it out")
    pictures = (
        f"{f'Picture {number}: ' if numbered else ''}<|vision_start|>{PICTURE * count}<|vision_end|>"
        for number, count in enumerate(tokens, start=1)
    )
    return "".join(pictures) + prompt
