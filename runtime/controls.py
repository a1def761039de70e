"""The ControlNets of a call: which act, with which pictures, how strongly and in which steps.

A call says it in one of three ways: ``controls``; diffusers' ``control_image`` with lists beside it, whose windows are
shares of the steps; or DiffSynth-Studio's ``controlnet_inputs``, whose windows count down from 1 to 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from zimgkit.engines.bundle import Control, Manifest
from zimgkit.engines.errors import UsageError
from zimgkit.runtime.inputs import InputPicture, Inputs, read_input
from zimgkit.runtime.parameters import Parameter, checked

OF_DIFFUSERS = ("controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end", "control_mask")
"""What diffusers says of ``control_image``."""
WAYS = ("controls", "control_image", "control_images", "controlnet_inputs", "blockwise_controlnet_inputs")
"""Ways to say it, of which a call takes one."""
PICTURES = ("image", "mask", "inpaint_image")
NUMBERS = {
    "scale": Parameter("scale", float, "How strongly it acts.", low=-100, high=100),
    "start": Parameter("start", float, "Where it begins to act.", low=0, high=1),
    "end": Parameter("end", float, "Where it ceases to.", low=0, high=1),
}
KEYS = ("name", *PICTURES, *NUMBERS, "counts_down")
TOLERANCE = 1e-4
"""On windows that count down, as in DiffSynth-Studio."""
HINT = "build one with zimg-export build --controlnet, or add a net: zimg-export add-controlnet BUNDLE FILE"


@dataclass(frozen=True)
class ControlInput:
    """One net of a call."""

    name: str
    image: InputPicture | None = None
    mask: InputPicture | None = None
    """White where the picture is drawn anew."""
    inpaint_image: InputPicture | None = None
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    counts_down: bool = False
    """Whether the window is that of DiffSynth-Studio: of a number that falls from 1 in the first step to 0 in the last.
    """

    def acts(self, step: int, steps: int) -> bool:
        """Whether it acts in a step, from 0, of so many."""
        if not self.scale:
            return False
        if self.counts_down:
            progress = (steps - 1 - step) / max(steps - 1, 1)
            return self.end - TOLERANCE <= progress <= self.start + TOLERANCE
        return not (step / steps < self.start or (step + 1) / steps > self.end)

    @property
    def is_windowed(self) -> bool:
        """Whether there may be steps in which it does not act."""
        return abs(self.end - self.start) < 1

    @property
    def exact(self) -> bool:
        """Whether its pictures have to have the size that is drawn: DiffSynth-Studio resizes masks alone."""
        return self.counts_down


def read_controls(manifest: Manifest, inputs: Inputs, given: Mapping[str, Any]) -> tuple[ControlInput, ...]:
    """Read what a call says of ControlNets.

    Args:
        manifest: of the bundle.
        inputs: what it says of other pictures.
        given: the call's arguments, by name.

    Raises:
        UsageError: a net that the bundle has not, pictures that it does not take, or numbers out of range.
    """
    ways = [name for name in WAYS if name in given]
    said = [*ways, *(name for name in OF_DIFFUSERS if name in given)]
    if not said:
        return ()
    if not manifest.controls:
        raise UsageError(f"{said[0]} is given, and this bundle has no ControlNet", HINT)
    if len(ways) > 1:
        raise UsageError(f"{' and '.join(ways)} are both given", "give only one of them")
    if not ways:
        raise UsageError(f"{said[0]} is given, and no control_image", "give the pictures as control_image")
    if said[1:] and ways[0] not in WAYS[1:3]:
        raise UsageError(f"{said[1]} is given beside {ways[0]}", f"say it in {ways[0]}")
    for other in ("references", "layered", "context_image", "eligen_entity_prompts"):
        if getattr(inputs, other):
            raise UsageError("a ControlNet is asked for beside pictures to edit, layers or regions", "give one of them")
    value = given[ways[0]]
    if ways[0] in WAYS[1:3]:
        entries = _of_diffusers(manifest, value, given)
    elif ways[0] == "controls":
        entries = [_mapping(entry, "controls") for entry in _several(value)]
    else:
        entries = [_of_diffsynth(manifest, entry, ways[0]) for entry in _several(value)]
    found = tuple(_checked(manifest, entry) for entry in entries)
    _check_together(manifest, found)
    return found


def net_of(manifest: Manifest, name: Any) -> Control:
    """The bundle's net of this name.

    Raises:
        UsageError: it has none.
    """
    for control in manifest.controls:
        if control.name == name:
            return control
    raise UsageError(f"this bundle has no ControlNet {name!r}", f"it has {_names(manifest)}")


def _of_diffusers(manifest: Manifest, value: Any, given: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Entries of pictures with lists beside them."""
    pictures = _by_net(manifest, "control_image", value)
    masks = _by_net(manifest, "control_mask", given["control_mask"]) if "control_mask" in given else {}
    if stray := [name for name in masks if name not in pictures]:
        raise UsageError(f"control_mask has a mask for {stray[0]}, and control_image no picture", "give both")
    entries = [
        {"name": name, "image": picture, **({"mask": masks[name]} if name in masks else {})}
        for name, picture in pictures.items()
    ]
    for key, name in zip(NUMBERS, OF_DIFFUSERS, strict=False):
        if name in given:
            numbers = given[name]
            each = list(numbers) if isinstance(numbers, Sequence) else [numbers] * len(entries)
            if len(each) != len(entries):
                hint = "give one number, or one for each"
                raise UsageError(f"{name} has {len(each)} numbers for {len(entries)} pictures", hint)
            for entry, number in zip(entries, each, strict=True):
                entry[key] = number
    return entries


def _by_net(manifest: Manifest, argument: str, value: Any) -> dict[str, Any]:
    """Net -> its picture, of one picture, of several in the order of the nets, or of a mapping by their names."""
    if isinstance(value, Mapping):
        return {net_of(manifest, name).name: picture for name, picture in value.items()}
    pictures = list(value) if isinstance(value, list | tuple) else [value]
    if len(pictures) > len(manifest.controls):
        hint = f"it has {_names(manifest)}"
        raise UsageError(f"{argument} has {len(pictures)} pictures, more than this bundle has ControlNets", hint)
    nets = zip(manifest.controls, pictures, strict=False)
    return {control.name: picture for control, picture in nets if picture is not None}


def _of_diffsynth(manifest: Manifest, entry: Any, argument: str) -> dict[str, Any]:
    """An entry of a ``ControlNetInput``, or of a mapping with its keys."""
    said = dict(entry) if isinstance(entry, Mapping) else {**vars(entry)} if hasattr(entry, "__dict__") else None
    if said is None:
        raise UsageError(f"{argument} has {entry!r:.60}", "give mappings, or objects, with image and scale")
    said.pop("processor_id", None)
    number = said.pop("controlnet_id", 0)
    if not isinstance(number, int) or not 0 <= number < len(manifest.controls):
        raise UsageError(f"controlnet_id is {number!r}", f"this bundle has {_names(manifest)}, from 0 on")
    renamed = {"inpaint_mask": "mask"}
    named = {renamed.get(key, key): value for key, value in said.items() if value is not None}
    return {"start": 1.0, "end": 0.0, **named, "name": manifest.controls[number].name, "counts_down": True}


def _mapping(entry: Any, argument: str) -> dict[str, Any]:
    if isinstance(entry, ControlInput):
        return {key: getattr(entry, key) for key in KEYS if getattr(entry, key) is not None}
    if not isinstance(entry, Mapping):
        raise UsageError(f"{argument} has {entry!r:.60}", f"give mappings with {', '.join(KEYS)}")
    return {key: value for key, value in entry.items() if value is not None}


def _several(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else [value]


def _checked(manifest: Manifest, entry: Mapping[str, Any]) -> ControlInput:
    """One entry, against what its net takes."""
    if unknown := [key for key in entry if key not in KEYS]:
        raise UsageError(f"a ControlNet is given {unknown[0]!r}", f"give of {', '.join(KEYS)}")
    if "name" not in entry and len(manifest.controls) > 1:
        raise UsageError("a ControlNet is given without its name", f"this bundle has {_names(manifest)}")
    net = net_of(manifest, entry.get("name", manifest.controls[0].name))
    pictures = [key for key in PICTURES if entry.get(key) is not None]
    for key in pictures:
        if key not in net.takes:
            raise UsageError(f"the ControlNet {net.name} is given {_said(key)}", f"it takes {_all_said(net.takes)}")
    for key in net.needs:
        if key not in pictures:
            raise UsageError(f"the ControlNet {net.name} is given no {key}", f"it takes {_all_said(net.takes)}")
    if not pictures:
        raise UsageError(f"the ControlNet {net.name} is given no picture", f"it takes {_all_said(net.takes)}")
    both = [key for key in ("mask", "inpaint_image") if key in net.takes]
    if len(both) == 2 and len(given := [key for key in both if key in pictures]) == 1:
        (missing,) = {*both} - {*given}
        raise UsageError(f"the ControlNet {net.name} is given {_said(given[0])} and no {missing}", "give both")
    numbers = {}
    for key, parameter in NUMBERS.items():
        default = {"scale": net.scale, "start": 0.0, "end": 1.0}[key]
        named = Parameter(f"{key} of the ControlNet {net.name}", float, "", low=parameter.low, high=parameter.high)
        numbers[key] = checked(named, entry.get(key, default))
    counts_down = bool(entry.get("counts_down", False))
    start, end = numbers["start"], numbers["end"]
    if start < end if counts_down else start >= end:
        order = "start is where it begins to act, and counts down to end" if counts_down else "start comes before end"
        raise UsageError(f"the ControlNet {net.name} starts at {start:g} and ends at {end:g}", order)
    read = {key: read_input(entry[key], f"the {key} of the ControlNet {net.name}") for key in pictures}
    return ControlInput(
        net.name, read.get("image"), read.get("mask"), read.get("inpaint_image"), **numbers, counts_down=counts_down
    )


def _check_together(manifest: Manifest, found: Sequence[ControlInput]) -> None:
    """Check that nets act together, each of them once."""
    names = [one.name for one in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"the ControlNet {twice[0]} is given twice", "give each net once")
    together = {net_of(manifest, name).combines for name in names}
    if len(found) > 1 and (len(together) > 1 or "" in together):
        raise UsageError(f"the ControlNets {' and '.join(names)} cannot act together", "give one of them")


def check_sizes(found: Sequence[ControlInput], height: int, width: int) -> None:
    """Check the sizes of pictures that are not resized.

    Raises:
        UsageError: one has another than the picture that is drawn.
    """
    for one in found:
        for key in ("image", "inpaint_image"):
            picture: InputPicture | None = getattr(one, key)
            if one.exact and picture is not None and picture.size != (width, height):
                size, hint = "x".join(map(str, picture.size)), "give control_image, which is resized"
                message = f"the {key} of the ControlNet {one.name} is {size}, and what is drawn {width}x{height}"
                raise UsageError(message, hint)


def scales(found: Sequence[ControlInput], step: int, steps: int) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    """The scale of each net in a step: float32 (1,) by name."""
    return {one.name: np.full(1, one.scale if one.acts(step, steps) else 0.0, np.float32) for one in found}


def _names(manifest: Manifest) -> str:
    return ", ".join(control.name for control in manifest.controls)


def _said(key: str) -> str:
    return f"{'an' if key[0] in 'aeiou' else 'a'} {key}"


def _all_said(keys: Sequence[str]) -> str:
    return " and ".join(_said(key) for key in keys)
