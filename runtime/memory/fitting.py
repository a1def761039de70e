"""Whether a picture fits the memory there is, and what would fit where it does not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

from zimgkit.engines.base import BACKENDS
from zimgkit.engines.bundle import Bundle
from zimgkit.engines.errors import OutOfMemoryError, UsageError
from zimgkit.runtime.families import Family
from zimgkit.runtime.memory.amounts import gigabytes, parse_budget
from zimgkit.runtime.memory.machine import UNLIMITED, free_memory
from zimgkit.runtime.memory.needs import (
    BYTES,
    CONVOLUTIONS,
    DENOISER,
    ENCODER,
    PICTURES,
    VISION,
    Need,
    device_needs,
    host_needs,
    on_host,
    precision_of,
    residual_bytes,
    stored_bytes,
    widened_bytes,
    with_branches,
    with_scores,
)
from zimgkit.runtime.memory.plan import ALLOWED, Budget, Plan, Shortage, plan

MULTIPLE = 16
"""Sides of pictures are multiples of it."""
ON_HOST = {"onnxruntime": "onnxruntime", "torch": "torch", "openvino": "openvino"}
"""Backends that compute in the host's memory -> the package that each needs. Those that keep no copy of weights come
first, of them the faster one."""
SMALLER = ("bfloat16", "int8-weights", "int4-weights")
"""Precisions that a bundle could have instead, the best first."""
OPTION = {"bfloat16": "bf16"}
"""What ``zimg-export build --precision`` calls them, where that differs."""


@dataclass(frozen=True)
class Picture:
    """What is asked for."""

    height: int
    width: int
    tokens: int
    """Of the longest prompt, template included."""
    batch: int = 1
    """How many are denoised together."""
    encoded: tuple[int, int] | None = None
    """Height and width of the largest picture that the VAE encoder reads for it."""
    patches: int = 0
    """Of the largest picture that the vision encoder reads."""
    conditions: int = 0
    """Tokens of pictures beside it."""
    frames: int = 1
    """How many pictures are drawn together as one."""
    denoiser: str = "denoiser"
    """The component that denoises: one with ControlNets has their weights too."""
    alternates: bool = False
    """Whether the plain one is open beside it."""
    pieces: tuple[str, ...] = ()
    """What is open in its place where there is a cache."""
    residuals: int = 0
    """How many of them that keeps."""


@dataclass(frozen=True)
class Setting:
    """Where it is made."""

    bundle: Bundle
    family: Family
    backend: str
    host: bool
    """Whether it computes in the host's memory."""
    vae_tiling: str = "auto"
    tiles_are_served: bool = True
    """Whether the VAE takes tiles: one that is compiled has its shape profiles."""
    in_turn: bool = False
    """Whether engines are opened in turn, whatever fits."""


def setting(bundle: Bundle, family: Family, backend: str, device: str | None, **more: Any) -> Setting:
    """Where a picture is made, by the name of the device."""
    return Setting(bundle, family, backend, on_host(backend, device), **more)


def budget_of(memory: str | int | None, *, host: bool, addresses: int = 0, held: int = 0) -> Budget:
    """How much memory a picture may take now.

    Args:
        memory: what the user allows; see :func:`~zimgkit.runtime.memory.amounts.parse_budget`.
        host: whether it computes in the host's memory.
        addresses: bytes of the address space that engines which are open now take.
        held: bytes that they hold, mapped files left out.

    Returns:
        What bounds it. On a device only the user does: a full one says so when it is.

    Raises:
        UsageError: ``memory`` is no amount.
    """
    free = free_memory()
    if not host and str(memory).strip().endswith("%"):
        raise UsageError(f"memory is {memory!r}", "of a device nobody knows how much is free: give an amount, as 8GB")
    total = parse_budget(memory, free.memory + held) or UNLIMITED
    if not host:
        return Budget(total)
    return Budget(total, free.memory + held, free.limit, free.address_space + addresses)


def fit(where: Setting, picture: Picture, budget: Budget) -> Plan:
    """How a picture is made within its budget.

    Raises:
        OutOfMemoryError: it cannot be; naming what would fit.
        UsageError: the VAE has to take tiles, and was compiled for other sizes.
    """
    found = try_to_fit(where, picture, budget)
    if isinstance(found, Plan):
        return found
    if found.source == ALLOWED:
        bound = f"memory={gigabytes(found.available)} is allowed"
    else:
        bound = f"{gigabytes(found.available)} are {found.source}"
    size = f"{picture.width}x{picture.height}"
    message = f"{size} takes {gigabytes(found.needed)} for the {found.component} alone, and {bound}"
    choices = list(choices_that_fit(where, picture, budget))
    raise OutOfMemoryError(
        message, f"what fits: {', or '.join(choices)}" if choices else _least(where, picture, budget)
    )


def try_to_fit(where: Setting, picture: Picture, budget: Budget, precision: str | None = None) -> Plan | Shortage:
    """As :func:`fit`, of this precision or another; a :class:`Shortage` where it does not."""
    found = _try_to_fit(where, picture, budget, precision)
    if isinstance(found, Plan) or where.backend != "onnxruntime" or not where.host or where.bundle.in_place:
        return found
    return _try_to_fit(replace(where, bundle=replace(where.bundle, in_place=True)), picture, budget, precision)


def _try_to_fit(where: Setting, picture: Picture, budget: Budget, precision: str | None) -> Plan | Shortage:
    tiling = where.family.TILING
    larger = picture if tiling.cuts(picture.height, picture.width) else _of_encoder(picture)
    cuts = tiling.cuts(larger.height, larger.width) and where.vae_tiling != "off"
    if cuts and where.vae_tiling == "on" and not where.tiles_are_served:
        height, width = tiling.tile(larger.height, larger.width)
        hint = f"compile it for tiles: zimg-export compile {where.bundle.root} --size {width}x{height} --size …"
        raise UsageError(f"the VAE was not compiled for tiles of {width}x{height}", hint)
    whole = needs_in(where, picture, precision)
    tiled = None
    if cuts and where.tiles_are_served:
        height, width = tiling.tile(picture.height, picture.width)
        encoded = tiling.tile(*picture.encoded) if picture.encoded else None
        of_tile = needs_in(where, replace(picture, height=height, width=width, encoded=encoded), precision)
        tiled = whole | {name: of_tile[name] for name in CONVOLUTIONS & whole.keys()}
    if where.vae_tiling == "on" and tiled:
        whole = {}
    found = plan(whole, tiled, budget, in_turn=where.in_turn)
    return replace(found, in_place=where.bundle.in_place) if isinstance(found, Plan) else found


def needs_in(where: Setting, picture: Picture, precision: str | None = None) -> dict[str, Need]:
    """What each component takes for the whole picture, of this precision or another."""
    needs = with_branches(where.bundle, _needs_of_all(where, picture, precision))
    if picture.encoded is not None and ENCODER in needs:
        needs[ENCODER] = _needs_of_all(where, _of_encoder(picture), precision)[ENCODER]
    unused = {ENCODER} if picture.encoded is None else set()
    unused |= {VISION, PICTURES} if not picture.patches else set()
    return {name: need for name, need in needs.items() if name not in unused}


def _of_encoder(picture: Picture) -> Picture:
    """Of the size that the VAE encoder reads, where it reads one."""
    height, width = picture.encoded or (picture.height, picture.width)
    return replace(picture, height=height, width=width)


def _needs_of_all(where: Setting, picture: Picture, precision: str | None) -> dict[str, Need]:
    needs, sizes = _needs_without_a_cache(where, picture, precision)
    kept = picture.residuals * residual_bytes(where.family, sizes, picture.batch)
    return needs | {DENOISER: replace(needs[DENOISER], working=needs[DENOISER].working + kept)}


def _needs_without_a_cache(
    where: Setting, picture: Picture, precision: str | None
) -> tuple[dict[str, Need], dict[str, int]]:
    """What each component takes, and the dynamic dimensions."""
    lengths = (picture.height, picture.width, picture.tokens, picture.conditions, picture.frames)
    sizes = where.family.dynamic_dimensions(*lengths) | {"patches": picture.patches}
    if picture.frames > 1:
        sizes["planes"] = 4 * (picture.frames - 1)
    if not where.host:
        denoiser = picture.pieces or (picture.denoiser,)
        return device_needs(where.bundle, where.family, where.backend, sizes, picture.batch, denoiser), sizes
    manifest = where.bundle.manifest
    stored = stored_bytes(manifest, precision, picture.denoiser)
    own = precision or precision_of(manifest)
    widened = {} if precision else widened_bytes(manifest, where.backend)
    scores = set() if precision else with_scores(manifest, where.backend)
    in_place = where.bundle.in_place and where.backend == "onnxruntime"
    needs = host_needs(
        stored, own, where.family, where.backend, sizes, picture.batch, widened, scores, in_place=in_place
    )
    if picture.alternates:
        # What it maps are files that the other has mapped too.
        plain = replace(picture, denoiser=DENOISER, alternates=False)
        other = _needs_of_all(where, plain, precision)[DENOISER]
        needs[DENOISER] = replace(needs[DENOISER], held=needs[DENOISER].held + other.held)
    return needs, sizes


def choices_that_fit(where: Setting, picture: Picture, budget: Budget) -> Iterator[str]:
    """What could be asked for instead, each in words: tiles, another backend, a smaller size, another precision."""

    def fits(other: Setting, size: Picture = picture, precision: str | None = None) -> bool:
        return isinstance(try_to_fit(other, size, budget, precision), Plan)

    if where.vae_tiling == "off" and fits(replace(where, vae_tiling="auto")):
        yield "vae_tiling=auto"
    if where.host:
        for backend, package in ON_HOST.items():
            other = replace(where, backend=backend)
            if backend == "openvino" and precision_of(where.bundle.manifest) == "fp8":
                continue  # It has no kernels for that.
            if backend != where.backend and backend in BACKENDS and find_spec(package) and fits(other):
                yield f"--backend {backend}"
                break
    for size in smaller(picture):
        if fits(where, size):
            yield f"{size.width}x{size.height}"
            break
    if where.host:
        own = BYTES.get(precision_of(where.bundle.manifest), 0.0)
        for precision in SMALLER:
            if BYTES[precision] < own and fits(where, picture, precision):
                yield f"a bundle built with --precision {OPTION.get(precision, precision)}"
                break


def choices_that_take_less(where: Setting, picture: Picture) -> str:
    """Likewise where a picture should have fitted and did not: what takes three quarters of it at the most."""
    found = try_to_fit(replace(where, in_turn=True), picture, Budget())
    if not isinstance(found, Plan):
        return ""
    choices = choices_that_fit(where, picture, Budget(total=int(0.75 * found.peak)))
    return ", or ".join(choices)


def smaller(picture: Picture) -> Iterator[Picture]:
    """Smaller pictures of nearly the same shape, the largest first, down to 256 pixels."""
    short, long = sorted((picture.height, picture.width))
    for side in range(short - MULTIPLE, 255, -MULTIPLE):
        other = max(MULTIPLE, round(long * side / short / MULTIPLE) * MULTIPLE)
        height, width = (side, other) if picture.height <= picture.width else (other, side)
        # What is drawn from another picture has its size; those that are edited keep their own.
        is_own = picture.encoded == (picture.height, picture.width)
        encoded = (height, width) if is_own else picture.encoded
        yield replace(picture, height=height, width=width, encoded=encoded)


def _least(where: Setting, picture: Picture, budget: Budget) -> str:
    """How much memory is needed at the least."""
    small = next(reversed(list(smaller(picture))), picture)
    found = try_to_fit(where, small, budget)
    least = found.needed if isinstance(found, Shortage) else found.peak
    return f"it takes {gigabytes(least)} at the least, for {small.width}x{small.height}"


def line(found: Plan, tiling: object) -> str:
    """A plan in one line."""
    bound = f" of {gigabytes(found.budget.bound)}" if found.budget.bound < UNLIMITED else ""
    parts = [f"memory: at most {gigabytes(found.peak)}{bound}"]
    if found.stay:
        parts.append(f"{', '.join(found.stay)} stay open")
    if found.in_turn:
        parts.append(f"{', '.join(found.in_turn)} opened in turn")
    if found.tiled:
        parts.append(f"the VAE takes tiles ({tiling})")
    if found.in_place:
        parts.append("ONNX Runtime makes no copies of weights, which is slower")
    if found.rereads:
        parts.append(f"the weights of {', '.join(found.rereads)} are read again in every run")
    return "; ".join(parts)


def summary(found: Plan, tiling: object) -> dict[str, Any]:
    """A plan for machines; amounts are in bytes, None where nothing bounds them."""
    return {
        "budget": found.budget.bound if found.budget.bound < UNLIMITED else None,
        "peak": found.peak,
        "stay": list(found.stay),
        "in_turn": list(found.in_turn),
        "vae_tiling": str(tiling) if found.tiled else None,
        "in_place": found.in_place,
        "read_again": list(found.rereads),
    }
