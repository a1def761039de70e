"""What Qwen-Image's text model makes of a prompt about pictures. Source: ``QwenImageEditPlusPipeline`` of diffusers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zimgkit.engines.bundle import ReferencePictures
from zimgkit.runtime.pictures.patches import Patches, merged_patches, preprocessor
from zimgkit.runtime.pictures.resizing import calculate_dimensions, resize
from zimgkit.runtime.text.edit_prompts import EDIT, PICTURE, with_pictures
from zimgkit.training.families.base import Editor

if TYPE_CHECKING:
    from PIL.Image import Image

EDITOR = Editor(
    "QwenImageEditPlusPipeline",  # Of one picture or several.
    {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": 14,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "min_pixels": 784,  # Down to one patch of the text model.
        "max_pixels": 12_845_056,
    },
    (EDIT.prefix, EDIT.suffix, *(f"Picture {number}: " for number in (1, 2, 3))),
)


def pictured_inputs(
    tokenizer: Any,
    prompts: Sequence[str],
    pictures: Sequence[Image],
    references: ReferencePictures,
    processor: Mapping[str, Any],
) -> list[dict[str, Tensor]]:
    """The inputs of ``Qwen2_5_VLModel`` for each of some prompts about the same pictures.

    Args:
        tokenizer: of transformers.
        prompts: what is to become of the pictures.
        pictures: RGB, one or more.
        references: how the checkpoint takes them.
        processor: ``preprocessor_config.json``.

    Returns:
        For each prompt ``input_ids``, ``mm_token_type_ids`` int64 (tokens,), ``pixel_values`` float32 (patches, values)
        and ``image_grid_thw`` int64 (pictures, 3).
    """
    sized = [resize(one, *calculate_dimensions(references.vision_area, one.width / one.height)) for one in pictures]
    config = preprocessor(processor)
    patches: Patches = merged_patches(sized, config)
    counts = [int(grid.prod()) // config.merge_size**2 for grid in patches.image_grid_thw]
    shared = {
        "pixel_values": torch.from_numpy(patches.pixel_values),
        "image_grid_thw": torch.from_numpy(patches.image_grid_thw),
    }
    place = tokenizer.convert_tokens_to_ids(PICTURE)
    texts = [EDIT.prefix + with_pictures(prompt, counts, references.introduction) + EDIT.suffix for prompt in prompts]
    rows = [torch.tensor(row[: EDIT.max_tokens]) for row in tokenizer(texts)["input_ids"]]
    return [{"input_ids": ids, "mm_token_type_ids": (ids == place).long(), **shared} for ids in rows]


def encode_pictured(text_encoder: Any, inputs: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """What comes out of the last layer's norm, without the template's head: (prompts, tokens, hidden).

    Prompts have equally many tokens and pictures of equal sizes. transformers 5 has to be told which tokens are
    pictures; before, it counts them.
    """
    from inspect import signature

    model = text_encoder.model
    device = next(model.parameters()).device
    given = {name: torch.stack([one[name] for one in inputs]).to(device) for name in ("input_ids", "mm_token_type_ids")}
    given |= {name: torch.cat([one[name] for one in inputs]).to(device) for name in ("pixel_values", "image_grid_thw")}
    if "mm_token_type_ids" not in signature(model.forward).parameters:
        given.pop("mm_token_type_ids")
    mask = torch.ones_like(given["input_ids"])
    rows: Tensor = model(**given, attention_mask=mask, use_cache=False).last_hidden_state
    return rows[:, EDIT.drop :]
