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
    pictures: tuple[Image.Image, ...] = ()
    """What a LoRA is made of in the place of one that is drawn by name; it and what led to it is kept too."""
    is_positive_only: bool = False
    """Whether that is for the branch of the prompt alone."""

    @property
    def said(self) -> dict[str, Any]:
        """What is kept of the call."""
        return self.call | ({"pictures": list(self.pictures)} if self.pictures else {})


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
SOFT = Image.merge("RGB", [picture(96, 128, 17).getchannel(0)] * 3)
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
SMALL_FEW = {"width": 64, "height": 48, "num_inference_steps": 2, "seed": 5}
EDGES, FILLED, HOLE = picture(64, 48, 8), picture(64, 48, 9), mask(64, 48, (0.25, 0.2, 0.8, 0.7))
SOFT_HOLE = Image.merge("RGB", [picture(48, 80, 10).getchannel(1)] * 3)


def controlled(call: dict[str, Any], **given: Any) -> Case:
    """A call with a ControlNet, and what that is given."""
    return Case("z-image-control", call | {"controlnet_inputs": [given]}, tensors=True)


def blockwise(call: dict[str, Any], *given: dict[str, Any]) -> Case:
    """A call with Blockwise ControlNets, and what each of them is given."""
    return Case("qwen-image-control", call | {"blockwise_controlnet_inputs": [*given]}, tensors=True)


CANNY, DEPTH, INPAINT = ({"controlnet_id": number} for number in range(3))

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
    "z-image-i2l.positive": Case(
        "z-image", GUIDED | WIDE | FEW, pictures=(picture(60, 45, 8), picture(25, 100, 9)), is_positive_only=True
    ),
    "z-image-i2l.unguided": Case(
        "z-image", UNGUIDED | ODD | FEW, pictures=(picture(72, 52, 10),), is_positive_only=True
    ),
    "z-image-i2l.both": Case("z-image", GUIDED | ODD | FEW, pictures=(picture(32, 32, 11),) * 3),
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
    "z-image-control.guided": controlled(GUIDED | SMALL_FEW, image=EDGES, scale=0.8),
    "z-image-control.odd": controlled(UNGUIDED | ODD | FEW, image=picture(48, 80, 11), scale=0.35),
    "z-image-control.inpaint": controlled(UNGUIDED | SMALL_FEW, inpaint_image=FILLED, inpaint_mask=HOLE, scale=1.0),
    "z-image-control.soft-inpaint": controlled(
        UNGUIDED | ODD | FEW, inpaint_image=picture(48, 80, 2), inpaint_mask=SOFT_HOLE, scale=0.75
    ),
    "z-image-control.both": controlled(
        GUIDED | SMALL_FEW, image=EDGES, inpaint_image=FILLED, inpaint_mask=HOLE, scale=0.65
    ),
    "qwen-image-control.guided": blockwise(GUIDED | WIDE | FEW, CANNY | {"image": picture(96, 64, 11), "scale": 0.8}),
    "qwen-image-control.window": blockwise(
        UNGUIDED | ODD | {"num_inference_steps": 5}, DEPTH | {"image": picture(48, 80, 12), "start": 0.9, "end": 0.3}
    ),
    "qwen-image-control.inpaint": blockwise(
        UNGUIDED | ODD | FEW,
        INPAINT | {"image": picture(48, 80, 13), "inpaint_mask": mask(150, 70, (0.2, 0.1, 0.7, 0.9))},
    ),
    "qwen-image-control.soft-inpaint": blockwise(
        GUIDED | ODD | FEW, INPAINT | {"image": picture(48, 80, 14), "inpaint_mask": SOFT, "scale": 1.3}
    ),
    "qwen-image-control.together": blockwise(
        GUIDED | ODD | {"num_inference_steps": 3},
        CANNY | {"image": picture(48, 80, 15), "scale": 0.6},
        DEPTH | {"image": picture(48, 80, 16), "scale": -0.4, "end": 0.6},
    ),
}
