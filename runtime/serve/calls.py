"""A checked body to what is drawn: the model, the call's parameters, and the form of the answer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from zimgkit.engines.bundle import Defaults
from zimgkit.engines.errors import UsageError
from zimgkit.runtime.controls import PICTURES as OF_CONTROLS
from zimgkit.runtime.pictures.reading import flattened, read_picture
from zimgkit.runtime.request import Request, check
from zimgkit.runtime.serve.bodies import OF_CALL, PICTURES, Control, picture_bytes
from zimgkit.runtime.serve.catalog import Catalog, Model
from zimgkit.runtime.serve.errors import ApiError
from zimgkit.runtime.serve.fetching import Fetcher

SIZE = re.compile(r"([1-9][0-9]{0,5})[xX\u00d7]([1-9][0-9]{0,5})")
QUALITIES = {"low": 0.5, "high": 1.5, "hd": 1.5}
"""``quality`` -> how many times the model's own number of steps."""
KINDS = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}


@dataclass(frozen=True)
class Answer:
    """How pictures are sent."""

    output_format: str = "png"
    compression: int | None = None
    as_url: bool = False
    quality: str = "auto"
    stream: bool = False
    partial_images: int = 0
    progress: bool = False

    @property
    def kind(self) -> str:
        """The format as Pillow names it."""
        return KINDS[self.output_format]

    @property
    def media_type(self) -> str:
        """Of the files."""
        return f"image/{self.output_format}"


def read_body(catalog: Catalog, body: Mapping[str, Any], fetcher: Fetcher) -> tuple[Model, Request, Answer]:
    """Check all that a body says.

    Args:
        catalog: the models there are.
        body: what :func:`.bodies.parse` gave.
        fetcher: of pictures that came as addresses.

    Raises:
        ApiError: the model is not served, or a field is wrong.
        UsageError: a parameter is, or what is asked does not go together.
    """
    loras = {lora.name: lora.weight for lora in body["loras"]} if "loras" in body else None
    model = catalog.find(body.get("model"), loras)
    answer = _answer(model, body)
    call: dict[str, Any] = {name: value for name, value in body.items() if name in OF_CALL}
    call |= {name: picture_bytes(value, name, fetcher) for name, value in call.items() if name in PICTURES}
    call |= _pictures(body, fetcher)
    if "controls" in call:
        controls = call["controls"] if isinstance(call["controls"], list) else [call["controls"]]
        call["controls"] = [_control(one, fetcher) for one in controls]
    if not body.get("prompt", "").strip() and model.manifest.layers is None:
        raise ApiError(400, "prompt is empty; say what to draw", param="prompt", code="invalid_value")
    call["prompt"] = body.get("prompt", "")
    call["num_images_per_prompt"] = body.get("n", 1)
    call.setdefault("negative_prompt", model.manifest.defaults.negative_prompt)
    call |= _size(body)
    if "num_inference_steps" not in call and "sigmas" not in call:
        call["num_inference_steps"] = steps_of(model.manifest.defaults, answer.quality)
    return model, check(model.manifest, model.family, **call), answer


def steps_of(defaults: Defaults, quality: str) -> int:
    """How many steps a quality takes."""
    return max(1, round(defaults.num_inference_steps * QUALITIES.get(quality, 1.0)))


def _answer(model: Model, body: Mapping[str, Any]) -> Answer:
    kind, layered = body.get("output_format", "png"), model.manifest.layers is not None
    if layered and kind == "jpeg":
        raise ApiError(
            400, "JPEG holds no transparency, and layers have it; ask for png or webp", param="output_format"
        )
    if not layered and body.get("background") == "transparent":
        raise ApiError(400, f"{model.name} draws no transparency; ask for opaque", param="background")
    if body.get("partial_images") and not body.get("stream"):
        raise ApiError(400, "partial_images are sent in a stream alone; ask for stream", param="partial_images")
    if layered and body.get("partial_images"):
        raise ApiError(400, f"{model.name} gives layers, of which there are no previews", param="partial_images")
    return Answer(
        output_format=kind,
        compression=body.get("output_compression"),
        as_url=body.get("response_format") == "url",
        quality=body.get("quality", "auto"),
        stream=body.get("stream", False),
        partial_images=body.get("partial_images", 0),
        progress=body.get("progress", False),
    )


def _size(body: Mapping[str, Any]) -> dict[str, int]:
    size = body.get("size", "auto")
    if size == "auto":
        return {}
    if "width" in body or "height" in body:
        raise ApiError(400, "size and width or height are both given; give one of them", param="size")
    match = SIZE.fullmatch(size)
    if match is None:
        raise ApiError(400, f"size is {size!r}; give auto, or WIDTHxHEIGHT such as 1024x1024", param="size")
    width, height = map(int, match.groups())
    near = tuple(max(16, round(side / 16) * 16) for side in (width, height))
    if near != (width, height):
        message = f"size is {size}, and sides are multiples of 16; the nearest is {near[0]}x{near[1]}"
        raise ApiError(400, message, param="size", code="invalid_value")
    return {"width": width, "height": height}


def _pictures(body: Mapping[str, Any], fetcher: Fetcher) -> dict[str, Any]:
    """The pictures of an edit, and its mask as diffusers has them: white where it is drawn anew."""
    found: dict[str, Any] = {}
    if "image" in body and "images" in body:
        raise ApiError(400, "image and images are both given; give one of them", param="images")
    pictures = picture_bytes(body.get("image", body.get("images", [])), "image", fetcher)
    pictures = pictures if isinstance(pictures, list) else [pictures]
    if pictures:
        found["image"] = pictures if len(pictures) > 1 else pictures[0]
    if "mask" in body:
        if "mask_image" in body:
            raise ApiError(400, "mask and mask_image are both given; give one of them", param="mask")
        found["mask_image"] = _mask(picture_bytes(body["mask"], "mask", fetcher))
    if "mask" in body or "mask_image" in body:
        # Who sends a mask expects the rest to stay; it counts as given, so a request can say otherwise.
        found["keep_unmasked"] = body.get("keep_unmasked", True)
        found["image"] = flattened(read_picture(pictures[0], "image")) if len(pictures) == 1 else found.get("image")
    return found


def _control(control: Control, fetcher: Fetcher) -> dict[str, Any]:
    """What a request says of a ControlNet, its pictures read."""
    said = control.model_dump(exclude_none=True)
    pictures = {key: picture_bytes(said[key], "controls", fetcher) for key in OF_CONTROLS if key in said}
    return said | pictures


def _mask(data: bytes) -> Any:
    """OpenAI's mask, transparent where it is to be edited."""
    from PIL import ImageOps

    mask = read_picture(data, "mask")
    if mask.mode != "RGBA":
        hint = "make it transparent where the picture is drawn anew, or send mask_image, white there"
        raise UsageError("mask has no transparency", hint)
    return ImageOps.invert(mask.getchannel("A"))
