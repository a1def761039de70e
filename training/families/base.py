"""What training asks of a family: the reference's classes, how they are called, and the numbers of its small model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any, Protocol

from torch import Tensor, nn

from zimgkit.runtime.families import Family
from zimgkit.training.loop import Settings

Configs = Mapping[str, Mapping[str, Any]]
"""Component -> config; what depends on the vocabulary is filled in with the tokenizer at hand."""


class Net(Protocol):
    """A ControlNet in training, a module with the parameters of its published files."""

    def attach(self, transformer: Any) -> None:
        """Let a transformer be controlled by it."""

    def see(self, control: Tensor) -> None:
        """Take latents (batch, channels, h, w) of the picture that controls the next forward."""


@dataclass(frozen=True)
class Editor:
    """A pipeline that edits pictures."""

    pipeline: str
    """What diffusers calls it."""
    processor: Mapping[str, Any]
    """``preprocessor_config.json`` for the small model's text model."""
    texts: Sequence[str]
    """What stands around prompts."""


@dataclass(frozen=True)
class TrainingFamily:
    """A family as training knows it."""

    host: type[Family]
    """Its host side, which has its name and its prompt template."""
    classes: Mapping[str, str]
    """``"pipeline"`` or a component -> the reference's class, with its package: ``"diffusers.AutoencoderKL"``."""
    autoencoder: Callable[[Mapping[str, Any]], tuple[nn.Module, nn.Module]]
    """The networks of encoder and decoder of one still image, from the autoencoder's config."""

    start: Callable[[Any, Configs], Any]
    """Makes an untrained pipeline of diffusers from a tokenizer and configs; draws from torch's own generator."""
    encode: Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]]
    """What pictures are conditioned on, as the family's pipeline takes it from the text model: from that model, token
    ids (batch, tokens) int64 and their mask, bool, to embeddings (batch, tokens, hidden) and theirs."""
    velocity: Callable[..., Tensor]
    """Asks the transformer of diffusers: from that network, latents (batch, channels, h, w), noise levels (batch,),
    embeddings (batch, tokens, hidden) and their mask (batch, tokens), bool, True from the left as far as each prompt
    goes, to the velocity, of the latents' shape. By name it takes what the family draws beside: ``net`` and
    ``control``, latents (batch, channels, h, w) of the picture that a ControlNet sees; ``conditions``, latents of
    pictures beside the drawn one; ``regions``, bool (batch, entities, image tokens), where the text is that of all
    entities and then of the whole, each padded to the same length."""
    freeze_unused_text: Callable[[Any], None]
    """Freezes the parameters of a text model that no embedding depends on."""
    unused_modules: Callable[[Any], tuple[str, ...]]
    """Names of modules of a transformer whose results nothing reads."""
    latents_statistics: Callable[[Tensor, Tensor, Tensor], dict[str, Any]]
    """Mean and standard deviation of latents in the words of the autoencoder's config: from how many numbers each
    channel had, their sum, and the sum of their squares, (channels,) float64 each."""
    guided_call: Callable[[list[Tensor], list[Tensor], float], dict[str, Any]]
    """The pipeline's arguments for embeddings (tokens, hidden) of prompts, those of negative prompts, and the guidance
    scale in the family's own form."""

    no_prompts: tuple[str, ...]
    """What stands for no prompt in guidance; the first is the pipeline's own."""
    lora_targets: str
    """Ends of the names of the linears that DiffSynth adapts by default, separated by commas."""

    configs: Configs
    """Of the small model: the real architecture, narrower and shallower, three million parameters.

    Two thirds of them go to the transformer, for composing is what is hard; a sixth to the text model, whose language
    is small; the rest to the autoencoder. Its norms have one group, for one of two channels keeps little of a colour.
    """
    vae_settings: Settings
    """How the small model's autoencoder is trained: some minutes on two cores."""
    diffusion_settings: Settings
    """How its transformer and text model are trained: less than two hours on two cores."""
    crops: Mapping[int, float]
    """Sides of the pieces of pictures that an autoencoder is trained on, in pixels -> how often. Small ones make many
    short steps."""
    demo_restart: int = 0
    """The step at which the training of the small model that is carried began anew; 0 for none."""

    nets: Mapping[str, Callable[[Any, int], Net]] = field(default_factory=dict)
    """Kind of ControlNet -> begins one for a transformer, from channels of latents; the first is the usual one."""
    attach_regions: Callable[[Any], None] | None = None
    """Lets a transformer take ``regions``; None where the family has none."""

    takes_conditions: bool = False
    """Whether its transformer takes ``conditions``."""
    pictured_inputs: Callable[..., list[dict[str, Tensor]]] | None = None
    """Makes the inputs of :attr:`encode_pictured` from a tokenizer, prompts, their pictures, RGB, how the checkpoint
    takes pictures (:class:`ReferencePictures`) and its processor's config; None where no text model reads any."""
    encode_pictured: Callable[[Any, Sequence[Mapping[str, Tensor]]], Tensor] | None = None
    """What the text model makes of several of these, of equal lengths: (prompts, tokens, hidden)."""

    editor: Editor | None = None
    """The reference's pipeline that edits pictures; None where there is none."""

    initialize_text: Callable[[Any], None] = lambda _: None
    """Changes what an untrained text model begins with."""

    @property
    def name(self) -> str:
        """As manifests have it."""
        return self.host.NAME

    @property
    def demo_settings(self) -> Settings:
        """:attr:`diffusion_settings` of the small model that is carried."""
        return replace(self.diffusion_settings, restart=self.demo_restart)

    def reference_class(self, component: str) -> Any:
        """The reference's class of a component, or of the pipeline."""
        package, _, name = self.classes[component].partition(".")
        return getattr(import_module(package), name)
