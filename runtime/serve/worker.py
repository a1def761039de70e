"""The thread that owns a device: it takes what waits, one request after the other, and draws."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from zimgkit.engines.errors import CancelledError, ZimgError
from zimgkit.runtime.job import Job
from zimgkit.runtime.request import Request, check
from zimgkit.runtime.serve.catalog import Catalog, Model
from zimgkit.runtime.serve.drawing import Done, Drawing, Failed, FinishedPixels, PreviewPixels
from zimgkit.runtime.serve.events import Progress
from zimgkit.runtime.serve.metrics import Metrics
from zimgkit.runtime.serve.rates import Rates
from zimgkit.runtime.serve.tracing import span
from zimgkit.runtime.serve.waiting import Waiting
from zimgkit.runtime.session import Session
from zimgkit.runtime.work import denoiser_runs

LOG = logging.getLogger("zimgkit.serve")
WARM_UP_SIDE = 512
"""Of the picture that is drawn before the first request, where the bundle is for larger ones."""
Open = Callable[[Model], Session]


class Worker(threading.Thread):
    """Draws what waits on one device.

    Args:
        catalog: the models; all are opened and warmed up before anything is drawn.
        waiting: where requests come from; several workers may share it.
        rates: told how long each took.
        metrics: told what happens.
        open_session: opens a model on this worker's device.
        warm_up: whether to draw a picture with each model before the first request.
        device: held while something is drawn, where several workers have one device.
    """

    def __init__(
        self,
        catalog: Catalog,
        waiting: Waiting,
        rates: Rates,
        metrics: Metrics,
        open_session: Open,
        *,
        warm_up: bool = True,
        device: threading.Lock | None = None,
    ) -> None:
        super().__init__(name="zimg-device", daemon=True)
        self._catalog, self._waiting, self._rates, self._metrics = catalog, waiting, rates, metrics
        self._open, self._warm_up = open_session, warm_up
        self._device = device or threading.Lock()
        self._sessions: dict[str, Session] = {}
        self.ready = threading.Event()
        self.failure: ZimgError | None = None
        """What kept it from opening its models."""
        self.current: Drawing | None = None

    @property
    def sessions(self) -> Mapping[str, Session]:
        """Its open models, by name."""
        return self._sessions

    def run(self) -> None:
        """Open the models, then draw until nothing waits and nothing more comes."""
        try:
            self._load()
        except ZimgError as error:
            self.failure = error
            LOG.error("%s", error)
            return
        except Exception as error:
            self.failure = ZimgError(f"internal error: {type(error).__name__}: {error}")
            LOG.exception("a model could not be opened")
            return
        self.ready.set()
        while (drawing := self._waiting.take()) is not None:
            self.current = drawing
            try:
                self._serve(drawing)
            finally:
                self.current = None
        for session in self._sessions.values():
            session.close()

    def _load(self) -> None:
        for model in self._catalog.models.values():
            started = time.monotonic()
            model.bundle.verify()
            session = self._sessions[model.name] = self._open(model)
            if self._warm_up and (request := _warm_up_request(model)):
                self._draw(Drawing(model, request, "", lambda event: None))
            LOG.info("%s is ready after %.1f s, %s", model.name, time.monotonic() - started, session.backend)

    def _serve(self, drawing: Drawing) -> None:
        """Draw one request; whatever goes wrong is its own affair, and the next one is served."""
        name = drawing.model.name
        self._metrics.begun(name, time.monotonic() - drawing.asked)
        outcome = "failed"
        try:
            if drawing.cancelled:
                raise CancelledError("it was cancelled while it waited")
            with self._device:
                self._draw(drawing)
            outcome = "succeeded"
            drawing.tell(Done())
        except CancelledError as error:
            outcome = "cancelled"
            drawing.tell(Failed(error))
        except ZimgError as error:
            LOG.warning("%s: %s", drawing.request_id, error)
            drawing.tell(Failed(error))
        except Exception as error:
            LOG.exception("%s: internal error", drawing.request_id)
            drawing.tell(Failed(error))
        finally:
            drawing.release()
            self._metrics.ended(name, outcome, time.monotonic() - drawing.asked)

    def _draw(self, drawing: Drawing) -> None:
        session, request, name = self._sessions[drawing.model.name], drawing.request, drawing.model.name
        started = time.monotonic()
        with span("encode", drawing.trace, model=name):
            jobs = session.begin(request)
        drawing.under_way(jobs)
        drawing.begun = begun = time.monotonic()
        decoding, previews = 0.0, drawing.preview_steps(len(jobs[0].schedule))
        drawing.tell(Progress(0, drawing.total))
        for group in list(session.groups(jobs)):
            with span("steps", drawing.trace, model=name, pictures=len(group)):
                for step in range(1, len(group[0].schedule) + 1):
                    before = time.monotonic()
                    session.step(group)
                    self._metrics.stepped(name, time.monotonic() - before)
                    drawing.steps += len(group)
                    drawing.tell(Progress(drawing.steps, drawing.total))
                    if step in previews or drawing.preview_wanted:
                        before = time.monotonic()
                        self._preview(session, drawing, group, told=step in previews)
                        decoding += time.monotonic() - before
            before = time.monotonic()
            with span("decode", drawing.trace, model=name, pictures=len(group)):
                for job in group:
                    drawing.tell(FinishedPixels(job.index, session.finish(job)))
            decoding += time.monotonic() - before
        rest = begun - started + decoding
        self._rates.measured(name, request, denoiser_runs(session, request), time.monotonic() - started - rest, rest)

    @staticmethod
    def _preview(session: Session, drawing: Drawing, group: Sequence[Job], told: bool) -> None:
        """Decode the clean latents that pictures aim at now."""
        drawing.preview_wanted = False
        latents = np.concatenate([job.denoised for job in group if job.denoised is not None])
        request = drawing.request
        for job, pixels in zip(group, session.decode(latents, request.height, request.width), strict=True):
            drawing.preview = pixels
            if told:
                drawing.tell(PreviewPixels(job.index, pixels))


def _warm_up_request(model: Model) -> Request | None:
    """A picture of two steps, none where the model draws nothing from a prompt alone."""
    manifest = model.manifest
    if "text-to-image" not in manifest.tasks:
        return None
    side = {name: min(getattr(manifest.defaults, name), WARM_UP_SIDE) // 16 * 16 for name in ("height", "width")}
    try:
        return check(manifest, model.family, prompt="a red circle", num_inference_steps=2, seed=0, **side)
    except ZimgError:
        return None
