"""How long a request will take, from what those before it took."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from zimgkit.runtime.request import Request

NEWEST = 0.3
"""The weight of the newest measurement in the average."""


@dataclass
class _Rate:
    step: float | None = None
    """Seconds of a step of one picture in one branch of guidance, for a million pixels."""
    rest: float = 0.0
    """Seconds of the rest of a picture, for a million pixels."""


class Rates:
    """Seconds of work of each model, averaged; nothing is known of a model before its first picture."""

    def __init__(self) -> None:
        self._rates: dict[str, _Rate] = {}
        self._lock = threading.Lock()

    def seconds(self, model: str, request: Request) -> float:
        """How long a request is likely to take; 0 where nothing is known yet."""
        with self._lock:
            rate = self._rates.get(model)
        if rate is None or rate.step is None:
            return 0.0
        return (
            request.batch
            * _megapixels(request)
            * (request.num_inference_steps * _branches(request) * rate.step + rate.rest)
        )

    def measured(self, model: str, request: Request, steps: int, denoising: float, rest: float) -> None:
        """Take a request's times into the average.

        Args:
            model: which.
            request: what was drawn.
            steps: how many were taken, of all its pictures.
            denoising: seconds these took.
            rest: seconds that encoding and decoding took.
        """
        if not steps:
            return
        size = _megapixels(request)
        step, others = denoising / (steps * _branches(request) * size), rest / (request.batch * size)
        with self._lock:
            rate = self._rates.setdefault(model, _Rate())
            if rate.step is None:
                rate.step, rate.rest = step, others
            else:
                rate.step += NEWEST * (step - rate.step)
                rate.rest += NEWEST * (others - rate.rest)


def _megapixels(request: Request) -> float:
    return request.height * request.width * request.frames / 1e6


def _branches(request: Request) -> float:
    """How often the whole denoiser runs in a step, on the average."""
    asked = request.caching
    if asked is None or asked.threshold is not None:
        return 2 if request.is_guided else 1
    masks = (asked.positive, asked.negative) if request.is_guided else (asked.positive,)
    return sum(sum(mask) / len(mask) for mask in masks)
