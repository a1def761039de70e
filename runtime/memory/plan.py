"""What stays open and what is opened in turn, so that a picture fits: plain numbers in, data out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from zimgkit.runtime.memory.machine import UNLIMITED
from zimgkit.runtime.memory.needs import BASE, Need

ALLOWED = "allowed"
"""Of the user's own bound."""
BASE_ADDRESSES = 512 << 20
"""Bytes of address space that libraries and the stacks and heaps of threads take beside the memory they use."""


@dataclass(frozen=True)
class Budget:
    """How much memory a picture may take, in bytes. What engines that are open now hold is part of it."""

    total: int = UNLIMITED
    """In all, weights in mapped files included: what the user allows."""
    own: int = UNLIMITED
    """Of what nobody can take back: what is free."""
    limit: str = ""
    """What sets that, in words."""
    address_space: int = UNLIMITED
    """Likewise with mapped files: the process's own limit."""

    @property
    def bound(self) -> int:
        """The smaller one of what is allowed and what is free."""
        return min(self.total, self.own)


@dataclass(frozen=True)
class Plan:
    """How a picture is made within its budget."""

    budget: Budget
    stay: tuple[str, ...]
    """Components whose engines stay open for the next picture."""
    in_turn: tuple[str, ...]
    """Those whose engines are closed when they are done."""
    tiled: bool
    """Whether the VAE takes tiles."""
    peak: int
    """The most memory it takes, in bytes, weights in mapped files included."""
    rereads: tuple[str, ...] = ()
    """Components whose weights do not all fit: they are read from the disk again in every run."""
    in_place: bool = False
    """Whether engines are to compute on mapped weights, for the copies that are faster to compute with do not fit."""
    alternates: bool = False
    """Whether the plain denoiser is open beside the one with ControlNets, for the steps in which none acts."""


@dataclass(frozen=True)
class Shortage:
    """Why a picture does not fit."""

    component: str
    """What takes the most."""
    needed: int
    """Bytes, of what is short."""
    available: int
    source: str
    """What becomes of that: allowed, or free."""


def opened_bytes(need: Need) -> int:
    """What an open engine takes, files included."""
    return need.opened


def held_bytes(need: Need) -> int:
    """Likewise without files, whose memory the system takes back where it is short."""
    return need.held


def addressed_bytes(need: Need) -> int:
    """What it takes of the address space."""
    return need.addresses


def peak_of(needs: Mapping[str, Need], stay: Collection[str], size: Callable[[Need], int]) -> tuple[int, str]:
    """The most memory that is taken at one time, and by which component.

    Args:
        needs: by component, in the order they run.
        stay: those that are open all the time.
        size: what an open engine counts for.
    """
    always = sum(size(needs[name]) for name in stay)
    peaks = {name: always + (0 if name in stay else size(need)) + need.working for name, need in needs.items()}
    most = max(peaks, key=peaks.__getitem__)
    return BASE + peaks[most], most


def plan(
    whole: Mapping[str, Need],
    tiled: Mapping[str, Need] | None,
    budget: Budget,
    *,
    in_turn: bool = False,
) -> Plan | Shortage:
    """Choose what stays open, and whether the picture is decoded in tiles.

    The whole decode is preferred to all else, for its picture is the reference's; then as many engines stay open as
    fit. Those used first in a picture are the first to be opened in turn.

    Args:
        whole: what each component takes, in the order they run; empty where the picture has to be decoded in tiles.
        tiled: likewise with tiles; None where it cannot be.
        budget: what there is.
        in_turn: let nothing stay open, whatever fits.
    """
    ways = [(needs, is_tiled) for needs, is_tiled in ((whole, False), (tiled or {}, True)) if needs]
    names = tuple(ways[0][0])
    short = Shortage("", 0, 0, "")
    for needs, is_tiled in ways:
        for first in range(len(names) if in_turn else 0, len(names) + 1):
            stay = names[first:]
            found = shortage(needs, stay, budget)
            if found is None:
                peak = peak_of(needs, stay, opened_bytes)[0]
                rereads = tuple(name for name, need in needs.items() if need.opened + need.working > budget.bound)
                return Plan(budget, stay, names[:first], is_tiled, peak, rereads)
            short = found
    return short


def shortage(needs: Mapping[str, Need], stay: Collection[str], budget: Budget) -> Shortage | None:
    """What there is too little of while these engines stay open; None where all fits."""
    bounds = (
        (budget.total, ALLOWED, opened_bytes, 0),
        (budget.own, f"free ({budget.limit})", held_bytes, 0),
        (budget.address_space, "left of RLIMIT_AS", addressed_bytes, BASE_ADDRESSES),
    )
    for available, source, size, base in bounds:
        needed, component = peak_of(needs, stay, size)
        if needed + base > available:
            return Shortage(component, needed + base, available, source)
    return None
