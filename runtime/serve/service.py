"""What the routers share: the models, and pictures on their way to clients, wherever they are drawn."""

from __future__ import annotations

import base64
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Any

from zimgkit.engines.errors import ZimgError
from zimgkit.runtime.request import Request
from zimgkit.runtime.serve.calls import Answer
from zimgkit.runtime.serve.catalog import Catalog, Model
from zimgkit.runtime.serve.drawing import Drawing
from zimgkit.runtime.serve.errors import closing, loading
from zimgkit.runtime.serve.events import Event
from zimgkit.runtime.serve.fetching import Fetcher
from zimgkit.runtime.serve.metrics import Metrics
from zimgkit.runtime.serve.store import Store


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


class Service(ABC):
    """A server without its HTTP.

    Args:
        catalog: the models.
        limits: what is taken.
        fetcher: of pictures that come as addresses.
    """

    def __init__(self, catalog: Catalog, limits: Limits | None = None, fetcher: Fetcher | None = None) -> None:
        self.catalog, self.limits, self.fetcher = catalog, limits or Limits(), fetcher or Fetcher()
        self.metrics, self.store = Metrics(), Store(self.limits.keep_seconds)

    @abstractmethod
    def start(self) -> None:
        """Open the models, in the background."""

    @abstractmethod
    def close(self) -> None:
        """Draw what waits, begin nothing new, and free the devices."""

    @property
    @abstractmethod
    def ready(self) -> bool:
        """Whether a device can draw."""

    @property
    @abstractmethod
    def closing(self) -> bool:
        """Whether nothing new is begun."""

    @property
    @abstractmethod
    def failure(self) -> ZimgError | None:
        """Why no device can ever draw."""

    @abstractmethod
    def drawings(self) -> list[Drawing]:
        """All that is drawn now, and then what waits, in its order."""

    @abstractmethod
    def draw(
        self,
        model: Model,
        request: Request,
        answer: Answer,
        *,
        client: str,
        request_id: str = "",
        begun: Callable[[Drawing], object] = lambda drawing: None,
    ) -> AsyncGenerator[Event]:
        """Queue a request, and tell what happens until all its pictures are told; who stops listening cancels it.

        Args:
            model: what draws it.
            request: what to draw.
            answer: in which form.
            client: whose turn it takes.
            request_id: for the log.
            begun: called with the drawing once it is queued.

        Raises:
            ApiError: the queue is full, or the server is loading or ending.
            ZimgError: it could not be drawn.
        """

    def check_ready(self) -> None:
        """Refuse to draw before the models are open, and after the server was told to end.

        Raises:
            ApiError: 503.
        """
        if self.closing:
            raise closing()
        if not self.ready:
            raise loading()

    def entry(self, data: bytes, answer: Answer, base_url: str) -> dict[str, Any]:
        """A file as OpenAI's answers have it: in base64, or an address where it is kept for a while."""
        if answer.as_url:
            return {"url": f"{base_url}v1/images/{self.store.put(data, answer.media_type)}/content"}
        return {"b64_json": base64.b64encode(data).decode()}
