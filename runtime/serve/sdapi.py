"""The API of AUTOMATIC1111's web UI, as far as Open WebUI, SillyTavern and the plug-ins of Krita and GIMP speak it.

Source: https://github.com/AUTOMATIC1111/stable-diffusion-webui, ``modules/api/models.py`` and ``api.py``.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import time
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import aclosing
from io import BytesIO
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from zimgkit.engines.errors import CancelledError, UsageError
from zimgkit.runtime.pictures import metadata
from zimgkit.runtime.pictures.reading import flattened, read_picture
from zimgkit.runtime.pictures.resizing import crop_and_resize, resize
from zimgkit.runtime.request import Request as Call
from zimgkit.runtime.request import check
from zimgkit.runtime.serve.bodies import parse, picture_bytes
from zimgkit.runtime.serve.calls import Answer
from zimgkit.runtime.serve.catalog import Model
from zimgkit.runtime.serve.drawing import Drawing
from zimgkit.runtime.serve.errors import ApiError
from zimgkit.runtime.serve.events import Finished
from zimgkit.runtime.serve.fetching import Fetcher
from zimgkit.runtime.serve.images_api import read_json, takes, unless_gone
from zimgkit.runtime.serve.service import Service

PREFIX = "/sdapi/v1"
JSON = "application/json"
TAG = re.compile(r"<lora:([^:<>]{1,200})(?::(-?\d{0,6}\.?\d{1,6}))?>", re.ASCII)
"""How a prompt asks for a LoRA."""
MOST_CLIENTS = 1000
"""Whose choice of a model is kept."""
MULTIPLE = 16
SAMPLER = "Euler"


class TextToImage(BaseModel):
    """What of ``txt2img`` has a meaning here; the rest is not read."""

    model_config = ConfigDict(extra="ignore")

    prompt: str = Field("", max_length=32_000)
    negative_prompt: str | None = Field(None, max_length=32_000)
    seed: int | None = Field(None, ge=-1, le=2**64 - 1, description="-1 is a random one.")
    steps: int | None = Field(None, ge=1, le=1000)
    cfg_scale: float | None = Field(None, ge=0, le=1000, description="1 is no guidance.")
    width: int | None = Field(None, ge=16, le=1 << 16)
    height: int | None = Field(None, ge=16, le=1 << 16)
    batch_size: int | None = Field(None, ge=1, le=10)
    n_iter: int | None = Field(None, ge=1, le=10)
    override_settings: dict[str, Any] | None = None
    send_images: bool | None = None


class ImageToImage(TextToImage):
    """What of ``img2img`` has."""

    init_images: Annotated[list[str], Field(max_length=16)] | None = None
    mask: str | None = Field(None, description="White where it is drawn anew.")
    denoising_strength: float | None = Field(None, ge=0, le=1)
    mask_blur: float | None = Field(None, ge=0, le=1024)
    inpainting_mask_invert: int | None = None
    resize_mode: int | None = Field(None, ge=0, le=3, description="0 stretches, and others cut the edges off.")


class Options(BaseModel):
    """What of ``options`` has."""

    model_config = ConfigDict(extra="ignore")

    sd_model_checkpoint: str | None = Field(None, max_length=300)


class PngInfo(BaseModel):
    """A picture to read."""

    model_config = ConfigDict(extra="ignore")

    image: str = Field("", description="Base64, or a data URL.")


def router(service: Service) -> APIRouter:
    """The routes below ``/sdapi/v1``."""
    routes = APIRouter(prefix=PREFIX)
    chosen: OrderedDict[str, str] = OrderedDict()
    """Client -> the model that it chose: one user's choice is not another's."""

    def model_of(request: Request, name: Any = None, loras: Mapping[str, float] | None = None) -> Model:
        named = str(name or "") or chosen.get(request.state.client)
        return service.catalog.find(re.sub(r" \[[0-9a-f]+\]$", "", named) if named else None, loras)

    async def draw(request: Request, body: Mapping[str, Any], call: dict[str, Any]) -> dict[str, Any]:
        service.check_ready()
        tags = _loras(body.get("prompt", ""))
        settings = body.get("override_settings", {})
        model = model_of(request, settings.get("sd_model_checkpoint"), tags or None)
        checked = await asyncio.to_thread(_checked, model, body, call)
        return await unless_gone(request, _drawn(service, request, model, checked, body))

    @routes.post("/txt2img", openapi_extra=takes(TextToImage, JSON))
    async def text_to_image(request: Request) -> dict[str, Any]:
        """Draw from a prompt."""
        return await draw(request, parse(TextToImage, await read_json(request)), {})

    @routes.post("/img2img", openapi_extra=takes(ImageToImage, JSON))
    async def image_to_image(request: Request) -> dict[str, Any]:
        """Draw from pictures."""
        body = parse(ImageToImage, await read_json(request))
        if not body.get("init_images"):
            raise ApiError(400, "init_images is empty; give the picture to start from", param="init_images")
        return await draw(request, body, await asyncio.to_thread(_inputs, body, service.fetcher))

    @routes.get("/progress")
    async def progress(request: Request, skip_current_image: bool = False) -> dict[str, Any]:
        """How far this client's picture is."""
        return _progress(_own(service, request), skip_current_image)

    @routes.post("/interrupt")
    @routes.post("/skip")
    async def interrupt(request: Request) -> dict[str, Any]:
        """Stop this client's picture."""
        if (drawing := _own(service, request)) is not None:
            drawing.cancel()
        return {}

    @routes.get("/options")
    async def options(request: Request) -> dict[str, Any]:
        """What is set."""
        return {"sd_model_checkpoint": model_of(request).name, "samples_format": "png", "CLIP_stop_at_last_layers": 1}

    @routes.post("/options", openapi_extra=takes(Options, JSON))
    async def set_options(request: Request) -> dict[str, Any]:
        """Choose a model for this client; the rest is not read."""
        if name := parse(Options, await read_json(request)).get("sd_model_checkpoint"):
            chosen[request.state.client] = model_of(request, name).name
            chosen.move_to_end(request.state.client)
            while len(chosen) > MOST_CLIENTS:
                chosen.popitem(last=False)
        return {}

    _add_lists(routes, service)
    return routes


def _add_lists(routes: APIRouter, service: Service) -> None:
    """What there is to choose from, and what made a picture."""

    @routes.get("/samplers")
    async def samplers() -> list[dict[str, Any]]:
        """The one there is."""
        return [{"name": SAMPLER, "aliases": [SAMPLER.lower()], "options": {}}]

    @routes.get("/schedulers")
    async def schedulers() -> list[dict[str, Any]]:
        """The model's own."""
        return [
            {"name": "automatic", "label": "Automatic", "aliases": None, "default_rho": -1, "need_inner_model": False}
        ]

    @routes.get("/sd-models")
    async def models() -> list[dict[str, Any]]:
        """What is served."""
        names = service.catalog.models
        common = {"hash": None, "sha256": None, "config": None}
        return [{"title": name, "model_name": name, "filename": name, **common} for name in names]

    @routes.get("/loras")
    async def loras() -> list[dict[str, Any]]:
        """The LoRAs that served models have."""
        names = dict.fromkeys(name for model in service.catalog.models.values() for name in model.loras)
        return [{"name": name, "alias": name, "path": name, "metadata": {}} for name in names]

    @routes.get("/upscalers")
    async def upscalers() -> list[dict[str, Any]]:
        """None."""
        return []

    @routes.post("/png-info", openapi_extra=takes(PngInfo, JSON))
    async def png_info(request: Request) -> dict[str, Any]:
        """What made a picture."""
        image = parse(PngInfo, await read_json(request)).get("image")
        if not image:
            raise ApiError(400, "image is missing; send the picture in base64", param="image")
        data = picture_bytes(image, "image", service.fetcher)
        try:
            record = await asyncio.to_thread(metadata.read, BytesIO(data))
        except UsageError:
            return {"info": "", "items": {}, "parameters": {}}
        text = record.to_text()
        return {"info": text, "items": {"parameters": text}, "parameters": json.loads(record.to_json())}


def _loras(prompt: str) -> dict[str, float]:
    """The LoRAs that a prompt asks for, and their scales."""
    if "<lora:" in TAG.sub("", prompt):
        raise ApiError(400, "the prompt asks for a LoRA in another form than <lora:NAME:SCALE>", param="prompt")
    return {name: float(scale or 1) for name, scale in TAG.findall(prompt)}


def _checked(model: Model, body: Mapping[str, Any], call: Mapping[str, Any]) -> Call:
    """A body as a call, in this model's sizes."""
    prompt = TAG.sub("", body.get("prompt", "")).strip()
    if not prompt:
        raise ApiError(400, "prompt is empty; say what to draw", param="prompt")
    seed = body.get("seed", -1)
    given = {
        "negative_prompt": body.get("negative_prompt") or model.manifest.defaults.negative_prompt,
        "seed": seed if seed >= 0 else None,
        "num_inference_steps": body.get("steps"),
        "cfg_scale": body.get("cfg_scale"),
        "num_images_per_prompt": body.get("batch_size", 1) * body.get("n_iter", 1),
        **{
            side: max(MULTIPLE, round(body[side] / MULTIPLE) * MULTIPLE) for side in ("width", "height") if side in body
        },
    }
    return check(model.manifest, model.family, prompt=prompt, **given, **call)


def _inputs(body: Mapping[str, Any], fetcher: Fetcher) -> dict[str, Any]:
    """The pictures of a body and what it says of them, as diffusers has them."""
    files = picture_bytes(body["init_images"], "init_images", fetcher)
    pictures = [flattened(read_picture(data, "init_images")) for data in files]
    if "width" in body and "height" in body and len(pictures) == 1:
        size = [max(MULTIPLE, round(body[side] / MULTIPLE) * MULTIPLE) for side in ("width", "height")]
        make = crop_and_resize if body.get("resize_mode") else resize
        pictures = [make(picture, size[0], size[1], "lanczos") for picture in pictures]
    found: dict[str, Any] = {"image": pictures if len(pictures) > 1 else pictures[0]}
    if "denoising_strength" in body:
        found["strength"] = body["denoising_strength"]
    if "mask" in body:
        from PIL import ImageOps

        mask = flattened(read_picture(picture_bytes(body["mask"], "mask", fetcher), "mask"), 0).convert("L")
        found["mask_image"] = ImageOps.invert(mask) if body.get("inpainting_mask_invert") else mask
        found |= {"keep_unmasked": True, "mask_blur": body.get("mask_blur")}
    return found


async def _drawn(
    service: Service, request: Request, model: Model, call: Call, body: Mapping[str, Any]
) -> dict[str, Any]:
    """Pictures in the form of the web UI."""
    request.state.log = {"model": model.name, "pictures": call.batch, "size": f"{call.width}x{call.height}"}
    found: dict[int, Finished] = {}
    state, begun = request.state, list[Drawing]()
    drawn = service.draw(model, call, Answer(), client=state.client, request_id=state.request_id, begun=begun.append)
    files: list[bytes] = []
    try:
        async with aclosing(drawn) as events:
            async for event in events:
                if isinstance(event, Finished):
                    found[event.picture] = event
    except CancelledError:  # Interrupted: its clients expect what there is by then.
        preview = begun[0].preview
        files = [] if preview is None else [await asyncio.to_thread(_file, preview)]
    files = [data for picture in sorted(found) for data in found[picture].files] or files
    service.metrics.sent(model.name, len(files))
    texts = [found[picture].text for picture in sorted(found)]
    seeds = list(call.seed) if isinstance(call.seed, tuple) else [call.seed] * call.batch
    info = {
        "prompt": call.prompts[0],
        "negative_prompt": (call.negative_prompts or ("",))[0],
        "seed": seeds[0],
        "all_seeds": seeds,
        "all_prompts": [call.prompts[0]] * call.batch,
        "width": call.width,
        "height": call.height,
        "steps": call.num_inference_steps,
        "cfg_scale": model.family.cfg_scale(call.guidance_scale),
        "sampler_name": SAMPLER,
        "batch_size": call.batch,
        "sd_model_name": model.name,
        "infotexts": texts,
    }
    images = [base64.b64encode(data).decode() for data in files] if body.get("send_images", True) else []
    echoed = {name: value for name, value in body.items() if name not in ("init_images", "mask")}
    return {"images": images, "parameters": echoed, "info": json.dumps(info)}


def _own(service: Service, request: Request) -> Drawing | None:
    """The first of this client's that is drawn or waits."""
    return next((one for one in service.drawings() if one.client == request.state.client), None)


def _progress(drawing: Drawing | None, skip_current_image: bool) -> dict[str, Any]:
    state = {"skipped": False, "interrupted": False, "job": "", "job_count": 0, "job_no": 0}
    if drawing is None:
        steps = {"sampling_step": 0, "sampling_steps": 0}
        return {"progress": 0.0, "eta_relative": 0.0, "state": state | steps, "current_image": None, "textinfo": None}
    share = drawing.steps / drawing.total
    taken = time.monotonic() - drawing.begun if drawing.begun else 0.0
    image = None
    if not skip_current_image:
        drawing.preview_wanted = True
        if drawing.preview is not None:
            image = base64.b64encode(_file(drawing.preview)).decode()
    state |= {
        "job": drawing.request_id,
        "job_count": 1,
        "sampling_step": drawing.steps,
        "sampling_steps": drawing.total,
    }
    return {
        "progress": share,
        "eta_relative": taken * (1 - share) / share if share else drawing.seconds,
        "state": state,
        "current_image": image,
        "textinfo": None,
    }


def _file(pixels: Any) -> bytes:
    from zimgkit.runtime.pictures.saving import encoded, to_pil

    return encoded(to_pil(pixels[None])[0], "PNG")
