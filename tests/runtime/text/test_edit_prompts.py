"""Texts against those that diffusers' pipelines give their processors."""

from __future__ import annotations

from typing import Any

import pytest
from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline

from zimgkit.engines.errors import UsageError
from zimgkit.runtime.text.edit_prompts import EDIT, PICTURE, with_pictures

PROMPTS = ["make the cup blue", "", " ", "{} {0} {braces}", "把杯子变成蓝色\nnew line"]
NUMBERED = "Picture {number}: "
PARTS = dict.fromkeys(("scheduler", "vae", "text_encoder", "tokenizer", "processor", "transformer"))


class SeenError(Exception):
    """Carries the text, instead of encoding it."""


def texts_of(kind: type, prompt: str, image: Any) -> tuple[str, int]:
    """What a pipeline gives its processor, and the rows that it drops."""
    pipeline = kind(**PARTS)

    def processor(text: list[str], **others: Any) -> None:
        raise SeenError(*text)

    pipeline.processor = processor
    with pytest.raises(SeenError) as seen:
        pipeline._get_qwen_prompt_embeds(prompt, image, device="cpu", dtype="float32")
    return seen.value.args[0], pipeline.prompt_template_encode_start_idx


@pytest.mark.parametrize("prompt", PROMPTS)
def test_one_picture(prompt: str) -> None:
    text, drop = texts_of(QwenImageEditPipeline, prompt, object())
    assert f"{EDIT.prefix}{with_pictures(prompt, [1])}{EDIT.suffix}" == text
    assert EDIT.drop == drop


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_several_pictures(prompt: str, count: int) -> None:
    text, drop = texts_of(QwenImageEditPlusPipeline, prompt, [object()] * count)
    assert f"{EDIT.prefix}{with_pictures(prompt, [1] * count, NUMBERED)}{EDIT.suffix}" == text
    assert EDIT.drop == drop


def test_each_picture_has_its_tokens() -> None:
    text = with_pictures("x", [3, 2], NUMBERED)
    assert text.split("<|vision_start|>")[1].count(PICTURE) == 3
    assert text.split("<|vision_start|>")[2].count(PICTURE) == 2


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|video_pad|>"])
def test_a_prompt_has_no_pictures_of_its_own(token: str) -> None:
    with pytest.raises(UsageError, match="stands for a picture"):
        with_pictures(f"a {token}", [4])
