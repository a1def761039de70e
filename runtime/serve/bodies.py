"""What requests may say: OpenAI's fields, and every parameter of a call, derived from their one list.

OpenAI's: https://github.com/openai/openai-python, ``types/image_generate_params.py`` and ``image_edit_params.py``.
"""

from __future__ import annotations

import base64
import binascii
import difflib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from zimgkit.runtime.parameters import BY_NAME, INSTEAD, PARAMETERS, ControlPicture, Parameter, Picture
from zimgkit.runtime.serve.errors import ApiError
from zimgkit.runtime.serve.fetching import Fetcher

ELSEWHERE = ("prompt", "num_images_per_prompt", "image", "output_type")
"""Parameters that have OpenAI's own names here, or that a client has no use for."""
DATA_URL = re.compile(r"data:[\w.+-]+/[\w.+-]+(;[\w=.+-]+)*;base64,", re.ASCII)
ADDRESS = re.compile(r"\s*[a-z][a-z0-9+.-]*://", re.IGNORECASE)
MOST_IMAGES = 16
"""Pictures in one request, as OpenAI's API has it."""


class Lora(BaseModel):
    """A LoRA that the model is asked to have."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(description="Its file, without the ending.", max_length=300)
    weight: float = Field(1.0, description="Its scale.")


class Control(BaseModel):
    """A ControlNet that acts, with its pictures."""

    model_config = ConfigDict(extra="forbid")

    name: str | None = Field(None, description="Which; the model's only one where it is left out.", max_length=300)
    image: str | None = Field(None, description="What it follows: base64, or a data URL.")
    mask: str | None = Field(None, description="White where the picture is drawn anew.")
    inpaint_image: str | None = Field(None, description="What stays outside the mask.")
    scale: float | None = Field(None, description="How strongly it acts.")
    start: float | None = Field(None, description="The share of the steps after which it acts.")
    end: float | None = Field(None, description="The share of the steps up to which it acts.")


class ImageUrl(BaseModel):
    """A picture in a JSON body."""

    model_config = ConfigDict(extra="ignore")

    image_url: str = Field(description="A data URL, or base64.")


class Common(BaseModel):
    """OpenAI's fields that both kinds of request have."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    prompt: str = Field("", description="What to draw.", max_length=32_000)
    model: str | None = Field(None, description="A served model; the first where it is left out.")
    n: int | None = Field(None, ge=1, le=10, description="How many pictures.")
    size: str | None = Field(None, description="auto, or WIDTHxHEIGHT in multiples of 16.", max_length=20)
    quality: Literal["auto", "low", "medium", "high", "standard", "hd"] | None = Field(
        None,
        description="How many steps are taken: half of the model's own for low, half as many again for high and hd.",
    )
    response_format: Literal["b64_json", "url"] | None = Field(None, description="b64_json where it is left out.")
    output_format: Literal["png", "jpeg", "webp"] | None = Field(None, description="png where it is left out.")
    output_compression: int | None = Field(None, ge=0, le=100, description="The quality of JPEG and WebP.")
    background: Literal["auto", "opaque", "transparent"] | None = Field(None, description="Layers are transparent.")
    stream: bool | None = Field(None, description="Send server-sent events.")
    partial_images: int | None = Field(None, ge=0, le=3, description="Previews of each picture in the stream.")
    progress: bool | None = Field(None, description="Send events of progress and of the place in the queue as well.")
    loras: Annotated[list[Lora], Field(max_length=64)] | None = Field(
        None, description="LoRAs that the model must have merged; a served one with these is taken."
    )
    user: str | None = Field(None, description="Not read.")
    moderation: str | None = Field(None, description="Not read.")
    style: str | None = Field(None, description="Not read.")
    input_fidelity: str | None = Field(None, description="Not read.")


def _field(parameter: Parameter) -> tuple[Any, Any]:
    """A parameter of a call as a field of a body."""
    kind: Any = {tuple: list[float], Picture: str, ControlPicture: Control}.get(parameter.type, parameter.type)
    text = parameter.help
    if parameter.type is Picture:
        text += " Base64, a data URL, or a file."
    elif parameter.choices:
        kind = Literal.__getitem__(parameter.choices)
    elif parameter.type in (int, float):
        low, high = (bound if math.isfinite(bound) else None for bound in (parameter.low, parameter.high))
        kind = Annotated[kind, Field(ge=low, le=high)]
    if parameter.several or parameter.name == "seed":  # A seed for each picture.
        kind = list[kind] | kind
    return kind | None, Field(None, description=text)


EXTENSIONS: dict[str, Any] = {
    parameter.name: _field(parameter) for parameter in PARAMETERS if parameter.name not in ELSEWHERE
}
Generation: Any = pydantic.create_model("Generation", __base__=Common, **EXTENSIONS)
"""The body of ``POST /v1/images/generations``."""
Edit: Any = pydantic.create_model(
    "Edit",
    __base__=Generation,
    image=(Annotated[list[str], Field(max_length=MOST_IMAGES)] | str | None, Field(None, description="The pictures.")),
    images=(
        Annotated[list[ImageUrl], Field(max_length=MOST_IMAGES)] | None,
        Field(None, description="The pictures, in JSON."),
    ),
    mask=(ImageUrl | str | None, Field(None, description="A picture that is transparent where it is to be edited.")),
)
"""The body of ``POST /v1/images/edits``."""
PICTURES = {parameter.name for parameter in PARAMETERS if parameter.type is Picture} | {"mask"}
STRUCTURED = ("controls", "loras")
"""Fields that forms have as JSON."""
OF_CALL = frozenset(EXTENSIONS)
"""Fields that are parameters of a call."""
NAMES = {name: name for name in (*OF_CALL, "prompt", "image", "mask")} | {
    "num_images_per_prompt": "n",
    "mask_image": "mask",
    "seeds": "seed",
    "ControlNet": "controls",
    "ControlNets": "controls",
}
"""What messages call a field -> its name here."""


def parse(kind: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Check a body, and leave out what is not given.

    Args:
        kind: :data:`Generation` or :data:`Edit`.
        values: the body; pictures may be bytes.

    Raises:
        ApiError: a field is unknown, or of a wrong type or value; naming it.
    """
    files = {name: value for name, value in values.items() if name in PICTURES and _has_bytes(value)}
    rest = {name: value for name, value in values.items() if name not in files}
    try:
        found = kind.model_validate(rest)
    except pydantic.ValidationError as error:
        raise invalid(error.errors(include_url=False, include_context=False), kind) from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None
    return {name: value for name in found.model_fields_set if (value := getattr(found, name)) is not None} | files


def invalid(errors: Sequence[Mapping[str, Any]], kind: Any = Edit) -> ApiError:
    """The first of pydantic's complaints as an error object."""
    first = errors[0]
    place = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    name = place[0][:100] if place else None
    if first["type"] == "extra_forbidden" and name:
        serves = INSTEAD.get(name) or next(iter(difflib.get_close_matches(name, kind.model_fields, n=1)), None)
        message = f"there is no field {name!r}; " + (f"use {serves}" if serves else "leave it out")
        return ApiError(400, message, param=name, code="unknown_parameter")
    told = first["msg"][:1].lower() + first["msg"][1:300]
    message = f"{name}: {told}" if name else f"the body cannot be read: {told}"
    return ApiError(400, message, param=name, code="invalid_value")


def _has_bytes(value: Any) -> bool:
    return isinstance(value, bytes) or (isinstance(value, list) and any(isinstance(one, bytes) for one in value))


def picture_bytes(value: Any, name: str, fetcher: Fetcher) -> Any:
    """The bytes of a picture, or of each of several, that came as a file, base64, a data URL, or an address.

    Args:
        value: what came.
        name: the field it came in.
        fetcher: of addresses.

    Raises:
        ApiError: it is an address that is not fetched, or no base64.
    """
    if isinstance(value, list):
        return [picture_bytes(one, name, fetcher) for one in value]
    if isinstance(value, bytes):
        return value
    text = value.image_url if isinstance(value, ImageUrl) else value
    if ADDRESS.match(text):
        return fetcher.fetch(text.strip(), name)
    text = text[match.end() :] if (match := DATA_URL.match(text)) else text
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise ApiError(400, f"{name} is neither base64 nor a data URL", param=name, code="invalid_value") from None


def parameter_type(name: str) -> type:
    """The type of a parameter of a call."""
    return BY_NAME[name].type
