"""What is attached to diffusers' ``QwenImageTransformer2DModel`` in training, where it has no place for it.

Blockwise ControlNets add to the image tokens after each block; EliGen's regions need a mask of all tokens, and
positions that begin anew with each prompt. Sources: ``QwenImageBlockWiseControlNet`` and
``QwenImageDiT.process_entity_masks`` of DiffSynth-Studio 2.1. What is attached stays, for gradient checkpointing runs
blocks again on the way back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zimgkit.export.networks.qwen_image_control import BlockwiseControlNet


def pack(latents: Tensor) -> Tensor:
    """Patches of 2x2 as tokens: (batch, channels, h, w) -> (batch, h / 2 * w / 2, 4 * channels)."""
    batch, channels, height, width = latents.shape
    patches = latents.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.flatten(3).flatten(1, 2)


class Blockwise(BlockwiseControlNet):
    """The net of the published files, which adds nothing at first."""

    condition: Tensor
    """Tokens of the picture that controls, (batch, tokens, dim)."""

    def __init__(self, transformer: Any, channels: int) -> None:
        """Begin a net for a transformer; its pictures have so many channels of latents."""
        super().__init__(len(transformer.transformer_blocks), 4 * channels, transformer.inner_dim)
        for name, parameter in self.named_parameters():
            if ".output_proj." in name:
                nn.init.zeros_(parameter)

    def attach(self, transformer: Any) -> None:
        """Let each block of a transformer be followed by the net's."""
        for own, block in zip(self.controlnet_blocks, transformer.transformer_blocks, strict=True):

            def add(_: nn.Module, __: Any, output: tuple[Tensor, Tensor], own: nn.Module = own) -> tuple[Tensor, ...]:
                text, image = output
                return text, image + own(image, self.condition, image.new_ones(1))

            block.register_forward_hook(add)

    def see(self, control: Tensor) -> None:
        """Take latents (batch, channels, h, w) for the next forward."""
        self.condition = self.img_in(pack(control))


class Regions:
    """A processor of attention for prompts with regions; all blocks share one."""

    mask: Tensor | None = None
    """Bool (batch, 1, all tokens, all tokens), whether a token, in rows, sees another; None without regions."""
    prompts = 1
    """How many prompts, equally long, make up the text."""

    def attach(self, transformer: Any) -> None:
        """Let a transformer attend as this says."""

        def positions(_: nn.Module, __: Any, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            image, text = tables
            return image, text[: len(text) // self.prompts].repeat(self.prompts, 1)

        transformer.pos_embed.register_forward_hook(positions)
        for block in transformer.transformer_blocks:
            block.attn.set_processor(self)

    def see(self, valid: Tensor, regions: Tensor | None) -> None:
        """Prepare for the next forward.

        Args:
            valid: bool (batch, text tokens), False where prompts were padded.
            regions: bool (batch, prompts - 1, image tokens), of each prompt but the last, which is the whole's.
        """
        self.mask, self.prompts = None, 1
        if regions is None:
            return
        batch, entities, image_tokens = regions.shape
        self.prompts = entities + 1
        segment = torch.arange(self.prompts, device=valid.device).repeat_interleave(valid.shape[1] // self.prompts)
        seen = torch.cat([regions, regions.new_ones(batch, 1, image_tokens)], dim=1)[:, segment]
        of_text = torch.cat([(segment[:, None] == segment).expand(batch, -1, -1), seen], dim=2)
        whole = regions.new_ones(batch, image_tokens, image_tokens)
        mask = torch.cat([of_text, torch.cat([seen.mT, whole], dim=2)], dim=1)
        mask[:, :, : valid.shape[1]] &= valid[:, None]
        # A pad sees itself, for what sees nothing becomes no number.
        self.mask = (mask | torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device))[:, None]

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None = None,
        attention_mask: None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``QwenDoubleStreamAttnProcessor2_0`` of diffusers with this mask."""
        from diffusers.models.transformers.transformer_qwenimage import apply_rotary_emb_qwen as rotate

        image_table, text_table = image_rotary_emb if image_rotary_emb is not None else (None, None)

        def heads(text: Tensor, image: Tensor, *norms: nn.Module) -> Tensor:
            parts = [x.unflatten(-1, (-1, attn.inner_dim // attn.heads)) for x in (text, image)]
            if norms:
                parts = [norm(x) for norm, x in zip(norms, parts, strict=True)]
                parts = [rotate(x, t, use_real=False) for x, t in zip(parts, (text_table, image_table), strict=True)]
            return torch.cat(parts, dim=1).transpose(1, 2)

        text, image = encoder_hidden_states, hidden_states
        query = heads(attn.add_q_proj(text), attn.to_q(image), attn.norm_added_q, attn.norm_q)
        key = heads(attn.add_k_proj(text), attn.to_k(image), attn.norm_added_k, attn.norm_k)
        value = heads(attn.add_v_proj(text), attn.to_v(image))
        mask = self.mask
        if mask is None and encoder_hidden_states_mask is not None:
            mask = F.pad(encoder_hidden_states_mask, (0, image.shape[1]), value=True)[:, None, None]
        out = F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2).flatten(2).to(image.dtype)
        return attn.to_out[0](out[:, text.shape[1] :]), attn.to_add_out(out[:, : text.shape[1]])
