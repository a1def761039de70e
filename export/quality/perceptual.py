"""LPIPS by the package ``lpips``, if it is installed and its weights are in torch's cache: nothing is downloaded."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float32]
Distance = Callable[[Array, Array], float]

BACKBONE = "alexnet-owt-7be5be79.pth"
"""The file of AlexNet's weights in torch's cache, which the package would download."""


def lpips() -> Distance | None:
    """The learned perceptual distance of two pictures, with AlexNet.

    Zhang, Isola, Efros, Shechtman and Wang, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric"
    (2018).

    Returns:
        ``distance(found, expected)`` of pictures (height, width, 3), float32, with values from 0 to 1; 0 where they
        are equal. None where the package or the weights are not on this machine.
    """
    if find_spec("lpips") is None or not (Path(torch.hub.get_dir()) / "checkpoints" / BACKBONE).is_file():
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # It calls torchvision as older versions were called.
        network = import_module("lpips").LPIPS(net="alex", verbose=False)

    def distance(found: Array, expected: Array) -> float:
        pair = (torch.from_numpy(np.moveaxis(picture, -1, 0)[None].copy()) for picture in (found, expected))
        with torch.inference_mode():
            return float(network(*pair, normalize=True))

    return distance
