"""How long a request will take, from what those before it took."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from zimgkit.runtime.request import Request

NEWEST = 0.3
"""The weight of the newest measurement in the average."""


@dataclass
class _Rate:
    run: float | None = None
    """Seconds of a run of the denoiser for one picture, for a million pixels."""
    rest: float = 0.0
    """Seconds of the rest of a picture, for a million pixels."""


class Rates:
    """Seconds of work of each model, averaged; nothing is known of a model before its first picture."""

    def __init__(self) -> None:
        self._rates: dict[str, _Rate] = {}
        self._lock = threading.Lock()

    def seconds(self, model: str, request: Request, runs: float) -> float:
        """How long a request is likely to take; 0 where nothing is known yet.

        Args:
            model: which.
            request: what is to be drawn.
            runs: of the denoiser for each picture, see :func:`zimgkit.runtime.work.denoiser_runs`.
        """
        with self._lock:
            rate = self._rates.get(model)
        if rate is None or rate.run is None:
            return 0.0
        return request.batch * _megapixels(request) * (runs * rate.run + rate.rest)

    def measured(self, model: str, request: Request, runs: float, denoising: float, rest: float) -> None:
        """Take a request's times into the average.

        Args:
            model: which.
            request: what was drawn.
            runs: of the denoiser for each picture.
            denoising: seconds that the steps of all pictures took.
            rest: seconds that encoding and decoding took.
        """
        if not runs:
            return
        size = request.batch * _megapixels(request)
        run, others = denoising / (runs * size), rest / size
        with self._lock:
            rate = self._rates.setdefault(model, _Rate())
            if rate.run is None:
                rate.run, rate.rest = run, others
            else:
                rate.run += NEWEST * (run - rate.run)
                rate.rest += NEWEST * (others - rate.rest)


def _megapixels(request: Request) -> float:
    return request.height * request.width * request.frames / 1e6
