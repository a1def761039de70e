"""What ControlNets add to the steps of a request: their pictures encoded once, and their scales in every step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from zimgkit.engines.bundle import Bundle
from zimgkit.runtime.controls import ControlInput, net_of
from zimgkit.runtime.encoding import Encoder
from zimgkit.runtime.families import Family
from zimgkit.runtime.families.base import ControlPictures, Encoded, Feeds
from zimgkit.runtime.inputs import InputPicture
from zimgkit.runtime.job import Conditions, Controls
from zimgkit.runtime.pictures.reading import flattened
from zimgkit.runtime.pictures.resizing import resize
from zimgkit.runtime.request import Request

if TYPE_CHECKING:
    from PIL.Image import Image


def acting(request: Request) -> tuple[ControlInput, ...]:
    """The nets of a request whose scale is not 0."""
    return tuple(one for one in request.controls if one.scale)


def component_of(bundle: Bundle, request: Request) -> str:
    """The denoiser that has the nets of a request; the plain one where none acts."""
    nets = [net_of(bundle.manifest, one.name) for one in acting(request)]
    if not nets:
        return "denoiser"
    return nets[0].component if len(nets) == 1 else nets[0].combines


def controls_of(
    request: Request,
    text: Encoded,
    family: Family,
    bundle: Bundle,
    encoder: Encoder,
    device_of: Callable[[str], str | None],
) -> Controls | None:
    """What the nets of a request add to the steps of one prompt; None where none acts.

    Args:
        request: the call.
        text: the prompt.
        family: of the bundle.
        bundle: an open bundle.
        encoder: makes latents of pictures.
        device_of: component -> where it runs.

    Raises:
        BackendError: an engine failed.
    """
    nets = acting(request)
    if not nets:
        return None
    component = component_of(bundle, request)
    feeds: Feeds = {}
    for one in nets:
        net = net_of(bundle.manifest, one.name)
        encode = partial(encoder.encode_pixels, device=device_of(encoder.COMPONENT))
        given = family.control_inputs(net, _pictures(one, request), encode, text, *request.size)
        feeds |= {f"{name}.{net.name}": value for name, value in given.items()}
    silent = _silent(bundle, component, request, feeds)
    conditions = Conditions(lambda: feeds | silent, component)
    absent = {name: np.zeros(1, np.float32) for name in silent_names(bundle, component, request)}
    return Controls(conditions, nets, absent, tuple(net_of(bundle.manifest, one.name) for one in nets))


def silent_names(bundle: Bundle, component: str, request: Request) -> tuple[str, ...]:
    """The nets of a denoiser that a request does not ask for."""
    asked = {one.name for one in acting(request)}
    has = [net for net in bundle.manifest.controls if component in (net.component, net.combines)]
    return tuple(net.name for net in has if net.name not in asked)


def _silent(bundle: Bundle, component: str, request: Request, feeds: Feeds) -> Feeds:
    """Inputs of nets that do not act: nothing, of the right shape."""
    specs = bundle.component(component).inputs
    sizes: dict[str, int] = {}
    for name, value in feeds.items():
        both = zip(specs[name].shape, value.shape, strict=True)
        sizes |= {key: length for key, length in both if isinstance(key, str)}
    ends = tuple(f".{name}" for name in silent_names(bundle, component, request))
    found: Feeds = {}
    for name, spec in specs.items():
        if ends and name.endswith(ends) and not name.startswith("scale."):
            found[name] = np.zeros([sizes[key] if isinstance(key, str) else key for key in spec.shape], spec.dtype)
    return found


def _pictures(one: ControlInput, request: Request) -> ControlPictures:
    def sized(picture: InputPicture | None) -> Image | None:
        return None if picture is None else resize(flattened(picture.picture), request.width, request.height)

    mask = None if one.mask is None else flattened(one.mask.picture, 0)
    return ControlPictures(sized(one.image), mask, sized(one.inpaint_image), one.exact)
