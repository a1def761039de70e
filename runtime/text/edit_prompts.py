"""Prompts about pictures: the templates of diffusers' pipelines that edit."""

from __future__ import annotations

from collections.abc import Sequence

from zimgkit.engines.bundle import TextConfig
from zimgkit.engines.errors import UsageError

PICTURE = "<|image_pad|>"
RESERVED = (PICTURE, "<|video_pad|>")
MOST_TOKENS = 4096
"""The reference cuts no prompt. Pictures stand before the words: three take at most 1,500."""
EDIT = TextConfig(
    prefix="<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, objects, "
    "background), then explain how the user's text instruction should alter or modify the image. Generate a new image "
    "that meets the user's requirements while maintaining consistency with the original input where appropriate."
    "<|im_end|>\n<|im_start|>user\n",
    suffix="<|im_end|>\n<|im_start|>assistant\n",
    drop=64,
    max_tokens=MOST_TOKENS,
    max_sequence_length=MOST_TOKENS - 64,
)
"""Of ``QwenImageEditPipeline`` and ``QwenImageEditPlusPipeline``; what stands between is :func:`with_pictures`."""


def with_pictures(prompt: str, tokens: Sequence[int], introduction: str = "") -> str:
    """A prompt behind its pictures, each as many image tokens as the vision tower gives for it.

    Args:
        prompt: what the user wrote.
        tokens: of each picture: its patches by ``merge_size**2``.
        introduction: what stands before each picture; ``{number}`` is its number, from 1.

    Raises:
        UsageError: the prompt has a token that stands for a picture.
    """
    found = next((token for token in RESERVED if token in prompt), None)
    if found:
        raise UsageError(f"the prompt has {found}, which stands for a picture", "leave it out")
    pictures = (
        f"{introduction.replace('{number}', str(number))}<|vision_start|>{PICTURE * count}<|vision_end|>"
        for number, count in enumerate(tokens, start=1)
    )
    return "".join(pictures) + prompt


def around_pictures(prompt: str, pictures: int, text: TextConfig) -> list[str]:
    """A prompt within its template, in the pieces that pictures stand between: as ``ZImageOmniPipeline`` has them.

    Args:
        prompt: what the user wrote.
        pictures: how many, one or more; the last piece but one ends where the one that is drawn stands.
        text: the template.

    Returns:
        ``pictures + 2`` pieces.
    """
    return [
        f"{text.prefix}<|vision_start|>",
        *["<|vision_end|><|vision_start|>"] * (pictures - 1),
        f"<|vision_end|>{prompt}{text.suffix}<|vision_start|>",
        "<|vision_end|><|im_end|>",
    ]
