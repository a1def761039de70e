"""The pictures of a call: read, and checked against what the bundle does and against each other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zimgkit.engines.bundle import Manifest, ReferencePictures
from zimgkit.engines.errors import UsageError
from zimgkit.runtime.families import Family
from zimgkit.runtime.families.base import ConditionedFamily
from zimgkit.runtime.parameters import BY_NAME, MULTIPLE, checked, texts
from zimgkit.runtime.pictures.resizing import area_dimensions, calculate_dimensions, check_aspect

if TYPE_CHECKING:
    from PIL.Image import Image

ONE_OF = (
    ("image", "input_image", "edit_image", "layer_input_image"),
    ("mask_image", "inpaint_mask"),
    ("strength", "denoising_strength"),
    ("sigmas", "denoising_strength"),
    ("layers", "layer_num"),
    ("cfg_normalization", "cfg_normalize"),
)
"""Names of one thing, of which a call takes one."""
EDITED = ("image", "edit_image")
"""Those that name what is edited, where a bundle does that."""
OF_IMAGE = ("strength", "denoising_strength", "mask_image", "inpaint_mask")
"""What says something of a picture."""
OF_MASK = ("mask_blur", "inpaint_blur_size", "inpaint_blur_sigma", "keep_unmasked")
"""What says something of a mask."""
OF_REFERENCES = ("edit_image_auto_resize", "edit_image_area", "edit_rope_interpolation")
"""What says something of pictures that a bundle edits."""
OF_ENTITIES = ("eligen_entity_prompts", "eligen_entity_masks", "eligen_enable_on_negative")
"""What says something of regions."""
OF_LAYERS = ("layer_input_image", "layers", "layer_num", "resolution")
"""What says something of a picture that a bundle takes apart."""
BLUR = ("inpaint_blur_size", "inpaint_blur_sigma")


@dataclass(frozen=True)
class InputPicture:
    """A picture that a call was given."""

    name: str
    """Of its file; empty where it came from memory."""
    sha256: str
    """Of its pixels, as :func:`.pictures.reading.digest` takes it."""
    picture: Image = field(compare=False, repr=False)
    """In mode RGB, or RGBA where parts of it are transparent."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.picture.size


@dataclass(frozen=True)
class Inputs:
    """What a call says of pictures."""

    image: InputPicture | None = None
    """What it starts from."""
    layered: InputPicture | None = None
    """What is taken apart, where the bundle does that."""
    references: tuple[InputPicture, ...] = ()
    """What the prompt speaks of, where the bundle edits."""
    edit_image_auto_resize: bool = True
    """Whether those are brought to the areas that the checkpoint was trained on."""
    edit_image_area: int | None = None
    """The area of those that are larger than the checkpoint takes, where it is settled by the call."""
    edit_rope_interpolation: bool = False
    """Whether those span the positions of what is drawn, whatever their size."""
    context_image: InputPicture | None = None
    """What controls the picture: edges, depth, a pose."""
    eligen_entity_prompts: tuple[str, ...] = ()
    """What to draw in regions."""
    eligen_entity_masks: tuple[InputPicture, ...] = ()
    """Where these are, white, one for each."""
    eligen_enable_on_negative: bool = False
    """Whether the negative prompt stands for every region, rather than for the whole alone."""
    strength: float | None = None
    """How much is drawn anew, as diffusers counts it: the first steps are left out."""
    denoising_strength: float | None = None
    """Likewise as DiffSynth counts it: all steps are taken, from this noise level on before the shift."""
    mask_image: InputPicture | None = None
    mask_blur: float = 0.0
    """Radius in pixels."""
    blends_velocity: bool = False
    """Whether the mask is resized and blended as DiffSynth does it, rather than as diffusers."""
    inpaint_blur_size: int | None = None
    inpaint_blur_sigma: float | None = None
    keep_unmasked: bool = False

    @property
    def samples_latents(self) -> bool:
        """Whether the picture's latents are drawn from the posterior, as diffusers does, and are not its mean."""
        return self.image is not None and self.denoising_strength is None and not self.blends_velocity


NONE = Inputs()


def read_inputs(manifest: Manifest, family: Family, given: Mapping[str, Any]) -> Inputs:
    """Read a call's pictures and what it says of them.

    Args:
        manifest: of the bundle.
        family: of the bundle.
        given: the call's arguments, by name.

    Raises:
        UsageError: two names of one thing, a picture that cannot be read or that the bundle cannot take, or something
            said of a picture or mask that is not there.
    """
    # What a picture starts from may be another one than those that a bundle edits.
    apart = manifest.references is not None and "input_image" in given and not given.keys().isdisjoint(EDITED)
    others = {name: value for name, value in given.items() if not apart or name != "input_image"}
    for names in ONE_OF:
        if len(found := [name for name in names if name in others]) > 1:
            raise UsageError(f"{' and '.join(found)} are both given", "give only one of them")
    source = next((others[name] for name in ONE_OF[0] if name in others), None)
    if manifest.layers is not None:
        return _read_layered(source, given)
    if said := next((name for name in OF_LAYERS if name in given), None):
        raise UsageError(f"{said} is given, and this bundle takes no picture apart", "leave it out")
    conditions = _read_context(manifest, family, given) | _read_entities(manifest, family, given)
    if manifest.references is not None:
        references = _read_references(source, manifest.references, family, given)
        return replace(references, **conditions) if conditions else references
    if said := next((name for name in ("edit_image", *OF_REFERENCES) if name in given), None):
        raise UsageError(f"{said} is given, and this bundle edits nothing", "give image, and a strength")
    if source is not None:
        _check_task(manifest, _task_from(given))
        return Inputs(**conditions, **_read_start(family, source, given))
    if said := next((name for name in (*OF_IMAGE, *OF_MASK) if name in given), None):
        raise UsageError(f"{said} is given, and no image", "give the picture to start from as image")
    return Inputs(**conditions)


def _task_from(given: Mapping[str, Any]) -> str:
    """What a call that starts from a picture asks for."""
    return "image-to-image" if given.keys().isdisjoint(ONE_OF[1]) else "inpaint"


def _read_start(family: Family, source: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """The picture that another starts from, its mask, and what is said of both."""
    mask = given.get("mask_image", given.get("inpaint_mask"))
    if mask is None and (said := next((name for name in OF_MASK if name in given), None)):
        raise UsageError(f"{said} is given, and no mask", "give mask_image, white where the picture is drawn anew")
    values = {name: checked(BY_NAME[name], given[name]) for name in (*OF_IMAGE[:2], *OF_MASK) if name in given}
    blurs = [name for name in BLUR if name in given]
    if len(blurs) == 1:
        raise UsageError(f"{blurs[0]} is given alone", f"give {' and '.join(BLUR)}, or neither")
    blends_velocity = "inpaint_mask" in given or bool(blurs)
    if blurs and values.get("mask_blur"):
        raise UsageError("mask_blur and inpaint_blur_size are both given", "give one of them")
    if "denoising_strength" not in values:
        values.setdefault("strength", 1.0 if blends_velocity else family.STRENGTHS[_task_from(given)])
    name = "strength" if "strength" in values else "denoising_strength"
    if not values[name]:
        raise UsageError(f"{name} is 0, which draws nothing anew", "give more, up to 1")
    return values | {
        "image": read_input(source, "image"),
        "mask_image": read_input(mask, "mask_image") if mask is not None else None,
        "blends_velocity": blends_velocity,
    }


def _check_task(manifest: Manifest, task: str) -> None:
    if task not in manifest.tasks:
        hint = f"build one with zimg-export build --tasks {task}"
        raise UsageError(f"this bundle is built for {', '.join(manifest.tasks)}, not for {task}", hint)


def _check_conditioned(manifest: Manifest, family: Family, task: str, name: str) -> None:
    """Likewise of a task that only some families have, which ``name`` asks for."""
    if not isinstance(family, ConditionedFamily):
        raise UsageError(f"{name} is given, and this model has nothing like it", "leave it out")
    _check_task(manifest, task)


def _read_references(source: Any, config: ReferencePictures, family: Family, given: Mapping[str, Any]) -> Inputs:
    """The pictures of a bundle that edits, and the one that it starts from.

    That is DiffSynth's ``input_image``, or the first one that it edits where a strength or a mask is given: as
    ``QwenImageEditInpaintPipeline`` of diffusers has it.
    """
    said = next((name for name in (*OF_IMAGE, *OF_MASK) if name in given), None)
    start = given.get("input_image")
    if start is not None and said and not config.least and given.keys().isdisjoint(EDITED):
        source = None
    sources = source if isinstance(source, list | tuple) else [source]
    if source is None or not sources:
        if config.least:
            raise UsageError("there is no picture to edit", "give it as image")
        if of_edits := next((name for name in OF_REFERENCES if name in given), None):
            raise UsageError(f"{of_edits} is given, and no image", "give the picture to edit as image")
        if start is None and said:
            raise UsageError(f"{said} is given, and no image", "give the picture to start from as image")
        return NONE if start is None else Inputs(**_read_start(family, read_input(start, "input_image"), given))
    if len(sources) > config.most:
        takes = "one" if config.most == 1 else f"{config.most} at most"
        raise UsageError(f"image has {len(sources)} pictures", f"this bundle takes {takes}")
    names = ["image"] if len(sources) == 1 else [f"image {number}" for number in range(1, len(sources) + 1)]
    defaults = {
        "edit_image_auto_resize": config.auto_resize,
        "edit_rope_interpolation": bool(config.rope_interpolation),
    }
    values = {name: checked(BY_NAME[name], given.get(name, default)) for name, default in defaults.items()}
    if values["edit_rope_interpolation"] and config.rope_interpolation is None:
        raise UsageError("edit_rope_interpolation is given, and this bundle has nothing like it", "leave it out")
    references = tuple(read_input(one, name) for one, name in zip(sources, names, strict=True))
    if start is not None and start is not source:
        values |= _read_start(family, read_input(start, "input_image"), given)
    elif said:
        values |= _read_start(family, references[0], given)
    inputs = Inputs(references=references, edit_image_area=_area(config, given), **values)
    for picture, name in zip(inputs.references, names, strict=True):
        _check_reference(picture, name, inputs, config)
    return inputs


def _area(config: ReferencePictures, given: Mapping[str, Any]) -> int | None:
    """What larger pictures are reduced to: as ``ZImageOmniPipeline``, to the size to draw where a call says it."""
    if not config.crops:
        if "edit_image_area" in given:
            raise UsageError("edit_image_area is given, and this bundle has areas of its own", "leave it out")
        return None
    size = {side: checked(BY_NAME[side], given[side]) for side in ("height", "width") if side in given}
    own = math.prod(size.values()) if len(size) == 2 else config.latents_area
    area: int = checked(BY_NAME["edit_image_area"], given.get("edit_image_area", own))
    return area


def _check_reference(picture: InputPicture, name: str, inputs: Inputs, config: ReferencePictures) -> None:
    width, height = picture.size
    if min(width, height) < config.shortest_side:
        hint = f"this bundle takes sides of {config.shortest_side} pixels and more"
        raise UsageError(f"{name} is {width}x{height}", hint)
    check_aspect(width / height, name, config.most_aspect)
    if config.crops and min(reduced := reduced_size(picture.size, inputs, config)) < MULTIPLE:
        sides = "x".join(map(str, reduced))
        raise UsageError(f"{name} is {sides} at {inputs.edit_image_area} pixels", "give a larger height and width")


def reduced_size(size: tuple[int, int], inputs: Inputs, config: ReferencePictures) -> tuple[int, int]:
    """The width and height of a picture where a bundle reduces larger ones alone."""
    width, height = size
    if not inputs.edit_image_auto_resize or width * height <= config.latents_area:
        return width, height
    return area_dimensions(width, height, inputs.edit_image_area or config.latents_area)


def _read_layered(source: Any, given: Mapping[str, Any]) -> Inputs:
    """The picture of a bundle that takes it apart."""
    others = (*OF_IMAGE, *OF_MASK, *OF_REFERENCES, "context_image", *OF_ENTITIES)
    if said := next((name for name in others if name in given), None):
        raise UsageError(f"{said} is given, and this bundle takes whole pictures apart", "leave it out")
    if source is None:
        raise UsageError("there is no picture to take apart", "give it as image")
    if "resolution" in given and (side := next((name for name in ("height", "width") if name in given), None)):
        raise UsageError(f"resolution and {side} are both given", "give one of them")
    return Inputs(layered=read_input(source, "image"))


def _read_context(manifest: Manifest, family: Family, given: Mapping[str, Any]) -> dict[str, Any]:
    """The picture that controls another."""
    if "context_image" not in given:
        return {}
    _check_conditioned(manifest, family, "context", "context_image")
    return {"context_image": read_input(given["context_image"], "context_image")}


def _read_entities(manifest: Manifest, family: Family, given: Mapping[str, Any]) -> dict[str, Any]:
    """Prompts of regions, and where these are."""
    names = OF_ENTITIES
    prompts, masks = (given.get(name, ()) for name in names[:2])
    prompts = texts(names[0], prompts) if prompts else ()
    masks = tuple(masks) if isinstance(masks, list | tuple) else (masks,)
    if not prompts and not masks:
        if names[2] in given:
            raise UsageError(f"{names[2]} is given, and no entity", "leave it out")
        return {}
    if len(prompts) != len(masks):
        counts = f"there are {len(prompts)} prompts of entities, and {len(masks)} masks"
        raise UsageError(counts, "give a mask for each")
    _check_conditioned(manifest, family, "regions", names[0])
    return {
        names[0]: prompts,
        names[1]: tuple(read_input(mask, f"the mask of entity {number}") for number, mask in enumerate(masks, start=1)),
        names[2]: checked(BY_NAME[names[2]], given.get(names[2], False)),
    }


def first_step(num_inference_steps: int, strength: float) -> int:
    """How many steps diffusers leaves out for a strength: ``get_timesteps`` of its pipelines from pictures.

    Raises:
        UsageError: no step is left.
    """
    first = int(max(num_inference_steps - min(num_inference_steps * strength, num_inference_steps), 0))
    if first >= num_inference_steps:
        message = f"a strength of {strength:g} leaves no step of {num_inference_steps}"
        raise UsageError(message, "give a greater strength")
    return first


def size_like(picture: InputPicture, height: int | None, width: int | None, area: int) -> tuple[int, int]:
    """The height and width of what is drawn from a picture: its own, in multiples of 16, where they are not given.

    A picture of more pixels than the bundle is for is made smaller; a side that is given decides over the other.

    Args:
        picture: the picture.
        height: where it is given.
        width: likewise.
        area: as many pixels as the bundle's own recommendation has.
    """
    own_width, own_height = picture.size
    if height is None and width is None:
        factor = min(1.0, math.sqrt(area / (own_width * own_height)))
        return _multiple(own_height * factor), _multiple(own_width * factor)
    if height is None:
        return _multiple(own_height * (width or 0) / own_width), width or 0
    return height, width if width is not None else _multiple(own_width * height / own_height)


def size_in_area(picture: InputPicture, area: int) -> tuple[int, int]:
    """The height and width of a picture's shape in an area of so many pixels.

    Source: ``QwenImageEditPlusPipeline`` and ``QwenImageLayeredPipeline`` of diffusers 0.42.

    Raises:
        UsageError: it is more than 200 times as wide as high, or as high as wide.
    """
    width, height = picture.size
    width, height = calculate_dimensions(area, width / height)
    return _multiple(height), _multiple(width)


def size_of_edit(inputs: Inputs, config: ReferencePictures) -> tuple[int, int]:
    """The height and width of what is drawn beside pictures where they are not given: like the last one, in its area.

    Or like the one that it starts from.

    Source: ``QwenImageEditPlusPipeline``, ``QwenImageEditInpaintPipeline`` and ``ZImageOmniPipeline`` of diffusers.

    Raises:
        UsageError: it is more than 200 times as wide as high, or as high as wide.
    """
    like = inputs.image or inputs.references[-1]
    if not config.crops:
        return size_in_area(like, config.latents_area)
    width, height = reduced_size(like.size, inputs, config)
    return _multiple(height), _multiple(width)


def _multiple(side: float) -> int:
    return max(MULTIPLE, int(side + 1e-6) // MULTIPLE * MULTIPLE)


def read_input(source: Any, name: str) -> InputPicture:
    """Read one picture; a list of one stands for it, as ported code has it.

    Args:
        source: what :func:`.pictures.reading.read_picture` takes.
        name: what messages call it.

    Raises:
        UsageError: it is none, or several.
    """
    from zimgkit.runtime.pictures.reading import digest, read_picture

    if isinstance(source, list | tuple) and len(source) == 1:
        source = source[0]
    if isinstance(source, list | tuple):
        raise UsageError(f"{name} has {len(source)} pictures", "this bundle takes one")
    if isinstance(source, InputPicture):
        return source
    picture = read_picture(source, name)
    return InputPicture(Path(source).name if isinstance(source, str | Path) else "", digest(picture), picture)
