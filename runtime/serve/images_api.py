"""OpenAI's images API: generations, edits, models, and pictures by address.

Source: https://github.com/openai/openai-python, ``resources/images.py`` and ``types/image_gen_stream_event.py``.
"""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Awaitable, Mapping
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from zimgkit.engines.errors import CancelledError
from zimgkit.runtime.request import Request as Call
from zimgkit.runtime.serve import bodies
from zimgkit.runtime.serve.calls import Answer, read_body
from zimgkit.runtime.serve.catalog import Model
from zimgkit.runtime.serve.errors import ApiError, told
from zimgkit.runtime.serve.events import Event, Finished, Preview, Queued
from zimgkit.runtime.serve.service import Service

Result = TypeVar("Result")
JSON, FORM = "application/json", "multipart/form-data"
MOST_FIELDS, MOST_FILES, MOST_TEXT = 200, 64, 1 << 24
"""Of a form: fields, files, and bytes of a field that is no file."""


def router(service: Service) -> APIRouter:
    """The routes below ``/v1``."""
    routes = APIRouter(prefix="/v1")

    @routes.post("/images/generations", response_model=None, openapi_extra=takes(bodies.Generation, JSON))
    async def generations(request: Request) -> Response:
        """Draw pictures from a prompt."""
        body = bodies.parse(bodies.Generation, await read_json(request))
        return await _answered(service, request, body, "image_generation")

    @routes.post("/images/edits", response_model=None, openapi_extra=takes(bodies.Edit, FORM, JSON))
    async def edits(request: Request) -> Response:
        """Draw pictures from pictures."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        body = await (read_json(request) if kind == JSON else _read_form(request, kind))
        parsed = bodies.parse(bodies.Edit, body)
        if not {"image", "images"} & parsed.keys():
            raise ApiError(400, "image is missing; send the picture to edit", param="image")
        return await _answered(service, request, parsed, "image_edit")

    @routes.post("/images/variations", response_model=None)
    async def variations() -> Response:
        """Refuse: no model that is served has these."""
        raise ApiError(
            400, "there are no variations of a picture without words; use edits with a prompt", code="unsupported"
        )

    @routes.get("/images/{name}/content", response_model=None)
    async def content(name: str) -> Response:
        """A picture that was asked for by address."""
        kept = service.store.get(name)
        if kept is None:
            raise ApiError(404, "there is no such picture any more", code="not_found")
        headers = {"Cache-Control": "private, immutable", "X-Content-Type-Options": "nosniff"}
        return Response(kept.data, media_type=kept.media_type, headers=headers)

    @routes.get("/models")
    async def models() -> dict[str, Any]:
        """What is served."""
        return {"object": "list", "data": [described(model) for model in service.catalog.models.values()]}

    @routes.get("/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """One of them."""
        return described(service.catalog.find(name))

    return routes


def described(model: Model) -> dict[str, Any]:
    """A model as OpenAI lists it, and what a page needs to know."""
    manifest, defaults, family = model.manifest, model.manifest.defaults, model.family
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "zimgkit",
        "zimg": {
            "name": manifest.name,
            "family": manifest.family,
            "precision": manifest.quantized or manifest.precision,
            "tasks": list(manifest.tasks),
            "least_images": manifest.references.least if manifest.references else int(manifest.layers is not None),
            "most_images": manifest.references.most if manifest.references else 1,
            "strengths": dict(family.STRENGTHS),
            "layers": manifest.layers.layers if manifest.layers else None,
            "loras": [{"name": name, "weight": scale} for name, scale in model.loras.items()],
            "controls": [
                {"name": control.name, "takes": list(control.takes), "scale": control.scale}
                for control in manifest.controls
            ],
            "width": defaults.width,
            "height": defaults.height,
            "num_inference_steps": defaults.num_inference_steps,
            "guidance_scale": defaults.guidance_scale,
            "unguided_scale": family.guidance_scale(1.0),
            "max_sequence_length": manifest.text.max_sequence_length,
            "negative_prompt": defaults.negative_prompt,
        },
    }


def takes(kind: Any, *media_types: str) -> dict[str, Any]:
    """The schema of a body, for ``/openapi.json``."""
    schema = kind.model_json_schema()
    content = {media_type: {"schema": _inlined(schema, schema.get("$defs", {}))} for media_type in media_types}
    return {"requestBody": {"required": True, "content": content}}


def _inlined(schema: Any, definitions: Mapping[str, Any]) -> Any:
    """A schema without references."""
    if isinstance(schema, list):
        return [_inlined(entry, definitions) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inlined(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    return {name: _inlined(entry, definitions) for name, entry in schema.items() if name != "$defs"}


async def read_json(request: Request) -> dict[str, Any]:
    """The object that a body holds.

    Raises:
        ApiError: it holds none.
    """
    try:
        found = json.loads(await request.body())
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is no JSON", code="invalid_json") from None
    if not isinstance(found, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    return found


async def _read_form(request: Request, kind: str) -> dict[str, Any]:
    """The fields of a form; those that come several times, or end in ``[]``, as lists."""
    if kind not in (FORM, "application/x-www-form-urlencoded"):
        raise ApiError(415, f"send {FORM}, or {JSON}", code="unsupported_media_type")
    values: dict[str, Any] = {}
    async with request.form(max_files=MOST_FILES, max_fields=MOST_FIELDS, max_part_size=MOST_TEXT) as form:
        for field, value in form.multi_items():
            read = value if isinstance(value, str) else await value.read()
            name = field.removesuffix("[]")
            if name != field or name in values:
                former = values.get(name, [])
                values[name] = [*(former if isinstance(former, list) else [former]), read]
            else:
                values[name] = read
    for name in set(bodies.STRUCTURED) & values.keys():
        try:
            values[name] = json.loads(values[name])
        except (TypeError, ValueError, RecursionError):
            raise ApiError(400, f"{name} is no JSON", param=name, code="invalid_json") from None
    return values


async def _answered(service: Service, request: Request, body: Mapping[str, Any], event: str) -> Response:
    """The answer to a checked body."""
    service.check_ready()
    model, call, answer = await asyncio.to_thread(read_body, service.catalog, body, service.fetcher)
    request.state.log = {"model": model.name, "pictures": call.batch, "size": f"{call.width}x{call.height}"}
    reply = _Reply(service, request, model, call, answer, event)
    if answer.stream:
        first = await reply.first()
        return StreamingResponse(
            reply.stream(first), media_type="text/event-stream", headers={"Cache-Control": "no-store"}
        )
    return JSONResponse(await unless_gone(request, reply.whole()))


class _Reply:
    """One request's pictures on their way out."""

    def __init__(
        self, service: Service, request: Request, model: Model, call: Call, answer: Answer, event: str
    ) -> None:
        self.service, self.model, self.call, self.answer, self.event = service, model, call, answer, event
        self.base_url = str(request.base_url)
        state = request.state
        self.events = service.draw(model, call, answer, client=state.client, request_id=state.request_id)

    def _form(self) -> dict[str, Any]:
        return {
            "size": f"{self.call.width}x{self.call.height}",
            "quality": self.answer.quality,
            "background": "transparent" if self.call.layers else "opaque",
            "output_format": self.answer.output_format,
        }

    def _seed(self, picture: int) -> dict[str, Any]:
        """What draws the picture again: its seed, or that of the batch and its place there."""
        seed = self.call.seed
        return {"seed": seed, "image_index": picture} if isinstance(seed, int) else {"seed": seed[picture]}

    def _entries(self, event: Finished) -> list[dict[str, Any]]:
        self.service.metrics.sent(self.model.name, len(event.files))
        seed = self._seed(event.picture)
        return [self.service.entry(data, self.answer, self.base_url) | seed for data in event.files]

    async def whole(self) -> dict[str, Any]:
        """All pictures in one body."""
        entries: dict[int, list[dict[str, Any]]] = {}
        usage: Mapping[str, Any] = {}
        async with aclosing(self.events) as events:
            async for event in events:
                if isinstance(event, Finished):
                    entries[event.picture], usage = self._entries(event), event.usage
        data = [entry for picture in sorted(entries) for entry in entries[picture]]
        return {"created": int(time.time()), "data": data, **self._form(), "usage": usage}

    async def first(self) -> Event | None:
        """The first event: what is refused is refused with a status, before the stream begins."""
        if not self.answer.progress:
            return await anext(self.events)
        # Who wants to see the queue shall see it before its turn comes.
        self.service.check_ready()
        return None

    async def stream(self, first: Event | None) -> AsyncIterator[bytes]:
        """Server-sent events: progress where it is wanted, previews, pictures."""
        partials = 0
        try:
            async with aclosing(self.events) as events:
                async for event in _with_first(first, events):
                    if isinstance(event, Finished):
                        for entry in self._entries(event):
                            yield _event(f"{self.event}.completed", entry | self._stamped() | {"usage": event.usage})
                    elif isinstance(event, Preview):
                        text = base64.b64encode(event.file).decode()
                        body = {"b64_json": text, "partial_image_index": partials, "image_index": event.picture}
                        yield _event(f"{self.event}.partial_image", body | self._stamped())
                        partials += 1
                    elif isinstance(event, Queued):
                        yield _event("progress", {"queue_position": event.position})
                    elif self.answer.progress:
                        yield _event("progress", {"queue_position": 0, "step": event.steps, "steps": event.total})
            yield b"data: [DONE]\n\n"
        except CancelledError:
            yield _error(ApiError(400, "the picture was cancelled", code="cancelled"))
        except Exception as error:
            yield _error(told(error, bodies.NAMES))

    def _stamped(self) -> dict[str, Any]:
        return {"created_at": int(time.time()), **self._form()}


async def _with_first(first: Event | None, events: AsyncIterator[Event]) -> AsyncIterator[Event]:
    if first is not None:
        yield first
    async for event in events:
        yield event


def _event(kind: str, body: Mapping[str, Any]) -> bytes:
    """One server-sent event; OpenAI's clients read its type from the JSON."""
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **body})}\n\n".encode()


def _error(error: ApiError) -> bytes:
    return f"event: error\ndata: {json.dumps({'type': 'error', **error.body()})}\n\n".encode()


async def unless_gone(request: Request, work: Awaitable[Result]) -> Result:
    """The result of some work, which is cancelled when the client hangs up.

    Raises:
        CancelledError: it did.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise CancelledError("the client is gone")
    finally:
        for one in (task, gone):
            one.cancel()
        with suppress(BaseException):
            await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
