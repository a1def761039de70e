"""How often the denoiser runs for a picture: once a step in each branch of guidance, where neither is left out."""

from __future__ import annotations

from collections.abc import Iterable

from zimgkit.runtime.caching import cached_share, pieces
from zimgkit.runtime.control_conditions import component_of
from zimgkit.runtime.request import Request
from zimgkit.runtime.session import Session
from zimgkit.runtime.sigmas import sigmas_of


def denoiser_runs(session: Session, request: Request) -> float:
    """How many runs of the whole denoiser the steps of one picture come to.

    A step without guidance has no branch of the negative prompt. A cached step counts for what head and tail are of
    the denoiser, or for nothing where velocities are reused. Where the change decides which steps are full, all count.

    Args:
        session: what draws it.
        request: what is drawn.

    Raises:
        UsageError: the noise levels cannot be shifted.
    """
    sigmas = sigmas_of(request, session.family, session.scheduler)[:-1].tolist()
    guided, always, asked = [*map(request.guides_at, sigmas)], [True] * len(sigmas), request.caching
    if asked is None or asked.threshold is not None:
        return float(len(sigmas) + sum(guided))
    names = pieces(session.bundle, component := component_of(session.bundle, request), session.backend, asked)
    share = cached_share(session.bundle.manifest, component) if names else 0.0
    return _runs(zip(asked.positive, always, strict=True), share) + _runs(
        zip(asked.negative, guided, strict=True), share
    )


def _runs(steps: Iterable[tuple[bool, bool]], share: float) -> float:
    """Of one branch: for each step whether its mask has it full, and whether the branch is computed at all."""
    full = [mask for mask, computed in steps if computed]
    # The first one is full whatever the mask says: there is nothing yet to take over.
    return sum(1.0 if mask or not index else share for index, mask in enumerate(full))
