"""What the routers share: models, queue, devices, and pictures on their way to clients."""

from __future__ import annotations

import asyncio
import base64
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from zimgkit.engines.errors import ZimgError
from zimgkit.runtime.pictures.metadata import Record
from zimgkit.runtime.pictures.saving import encoded, to_pil
from zimgkit.runtime.recording import record
from zimgkit.runtime.request import Request
from zimgkit.runtime.serve.calls import Answer
from zimgkit.runtime.serve.catalog import Catalog, Model
from zimgkit.runtime.serve.drawing import Done, Drawing, Event, Failed, Pixels
from zimgkit.runtime.serve.errors import ApiError, closing, loading
from zimgkit.runtime.serve.fetching import Fetcher
from zimgkit.runtime.serve.metrics import Metrics
from zimgkit.runtime.serve.rates import Rates
from zimgkit.runtime.serve.store import Store
from zimgkit.runtime.serve.waiting import Waiting
from zimgkit.runtime.serve.worker import Open, Worker
from zimgkit.runtime.session import Session

LOG = logging.getLogger("zimgkit.serve")


@dataclass(frozen=True)
class Limits:
    """What a server takes."""

    max_queue_seconds: float = 600.0
    """Of work that waits."""
    max_body_bytes: int = 64 << 20
    body_seconds: float = 60.0
    """How long a client may take to send a request."""
    keep_seconds: float = 3600.0
    """How long a picture can be fetched by its address."""


@dataclass(eq=False)
class Service:
    """A server without its HTTP.

    Args:
        catalog: the models.
        devices: for each device a function that opens a model there.
        limits: what is taken.
        warm_up: whether each model draws a picture before the first request.
        fetcher: of pictures that come as addresses.
    """

    catalog: Catalog
    devices: Sequence[Open]
    limits: Limits = field(default_factory=Limits)
    warm_up: bool = True
    fetcher: Fetcher = field(default_factory=Fetcher)

    def __post_init__(self) -> None:
        self.metrics, self.rates = Metrics(), Rates()
        self.waiting = Waiting(self.limits.max_queue_seconds)
        self.store = Store(self.limits.keep_seconds)
        make = partial(Worker, self.catalog, self.waiting, self.rates, self.metrics, warm_up=self.warm_up)
        self.workers = [make(open_session) for open_session in self.devices]
        self._observe()

    def _observe(self) -> None:
        gauge, count = self.metrics.observe, self.metrics.observe_count
        gauge("zimg:num_requests_waiting", "Requests that wait for a device.", self.waiting.__len__)
        gauge("zimg:queue_seconds", "Seconds of work that wait.", lambda: self.waiting.seconds)
        count("zimg:image_cache_queries", "Input pictures to encode.", lambda: self._cached("asked"))
        count("zimg:image_cache_hits", "Those encoded before.", lambda: self._cached("found"))

    def _cached(self, count: str) -> int:
        sessions = [session for worker in self.workers for session in worker.sessions.values()]
        return sum(getattr(session.encoder.kept, count) for session in sessions)

    def start(self) -> None:
        """Open the models, in the background."""
        for worker in self.workers:
            worker.start()

    def close(self, timeout: float | None = None) -> None:
        """Draw what waits, begin nothing new, and free the devices."""
        self.waiting.close()
        for worker in self.workers:
            if worker.is_alive():
                worker.join(timeout)

    @property
    def ready(self) -> bool:
        """Whether a device can draw."""
        return any(worker.ready.is_set() and worker.is_alive() for worker in self.workers) and not self.waiting.closed

    @property
    def failure(self) -> ZimgError | None:
        """Why no device can ever draw."""
        failures = [worker.failure for worker in self.workers]
        return failures[0] if all(failures) else None

    def check_ready(self) -> None:
        """Refuse to draw before the models are open, and after the server was told to end.

        Raises:
            ApiError: 503.
        """
        if self.waiting.closed:
            raise closing()
        if not self.ready:
            raise loading()

    def session(self, model: Model) -> Session:
        """One of the open sessions of a model: all of them draw the same."""
        return next(worker.sessions[model.name] for worker in self.workers if model.name in worker.sessions)

    def drawings(self) -> list[Drawing]:
        """All that is drawn now, and then what waits, in its order."""
        return [worker.current for worker in self.workers if worker.current] + self.waiting.order()

    async def draw(
        self,
        model: Model,
        request: Request,
        *,
        client: str,
        request_id: str = "",
        partial_images: int = 0,
        begun: Callable[[Drawing], object] = lambda drawing: None,
    ) -> AsyncGenerator[Event]:
        """Queue a request, and tell what happens to it; who stops listening cancels it.

        Args:
            model: what draws it.
            request: what to draw.
            client: whose turn it takes.
            request_id: for the log.
            partial_images: previews of each picture.
            begun: called with the drawing once it is queued.

        Raises:
            ApiError: the queue is full, or the server is loading or ending.
            ZimgError: it could not be drawn.
        """
        self.check_ready()
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def tell(event: Event) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(events.put_nowait, event)

        seconds = self.rates.seconds(model.name, request)
        drawing = Drawing(model, request, client, tell, request_id, partial_images, seconds)
        self.waiting.put(drawing)
        try:
            begun(drawing)
            while True:
                event = await events.get()
                if isinstance(event, Failed):
                    raise event.error
                yield event
                if isinstance(event, Done):
                    return
        finally:
            drawing.cancel()
            if self.waiting.remove(drawing):
                self.metrics.dropped(model.name)

    def position(self, drawing: Drawing) -> int:
        """How many are drawn before it; 0 once it is begun."""
        waiting = self.waiting.order()
        return waiting.index(drawing) + 1 if drawing in waiting else 0

    def recorded(self, model: Model, request: Request, picture: int) -> Record:
        """What is written into a picture."""
        return record(self.session(model), request, picture, request.batch)

    async def files(self, model: Model, request: Request, picture: int, pixels: Pixels, answer: Answer) -> list[bytes]:
        """A finished picture as a file, or as several where it was taken apart."""
        return await asyncio.to_thread(self._files, model, request, picture, pixels, answer)

    def _files(self, model: Model, request: Request, picture: int, pixels: Pixels, answer: Answer) -> list[bytes]:
        parameters = self.recorded(model, request, picture)
        pictures = to_pil(pixels if pixels.ndim == 4 else pixels[None])
        try:
            return [encoded(one, answer.kind, parameters, answer.compression) for one in pictures]
        except (OSError, ValueError) as error:
            message = f"{answer.output_format} cannot hold this picture ({error}); ask for png"
            raise ApiError(400, message, param="output_format") from None

    async def preview(self, pixels: Pixels, answer: Answer) -> bytes:
        """A preview as a file."""
        return await asyncio.to_thread(lambda: encoded(to_pil(pixels[None])[0], answer.kind, None, answer.compression))

    def entry(self, data: bytes, answer: Answer, base_url: str) -> dict[str, Any]:
        """A file as OpenAI's answers have it: in base64, or an address where it is kept for a while."""
        if answer.as_url:
            return {"url": f"{base_url}v1/images/{self.store.put(data, answer.media_type)}/content"}
        return {"b64_json": base64.b64encode(data).decode()}

    def usage(self, model: Model, request: Request) -> dict[str, Any]:
        """OpenAI's count of tokens: of the prompt's text, of pictures given, and of those drawn."""
        conditioner = self.session(model).conditioner
        text, given = conditioner.longest(request), conditioner.condition_tokens(request)
        drawn = request.batch * (request.height // 16) * (request.width // 16) * (request.layers or 1)
        return {
            "input_tokens": text + given,
            "input_tokens_details": {"text_tokens": text, "image_tokens": given},
            "output_tokens": drawn,
            "output_tokens_details": {"text_tokens": 0, "image_tokens": drawn},
            "total_tokens": text + given + drawn,
        }
