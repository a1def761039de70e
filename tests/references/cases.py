"""The calls that are recorded, in DiffSynth's words."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from PIL import Image


class Case(NamedTuple):
    """A call of a checkpoint's pipeline."""

    checkpoint: str
    call: dict[str, Any]
    lora: str = ""
    tensors: bool = False
    """Whether what goes into the transformer is kept too."""


def with_lora(checkpoint: str, call: dict[str, Any]) -> Case:
    """A call of what the checkpoint does with a LoRA alone."""
    return Case(checkpoint, call, lora="of the system", tensors=True)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Slopes with edges among them, so that wrong resizing shows; in integers, so that it is the same everywhere."""
    rng = np.random.RandomState(seed)
    y, x = np.mgrid[:height, :width]
    slopes = [x * rng.randint(200, 900) // width + y * rng.randint(200, 900) // height for _ in range(3)]
    pixels = np.abs((np.stack(slopes, axis=2) + rng.randint(0, 510, 3)) % 510 - 255).astype(np.uint8)
    pixels[height // 4 : height // 2, width // 5 : width // 2] = rng.randint(0, 256, 3)
    return Image.fromarray(pixels)


def mask(width: int, height: int, box: tuple[float, float, float, float]) -> Image.Image:
    """White in a box: its left, top, right and bottom as parts of the sides. RGB, as DiffSynth wants it."""
    made = Image.new("RGB", (width, height))
    sides = (width, height, width, height)
    made.paste((255, 255, 255), tuple(round(part * side) for part, side in zip(box, sides, strict=True)))
    return made


WIDE = {"width": 96, "height": 64, "num_inference_steps": 5, "seed": 7}
ODD = {"width": 48, "height": 80, "num_inference_steps": 4, "seed": 3}
"""Three by five tokens."""
CUP = {"prompt": "a red cup on a table"}
GUIDED = CUP | {"negative_prompt": "blurry", "cfg_scale": 4.0}
UNGUIDED = CUP | {"negative_prompt": "", "cfg_scale": 1.0}
FROM_WIDE = {"input_image": picture(96, 64, 1)}
FROM_ODD = {"input_image": picture(48, 80, 2)}
MIDDLE = {"inpaint_mask": mask(96, 64, (0.25, 0.25, 0.75, 0.75))}
LEFT = {"inpaint_mask": mask(150, 70, (0, 0.1, 0.55, 0.9))}
"""Neither of the picture's size nor of its shape."""
FEW = {"num_inference_steps": 2}
BLURRED = {"inpaint_blur_size": 2, "inpaint_blur_sigma": 1.5}
UNRESIZED = {"edit_image_auto_resize": False}
EDITED = {"edit_image_auto_resize": False, "edit_rope_interpolation": True}
CONTEXT = {"prompt": "Context_Control. a red cup on a table"}
LEFT_HALF, RIGHT_CORNER = mask(96, 64, (0, 0.1, 0.4, 0.9)), mask(200, 100, (0.55, 0.2, 0.95, 0.7))
TWO_THINGS = {
    "eligen_entity_prompts": ["a red cup", "a tall green bottle"],
    "eligen_entity_masks": [LEFT_HALF, RIGHT_CORNER],
    "eligen_enable_on_negative": False,
}
THREE_THINGS = TWO_THINGS | {
    "eligen_entity_prompts": ["a red cup", "a bottle", ""],
    "eligen_entity_masks": [LEFT_HALF, RIGHT_CORNER, mask(33, 47, (0.3, 0.3, 1, 1))],
}

CASES = {
    "qwen-image-img2img.guided": Case("qwen-image", GUIDED | WIDE | FROM_WIDE | {"denoising_strength": 0.6}),
    "qwen-image-img2img.odd": Case("qwen-image", UNGUIDED | ODD | FROM_ODD | {"denoising_strength": 0.85}),
    "qwen-image-inpaint.guided": Case("qwen-image", GUIDED | WIDE | FROM_WIDE | MIDDLE),
    "qwen-image-inpaint.odd": Case("qwen-image", UNGUIDED | ODD | FROM_ODD | LEFT | {"denoising_strength": 0.7}),
    "qwen-image-inpaint.blurred": Case("qwen-image", GUIDED | WIDE | FROM_WIDE | MIDDLE | BLURRED),
    "qwen-image-inpaint.blurred-odd": Case(
        "qwen-image",
        UNGUIDED | ODD | FROM_ODD | LEFT | {"denoising_strength": 0.8, "inpaint_blur_size": 3, "inpaint_blur_sigma": 1},
    ),
    "z-image-img2img.guided": Case("z-image", GUIDED | WIDE | FROM_WIDE | {"denoising_strength": 0.6}),
    "z-image-img2img.odd": Case("z-image", UNGUIDED | ODD | FROM_ODD | {"denoising_strength": 0.85}),
    "qwen-image-edit-lowres-fix.guided": with_lora(
        "qwen-image-edit", EDITED | GUIDED | WIDE | FEW | {"edit_image": picture(112, 112, 3)}
    ),
    # 15 of 17 columns: one where float32, in which they are counted, has another than the exact quotient.
    "qwen-image-edit-lowres-fix.odd": with_lora(
        "qwen-image-edit",
        EDITED | UNGUIDED | ODD | FEW | {"width": 272, "height": 48, "edit_image": picture(240, 32, 4)},
    ),
    "qwen-image-edit-lowres-fix.plain": with_lora(
        "qwen-image-edit",
        EDITED | UNGUIDED | ODD | FEW | {"edit_rope_interpolation": False, "edit_image": picture(112, 80, 5)},
    ),
    "qwen-image-in-context.guided": with_lora(
        "qwen-image", GUIDED | CONTEXT | WIDE | FEW | {"context_image": picture(150, 90, 6)}
    ),
    "qwen-image-in-context.odd": with_lora(
        "qwen-image", UNGUIDED | CONTEXT | ODD | FEW | {"context_image": picture(48, 80, 7)}
    ),
    "qwen-image-eligen.guided": with_lora("qwen-image", GUIDED | TWO_THINGS | WIDE | FEW),
    "qwen-image-eligen.on-negative": with_lora(
        "qwen-image", GUIDED | TWO_THINGS | ODD | FEW | {"eligen_enable_on_negative": True}
    ),
    "qwen-image-edit-img2img.guided": Case(
        "qwen-image-edit",
        UNRESIZED | GUIDED | WIDE | FROM_WIDE | {"denoising_strength": 0.6, "edit_image": picture(112, 80, 8)},
    ),
    "qwen-image-edit-img2img.masked": Case(
        "qwen-image-edit",
        UNRESIZED | UNGUIDED | ODD | FROM_ODD | LEFT | {"denoising_strength": 0.8, "edit_image": picture(64, 96, 9)},
    ),
    "qwen-image-edit-eligen.guided": with_lora(
        "qwen-image-edit", UNRESIZED | GUIDED | TWO_THINGS | WIDE | FEW | {"edit_image": picture(96, 64, 10)}
    ),
    "qwen-image-edit-eligen.on-negative": with_lora(
        "qwen-image-edit",
        UNRESIZED
        | GUIDED
        | THREE_THINGS
        | ODD
        | FEW
        | {"eligen_enable_on_negative": True, "edit_image": picture(48, 80, 11)},
    ),
    "qwen-image-context-eligen.guided": with_lora(
        "qwen-image", GUIDED | CONTEXT | TWO_THINGS | ODD | FEW | {"context_image": picture(90, 70, 12)}
    ),
    "qwen-image-eligen.overlapping": with_lora("qwen-image", UNGUIDED | THREE_THINGS | ODD | FEW),
}
