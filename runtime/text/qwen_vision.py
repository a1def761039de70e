"""What Qwen2.5-VL's vision tower and text model take in beside pixels and token ids: order, segments and positions.

Source: ``vision_utils`` and ``modeling_qwen2_5_vl`` of transformers 5.23. All of it depends on sizes alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from zimgkit.engines.decoding import Positive, Small, Width, decoded
from zimgkit.engines.errors import CheckpointError, UsageError
from zimgkit.runtime.diffusion.positions import Rope, Tables, axis_tables
from zimgkit.runtime.pictures.patches import Patches

Integers = NDArray[np.int64]


class _Rope(msgspec.Struct, frozen=True):
    rope_theta: Positive = 10000.0


class VisionTower(msgspec.Struct, frozen=True):
    """What the host side reads of a text encoder's ``vision_config``; the defaults are Qwen2.5-VL-7B's."""

    hidden_size: Width = 1280
    intermediate_size: Width = 3420
    num_heads: Small = 16
    patch_size: Small = 14
    spatial_merge_size: Small = 2
    window_size: Small = 112
    rope_parameters: _Rope = _Rope()

    @property
    def window(self) -> int:
        """Side of a window, in groups of patches."""
        return self.window_size // self.spatial_merge_size // self.patch_size


class _TextEncoder(msgspec.Struct, frozen=True):
    vision_config: VisionTower


def vision_tower(config: Mapping[str, Any], where: str = "text_encoder") -> VisionTower:
    """Read the sizes of the vision tower from a text encoder's ``config.json``.

    Raises:
        CheckpointError: there is no tower, or its sizes do not fit together.
    """
    tower = decoded(config, _TextEncoder, where, CheckpointError).vision_config
    if tower.window < 1 or tower.hidden_size % (4 * tower.num_heads):
        raise CheckpointError(f"{where}: the sizes in vision_config do not fit together", "fetch the file again")
    return tower


class TowerInputs(NamedTuple):
    """What the tower takes in of one picture, and how what it gives is put in order."""

    feeds: dict[str, NDArray[Any]]
    """Inputs of the component ``vision_encoder``. Patches stand window by window."""
    inverse: Integers
    """int64 (tokens,): ``output[inverse]`` is row by row."""


def tower_inputs(patches: Patches, tower: VisionTower) -> TowerInputs:
    """Everything that the tower takes in of one picture.

    Args:
        patches: of the picture, in the order of ``Qwen2VLImageProcessor``.
        tower: the tower's sizes.
    """
    grids, merge = patches.image_grid_thw, tower.spatial_merge_size
    order, boundaries = window_order(grids, merge, tower.window)
    moved = (order[:, None] * merge**2 + np.arange(merge**2)).reshape(-1)
    half = tower.hidden_size // tower.num_heads // 2
    cos, sin = axis_tables(patch_positions(grids, merge)[moved], [half, half], tower.rope_parameters.rope_theta)
    slots = np.arange(tower.window**2 * merge**2)
    taken = slots < np.diff(boundaries)[:, None]
    feeds = {
        "pixel_values": patches.pixel_values[moved],
        "cos": cos,
        "sin": sin,
        "window_index": np.where(taken, boundaries[:-1, None] + slots, 0),
        "window_mask": taken,
        "patch_places": np.flatnonzero(taken),
    }
    return TowerInputs(feeds, np.argsort(order))


def patch_positions(grids: Integers, merge: int) -> Integers:
    """Row and column of each patch in its picture, group by group: int64 (patches, 2).

    Args:
        grids: int64 (pictures, 3): one frame, rows and columns of patches.
        merge: side of a group, in patches.
    """
    found = []
    for _, rows, columns in grids.tolist():
        cells = np.indices((rows, columns)).reshape(2, rows // merge, merge, columns // merge, merge)
        found.append(cells.transpose(1, 3, 2, 4, 0).reshape(-1, 2))
    return np.concatenate(found)


def window_order(grids: Integers, merge: int, window: int) -> tuple[Integers, Integers]:
    """Groups of patches in the order of windows, as ``get_vision_window_index`` gives them.

    Args:
        grids: int64 (pictures, 3): one frame, rows and columns of patches.
        merge: side of a group, in patches.
        window: side of a window, in groups; those at the right and lower edges are smaller.

    Returns:
        int64 (groups,): which group stands at each place; and int64 (windows + 1,): the patch at which each window
        begins (``cu_window_seqlens``), and their number.
    """
    numbers, last = [], 0
    for _, rows, columns in (grids // [1, merge, merge]).tolist():
        row, column = np.indices((rows, columns)) // window
        numbers.append((last + row * -(-columns // window) + column).reshape(-1))
        last = int(numbers[-1].max()) + 1
    number = np.concatenate(numbers)
    sizes = np.bincount(number) * merge**2
    return np.argsort(number, kind="stable"), np.concatenate([[0], np.cumsum(sizes)])


def token_positions(input_ids: Integers, image_token: int, grids: Integers, merge: int) -> Integers:
    """Positions (frame, row, column) of a text with pictures in it, as ``get_rope_index`` counts them.

    Text counts on all axes. A picture's tokens begin where it stands, and text goes on beyond its longer side. So the
    encoder was trained. With transformers 5, diffusers 0.42's pipelines forget to pass ``mm_token_type_ids``, without
    which it counts pictures as text (huggingface/diffusers#14194); with transformers 4 they do as here.

    Args:
        input_ids: int64 (tokens,), with one image token for each group of patches.
        image_token: its id.
        grids: int64 (pictures, 3): one frame, rows and columns of patches, in the order of the text.
        merge: side of a group, in patches.

    Returns:
        int64 (3, tokens).

    Raises:
        UsageError: the image tokens are not those of the pictures.
    """
    positions = np.zeros((3, len(input_ids)), np.int64)
    is_image = input_ids == image_token
    place = position = 0
    for _, rows, columns in (grids // [1, merge, merge]).tolist():
        begin = place + int(is_image[place:].argmax()) if is_image[place:].any() else len(input_ids)
        end = begin + rows * columns
        if end > len(input_ids) or not is_image[begin:end].all():
            break
        positions[:, place:begin] = position + np.arange(begin - place)
        position += begin - place
        positions[:, begin:end] = position + np.indices((1, rows, columns)).reshape(3, -1)
        position += max(rows, columns)
        place = end
    expected = int(grids.prod(axis=1).sum()) // merge**2
    if is_image[place:].any() or is_image.sum() != expected:
        hint = "shorten the prompt, and leave <|image_pad|> out of it"
        raise UsageError(f"the prompt has {is_image.sum()} tokens for pictures that take {expected}", hint)
    positions[:, place:] = position + np.arange(len(input_ids) - place)
    return positions


def token_tables(positions: Integers, rope: Rope) -> Tables:
    """Rotary tables of the text model, where each axis has a section of a head's pairs of numbers.

    Args:
        positions: int64 (3, tokens).
        rope: of the text model.

    Returns:
        float32 (tokens, head_dim / 2) each.

    Raises:
        CheckpointError: the sections do not add up to a head.
    """
    if 2 * sum(rope.sections) != rope.dim:
        sections = list(rope.sections)
        raise CheckpointError(f"text_encoder: mrope_section {sections} does not add up to {rope.dim // 2} pairs")
    axes = [axis_tables(axis[:, None], [rope.dim], rope.theta) for axis in positions]
    section = np.repeat(np.arange(3), rope.sections)
    cos, sin = (np.choose(section, [axis[i] for axis in axes]) for i in (0, 1))
    return Tables(cos, sin)
