"""Write a calibration of a bundle that was never run: every channel of every input is said to reach the same magnitude.

For builds that are measured and not looked at, where a calibration would take hours.

    python benchmarks/synthetic_statistics.py BUNDLE FILE.calibration.safetensors
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from zimgkit.engines.bundle import Bundle
from zimgkit.engines.tensors.safetensors import read_header
from zimgkit.engines.torch.graph import load
from zimgkit.export.networks.registry import QUANTIZED
from zimgkit.export.quantization.linears import named_linears
from zimgkit.export.quantization.statistics import BINS, InputStatistics, Statistics

TOP = 8.0
"""Normal numbers hardly reach further."""


def synthetic(bundle: Bundle) -> Statistics:
    """Statistics of all inputs of the linears of a float bundle."""
    found = Statistics(made={"synthetic": True})
    for component, entry in bundle.manifest.components.items():
        if component not in QUANTIZED or not entry.graphs:
            continue
        shapes = {name: info.shape for file in entry.weights for name, info in read_header(bundle.file(file)).items()}
        inputs = found.inputs.setdefault(component, {})
        readers = found.readers.setdefault(component, {})
        for linear in named_linears(load(bundle, next(iter(entry.graphs.values())))):
            readers[linear.weight] = linear.first_reader
            channels = np.full(shapes[linear.weight][-1], TOP, np.float32)
            inputs[linear.first_reader] = InputStatistics(channels, np.ones(BINS), TOP)
    return found


if __name__ == "__main__":
    synthetic(Bundle.open(sys.argv[1], verify=False)).save(Path(sys.argv[2]))
