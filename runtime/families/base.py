"""What the loop asks of a family on the host side."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from zimgkit.engines.bundle import MANIFEST
from zimgkit.engines.decoding import Width, decoded
from zimgkit.engines.errors import CheckpointError, UsageError
from zimgkit.runtime.diffusion.latents import vae_normalization
from zimgkit.runtime.diffusion.positions import text_encoder_rope, text_encoder_tables
from zimgkit.runtime.pictures.tiles import Tiling

if TYPE_CHECKING:
    from PIL.Image import Image

    from zimgkit.engines.bundle import Bundle, Control, TextConfig
    from zimgkit.runtime.text.qwen_vision import TowerInputs, VisionTower

Array = NDArray[np.float32]
Config = Mapping[str, Mapping[str, Any]]
"""The checkpoint's config per component, as in ``Manifest.config``."""
Feeds = dict[str, NDArray[Any]]
StepInputs = Callable[[int], Feeds]
"""Step -> some of the denoiser's inputs."""
Progress = Callable[[int, int], None]
"""Called with how much is done, and how much there is."""


class TextEncoder(msgspec.Struct, frozen=True):
    """How wide a text encoder is: with what its ``config.json`` has, or as wide as none is."""

    hidden_size: Width = 1
    intermediate_size: Width = 1


@dataclass(frozen=True, eq=False)
class Beside:
    """Pictures that stand beside the one that is drawn."""

    latents: tuple[Array, ...]
    """Of each, float32 (1, ...) in the form that the family keeps them in, without noise."""
    grids: tuple[tuple[int, int], ...]
    """Rows and columns of the tokens of each."""
    rows: tuple[Array, ...] = ()
    """What the vision encoder gave for each that a prompt speaks of, float32 (tokens, hidden)."""
    patches: tuple[tuple[int, int], ...] = ()
    """Rows and columns of the patches that it read of each."""
    interpolated: bool = False
    """Whether they span the positions of the picture that is drawn, whatever their size."""
    frames: int = 1
    """How many pictures are drawn together as one."""


@dataclass(frozen=True, eq=False)
class Encoded:
    """A prompt, as the conditioner gave it."""

    conditioning: Array
    lengths: tuple[int, ...]
    """Rows that the conditioner was given: of the prompt, or of each of the pieces that pictures stand between."""
    pictures: Array = field(default_factory=lambda: np.zeros((1, 0, 0), np.float32))
    """What the picture conditioner gave for the prompt, float32 (1, tokens, dim); none where there is no such."""

    rows: tuple[Array, ...] = ()
    """Those, float32 (rows, hidden) each."""

    @property
    def tokens(self) -> int:
        """Rows in all."""
        return sum(self.lengths)


Encode = Callable[[Array], Array]
"""Pixels of a picture, float32 (1, 3, height, width) from -1 to 1 -> its latents as the denoiser knows them, float32
(1, channels, height / 8, width / 8)."""


@dataclass(frozen=True, eq=False)
class ControlPictures:
    """What a ControlNet is given for a picture, in RGB; None where it is not given."""

    image: Image | None = None
    """Of the size that is drawn."""
    mask: Image | None = None
    """White where it is drawn anew, of any size."""
    inpaint_image: Image | None = None
    """Of the size that is drawn."""
    as_diffsynth: bool = False
    """Whether DiffSynth-Studio's words were used, where it differs from diffusers."""


class Family(ABC):
    """A family's host side, for one checkpoint. Sizes are of the picture, in pixels.

    Args:
        config: the checkpoint's config per component.
        where: the file that it stands in, for messages.

    Raises:
        CheckpointError: a key that is read is missing, of another type, or out of its bounds.
    """

    NAME: ClassVar[str]
    """As manifests call it."""
    TEXT: ClassVar[TextConfig]
    """The prompt template and its limits, where the checkpoint does not bring its own."""
    EDIT_TEXT: ClassVar[TextConfig]
    """Likewise of checkpoints that edit pictures, where the family has some."""
    USES_CHAT_TEMPLATE: ClassVar[bool]
    """Whether the reference pipeline renders the tokenizer's own chat template."""
    MAX_SIDE: ClassVar[int]
    """The longest side the position tables allow, in pixels."""
    NEGATIVE_PROMPT: ClassVar[str | None]
    """What guidance uses where no negative prompt is given; None if there is no guidance then."""
    STRENGTHS: ClassVar[Mapping[str, float]]
    """Task -> how much of a picture is drawn anew where a call does not say, as in the reference pipelines."""
    TILING: ClassVar[Tiling]
    """How the VAE takes a picture in tiles."""

    def __init__(self, config: Config, where: str = MANIFEST) -> None:
        self.rope = text_encoder_rope(config.get("text_encoder", {}), f"{where}: config.text_encoder")
        self.text_encoder = decoded(
            config.get("text_encoder", {}), TextEncoder, f"{where}: config.text_encoder", CheckpointError
        )
        self.normalization = vae_normalization(config.get("vae", {}), f"{where}: config.vae")

    @staticmethod
    @abstractmethod
    def dynamic_dimensions(
        height: int, width: int, tokens: int, conditions: int = 0, frames: int = 1
    ) -> dict[str, int]:
        """How long the dynamic dimensions of all graphs are, but for the batch and those of pictures that are read.

        Args:
            height: of the picture.
            width: of the picture.
            tokens: token ids of the prompt, template included.
            conditions: tokens of pictures beside it.
            frames: how many pictures are drawn together as one: more than 1 where one is taken apart.
        """

    @abstractmethod
    def base_sigmas(self, num_inference_steps: int) -> list[float] | None:
        """The noise levels the reference pipeline gives its scheduler; None for the schedule's own equal steps."""

    @abstractmethod
    def noise_dtype(self, precision: str) -> str:
        """The element type the reference pipeline draws its noise in, for weights of this precision."""

    @abstractmethod
    def noise_shape(self, height: int, width: int, frames: int = 1) -> tuple[int, ...]:
        """The shape of one picture's noise as the reference pipeline draws it."""

    @abstractmethod
    def from_noise(self, noise: Array) -> Array:
        """Drawn noise (batch, ...) to latents in the form the reference pipeline keeps them."""

    @abstractmethod
    def latents_shape(self, height: int, width: int, frames: int = 1) -> tuple[int, ...]:
        """The shape of one picture's latents in that form."""

    @abstractmethod
    def to_vae(self, latents: Array, height: int, width: int) -> Array:
        """Latents to the VAE decoder's input, (pictures, channels, height / 8, width / 8).

        There is one picture for each of the batch; where it is taken apart, one for each layer.
        """

    def text_encoder_widths(self) -> tuple[int, int]:
        """How wide the text encoder is, and its feed-forward."""
        return self.text_encoder.hidden_size, self.text_encoder.intermediate_size

    def vision_widths(self) -> tuple[int, int]:
        """How wide the vision encoder is, and its feed-forward, where there is one."""
        return 1, 1

    @abstractmethod
    def denoiser_widths(self) -> tuple[int, int]:
        """How wide the denoiser is, and its feed-forward."""

    @abstractmethod
    def denoiser_heads(self) -> int:
        """How many heads the denoiser's attention has."""

    @abstractmethod
    def vae_channels(self) -> int:
        """The most channels that the VAE decoder has in a feature map of the picture's size."""

    def text_encoder_inputs(self, input_ids: NDArray[np.int64]) -> Feeds:
        """Inputs of ``text_encoder`` for the token ids (1, tokens) of one prompt."""
        cos, sin = text_encoder_tables(input_ids.shape[1], self.rope)
        return {"input_ids": input_ids, "cos": cos, "sin": sin}

    @abstractmethod
    def conditioner_inputs(self, prompt_embeds: Array) -> Feeds:
        """Inputs of ``conditioner`` for one prompt's rows (tokens, hidden)."""

    @abstractmethod
    def denoiser_constants(self, conditioning: Array, tokens: int, height: int, width: int) -> Feeds:
        """Inputs of ``denoiser`` that stay the same over all steps.

        Args:
            conditioning: what the conditioner gave.
            tokens: rows of the prompt that it was given.
            height: of the picture.
            width: of the picture.
        """

    def control_inputs(
        self, net: Control, given: ControlPictures, encode: Encode, text: Encoded, height: int, width: int
    ) -> Feeds:
        """Inputs of the denoiser with a ControlNet that stay the same over all steps, its scale apart.

        Args:
            net: which.
            given: its pictures.
            encode: the VAE encoder.
            text: the prompt, also where guidance is away from another one.
            height: of the picture that is drawn.
            width: likewise.

        Returns:
            By the names that they have before the net's.

        Raises:
            UsageError: the pictures are none that it takes.
        """
        hint = "upgrade zimgkit, or build the bundle again with this one"
        raise UsageError(f"{self.NAME} has no ControlNet of the kind {net.kind!r}", hint)

    def control_step_inputs(self, net: Control, sigma: float) -> Feeds:
        """Likewise those that follow from a step's noise level, its scale apart."""
        return {}

    @abstractmethod
    def schedule_inputs(self, bundle: Bundle, sigmas: Array, progress: Progress | None = None) -> StepInputs:
        """Inputs of ``denoiser`` that follow from the schedule alone.

        Args:
            bundle: an open bundle.
            sigmas: float32 (N,), the noise level of each step, without the 0 at the end.
            progress: called while a long computation runs.

        Returns:
            Step -> its inputs.
        """

    @abstractmethod
    def denoiser_inputs(self, latents: Array) -> Feeds:
        """Inputs of ``denoiser`` that change with the latents."""

    @abstractmethod
    def velocity(self, output: Array, latents: Array) -> Array:
        """The denoiser's output as a velocity in the form of the latents."""

    @staticmethod
    @abstractmethod
    def guidance_scale(cfg_scale: float) -> float:
        """DiffSynth's ``cfg_scale`` as this family's ``guidance_scale``."""

    @staticmethod
    @abstractmethod
    def cfg_scale(guidance_scale: float) -> float:
        """This family's ``guidance_scale`` as DiffSynth's ``cfg_scale``."""

    @staticmethod
    @abstractmethod
    def is_guided(guidance_scale: float) -> bool:
        """Whether there is guidance at this scale."""

    @abstractmethod
    def guide(self, positive: Array, negative: Array, guidance_scale: float, cfg_normalization: float = 0.0) -> Array:
        """Combine the velocities with and without the prompt, (batch, ...) each."""


class PictureFamily(Family):
    """A family that takes pictures beside the one that is drawn."""

    merge: int
    """Side of a group of patches that the vision encoder makes one row of."""

    @abstractmethod
    def condition_tokens(self, grids: Sequence[tuple[int, int]], patches: Sequence[tuple[int, int]]) -> int:
        """How many tokens the denoiser has of the pictures beside the one that is drawn.

        Args:
            grids: rows and columns of the tokens of each one's latents.
            patches: rows and columns of the patches that the vision encoder reads of each.
        """

    @abstractmethod
    def reading_dimensions(
        self, grids: Sequence[tuple[int, int]], patches: Sequence[tuple[int, int]]
    ) -> dict[str, int]:
        """How long the dynamic dimensions are of what the graphs are given of all pictures; arguments as above."""

    @abstractmethod
    def vision_dimensions(self, patches: tuple[int, int]) -> dict[str, int]:
        """Likewise of ``vision_encoder``, for one picture."""

    @abstractmethod
    def vision_grid(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns of the patches that the vision encoder reads of a picture of this size."""

    @abstractmethod
    def vision_inputs(self, picture: Image) -> TowerInputs:
        """Inputs of ``vision_encoder`` for one picture, RGB, and the order of what it gives."""

    @abstractmethod
    def conditioned_constants(self, bundle: Bundle, text: Encoded, height: int, width: int, beside: Beside) -> Feeds:
        """Inputs of ``denoiser.conditions`` that stay the same over all steps.

        Args:
            bundle: an open bundle.
            text: the prompt.
            height: of the picture.
            width: of the picture.
            beside: the pictures beside it.
        """


class SegmentedFamily(PictureFamily):
    """One whose prompts are encoded in pieces, which pictures stand between."""

    @abstractmethod
    def segments_tokens(self, lengths: Sequence[int]) -> int:
        """How many caption tokens a prompt in pieces of so many tokens has."""

    @abstractmethod
    def segments_inputs(self, segments: Sequence[Array]) -> Feeds:
        """Inputs of ``conditioner`` for one prompt's pieces, (tokens, hidden) each."""

    @abstractmethod
    def picture_conditioner_inputs(self, lengths: Sequence[int], beside: Beside) -> Feeds:
        """Inputs of ``picture_conditioner`` for one prompt.

        Args:
            lengths: tokens of the prompt's pieces.
            beside: the pictures that stand between them.
        """


class ConditionedFamily(PictureFamily):
    """One whose text encoder reads pictures, and which takes prompts for regions of the one that is drawn."""

    vision: VisionTower
    """The sizes of the vision encoder."""

    @abstractmethod
    def pictured_text_inputs(
        self, input_ids: NDArray[np.int64], image_token: int, rows: Sequence[Array], patches: Sequence[tuple[int, int]]
    ) -> Feeds:
        """Inputs of ``text_encoder.pictures`` for the token ids (1, tokens) of one prompt with pictures in it.

        Args:
            input_ids: with as many image tokens as there are rows.
            image_token: the id of those.
            rows: float32 (tokens, hidden), what the vision encoder gave for each picture.
            patches: rows and columns of each picture's patches.

        Raises:
            UsageError: the image tokens are not those of the pictures.
        """

    @abstractmethod
    def masked_constants(
        self,
        bundle: Bundle,
        segments: Sequence[Array],
        regions: NDArray[np.bool_],
        height: int,
        width: int,
        beside: Beside | None,
    ) -> Feeds:
        """Inputs of ``denoiser.masked``, or of ``denoiser.masked_conditions``, that stay the same over all steps.

        Args:
            bundle: an open bundle.
            segments: what the conditioner gave for the prompt of each region, and last for that of the whole.
            regions: bool (regions, image tokens), which tokens each region has, those of pictures beside it last.
            height: of the picture.
            width: of the picture.
            beside: the pictures beside it.
        """
