"""The server on a Ray cluster: a replica draws on each GPU, and one more takes requests to where their model is open.

serve run zimgkit.runtime.serve.ray_app:app bundles=/models/pictures max_replicas=8 api_key_file=/keys
"""

from __future__ import annotations

import asyncio
import math
import os
import threading
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from zimgkit.engines.errors import BackendError, CancelledError, UsageError, ZimgError, install

try:
    from ray import serve
    from ray.exceptions import RayActorError, TaskCancelledError
    from ray.serve.exceptions import BackPressureError, RayServeException
except ImportError as missing:
    raise BackendError(f"serving on a cluster needs {missing.name}", install("ray")) from None

from zimgkit.runtime.request import Request
from zimgkit.runtime.serve.access import Access, read_keys
from zimgkit.runtime.serve.app import create_app
from zimgkit.runtime.serve.bodies import NAMES
from zimgkit.runtime.serve.calls import Answer
from zimgkit.runtime.serve.catalog import Catalog, Model, open_models
from zimgkit.runtime.serve.drawing import Drawing
from zimgkit.runtime.serve.errors import ApiError, queue_full, told
from zimgkit.runtime.serve.events import Event, Finished, Preview, Progress
from zimgkit.runtime.serve.fetching import Fetcher
from zimgkit.runtime.serve.local import LocalService
from zimgkit.runtime.serve.service import Limits, Service
from zimgkit.runtime.session import Session

ATTEMPTS = 3
"""How many replicas may die under one request."""
MOST_REQUESTS, MOST_WAITING = 100, 200
"""At one replica, where they queue by seconds of work, and before all replicas."""
MOST_CONNECTIONS = 1000
"""At once, of the one replica that has them."""
LOAD_SECONDS = 0.05
"""How often it is looked whether a model is open."""

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Nothing phones home.


class Arguments(BaseModel):
    """What ``serve run`` and a RayService's ``args`` may say."""

    model_config = ConfigDict(extra="forbid")

    bundles: list[str] | str = Field(description="As --bundle of zimg-run serve; on each machine.")
    aliases: dict[str, str] = Field(default_factory=dict, description="Another name -> a model's.")
    min_replicas: int = Field(1, ge=0)
    max_replicas: int = Field(1, ge=1)
    gpus: float = Field(1.0, ge=0, description="Of each replica.")
    cpus: float = Field(1.0, ge=0, description="Likewise.")
    models_per_replica: int = Field(1, ge=1, description="How many are open at once.")
    target_seconds: float = Field(30.0, gt=0, description="Of work that a replica may have before another is started.")
    max_queue_seconds: float = Field(600.0, ge=0)
    max_body_mb: int = Field(64, ge=1)
    backend: str = "auto"
    memory: str = "auto"
    warm_up: bool = True
    api_key_file: Path | None = None
    no_auth: bool = False
    allow_origins: list[str] = Field(default_factory=list)
    allow_url_prefixes: list[str] = Field(default_factory=list)

    def catalog(self) -> Catalog:
        """The models, without their weights."""
        return Catalog(open_models([self.bundles] if isinstance(self.bundles, str) else self.bundles), self.aliases)

    def limits(self) -> Limits:
        """What is taken."""
        return Limits(self.max_queue_seconds, self.max_body_mb << 20)


def app(arguments: Arguments) -> Any:
    """The application, for ``serve run`` and RayService.

    Raises:
        ZimgError: a bundle cannot be served, or nobody would be asked for a key.
    """
    if not arguments.api_key_file and not arguments.no_auth:
        hint = "give api_key_file=FILE, or no_auth=true to let everybody in"
        raise UsageError("a cluster can be reached from other machines, and no key is asked for", hint)
    arguments.catalog()  # What is wrong with a bundle is told here, not by replicas that do not start.
    deployed = serve.deployment(
        max_ongoing_requests=MOST_REQUESTS,
        max_queued_requests=MOST_WAITING,
        ray_actor_options={"num_gpus": arguments.gpus, "num_cpus": arguments.cpus},
        autoscaling_config={
            "min_replicas": arguments.min_replicas,
            "max_replicas": arguments.max_replicas,
            "policy": {
                "policy_function": ByWork,
                "policy_kwargs": {"target_seconds": arguments.target_seconds},
            },
        },
    )
    keeping = serve.multiplexed(max_num_models_per_replica=arguments.models_per_replica)
    painter = deployed(type(Painter.__name__, (Painter,), {"model": keeping(Painter.model)}))

    def build() -> Any:
        handle = serve.get_deployment_handle(Painter.__name__, serve.get_replica_context().app_name)
        limits = arguments.limits()
        fetcher = Fetcher(tuple(arguments.allow_url_prefixes), limits.max_body_bytes)
        keys = read_keys(arguments.api_key_file) if arguments.api_key_file else ()
        access = Access(keys, tuple(arguments.allow_origins))
        return create_app(ReplicaService(arguments.catalog(), handle, limits, fetcher), access)

    ingress = serve.deployment(name="Ingress", max_ongoing_requests=MOST_CONNECTIONS)(serve.ingress(build)())
    return ingress.bind(painter.bind(arguments.model_dump(mode="json")))


class Painter:
    """Draws on one device, with as many models open as may be."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self._arguments = Arguments.model_validate(arguments)
        self._catalog = self._arguments.catalog()
        self._services: dict[str, LocalService] = {}
        self._device = threading.Lock()

    async def model(self, name: str) -> _Open:
        """Open a model; Ray keeps some."""
        model = self._catalog.find(name)
        options: dict[str, Any] = {"backend": self._arguments.backend, "memory": self._arguments.memory}
        service = LocalService(
            Catalog([model]),
            [lambda model: Session(model.bundle, **options)],
            self._arguments.limits(),
            warm_up=self._arguments.warm_up,
            device=self._device,
        )
        service.start()
        while not service.ready:
            if service.failure:
                raise service.failure
            await asyncio.sleep(LOAD_SECONDS)
        self._services[name] = service
        return _Open(name, service, self._services)

    async def draw(
        self, name: str, request: Request, answer: Answer, client: str, request_id: str
    ) -> AsyncGenerator[Event | dict[str, Any]]:
        """Tell what happens to a request; what is wrong is told, too, for not every error can travel."""
        try:
            service = (await self.model(name)).service
            model = service.catalog.find(name)
            drawn = service.draw(model, request, answer, client=client, request_id=request_id)
            async with aclosing(drawn) as events:
                async for event in events:
                    yield event
        except CancelledError:
            yield {"cancelled": True}
        except (ApiError, ZimgError) as error:
            yield told(error, NAMES).__dict__

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Seconds of work that are here, for :class:`ByWork`."""
        services = list(self._services.values())
        return {"work_seconds": sum(one.seconds for service in services for one in service.drawings())}


class _Open:
    """A model that is open, until the router lets go of it."""

    def __init__(self, name: str, service: LocalService, services: dict[str, LocalService]) -> None:
        self.name, self.service, self._services = name, service, services

    def __del__(self) -> None:
        self._services.pop(self.name, None)
        self.service.waiting.close()  # What waits is drawn, then its thread frees the device.


class ByWork:
    """As many replicas as it takes for none to have more than so many seconds of work.

    Args:
        target_seconds: how many.
    """

    def __init__(self, target_seconds: float) -> None:
        self._target = target_seconds

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """How many there shall be, and what is to be remembered: nothing."""
        work = sum((context.aggregated_metrics or {}).get("work_seconds", {}).values())
        wanted = max(math.ceil(work / self._target), 1 if context.total_num_requests else 0)
        return min(max(wanted, context.capacity_adjusted_min_replicas), context.capacity_adjusted_max_replicas), {}


class ReplicaService(Service):
    """Draws through replicas.

    Args:
        catalog: the models, of which no weights are read here.
        handle: of the deployment of :class:`Painter`.
        limits: what is taken.
        fetcher: of pictures that come as addresses.
    """

    def __init__(self, catalog: Catalog, handle: Any, limits: Limits | None, fetcher: Fetcher | None) -> None:
        super().__init__(catalog, limits, fetcher)
        self._handle, self._drawings = handle, dict[int, Drawing]()

    def start(self) -> None:
        """Replicas open models when they are asked to draw."""

    def close(self) -> None:
        """Replicas end with the application."""

    @property
    def ready(self) -> bool:
        """Ray queues requests until a replica is there."""
        return True

    @property
    def closing(self) -> bool:
        """Ray drains this replica before it ends it."""
        return False

    @property
    def failure(self) -> ZimgError | None:
        """Replicas fail for themselves."""
        return None

    def drawings(self) -> list[Drawing]:
        """All that were asked for here, the oldest first."""
        return list(self._drawings.values())

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
        """See :meth:`.service.Service.draw`. A request whose replica dies is drawn by another: its seed is known."""
        drawing = Drawing(model, request, client, lambda event: None, request_id)
        self._drawings[drawing.number] = drawing
        sent: set[int] = set()
        try:
            begun(drawing)
            for attempt in range(1, ATTEMPTS + 1):
                try:
                    async with aclosing(self._attempt(drawing, answer)) as events:
                        async for event in events:
                            if isinstance(event, Progress):
                                drawing.update(event)
                            if isinstance(event, Finished | Preview) and event.picture in sent:
                                continue
                            if isinstance(event, Finished):
                                sent.add(event.picture)
                            yield event
                    return
                except RayActorError:
                    if attempt == ATTEMPTS:
                        message = f"{ATTEMPTS} replicas ended while they drew this"
                        raise ApiError(500, message, code="replica_died", kind="server_error") from None
        finally:
            drawing.cancel()
            del self._drawings[drawing.number]

    async def _attempt(self, drawing: Drawing, answer: Answer) -> AsyncGenerator[Event]:
        handle = self._handle.options(stream=True, multiplexed_model_id=drawing.model.name)
        response = handle.draw.remote(drawing.model.name, drawing.request, answer, drawing.client, drawing.request_id)
        try:
            async for event in response:
                if drawing.cancelled:
                    raise CancelledError("it was cancelled")
                if isinstance(event, dict):
                    if event.pop("cancelled", False):
                        raise CancelledError("it was cancelled")
                    raise ApiError(**event)
                yield event
        except BackPressureError:
            raise queue_full(self.limits.max_queue_seconds, 30) from None
        except (RayServeException, TaskCancelledError) as error:
            message = "no replica can draw now; try again in a moment"
            raise ApiError(503, message, kind="server_error", code="no_replica", retry_after=5) from error
        finally:
            with suppress(Exception):  # It may have ended by itself.
                response.cancel()
