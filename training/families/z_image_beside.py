"""A Fun ControlNet attached to diffusers' ``ZImageTransformer2DModel`` in training.

Its layers see the tokens that the transformer's see, and add hints to what those give; so do its refiners, or the same
layers in their place. Source: ``ZImageControlNet`` of DiffSynth-Studio 2.1 and ``ZImageControlTransformer2DModel`` of
VideoX-Fun; ``ZImageControlNetModel`` of diffusers 0.42 has the layers, and leaves the refiners' hints out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

PATCHES = "2-1"
"""The key of the embedder of patches."""


class Fun(nn.Module):
    """diffusers' net and what it has seen; its hints are zero at first."""

    refiner_hints: Sequence[Tensor] = ()
    layer_hints: Sequence[Tensor] = ()
    control: list[Tensor]
    tokens: Any
    """What the condition's tokens become, (batch, tokens, dim)."""

    def __init__(self, transformer: Any, channels: int, layers: int = 1) -> None:
        """Begin a net that takes so many channels of latents and has so many layers, which are its refiners too."""
        from diffusers import ZImageControlNetModel

        super().__init__()
        config = transformer.config
        self.net = ZImageControlNetModel(
            control_layers_places=[place * (config.n_layers // layers) for place in range(layers)],
            control_refiner_layers_places=list(range(min(layers, config.n_refiner_layers))),
            control_in_dim=channels,
            add_control_noise_refiner="control_layers",
            **{name: config[name] for name in ("all_patch_size", "all_f_patch_size", "dim", "n_refiner_layers")},
            **{name: config[name] for name in ("n_heads", "n_kv_heads", "norm_eps", "qk_norm")},
        )
        # A layer begins as the transformer's own, as in VideoX-Fun.
        for own, place in zip(self.net.control_layers, self.net.control_layers_places, strict=True):
            own.load_state_dict(transformer.layers[place].state_dict(), strict=False)

    def attach(self, transformer: Any) -> None:
        """Let a transformer's refiners and layers be followed by hints."""
        self.__dict__["pad"] = transformer.x_pad_token  # The transformer's, and no parameter of this.
        net = self.net
        shared = net.add_control_noise_refiner == "control_layers"
        refiners = net.control_layers if shared else net.control_noise_refiner

        def refine(_: nn.Module, args: tuple[Any, ...]) -> None:
            x, *others = args[:4]
            control = self._embedded()
            if net.add_control_noise_refiner is None:
                for block in refiners:
                    control = block(control, *others)
                self.tokens = control
                return
            seen = _walk(refiners, control, x, *others)
            self.refiner_hints, self.tokens = seen[:-1], seen[-1]

        def control(_: nn.Module, args: tuple[Any, ...]) -> None:
            x, *others = args[:4]
            joined = torch.cat([self.tokens, x[:, self.tokens.shape[1] :]], dim=1)
            self.layer_hints = _walk(net.control_layers, joined, x, *others)[:-1]

        def refined(place: int) -> Any:
            return lambda _, __, out: out + self.refiner_hints[place] if place < len(self.refiner_hints) else out

        def controlled(place: int) -> Any:
            return lambda _, __, out: out + self.layer_hints[place]

        transformer.noise_refiner[0].register_forward_pre_hook(refine)
        transformer.layers[0].register_forward_pre_hook(control)
        for place, block in enumerate(transformer.noise_refiner):
            block.register_forward_hook(refined(place))
        for place, layer in enumerate(net.control_layers_places):
            transformer.layers[layer].register_forward_hook(controlled(place))

    def see(self, control: Tensor) -> None:
        """Take latents (batch, channels, h, w) for the next forward; channels that the net has more are zero."""
        channels = self.net.control_all_x_embedder[PATCHES].in_features // 4
        more = control.new_zeros(len(control), channels - control.shape[1], *control.shape[2:])
        self.control = list(torch.cat([control, more], dim=1).unsqueeze(2))

    def _embedded(self) -> Tensor:
        """The tokens of what controls, (batch, tokens, dim), pads among them."""
        height, width = self.control[0].shape[-2:]
        patches = torch.stack(self.net.patchify(self.control, 2, 1))
        tokens = self.net.control_all_x_embedder[PATCHES](patches)
        pad = torch.arange(tokens.shape[1], device=tokens.device) >= height // 2 * (width // 2)
        return torch.where(pad[:, None], self.__dict__["pad"].to(tokens.dtype), tokens)


def _walk(blocks: Any, control: Tensor, x: Tensor, *others: Any) -> list[Tensor]:
    """The hints of control blocks, one after the other, and the tokens that the last one gives."""
    for block in blocks:
        control = block(control, x, *others)
    return list(torch.unbind(control))
