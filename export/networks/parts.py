"""What a bundle is made of: for each of its components, which network it is and which tensors it takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

Shapes = dict[str, tuple[int, ...]]
"""Name -> shape."""
Transform = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""Makes a parameter from the checkpoint's tensor of the same name."""
Restore = Callable[[NDArray[np.float32], tuple[int, ...]], NDArray[np.float32]]
"""Makes a tensor of a checkpoint's shape from such a parameter, which does the same for a picture."""


@dataclass(frozen=True)
class Input:
    """One input of a network: name, element type and shape; a string names a dynamic dimension."""

    name: str
    dtype: torch.dtype
    shape: tuple[int | str, ...]

    def example(self, sizes: Mapping[str, int]) -> Tensor:
        """An empty tensor on the meta device."""
        shape = [sizes[entry] if isinstance(entry, str) else entry for entry in self.shape]
        return torch.empty(shape, dtype=self.dtype, device="meta")


@dataclass(frozen=True)
class Cut:
    """Where a network of blocks can be cut into head, body and tail, see :mod:`zimgkit.export.attachments.cut`."""

    blocks: str
    """What the names of its blocks begin with, before the dot and the number."""
    tail: tuple[str, ...]
    """What is called after the blocks, and only there."""
    names: Mapping[str, tuple[str, ...]]
    """What is called, ``blocks`` for any of the blocks -> names for its results, where they cross; where it is called
    several times, for those of all calls. The first of a block's results is the stream of what is drawn."""
    repeated: tuple[str, ...] = ()
    """Calls without parameters that each piece makes for itself: their arguments cross, and not their results."""

    def is_block(self, call: fx.Node) -> bool:
        """Whether a call of a plan is that of a block."""
        return str(call.target).startswith(f"{self.blocks}.")


@dataclass(frozen=True)
class ControlNet:
    """A network beside the denoiser that lets pictures control what is drawn, for one file of weights.

    Its blocks are called after some of the denoiser's and add to what these give, scaled; or it is so woven into the
    denoiser that both together are one network.
    """

    kind: str
    """What the family calls nets of this architecture."""
    network: Callable[[], nn.Module]
    """Makes the net alone, whose parameters its file has."""
    inputs: tuple[Input, ...]
    """What the denoiser with it takes beside its own inputs, the last of them :data:`SCALE`."""
    sizes: tuple[Mapping[str, int], Mapping[str, int]] = ({}, {})
    """Two lengths of each dynamic dimension of the inputs that is none of the denoiser's."""
    condition: str = ""
    """The child that makes of all inputs but the scale what each of its blocks takes."""
    blocks: Mapping[str, str | tuple[str, int]] = field(default_factory=dict)
    """A child, called with a value of the denoiser, the condition and the scale -> that value, to which it adds."""
    woven: Callable[[str], nn.Module] | None = None
    """Makes the denoiser with the net in it, by the net's name, where that has a ``forward`` of its own: it takes the
    denoiser's inputs and then the net's, and has the net's parameters under ``control.<name>``."""
    takes: tuple[str, ...] = ("image",)
    """Of ``"image"``, ``"mask"`` and ``"inpaint_image"``, the pictures that it may be given."""
    needs: tuple[str, ...] = ("image",)
    """Of these, what it cannot do without."""
    scale: float = 1.0
    """How strongly it acts where a call does not say."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What else the host side has to know."""
    unused: str = ""
    """What the names of tensors begin with that its file may have, and that it has no use for."""

    @property
    def combines(self) -> bool:
        """Whether it may act in one step with others that do."""
        return self.woven is None

    def linears(self) -> list[str]:
        """The names of the weights of its linears."""
        with torch.device("meta"):
            modules = self.network().named_modules()
            return [f"{name}.weight" for name, module in modules if isinstance(module, nn.Linear)]

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """The names and shapes of its own parameters."""
        with torch.device("meta"):
            return {name: tuple(value.shape) for name, value in self.network().state_dict().items()}


SCALE = Input("scale", torch.float32, (1,))
"""How strongly a ControlNet acts in a step."""


@dataclass(frozen=True)
class Part:
    """One component of a bundle."""

    source: str
    """The checkpoint's component its tensors come from, such as ``"transformer"``."""
    network: Callable[[], nn.Module] | None = None
    """Makes the network; None where the host computes with the tensors itself."""
    inputs: tuple[Input, ...] = ()
    outputs: tuple[str, ...] = ()
    """Names for its results: the one that the network returns, or those of the tuple."""
    sizes: tuple[Mapping[str, int], Mapping[str, int]] = ({}, {})
    """Two lengths of each dynamic dimension of the inputs. The first is traced: none the code could treat specially."""
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Of a part without a network: the tensors it takes, and their shapes."""
    transforms: Mapping[str, Transform] = field(default_factory=dict)
    """Parameters whose values are not the checkpoint's own, and how they are made."""
    transformed_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """The shapes of those in the checkpoint."""
    restores: Mapping[str, Restore] = field(default_factory=dict)
    """How those are made back."""
    other_sources: Mapping[str, str] = field(default_factory=dict)
    """What the names of some parameters begin with -> the source that has them, under the rest of their names: such as
    ``"control." -> "controlnet"``, a file beside the checkpoint.
    """
    cut: Cut | None = None
    """Where the network can be cut."""
    variants: Mapping[str, Part] = field(default_factory=dict)
    """Networks with other inputs over the same parameters or some of them, by what their names have after a dot."""

    def build(self, dtype: torch.dtype) -> nn.Module:
        """The network on the meta device, in the element type it shall compute in."""
        if self.network is None:
            raise TypeError("this part has no network")
        with torch.device("meta"):
            return self.network().to(dtype).eval()

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """The names and shapes of all parameters."""
        if self.network is None:
            return dict(self.shapes)
        return {name: tuple(value.shape) for name, value in self.build(torch.float32).state_dict().items()}

    def origin(self, parameter: str) -> tuple[str, str]:
        """The source that a parameter comes from, and its tensor's canonical name there."""
        for prefix, source in self.other_sources.items():
            if parameter.startswith(prefix):
                return source, parameter.removeprefix(prefix)
        return self.source, parameter

    def stored_shapes(self, source: str | None = None) -> Shapes:
        """The names and shapes of the tensors that parameters come from.

        Args:
            source: which of the sources; the part's own when None.
        """
        shapes = self.parameters() | dict(self.transformed_shapes)
        origins = {name: self.origin(name) for name in shapes}
        return {origins[name][1]: shapes[name] for name in shapes if origins[name][0] == (source or self.source)}


def stored_shapes(parts: Mapping[str, Part]) -> Shapes:
    """The names and shapes of the checkpoint's tensors that some components come from."""
    return {name: shape for part in parts.values() for name, shape in part.stored_shapes().items()}
