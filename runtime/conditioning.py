"""What prompts and pictures add to every step, read by the encoders of a session: once for all that is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from zimgkit.engines.bundle import POSITIVE, TextConfig
from zimgkit.engines.errors import UsageError
from zimgkit.runtime.control_conditions import acting, component_of, controls_of
from zimgkit.runtime.encoding import Encoder
from zimgkit.runtime.engine_pool import EnginePool
from zimgkit.runtime.families import Family
from zimgkit.runtime.families.base import (
    Array,
    Beside,
    ConditionedFamily,
    Encoded,
    Feeds,
    PictureFamily,
    SegmentedFamily,
)
from zimgkit.runtime.inpainting import image_regions
from zimgkit.runtime.job import Conditions, Controls
from zimgkit.runtime.parameters import MULTIPLE
from zimgkit.runtime.progress import Report
from zimgkit.runtime.references import Layout, ReferenceReader, References, layouts
from zimgkit.runtime.request import Request
from zimgkit.runtime.served import check_served
from zimgkit.runtime.text.edit_prompts import PICTURE, around_pictures, with_pictures
from zimgkit.runtime.text.tokenizer import PromptTokenizer, keep_rows

Key = str | int | tuple[str]
"""A prompt, the ``id`` of the rows that stand for one, or the prompt of a region where those speak of pictures."""


class Conditioner:
    """The tokenizer and the encoders of a session.

    Args:
        engines: of the bundle.
        family: of the bundle.
        encoder: makes latents of pictures.
        device_of: component -> where it runs.
        report: called with (stage, done, total).
        warn: called with what the caller should know, such as a prompt that was cut.
    """

    def __init__(
        self,
        engines: EnginePool,
        family: Family,
        encoder: Encoder,
        device_of: Callable[[str], str | None],
        report: Report,
        warn: Callable[[str], None],
    ) -> None:
        self.bundle = engines.bundle
        self._engines = engines
        self._family = family
        self._encoder = encoder
        self._device_of = device_of
        self._report = report
        self._warn = warn
        self._pictures = ReferenceReader(engines, family, encoder) if isinstance(family, PictureFamily) else None
        tokenizer = self.bundle.file("tokenizer/tokenizer.json")
        self._tokenizer = PromptTokenizer(tokenizer, self.bundle.manifest.text)

    def read(
        self, request: Request, clean: Array | None = None
    ) -> tuple[list[Conditions], list[Conditions] | None, list[Controls] | None]:
        """The conditions of each prompt, those of each negative prompt, and what ControlNets add to each prompt.

        Equal ones share theirs.

        Args:
            request: the call.
            clean: float32 (1, ...), the latents of the picture that it starts from.
        """
        asked = (
            request.prompt_embeds or request.prompts,
            request.negative_prompt_embeds or request.negative_prompts or (),
        )
        texts = [entry for entries in asked for entry in entries if isinstance(entry, str)]
        rows: dict[Key, tuple[Array, ...]] = {
            id(entry): (entry,) for entries in asked for entry in entries if not isinstance(entry, str)
        }
        inputs = request.inputs
        for (given,) in rows.values():
            if inputs.references and isinstance(self._family, SegmentedFamily):
                hint = "give prompt: pictures stand between its pieces"
                raise UsageError("prompt_embeds are given, and pictures", hint)
            self._check_embeds(given)
            self._check_served(request, self.bundle.manifest.text.drop + len(given))
        references = self._references(request)
        # Where prompts speak of pictures, those of regions do not: they have the template of text alone.
        entities: list[Key] = [text if references is None else (text,) for text in inputs.eligen_entity_prompts]
        if references is None:
            texts += inputs.eligen_entity_prompts
        else:
            alone = self._read(request, inputs.eligen_entity_prompts, None, self._family.TEXT)
            rows.update({(text,): pieces for text, pieces in alone.items()})
        rows.update(self._read(request, texts, references))
        beside = self._beside(request, references, clean)
        wanted, unwanted = ([entry if isinstance(entry, str) else id(entry) for entry in entries] for entries in asked)
        # Where LoRAs are for the prompt alone, the same text is not the same in both branches of guidance.
        parts = bool(self.bundle.manifest.positive_loras)
        read_in: dict[bool, list[Key]] = {
            True: [*entities, *wanted],
            False: [*entities, *unwanted] if unwanted else [],
        }
        encoded = {
            branch: self._condition({key: rows[key] for key in dict.fromkeys(keys)}, beside, positive=branch)
            for branch, keys in (read_in if parts else {False: list(rows)}).items()
            if keys
        }
        self._report("encode", len(rows), len(rows))
        made: dict[tuple[bool, tuple[Key, ...]], Conditions] = {}

        def conditions(*keys: Key, positive: bool = False) -> Conditions:
            branch = positive and parts
            if (branch, keys) not in made:
                found = [encoded[branch][key] for key in keys]
                made[branch, keys] = self._conditions(request, found, beside, positive=branch)
            return made[branch, keys]

        # Every region is guided away from the words that the whole is guided away from, or none is.
        regions = len(entities) if inputs.eligen_enable_on_negative else 0
        negative = [conditions(*[key] * (regions + 1)) for key in unwanted]
        controls = {key: self._controls(request, encoded[parts][key]) for key in dict.fromkeys(wanted)}
        found = [one for key in wanted if (one := controls[key])]
        return [conditions(*entities, key, positive=True) for key in wanted], negative or None, found or None

    def prompt_embeds(self, request: Request) -> list[Array]:
        """The text encoder's rows of each prompt of a request, float32 (tokens, hidden)."""
        rows = self._read(request, request.prompts, None)
        return [np.concatenate(rows[prompt]) for prompt in request.prompts]

    def longest(self, request: Request) -> int:
        """Tokens of the longest prompt, template included."""
        text = self.bundle.manifest.text
        most = min(text.drop + request.max_sequence_length, text.max_tokens)
        embeds = (*(request.prompt_embeds or ()), *(request.negative_prompt_embeds or ()))
        lengths = [text.drop + len(rows) for rows in embeds]
        for prompt in dict.fromkeys((*request.prompts, *(request.negative_prompts or ()))):
            lengths.append(self._length([min(most, ids.shape[1]) for ids in self._ids(request, prompt)]))
        return max(lengths)

    def condition_tokens(self, request: Request) -> int:
        """Of pictures beside the one that is drawn."""
        if not isinstance(self._family, PictureFamily):
            return 0
        found = self.layouts(request)
        grids = [layout.grid for layout in found]
        if request.inputs.context_image is not None or request.inputs.layered is not None:
            grids.append((request.height // MULTIPLE, request.width // MULTIPLE))
        return self._family.condition_tokens(grids, [layout.patches for layout in found])

    def _length(self, lengths: Sequence[int]) -> int:
        """Tokens of a prompt, or of one in pieces."""
        if isinstance(self._family, SegmentedFamily) and len(lengths) > 1:
            return self._family.segments_tokens(lengths)
        return sum(lengths)

    def _condition(
        self, rows: Mapping[Key, Sequence[Array]], beside: Beside | None, *, positive: bool
    ) -> dict[Key, Encoded]:
        """What the conditioner makes of each text, and of the pictures that stand between its pieces."""
        family, of_branch = self._family, self.bundle.manifest.of_branch
        encoded: dict[Key, Encoded] = {}
        component = of_branch("conditioner", positive=positive)
        with self._engines.engine(component, self._device_of(component)) as engine:
            for key, pieces in rows.items():
                if isinstance(family, SegmentedFamily):
                    feeds = family.segments_inputs(pieces)
                else:
                    feeds = family.conditioner_inputs(*pieces)
                (conditioning,) = engine.run(feeds).values()
                encoded[key] = Encoded(conditioning, tuple(map(len, pieces)), rows=tuple(pieces))
        if beside is None or not isinstance(family, SegmentedFamily):
            return encoded
        component = of_branch("picture_conditioner", positive=positive)
        with self._engines.engine(component, self._device_of(component)) as engine:
            for key, text in encoded.items():
                (pictures,) = engine.run(family.picture_conditioner_inputs(text.lengths, beside)).values()
                encoded[key] = replace(text, pictures=pictures)
        return encoded

    def _conditions(
        self, request: Request, texts: Sequence[Encoded], beside: Beside | None, *, positive: bool
    ) -> Conditions:
        """What a prompt, the last of the texts, and those of regions add to every step."""
        family, size, last = self._family, (request.height, request.width), texts[-1]
        of_branch = partial(self.bundle.manifest.of_branch, positive=positive)
        if isinstance(family, ConditionedFamily) and len(texts) > 1:
            segments = [text.conditioning for text in texts]
            grids = [(request.height // MULTIPLE, request.width // MULTIPLE), *(beside.grids if beside else ())]
            regions = image_regions(request.inputs, grids)
            make = partial(family.masked_constants, self.bundle, segments, regions, *size, beside)
            return Conditions(make, of_branch("denoiser.masked_conditions" if beside else "denoiser.masked"))
        if isinstance(family, PictureFamily) and beside is not None:
            make = partial(family.conditioned_constants, self.bundle, last, *size, beside)
            return Conditions(make, of_branch("denoiser.conditions"))
        make = partial(family.denoiser_constants, last.conditioning, last.tokens, *size)
        return Conditions(make, of_branch("denoiser"))

    def _controls(self, request: Request, text: Encoded) -> Controls | None:
        """What ControlNets add to every step of a prompt."""
        return controls_of(request, text, self._family, self.bundle, self._encoder, self._device_of)

    def _beside(self, request: Request, references: References | None, clean: Array | None = None) -> Beside | None:
        """The pictures whose latents stand beside those that are drawn: what controls them, then what is edited.

        Or that which is taken apart.
        """
        latents: list[Array] = []
        grids: list[tuple[int, int]] = []
        rows: tuple[Array, ...] = ()
        patches: tuple[tuple[int, int], ...] = ()
        inputs = request.inputs
        own, device = (request.height // MULTIPLE, request.width // MULTIPLE), self._device_of(self._encoder.COMPONENT)
        if inputs.context_image is not None:
            latents.append(self._encoder.encode(inputs.context_image, *request.size, device, kernel="bicubic"))
            grids.append(own)
        if inputs.layered is not None:
            latents.append(self._encoder.encode(inputs.layered, *request.size, device))
            grids.append(own)
        if references is not None:
            of_references = list(references.latents)
            own_size = references.layouts[0].latents == (request.width, request.height)
            if clean is not None and inputs.samples_latents and inputs.image is inputs.references[0] and own_size:
                of_references[0] = clean  # As in diffusers, it is sampled once for both.
            latents += of_references
            grids += [layout.grid for layout in references.layouts]
            rows, patches = references.rows, tuple(layout.patches for layout in references.layouts)
        if not latents:
            return None
        return Beside(tuple(latents), tuple(grids), rows, patches, inputs.edit_rope_interpolation, request.frames)

    def _references(self, request: Request) -> References | None:
        """The pictures that a request's prompts speak of, read."""
        config = self.bundle.manifest.references
        if config is None or self._pictures is None or not request.inputs.references:
            return None
        return self._pictures.read(request.inputs, config, self._device_of)

    def _read(
        self,
        request: Request,
        texts: Iterable[str],
        references: References | None,
        template: TextConfig | None = None,
    ) -> dict[str, tuple[Array, ...]]:
        """The text encoder's rows of each different text, float32 (tokens, hidden) of each of its pieces.

        Args:
            request: the call.
            texts: what to read.
            references: the pictures that they speak of.
            template: another one than the bundle's, of texts that speak of none.
        """
        tokens = self._tokenize(request, texts, template)
        template = template or self.bundle.manifest.text
        rows: dict[str, tuple[Array, ...]] = {}
        if not tokens:
            return rows
        component = "text_encoder"
        if references and isinstance(self._family, ConditionedFamily):
            component = "text_encoder.pictures"
        found: dict[bytes, Array] = {}  # Of pieces, most are those of all prompts.
        with self._engines.engine(component, self._device_of(component)) as engine:
            for index, (text, pieces) in enumerate(tokens.items()):
                self._report("encode", index, len(tokens))
                for ids in pieces:
                    if ids.tobytes() not in found:
                        hidden = engine.run(self._text_inputs(ids, references))["prompt_embeds"][0]
                        found[ids.tobytes()] = keep_rows(hidden, template, request.max_sequence_length)
                rows[text] = tuple(found[ids.tobytes()] for ids in pieces)
        return rows

    def _text_inputs(self, ids: NDArray[np.int64], references: References | None) -> Feeds:
        if references is None or not isinstance(self._family, ConditionedFamily):
            return self._family.text_encoder_inputs(ids)
        patches = [layout.patches for layout in references.layouts]
        return self._family.pictured_text_inputs(ids, self._tokenizer.id_of(PICTURE), references.rows, patches)

    def _tokenize(
        self, request: Request, texts: Iterable[str], template: TextConfig | None
    ) -> dict[str, list[NDArray[np.int64]]]:
        """The token ids of each different text, of each of its pieces; what is past the limit is cut."""
        text = template or self.bundle.manifest.text
        most = min(text.drop + request.max_sequence_length, text.max_tokens)
        tokens = {}
        for prompt in dict.fromkeys(texts):
            pieces = self._ids(request, prompt) if template is None else [self._tokenizer.encode(prompt, template)]
            if any(ids.shape[1] > most for ids in pieces):
                self._warn(f"the prompt has more than {most - text.drop} tokens; the rest is not read")
            # The encoder is causal: no row that is kept depends on what is cut here.
            tokens[prompt] = [ids[:, :most] for ids in pieces]
            self._check_served(request, self._length([ids.shape[1] for ids in tokens[prompt]]))
        return tokens

    def _ids(self, request: Request, prompt: str) -> list[NDArray[np.int64]]:
        """The token ids of a prompt within its template, behind the pictures that it speaks of or in pieces around."""
        config, found = self.bundle.manifest.references, self.layouts(request)
        if config is None or not found:
            return [self._tokenizer.encode(prompt)]
        if isinstance(self._family, SegmentedFamily):
            pieces = around_pictures(prompt, len(found), self.bundle.manifest.text)
            return [self._tokenizer.encode_whole(piece) for piece in pieces]
        return [self._tokenizer.encode(with_pictures(prompt, [one.tokens for one in found], config.introduction))]

    def layouts(self, request: Request) -> tuple[Layout, ...]:
        """How large the pictures that its prompts speak of are where they are read."""
        config = self.bundle.manifest.references
        if config is None or not isinstance(self._family, PictureFamily):
            return ()
        return layouts(request.inputs, config, self._family)

    def encoded_sizes(self, request: Request) -> list[tuple[int, int]]:
        """Height and width, in pixels, of the pictures that the VAE encoder is given."""
        inputs = request.inputs
        own = [request.size] if any((inputs.image, inputs.layered, inputs.context_image, acting(request))) else []
        return own + [(height, width) for width, height in (layout.latents for layout in self.layouts(request))]

    def _check_embeds(self, embeds: Array) -> None:
        """Check that rows are those of this bundle's text encoder, and no more than it gives."""
        width = self.bundle.component("conditioner").inputs["prompt_embeds"].shape[-1]
        most = self.bundle.manifest.text.max_tokens - self.bundle.manifest.text.drop
        if embeds.shape[1] != width or len(embeds) > most:
            hint = f"this bundle takes at most {most} rows of {width} numbers"
            raise UsageError(f"prompt_embeds have {len(embeds)} rows of {embeds.shape[1]} numbers", hint)

    def _check_served(self, request: Request, tokens: int) -> None:
        conditions = self.condition_tokens(request)
        dimensions = self._family.dynamic_dimensions(*request.size, tokens, conditions, request.frames)
        pictured = ".pictures" if request.inputs.references else ""
        masked = "masked" if request.inputs.eligen_entity_prompts else ""
        variant = "_".join(filter(None, [masked, "conditions" if conditions else ""]))
        denoiser = f"denoiser.{variant}" if variant else component_of(self.bundle, request)
        components = [f"text_encoder{pictured}", "conditioner", denoiser, "vae_decoder"]
        if request.inputs.image is not None or acting(request):
            components.append(self._encoder.COMPONENT)
        components += [name + POSITIVE for name in components]
        check_served(self.bundle, self._engines.backend, components, dimensions, request.width, request.height)
