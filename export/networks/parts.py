"""What a bundle is made of: for each of its components, which network it is and which tensors it takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Shapes = dict[str, tuple[int, ...]]
"""Name -> shape."""
Transform = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""Makes a parameter from the checkpoint's tensor of the same name."""


@dataclass(frozen=True)
class Input:
    """One input of a network: name, element type and sides; a string names a free side."""

    name: str
    dtype: torch.dtype
    shape: tuple[int | str, ...]

    def example(self, sizes: Mapping[str, int]) -> Tensor:
        """An empty tensor on the meta device."""
        sides = [sizes[side] if isinstance(side, str) else side for side in self.shape]
        return torch.empty(sides, dtype=self.dtype, device="meta")


@dataclass(frozen=True)
class Part:
    """One component of a bundle."""

    source: str
    """The checkpoint's component its tensors come from: ``"transformer"``, ``"text_encoder"`` or ``"vae"``."""
    network: Callable[[], nn.Module] | None = None
    """Makes the network; None where the host computes with the tensors itself."""
    inputs: tuple[Input, ...] = ()
    output: str = ""
    sizes: tuple[Mapping[str, int], Mapping[str, int]] = ({}, {})
    """Two values for each free side of the inputs. The first is traced: none the code could treat specially."""
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Of a part without a network: the tensors it takes, and their shapes."""
    transforms: Mapping[str, Transform] = field(default_factory=dict)
    """Parameters whose values are not the checkpoint's own, and how they are made."""
    transformed_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """The shapes of those in the checkpoint."""

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

    def stored_shapes(self) -> dict[str, tuple[int, ...]]:
        """The names and shapes of the checkpoint's tensors they come from."""
        return self.parameters() | dict(self.transformed_shapes)


def stored_shapes(parts: Mapping[str, Part]) -> Shapes:
    """The names and shapes of the checkpoint's tensors that some components come from."""
    return {name: shape for part in parts.values() for name, shape in part.stored_shapes().items()}
