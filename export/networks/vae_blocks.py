"""What the two autoencoders share; the names of the parameters are the checkpoints' own.

An autoencoder is a chain of blocks. The containers around them only give the names, so a network's ``forward`` calls
the blocks themselves, and each kind of block is traced once (see ``zimgkit.export.graphs.trace``).

A block becomes an ONNX function of its class's name. TensorRT's parser would take one called ``Attention`` or
``Upsample`` for ONNX's operator, so the classes are not called so.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import msgspec
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zimgkit.engines.errors import CheckpointError
from zimgkit.export.networks.parts import Input, Part, Restore, Transform

LEVELS = 4
"""Each level after the first halves the sides: latents are an eighth of the picture's size."""

FILE = "vae/config.json"
Norm = Callable[[int], nn.Module]
"""Makes a normalization layer for a number of channels."""


def refuse_others(found: msgspec.Struct, config: Mapping[str, Any], keys: Sequence[str]) -> None:
    """Refuse another value of some keys than their defaults, which are all that is implemented.

    Args:
        found: the config, decoded.
        config: as it was read.
        keys: whose values are not implemented but for one.

    Raises:
        CheckpointError: naming the key.
    """
    defaults = {field.name: field.default for field in msgspec.structs.fields(found)}
    for key in keys:
        if getattr(found, key) != defaults[key]:
            raise CheckpointError(f"{FILE} has {key} = {config[key]!r}; zimgkit supports {defaults[key]!r} only")


def named(**modules: nn.Module | None) -> nn.Sequential:
    """Modules one after the other, under these names; those that are None are left out."""
    return nn.Sequential(_present(modules))


def _present(modules: Mapping[str, nn.Module | None]) -> OrderedDict[str, nn.Module]:
    return OrderedDict((name, module) for name, module in modules.items() if module is not None)


def conv3x3(in_channels: int, out_channels: int) -> nn.Conv2d:
    """A convolution that keeps height and width."""
    return nn.Conv2d(in_channels, out_channels, 3, padding=1)


class EntryConv(nn.Conv2d):
    """The first convolution of a network: takes float32, whatever the network computes in."""

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_channels, height, width) -> (batch, out_channels, height, width)."""
        return super().forward(x.to(self.weight.dtype))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, each after a normalization and SiLU, and the way around them."""

    def __init__(self, in_channels: int, out_channels: int, norm: Norm) -> None:
        super().__init__()
        self.norm1 = norm(in_channels)
        self.conv1 = conv3x3(in_channels, out_channels)
        self.norm2 = norm(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.conv_shortcut = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_channels, height, width) -> (batch, out_channels, height, width)."""
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        out: Tensor = self.conv_shortcut(x) + hidden
        return out


def residual_blocks(count: int, in_channels: int, out_channels: int, norm: Norm) -> nn.Sequential:
    """Residual blocks, of which the first changes the number of channels."""
    widths = [in_channels] + [out_channels] * count
    return nn.Sequential(*(ResidualBlock(widths[i], widths[i + 1], norm) for i in range(count)))


class MidBlock(nn.Module):
    """The names of two residual blocks and of the attention between them, if there is one."""

    def __init__(self, channels: int, norm: Norm, attention: nn.Module | None) -> None:
        super().__init__()
        self.resnets = residual_blocks(2, channels, channels, norm)
        self.attentions = nn.Sequential(*([attention] if attention else []))

    def blocks(self) -> Iterator[nn.Module]:
        """The blocks in the order of calls."""
        yield from (self.resnets[0], *self.attentions, self.resnets[1])


class UpsampleConv(nn.Sequential):
    """Every pixel four times, then a 3x3 convolution.

    Four 2x2 convolutions of the small image, interleaved, do the same with 4/9 of the arithmetic. On two cores that
    saves 6 to 11 % of a decode, but ONNX Runtime interleaves on one core only, so more cores gain less.
    """

    def __init__(self, in_channels: int, out_channels: int, name: str) -> None:
        nearest = nn.Upsample(scale_factor=2.0, mode="nearest")
        super().__init__(OrderedDict({"nearest": nearest, name: conv3x3(in_channels, out_channels)}))


class DownsampleConv(nn.Sequential):
    """A 3x3 convolution of stride 2 that pads below and at the right only."""

    def __init__(self, channels: int, name: str) -> None:
        pad = nn.ZeroPad2d((0, 1, 0, 1))
        super().__init__(OrderedDict({"pad": pad, name: nn.Conv2d(channels, channels, 3, stride=2)}))


class Chain(nn.Sequential):
    """A network whose blocks are called one after the other, however deep in containers their names lie."""

    def __init__(self, **modules: nn.Module | None) -> None:
        super().__init__(_present(modules))

    def forward(self, x: Tensor) -> Tensor:
        """Call the blocks."""
        for block in _blocks(self):
            x = block(x)
        return x


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    if isinstance(module, MidBlock):
        yield from module.blocks()
    elif type(module) is nn.Sequential or isinstance(module, Chain):
        for child in module:
            yield from _blocks(child)
    else:
        yield module


def decoder_part(
    network: Callable[[], nn.Module],
    latent_channels: int,
    transform: Transform | None = None,
    stored_shapes: Mapping[str, tuple[int, ...]] | None = None,
    restore: Restore | None = None,
) -> Part:
    """The component that turns latents into a picture.

    Args:
        network: makes the decoder.
        latent_channels: channels of its input.
        transform: makes the parameters that are not the checkpoint's tensors as they are.
        stored_shapes: which those are, and the shapes of the tensors they are made from.
        restore: makes such tensors of them.
    """
    latents = Input("latents", torch.float32, ("batch", latent_channels, "height", "width"))
    sizes = ({"batch": 2, "height": 10, "width": 14}, {"batch": 3, "height": 18, "width": 22})
    return _part(network, latents, "image", sizes, transform, stored_shapes or {}, restore)


def encoder_part(
    network: Callable[[], nn.Module],
    image_channels: int,
    transform: Transform | None = None,
    stored_shapes: Mapping[str, tuple[int, ...]] | None = None,
    restore: Restore | None = None,
) -> Part:
    """The component that turns a picture into the moments of its latents: means, then logarithms of variances.

    The arguments are those of :func:`decoder_part`, with ``image_channels`` of its input.
    """
    image = Input("image", torch.float32, ("batch", image_channels, "image_height", "image_width"))
    sizes = tuple({"batch": b, "image_height": h, "image_width": w} for b, h, w in ((2, 80, 112), (3, 144, 176)))
    return _part(network, image, "moments", (sizes[0], sizes[1]), transform, stored_shapes or {}, restore)


def _part(
    network: Callable[[], nn.Module],
    takes: Input,
    gives: str,
    sizes: tuple[Mapping[str, int], Mapping[str, int]],
    transform: Transform | None,
    stored_shapes: Mapping[str, tuple[int, ...]],
    restore: Restore | None,
) -> Part:
    transforms = dict.fromkeys(stored_shapes, transform) if transform else {}
    return Part(
        "vae",
        network,
        inputs=(takes,),
        outputs=(gives,),
        sizes=sizes,
        transforms=transforms,
        transformed_shapes=stored_shapes,
        restores=dict.fromkeys(stored_shapes, restore) if restore else {},
    )
