"""What is recorded of a call in the pictures that it makes, so that they can be made again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import zimgkit
from zimgkit.engines.bundle import Manifest
from zimgkit.runtime.controls import PICTURES, ControlInput
from zimgkit.runtime.inputs import InputPicture, Inputs
from zimgkit.runtime.parameters import PARAMETERS
from zimgkit.runtime.pictures.metadata import ControlRecord, InputFile, Parameters, Record
from zimgkit.runtime.request import Request
from zimgkit.runtime.session import Session

FROM_A_PICTURE = (
    *("image", "input_image", "mask_image", "strength", "denoising_strength"),
    *("mask_blur", "inpaint_blur_size", "inpaint_blur_sigma", "keep_unmasked"),
)
"""What a call says of pictures that it starts from."""
OF_EDITS = ("edit_image_auto_resize", "edit_image_area", "edit_rope_interpolation")
"""What it says of those that it edits."""
ENTITIES = ("eligen_entity_prompts", "eligen_entity_masks", "eligen_enable_on_negative")
"""What it says of regions."""


def record(session: Session, request: Request, index: int, drawn: int) -> Record:
    """What made one of a call's pictures.

    Args:
        session: what drew it.
        request: the call.
        index: which of the pictures whose noise was drawn together.
        drawn: how many these are.
    """
    manifest = session.bundle.manifest
    call = {p.name: getattr(request, p.name) for p in PARAMETERS if p.recorded and hasattr(request, p.name)}
    call |= _inputs(request.inputs, edits=manifest.references is not None)
    call |= {
        "controls": tuple(map(_control, request.controls)) or None,
        "prompt": request.prompts[0],
        "negative_prompt": request.negative_prompts[0] if request.negative_prompts else None,
        "cfg_scale": session.family.cfg_scale(request.guidance_scale),
        "seed": request.seed if isinstance(request.seed, int) else None,
    }
    found: Record = Parameters(
        **call,
        num_images=drawn,
        image_index=index,
        model=manifest.name,
        family=manifest.family,
        precision=manifest.precision,
        loras=merged_loras(manifest),
        backend=session.backend,
        vae_tiling=session.tiles(request),
        version=f"zimgkit {zimgkit.__version__}",
    )
    return found


def merged_loras(manifest: Manifest) -> str | None:
    """The LoRAs in a bundle's weights, as pictures name them."""
    every = [(lora, "") for lora in manifest.loras] + [(lora, " for the prompt") for lora in manifest.positive_loras]
    return ", ".join(f"{lora.file}:{lora.scale:g} ({lora.sha256[:10]}){branch}" for lora, branch in every) or None


def _inputs(inputs: Inputs, *, edits: bool) -> dict[str, Any]:
    """What is recorded of the pictures of a call: their names and hashes, and what was said of them."""
    said = {name: getattr(inputs, name, None) or None for name in (*FROM_A_PICTURE, *ENTITIES)}
    images = inputs.references if edits else [inputs.image, inputs.layered]
    start = inputs.image if edits and inputs.image not in inputs.references[:1] else None
    said |= {name: getattr(inputs, name) for name in OF_EDITS} if inputs.references else {}
    said |= {"image": _named(images), "eligen_entity_masks": _named(inputs.eligen_entity_masks)}
    single = {"input_image": start, "mask_image": inputs.mask_image, "context_image": inputs.context_image}
    return said | {name: InputFile(one.name, one.sha256) if one else None for name, one in single.items()}


def _control(one: ControlInput) -> ControlRecord:
    """What is recorded of a ControlNet."""
    files = {key: files[0] for key in PICTURES if (files := _named([getattr(one, key)]))}
    return ControlRecord(one.name, **files, scale=one.scale, start=one.start, end=one.end, counts_down=one.counts_down)


def _named(pictures: Iterable[InputPicture | None]) -> tuple[InputFile, ...] | None:
    return tuple(InputFile(one.name, one.sha256) for one in pictures if one) or None
