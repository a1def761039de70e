"""What a dataset's columns give a network: pictures that control, pictures beside what is drawn, regions."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zimgkit.engines.errors import UsageError
from zimgkit.runtime.inpainting import touched_tokens
from zimgkit.training import prompts
from zimgkit.training.dataset import Dataset, Row
from zimgkit.training.latents import Latents
from zimgkit.training.metadata import DatasetError
from zimgkit.training.pictures import open_picture

CONTROL = ("control_image", "controlnet_image", "blockwise_controlnet_image")
"""Names of the column whose picture a ControlNet sees."""
EDITED = "edit_image"
"""The column of pictures that the text model reads too."""
CONDITIONS = ("context_image", EDITED)
"""Columns of pictures whose tokens stand beside those of what is drawn, in this order."""
ENTITIES = ("eligen_entity_prompts", "eligen_entity_masks")
KNOWN = (*CONTROL, *CONDITIONS, *ENTITIES)


def check_extras(extras: Collection[str], files: Collection[str]) -> None:
    """Check which columns a run takes beside image and prompt.

    Raises:
        UsageError: one is not known, names pictures and is no column of files, or has no use without another.
    """
    for name in extras:
        if name not in KNOWN:
            raise UsageError(f"--extra-inputs has {name}", f"known are {', '.join(KNOWN)}")
        if name != ENTITIES[0] and name not in files:
            raise UsageError(
                f"--extra-inputs has {name}, and --data-file-keys has not", "its pictures are files: name it"
            )
    if len({*ENTITIES} & {*extras}) == 1:
        raise UsageError(f"--extra-inputs has only one of {' and '.join(ENTITIES)}", "name both")


def encoded_columns(extras: Collection[str]) -> tuple[str, ...]:
    """The columns whose pictures go through the autoencoder."""
    return tuple(name for name in (*CONTROL, *CONDITIONS) if name in extras)


@dataclass(frozen=True)
class ControlPictures:
    """The one picture of each row that a ControlNet sees."""

    dataset: Dataset
    latents: Latents
    column: str

    def __post_init__(self) -> None:
        """Check all rows: a ControlNet's picture is as large as what is drawn."""
        for row in self.dataset.rows:
            sizes = [self.dataset.sizes[picture] for picture in row.pictures[self.column]]
            if sizes != [row.size]:
                said = ", ".join(f"{width}x{height}" for height, width in sizes)
                message = f"{row.where}: {self.column} is {said}, and the image {row.size[1]}x{row.size[0]}"
                raise DatasetError(message, "make it one picture as large as the image")

    def kind(self, row: int) -> Hashable:
        """All rows go together."""
        return 0

    def load(self, rows: Tensor, dropped: Tensor) -> dict[str, Any]:
        """Its latents, (n, channels, h, w), with any prompt."""
        return {"control": self.latents.load([self.dataset.rows[int(row)].pictures[self.column][0] for row in rows])}


@dataclass(frozen=True)
class ConditionPictures:
    """All pictures of each row whose tokens stand beside what is drawn."""

    dataset: Dataset
    latents: Latents
    columns: Sequence[str]

    def kind(self, row: int) -> Hashable:
        """Their sizes."""
        return tuple(self.dataset.sizes[picture] for picture in self._pictures(row))

    def load(self, rows: Tensor, dropped: Tensor) -> dict[str, Any]:
        """Latents (n, channels, h, w) of the first of each row, of the second, and so on, with any prompt."""
        each = [self._pictures(int(row)) for row in rows]
        return {"conditions": [self.latents.load(list(place)) for place in zip(*each, strict=True)]}

    def _pictures(self, row: int) -> list[Any]:
        return [picture for name in self.columns for picture in self.dataset.rows[row].pictures[name]]


class PicturedTexts:
    """The prompt of each row as the text model reads it with the row's pictures, and the same without a prompt."""

    def __init__(self, texts: Sequence[Tensor], without: Sequence[Tensor]) -> None:
        """Take what the text model made of each row, (tokens, hidden), with its prompt and with none."""
        self.texts, self.without = texts, without

    def kind(self, row: int) -> Hashable:
        """All rows go together."""
        return 0

    def load(self, rows: Tensor, dropped: Tensor) -> dict[str, Any]:
        """Texts (n, tokens, hidden) with their mask."""
        chosen = [
            (self.without if drop else self.texts)[row]
            for row, drop in zip(rows.tolist(), dropped.tolist(), strict=True)
        ]
        text, mask = prompts.pad(chosen)
        return {"text": text, "mask": mask}


class Entities:
    """The prompts and regions of each row, before the prompt of the whole; without a prompt there are none."""

    def __init__(self, dataset: Dataset, texts: dict[str, Tensor], no_prompt: str) -> None:
        """Read all masks.

        Args:
            dataset: of which the rows are.
            texts: what the text model makes of all prompts, (tokens, hidden) each.
            no_prompt: stands for none.

        Raises:
            DatasetError: naming the row whose prompts and masks are not as many, or a mask that covers nothing.
        """
        self.texts, self.no_prompt = texts, texts[no_prompt]
        self.rows = dataset.rows
        self.regions = [_regions(dataset, row) for row in dataset.rows]

    def kind(self, row: int) -> Hashable:
        """How many entities there are."""
        return len(self.regions[row])

    def load(self, rows: Tensor, dropped: Tensor) -> dict[str, Any]:
        """Texts (n, prompts * length, hidden) with their mask, and regions bool (n, entities, image tokens)."""
        texts: list[Tensor] = []
        for row, drop in zip(rows.tolist(), dropped.tolist(), strict=True):
            whole = self.no_prompt if drop else self.texts[self.rows[row].prompt]
            own = entity_prompts(self.rows[row])
            texts += [*(self.no_prompt[:0] if drop else self.texts[prompt] for prompt in own), whole]
        text, mask = prompts.pad(texts)
        regions = torch.stack([self.regions[row] & ~drop for row, drop in zip(rows.tolist(), dropped, strict=True)])
        return {"text": _joined(text, len(rows)), "mask": _joined(mask, len(rows)), "regions": regions}


def entity_prompts(row: Row) -> list[str]:
    """The prompts of a row's entities.

    Raises:
        DatasetError: they are no list of texts.
    """
    found = row.values[ENTITIES[0]]
    if not isinstance(found, list) or not all(isinstance(prompt, str) and prompt.strip() for prompt in found):
        raise DatasetError(f"{row.where}: {ENTITIES[0]} is no list of texts", 'write ["a cat", "a dog"]')
    return found


def _regions(dataset: Dataset, row: Row) -> Tensor:
    own, masks = entity_prompts(row), row.pictures[ENTITIES[1]]
    if len(own) != len(masks) or not own:
        raise DatasetError(
            f"{row.where}: {len(own)} prompts and {len(masks)} masks of entities", "name a mask for each"
        )
    regions = []
    for mask in masks:
        touched = touched_tokens(open_picture(mask), row.size[0] // 16, row.size[1] // 16)
        if not touched.any():
            raise DatasetError(f"{row.where}: {mask} covers nothing", "paint its region white")
        regions.append(touched)
    return torch.from_numpy(np.stack(regions))


def _joined(rows: Tensor, batch: int) -> Tensor:
    """(batch * prompts, length, ...) -> (batch, prompts * length, ...)."""
    return rows.unflatten(0, (batch, -1)).flatten(1, 2)
