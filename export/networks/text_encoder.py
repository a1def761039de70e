"""The language models that read the prompt, as transformers defines them, without the parts no picture needs.

Of Qwen3 the second-to-last hidden state is taken: its last layer, final norm and head are unused. Of Qwen2.5-VL it is
the last hidden state: its head is unused, and so is its vision tower where no picture is read.
Prompts run one at a time at their exact length, so causal attention needs no mask. Where pictures are in a prompt, some
of its tokens take rows of the vision tower; their positions on three axes are in the tables, which the host makes.

A network's ``forward`` only calls its children; each kind of child is traced once, see ``zimgkit.export.graphs.trace``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import msgspec
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLTextConfig, Qwen3Config
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VLDecoderLayer,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLRMSNorm,
    Qwen2_5_VLTextModel,
)
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3Model

from zimgkit.engines.decoding import Count, Positive, Small, Width, decoded
from zimgkit.engines.errors import CheckpointError
from zimgkit.export.networks import vision_tower
from zimgkit.export.networks.layers import Border
from zimgkit.export.networks.parts import Input, Part, Shapes

FILE = "text_encoder/config.json"


class _Kind(msgspec.Struct, frozen=True):
    model_type: str | None = None
    text_config: dict[str, Any] | None = None


class Language(msgspec.Struct, frozen=True):
    """What of the language model's config has to be right for transformers to make the network."""

    model_type: str
    vocab_size: Count
    hidden_size: Width
    intermediate_size: Count
    num_hidden_layers: Small
    num_attention_heads: Small
    num_key_value_heads: Small
    rms_norm_eps: Positive = 1e-6
    head_dim: Small | None = None
    hidden_act: Literal["silu"] = "silu"
    attention_bias: bool = False
    use_sliding_window: bool | None = False


def text_config(config: Mapping[str, Any]) -> Any:
    """Build transformers' config of the text model from ``text_encoder/config.json``, or from its text part alone.

    Raises:
        CheckpointError: another model type, a RoPE scaling or window that zimgkit does not implement, or a config of
            which transformers makes none.
    """
    parsed = _parsed(config).get_text_config()
    scaling = parsed.rope_parameters.get("rope_type", "default")
    if scaling != "default":
        raise CheckpointError(f"{FILE} asks for {scaling!r} RoPE scaling, which zimgkit does not support")
    parsed._attn_implementation = "sdpa"
    return parsed


def _parsed(config: Mapping[str, Any]) -> Any:
    """Transformers' config of the whole model, after a look at what it takes unseen."""
    kind = decoded(config, _Kind, FILE, CheckpointError).model_type
    kinds = {"qwen3": Qwen3Config, "qwen2_5_vl": Qwen2_5_VLConfig, "qwen2_5_vl_text": Qwen2_5_VLTextConfig}
    if kind not in kinds:
        raise CheckpointError(f"{FILE} has model_type {kind!r}; zimgkit supports qwen3 and qwen2_5_vl")
    try:
        parsed = kinds[kind].from_dict(dict(config))
        language = decoded(parsed.get_text_config().to_dict(), Language, FILE, CheckpointError)
    except CheckpointError:
        raise
    except Exception as error:  # The library raises whatever its checks of types raise.
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{FILE}: transformers makes no config of it ({reason})", "fetch it again") from None
    heads, groups = language.num_attention_heads, language.num_key_value_heads
    if heads % groups or (not language.head_dim and language.hidden_size % heads):
        raise CheckpointError(f"{FILE}: hidden_size and numbers of heads do not divide each other", "fetch it again")
    if language.use_sliding_window:
        raise CheckpointError(f"{FILE} asks for sliding-window attention, which zimgkit does not support")
    return parsed


def text_part(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of ``text_encoder/config.json`` that describes the language model; older files are flat."""
    return decoded(config, _Kind, FILE, CheckpointError).text_config or dict(config)


def language_part(config: Mapping[str, Any], *, pictures: bool) -> dict[str, Any]:
    """What the host side reads of ``text_encoder/config.json``: the language model and, for pictures, the tower."""
    tower = {"vision_config": config["vision_config"]} if pictures and "vision_config" in config else {}
    return text_part(config) | tower


def whole_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A ``text_encoder/config.json`` from what :func:`language_part` keeps; without a tower where none is described."""
    kind = decoded(config, _Kind, FILE, CheckpointError).model_type
    if kind == "qwen2_5_vl_text" and "vision_config" in config:
        text = {key: value for key, value in config.items() if key != "vision_config"}
        kind = "qwen2_5_vl"
        config = {"text_config": text, "vision_config": config["vision_config"], "model_type": kind}
    classes = {"qwen3": "Qwen3Model", "qwen2_5_vl_text": "Qwen2_5_VLTextModel"}
    return {**config, "architectures": [classes.get(kind or "", "Qwen2_5_VLForConditionalGeneration")]}


def _both_halves(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Transformers wants (1, tokens, head_dim) tables whose halves are equal."""
    return torch.cat([cos, cos], dim=-1).unsqueeze(0), torch.cat([sin, sin], dim=-1).unsqueeze(0)


class Qwen3Layer(Qwen3DecoderLayer):  # type: ignore[misc]
    """A decoder layer of Qwen3."""

    def forward(self, hidden_states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(1, tokens, hidden), tables (tokens, head_dim / 2) float32 -> (1, tokens, hidden)."""
        tables = _both_halves(cos.to(hidden_states.dtype), sin.to(hidden_states.dtype))
        out: Tensor = super().forward(hidden_states, position_embeddings=tables)
        return out


class Qwen2Layer(Qwen2_5_VLDecoderLayer):  # type: ignore[misc]
    """A decoder layer of Qwen2.5-VL's language model."""

    def forward(self, hidden_states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(1, tokens, hidden), tables (tokens, head_dim / 2) float32 -> (1, tokens, hidden)."""
        tables = _both_halves(cos.to(hidden_states.dtype), sin.to(hidden_states.dtype))
        out: Tensor = super().forward(hidden_states, position_embeddings=tables)
        return out


class FinalNorm(Qwen2_5_VLRMSNorm):  # type: ignore[misc]
    """The last norm of Qwen2.5-VL; hands out float32."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(1, tokens, hidden) -> the same, float32."""
        out: Tensor = super().forward(hidden_states)
        return out.float()


class TextEncoder(nn.Module):
    """Token ids to the hidden states a picture is conditioned on."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        text = text_config(config)
        qwen3 = text.model_type == "qwen3"
        kind, layers = (Qwen3Layer, text.num_hidden_layers - 1) if qwen3 else (Qwen2Layer, text.num_hidden_layers)
        self.embed_tokens = nn.Embedding(text.vocab_size, text.hidden_size)
        self.layers = nn.ModuleList(kind(text, index) for index in range(layers))
        self.norm = Border() if qwen3 else FinalNorm(text.hidden_size, eps=text.rms_norm_eps)

    def forward(self, input_ids: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """One prompt.

        Args:
            input_ids: (1, tokens) int64.
            cos: (tokens, head_dim / 2) float32.
            sin: as ``cos``.

        Returns:
            (1, tokens, hidden_size) float32: hidden state -2 for Qwen3, -1 (after the norm) for Qwen2.5-VL.
        """
        return self._encoded(self.embed_tokens(input_ids), cos, sin)

    def _encoded(self, hidden_states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        for layer in self.layers:
            hidden_states = layer(hidden_states, cos, sin)
        out: Tensor = self.norm(hidden_states)
        return out


class PictureRows(nn.Module):
    """Rows of pictures in the places that a prompt has for them."""

    def forward(self, hidden_states: Tensor, picture_embeds: Tensor, row_index: Tensor) -> Tensor:
        """(1, tokens, hidden), (picture tokens, hidden) float32, (tokens,) int64 -> (1, tokens, hidden)."""
        rows = torch.cat([hidden_states.squeeze(0), picture_embeds.to(hidden_states.dtype)])
        return F.embedding(row_index, rows).unsqueeze(0)


class PicturesTextEncoder(TextEncoder):
    """Token ids and what the vision tower made of pictures to the hidden states a picture is conditioned on."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self.picture_rows = PictureRows()

    def forward(  # type: ignore[override]
        self, input_ids: Tensor, cos: Tensor, sin: Tensor, picture_embeds: Tensor, row_index: Tensor
    ) -> Tensor:
        """One prompt with pictures.

        Args:
            input_ids: (1, tokens) int64.
            cos: (tokens, head_dim / 2) float32, each pair's angle of the axis that it belongs to (mRoPE).
            sin: as ``cos``.
            picture_embeds: (picture tokens, hidden_size) float32, the vision tower's rows of all pictures.
            row_index: (tokens,) int64, the row that each token takes: its own number where it is a word, ``tokens`` + n
                where it stands for row n of ``picture_embeds``.

        Returns:
            (1, tokens, hidden_size) float32, the last hidden state after the norm.
        """
        hidden_states = self.picture_rows(self.embed_tokens(input_ids), picture_embeds, row_index)
        return self._encoded(hidden_states, cos, sin)


def checkpoint_shapes(config: Mapping[str, Any]) -> Shapes:
    """The tensors of the whole model by the names that hub files give them, the unused ones among them."""
    with torch.device("meta"):
        parsed = _parsed(config)
        classes = {"qwen3": Qwen3Model, "qwen2_5_vl_text": Qwen2_5_VLTextModel}
        model: Any = classes.get(parsed.model_type, Qwen2_5_VLForConditionalGeneration)(parsed)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    for modern, stored in {"model.language_model.": "model.", "model.visual.": "visual."}.items():
        shapes = {stored + n.removeprefix(modern) if n.startswith(modern) else n: s for n, s in shapes.items()}
    return shapes


def parts(config: Mapping[str, Any]) -> dict[str, Part]:
    """The component that the text encoder becomes.

    Raises:
        CheckpointError: the config is of no network that zimgkit implements.
    """
    text = text_config(config)
    half = (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads) // 2
    inputs = (
        Input("input_ids", torch.int64, (1, "tokens")),
        Input("cos", torch.float32, ("tokens", half)),
        Input("sin", torch.float32, ("tokens", half)),
    )
    sizes = ({"tokens": 34}, {"tokens": 55})
    part = Part("text_encoder", lambda: TextEncoder(config), inputs=inputs, outputs=("prompt_embeds",), sizes=sizes)
    return {"text_encoder": part}


def edit_parts(config: Mapping[str, Any]) -> dict[str, Part]:
    """The components that the text encoder becomes where pictures are read: its variant ``pictures``, and a tower.

    Raises:
        CheckpointError: the config is of no network that zimgkit implements, or has no vision tower.
    """
    tower, (whole,) = vision_tower.parts(config), parts(config).values()
    hidden = text_config(config).hidden_size
    if vision_tower.read_config(config).out_hidden_size != hidden:
        raise CheckpointError(f"{FILE}: the vision tower's out_hidden_size is not the text model's hidden_size")
    first, second = whole.sizes
    pictures = replace(
        whole,
        network=lambda: PicturesTextEncoder(config),
        inputs=(
            *whole.inputs,
            Input("picture_embeds", torch.float32, ("picture_tokens", hidden)),
            Input("row_index", torch.int64, ("tokens",)),
        ),
        sizes=({**first, "picture_tokens": 21}, {**second, "picture_tokens": 46}),
    )
    return {"text_encoder": replace(whole, variants={"pictures": pictures}), **tower}
