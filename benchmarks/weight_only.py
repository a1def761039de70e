"""Ways for PyTorch to multiply by a weight that alone has 8 or 4 bits, by the number of rows.

``as it is``: a kernel of PyTorch's own that reads the weight so. ``widened``: the weight with its scales in the
rows' type, in every run. ``scaled after``: widened without its scales, which multiply the result. ``16 or 32 bits``:
what a weight that was never narrow takes. Ways take turns; figures are medians of milliseconds of a thread.

    python benchmarks/weight_only.py --json benchmarks/results/weight_only.json
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import common
import torch
from clock import now
from torch import Tensor

from zimgkit.engines.torch.quantized import FEW_ROWS, weights_linear

ROWS = (1, 4, 8, 16, 64, 256, 1024)
BLOCK = 32
"""Values of a row that one scale of 4 bits is for."""
Ways = dict[str, Callable[[Tensor], Tensor]]


def ways(width: int, out: int, dtype: torch.dtype) -> Ways:
    """The ways of a weight (out, width), each a function of rows (n, width); those of 4 bits have another weight."""
    maker = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (out, width), generator=maker, dtype=torch.int8)
    scale = (torch.rand(out, generator=maker) / 100).to(dtype)
    wide = weight.to(dtype) * scale[:, None]
    found: Ways = {
        "16 or 32 bits": lambda x: x @ wide.T,
        "int8, widened": lambda x: x @ (weight.to(dtype) * scale[:, None]).T,
        "int8, scaled after": lambda x: (x @ weight.to(dtype).T) * scale,
        "int8, as it is": lambda x: torch._weight_int8pack_mm(x, weight, scale),
        "int8, zimgkit": lambda x: weights_linear(x, weight, scale),
    }
    if dtype == torch.bfloat16:
        small = torch.randint(-7, 8, (out, width), generator=maker, dtype=torch.int32)
        scales = (torch.rand(out, width // BLOCK, generator=maker) / 100).to(dtype)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(small + 8, 1)
        pairs = torch.stack([scales.T, torch.zeros_like(scales.T)], dim=-1).contiguous()
        blocks = small.to(torch.int8).reshape(out, -1, BLOCK)
        found["int4, widened"] = lambda x: x @ (blocks.to(dtype) * scales[..., None]).flatten(1).T
        found["int4, as it is"] = lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, BLOCK, pairs)
    return found


def measure(found: Ways, x: Tensor, turns: int) -> dict[str, float]:
    """Way -> milliseconds."""
    spent: dict[str, list[float]] = {name: [] for name in found}
    for turn in range(turns + 1):
        for name, way in found.items():
            start = now()
            way(x)
            if turn:  # The first warms up.
                spent[name].append(now().since(start).cpu_seconds * 1e3)
    return {name: statistics.median(each) for name, each in spent.items()}


def main() -> int:
    """Measure and print."""
    parser = common.parser(__doc__, family=False, folder=False)
    parser.add_argument("--width", type=int, default=2560, help="of rows [default: %(default)s]")
    parser.add_argument("--out", type=int, default=4096, help="rows of the weight [default: %(default)s]")
    parser.add_argument("--turns", type=int, default=7, help="[default: %(default)s]")
    options = parser.parse_args()
    torch.set_num_threads(1)
    facts, results = common.machine(), []
    for dtype in (torch.float32, torch.bfloat16):
        made, x = ways(options.width, options.out, dtype), torch.randn(max(ROWS), options.width).to(dtype)
        found = {rows: measure(made, x[:rows], options.turns) for rows in ROWS}
        name = str(dtype).removeprefix("torch.")
        results.append({"dtype": name, "width": options.width, "out": options.out, "milliseconds": found})
        print(f"\n{name}, {options.width} by {options.out}; few rows are up to {FEW_ROWS}")
        lines = [[way, *(f"{found[rows][way]:.2f}" for rows in ROWS)] for way in found[ROWS[0]]]
        print(common.table(["ms", *map(str, ROWS)], lines))
    common.save(options.json, facts, results)
    return 0


if __name__ == "__main__":
    common.start(main)
