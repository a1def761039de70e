"""Training beside a text model that stays: it reads all prompts before, and is not needed any more."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from zimgkit.engines.errors import UsageError
from zimgkit.export.checkpoints.checkpoint import Checkpoint
from zimgkit.export.networks.registry import FAMILIES, references_of
from zimgkit.training import families, prompts
from zimgkit.training.beside import (
    CONDITIONS,
    CONTROL,
    EDITED,
    ENTITIES,
    ConditionPictures,
    ControlPictures,
    Entities,
    PicturedTexts,
    entity_prompts,
)
from zimgkit.training.checkpoint import load_component, load_tokenizer
from zimgkit.training.dataset import Dataset
from zimgkit.training.diffusion import Beside, Denoiser, DenoiserTask, hidden_matrices
from zimgkit.training.families import TrainingFamily
from zimgkit.training.latents import Images, Latents
from zimgkit.training.metadata import DatasetError
from zimgkit.training.pictures import open_picture
from zimgkit.training.preview import drawer


def frozen_text_task(
    name: str,
    checkpoint: Checkpoint,
    dataset: Dataset,
    latents: Latents,
    module: Denoiser,
    extras: Collection[str] = (),
) -> DenoiserTask:
    """The task of training beside a text model that stays: it reads all prompts once, and is not needed any more.

    Args:
        name: of the stage.
        checkpoint: whose text model reads.
        dataset: pictures and captions.
        latents: of its images, and of the pictures in the columns.
        module: what is trained.
        extras: columns of the dataset that the transformer takes beside.

    Raises:
        CheckpointError: a component cannot be loaded.
        UsageError: the family takes no such columns.
        DatasetError: naming a row whose columns do not fit.
    """
    family, tokenizer = module.family, load_tokenizer(checkpoint)
    dtype = next(module.transformer.parameters()).dtype
    text_encoder = load_component(checkpoint, "text_encoder", dtype).eval().requires_grad_(False)
    with_entities = ENTITIES[0] in extras
    own = [prompt for row in dataset.rows for prompt in entity_prompts(row)] if with_entities else []
    captions = list(dict.fromkeys([*(row.prompt for row in dataset.rows), *own, *family.no_prompts]))
    ids = prompts.tokenize(captions, tokenizer, family)
    rows = dict(zip(captions, prompts.encode_all(text_encoder, ids, family), strict=True))
    texts = [rows[row.prompt] for row in dataset.rows]
    beside: list[Beside] = []
    if EDITED in extras:
        texts, without = pictured_texts(checkpoint, dataset, text_encoder, tokenizer, family)
        beside.append(PicturedTexts(texts, without))
    if with_entities:
        if family.attach_regions is None:
            raise UsageError(f"--extra-inputs has {ENTITIES[0]}, and {family.name} has no regions", "leave it out")
        if len(extras) > len(ENTITIES):
            raise UsageError("--extra-inputs has regions and more", "train them alone")
        family.attach_regions(module.transformer)
        beside.append(Entities(dataset, rows, family.no_prompts[0]))
    for column in (column for column in CONTROL if column in extras):
        beside.append(ControlPictures(dataset, latents, column))
    if columns := [column for column in CONDITIONS if column in extras]:
        if not family.takes_conditions:
            raise UsageError(f"{family.name} draws beside no other pictures", f"leave {columns[0]} out")
        beside.append(ConditionPictures(dataset, latents, columns))
    task = DenoiserTask(
        name,
        module,
        Images(dataset, latents),
        texts,
        [rows[prompt] for prompt in family.no_prompts],
        checkpoint.config("scheduler"),
        beside,
    )
    if not beside:
        task.draw = drawer(checkpoint, dataset, module.transformer, lambda texts: [rows[text] for text in texts])
    return task


def transformer_task(
    checkpoint: Checkpoint, dataset: Dataset, latents: Latents, extras: Collection[str] = ()
) -> DenoiserTask:
    """The task of training the whole transformer, in float32, and nothing else.

    The errors are those of :func:`frozen_text_task`.
    """
    family = families.family(checkpoint.family)
    transformer = load_component(checkpoint, "transformer")
    for name in family.unused_modules(transformer):
        transformer.get_submodule(name).requires_grad_(False)
    task = frozen_text_task("transformer", checkpoint, dataset, latents, Denoiser(family, transformer), extras)
    task.hidden = hidden_matrices(task.module)
    return task


def pictured_texts(
    checkpoint: Checkpoint, dataset: Dataset, text_encoder: Any, tokenizer: Any, family: TrainingFamily
) -> tuple[list[Tensor], list[Tensor]]:
    """What a text model makes of each row's prompt and pictures, and of these with no prompt: (tokens, hidden) each.

    Raises:
        UsageError: the checkpoint reads no pictures.
        DatasetError: a picture cannot be decoded.
    """
    references = references_of(checkpoint.family, checkpoint.pipeline, checkpoint.name)
    if references is None or family.pictured_inputs is None or family.encode_pictured is None:
        raise UsageError(f"--extra-inputs has {EDITED}, and {checkpoint.name} edits no pictures", "name one that does")
    processor = checkpoint.config(FAMILIES[checkpoint.family].processor)
    found: list[dict[int, Tensor]] = [{}, {}]
    waiting: dict[Any, list[tuple[int, int, dict[str, Tensor]]]] = {}
    with torch.no_grad():
        for number, row in enumerate(dataset.rows):
            pictures = [open_picture(picture) for picture in row.pictures[EDITED]]
            if len(pictures) > references.most:
                message = f"{row.where}: {len(pictures)} pictures, and {checkpoint.name} takes {references.most}"
                raise DatasetError(message, "name fewer")
            both = (row.prompt, family.no_prompts[0])
            for place, inputs in enumerate(family.pictured_inputs(tokenizer, both, pictures, references, processor)):
                alike = len(inputs["input_ids"]), str(inputs["image_grid_thw"].tolist())
                waiting.setdefault(alike, []).append((place, number, inputs))
                if len(waiting[alike]) == prompts.TOGETHER:
                    _encode(text_encoder, family.encode_pictured, waiting.pop(alike), found)
        for rest in waiting.values():
            _encode(text_encoder, family.encode_pictured, rest, found)
    with_prompt, without = ([one[number] for number in range(len(dataset.rows))] for one in found)
    return with_prompt, without


def _encode(
    text_encoder: Any,
    encode: Callable[[Any, Sequence[Mapping[str, Tensor]]], Tensor],
    together: Sequence[tuple[int, int, dict[str, Tensor]]],
    found: Sequence[dict[int, Tensor]],
) -> None:
    """Put the rows of some prompts, of equal lengths, where they belong."""
    rows = encode(text_encoder, [inputs for *_, inputs in together]).cpu()
    for (place, number, _), row in zip(together, rows, strict=True):
        found[place][number] = row.clone()
