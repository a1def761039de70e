"""A service whose devices are this process's own: a thread for each."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from zimgkit.engines.errors import ZimgError
from zimgkit.runtime.pictures.saving import encoded, to_pil
from zimgkit.runtime.recording import record
from zimgkit.runtime.request import Request
from zimgkit.runtime.serve import drawing as told
from zimgkit.runtime.serve.calls import Answer
from zimgkit.runtime.serve.catalog import Catalog, Model
from zimgkit.runtime.serve.drawing import Drawing
from zimgkit.runtime.serve.errors import ApiError
from zimgkit.runtime.serve.events import Event, Finished, Preview, Progress, Queued
from zimgkit.runtime.serve.fetching import Fetcher
from zimgkit.runtime.serve.rates import Rates
from zimgkit.runtime.serve.service import Limits, Service
from zimgkit.runtime.serve.waiting import Waiting
from zimgkit.runtime.serve.worker import Open, Worker
from zimgkit.runtime.session import Session
from zimgkit.runtime.work import denoiser_runs

LOOK_SECONDS = 0.25
"""How often it is looked whether the place in the queue has changed."""


class LocalService(Service):
    """Draws on this machine's devices.

    Args:
        catalog: the models.
        devices: for each device a function that opens a model there.
        limits: what is taken.
        fetcher: of pictures that come as addresses.
        warm_up: whether each model draws a picture before the first request.
        device: held while something is drawn, where several services have one device.
    """

    def __init__(
        self,
        catalog: Catalog,
        devices: Sequence[Open],
        limits: Limits | None = None,
        fetcher: Fetcher | None = None,
        *,
        warm_up: bool = True,
        device: threading.Lock | None = None,
    ) -> None:
        super().__init__(catalog, limits, fetcher)
        self.rates, self.waiting = Rates(), Waiting(self.limits.max_queue_seconds)
        make = partial(Worker, catalog, self.waiting, self.rates, self.metrics, warm_up=warm_up, device=device)
        self.workers = [make(open_session) for open_session in devices]
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

    def close(self) -> None:
        """Draw what waits, begin nothing new, and free the devices."""
        self.waiting.close()
        for worker in self.workers:
            if worker.is_alive():
                worker.join()

    @property
    def ready(self) -> bool:
        """Whether a device can draw."""
        return any(worker.ready.is_set() and worker.is_alive() for worker in self.workers) and not self.closing

    @property
    def closing(self) -> bool:
        """Whether nothing new is begun."""
        return self.waiting.closed

    @property
    def failure(self) -> ZimgError | None:
        """Why no device can ever draw."""
        failures = [worker.failure for worker in self.workers]
        return failures[0] if all(failures) else None

    def drawings(self) -> list[Drawing]:
        """All that is drawn now, and then what waits, in its order."""
        return [worker.current for worker in self.workers if worker.current] + self.waiting.order()

    async def draw(
        self,
        model: Model,
        request: Request,
        answer: Answer,
        *,
        client: str,
        request_id: str = "",
        begun: Callable[[Drawing], object] = lambda drawing: None,
    ) -> AsyncGenerator[Event]:
        """See :meth:`.service.Service.draw`."""
        self.check_ready()
        loop, events = asyncio.get_running_loop(), asyncio.Queue[told.Event]()

        def tell(event: told.Event) -> None:
            with suppress(RuntimeError):  # The loop has ended, and nobody listens.
                loop.call_soon_threadsafe(events.put_nowait, event)

        seconds = self.rates.seconds(model.name, request, denoiser_runs(self._session(model), request))
        drawing = Drawing(model, request, client, tell, request_id, answer.partial_images, seconds)
        self.waiting.put(drawing)
        coming, position = asyncio.ensure_future(events.get()), 0
        try:
            begun(drawing)
            while True:
                while answer.progress and not (await asyncio.wait({coming}, timeout=LOOK_SECONDS))[0]:
                    if (now := self._position(drawing)) and now != position:
                        position = now
                        yield Queued(position)
                event = await coming
                if isinstance(event, told.Failed):
                    raise event.error
                if isinstance(event, told.Done):
                    return
                coming = asyncio.ensure_future(events.get())
                if isinstance(event, Progress):
                    yield event
                else:
                    yield await asyncio.to_thread(self._file, model, request, answer, event)
        finally:
            coming.cancel()
            drawing.cancel()
            if self.waiting.remove(drawing):
                self.metrics.dropped(model.name)

    def _position(self, drawing: Drawing) -> int:
        """Which it is of those that wait; 0 once it is begun."""
        waiting = self.waiting.order()
        return waiting.index(drawing) + 1 if drawing in waiting else 0

    def _file(
        self, model: Model, request: Request, answer: Answer, event: told.PreviewPixels | told.FinishedPixels
    ) -> Event:
        """Pixels in the form in which they are sent."""
        if isinstance(event, told.PreviewPixels):
            return Preview(event.picture, encoded(to_pil(event.pixels[None])[0], answer.kind, None, answer.compression))
        session = self._session(model)
        parameters = record(session, request, event.picture, request.batch)
        pictures = to_pil(event.pixels if event.pixels.ndim == 4 else event.pixels[None])
        try:
            files = tuple(encoded(one, answer.kind, parameters, answer.compression) for one in pictures)
        except (OSError, ValueError) as error:
            message = f"{answer.output_format} cannot hold this picture ({error}); ask for png"
            raise ApiError(400, message, param="output_format") from None
        return Finished(event.picture, files, parameters.to_text(), _usage(session, request))

    def _session(self, model: Model) -> Session:
        """One of the open sessions of a model: all of them draw the same."""
        return next(worker.sessions[model.name] for worker in self.workers if model.name in worker.sessions)


def _usage(session: Session, request: Request) -> dict[str, Any]:
    """OpenAI's count of tokens: of the prompt's text, of pictures given, and of those drawn."""
    conditioner = session.conditioner
    text, given = conditioner.longest(request), conditioner.condition_tokens(request)
    drawn = request.batch * (request.height // 16) * (request.width // 16) * (request.layers or 1)
    return {
        "input_tokens": text + given,
        "input_tokens_details": {"text_tokens": text, "image_tokens": given},
        "output_tokens": drawn,
        "output_tokens_details": {"text_tokens": 0, "image_tokens": drawn},
        "total_tokens": text + given + drawn,
    }
