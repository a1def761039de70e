"""Export a checkpoint of the real size on a small machine: peak memory, time and disk of ``zimg-export build``.

The checkpoint has the real configs, names and shards and weighs nothing (see ``sparse_checkpoint.py``). All is removed
at the end. Exits with 1 where a bound is broken.

    python benchmarks/export_memory.py                               # all families as most checkpoints are, bfloat16
    python benchmarks/export_memory.py --family FAMILY --stored fp32      # the transformer is cast, and written
    python benchmarks/export_memory.py --precision int8-weights           # quantized on the way: writes half of it
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import common

PRECISIONS = ("bf16", "fp32", "int8-weights", "int4-weights")
"""Those that need no calibration, which would run the whole model."""
PEAK_GIB = 3.0
DENOISER_MB = 1.0
BLOCK_NODES = 100
STORED_OTHERWISE = ("Cast", "DequantizeLinear")
BLOCK_GRAPHS = ("denoiser", "conditioner", "text_encoder")


def export(family: str, folder: Path, *, precision: str = "bf16", stored: str = "bf16") -> dict[str, Any]:
    """Write a sparse checkpoint into a folder and build a bundle from it beside it.

    Args:
        family: its name.
        folder: an empty folder, on the disk that shall be measured.
        precision: of the bundle, one of :data:`PRECISIONS`.
        stored: of the checkpoint's transformer, ``"fp32"`` or ``"bf16"``.
    """
    model, bundle = folder / family, folder / f"{family}.bundle"
    writer = Path(__file__).with_name("sparse_checkpoint.py")
    exporter = common.console_script("zimg-export")
    checkpoint = common.run([sys.executable, writer, family, model, "--stored", stored])
    built = common.run(
        [exporter, "build", "--model", model, "--out", bundle, "--precision", precision, "--quiet"],
        {"XDG_CACHE_HOME": str(folder / "cache")},
    )
    return {
        "family": family,
        "precision": precision,
        "stored": stored,
        "checkpoint_bytes": int(checkpoint.output.split()[-1]),
        "peak_bytes": built.peak_bytes,
        "seconds": round(built.seconds, 1),
        **disk_use(bundle),
        "graphs": {path.name: graph_size(path) for path in sorted(bundle.glob("*.onnx"))},
    }


def disk_use(bundle: Path) -> dict[str, int]:
    """What a bundle seems to take, what of that it shares with the checkpoint by links, and what it takes itself."""
    stats = [path.stat() for path in bundle.rglob("*") if path.is_file()]
    return {
        "bundle_bytes": sum(stat.st_size for stat in stats),
        "linked_bytes": sum(stat.st_size for stat in stats if stat.st_nlink > 1),
        "disk_bytes": sum(512 * stat.st_blocks for stat in stats if stat.st_nlink == 1),
    }


def graph_size(path: Path) -> dict[str, int]:
    """The size of an ONNX file, the nodes of its graph and those of its largest function.

    What makes a weight from what is stored, a cast or a dequantization with its zero points, is not counted.
    """
    import onnx

    model = onnx.load(path, load_external_data=False)
    functions = [_own_nodes(function) for function in model.functions]
    return {"bytes": path.stat().st_size, "calls": len(model.graph.node), "largest_function": max(functions, default=0)}


def _own_nodes(function: Any) -> int:
    weights = {name for name in function.input if not name.startswith("input_")}
    reading = [node for node in function.node if node.op_type in STORED_OTHERWISE and node.input[0] in weights]
    apart = {name for node in reading for name in (*node.output, *node.input[1:])}
    return sum(apart.isdisjoint(node.output) for node in function.node)


def report(result: dict[str, Any]) -> int:
    """Print a result; the exit code."""
    gib = result["peak_bytes"] / 2**30
    print(f"\n{result['family']}, {result['stored']} checkpoint to {result['precision']} bundle")
    print(f"  checkpoint      {result['checkpoint_bytes'] / 1e9:8.2f} GB")
    print(
        f"  bundle          {result['bundle_bytes'] / 1e9:8.2f} GB, {result['linked_bytes'] / 1e9:.2f} GB of it linked"
    )
    print(f"  written         {result['disk_bytes'] / 1e9:8.2f} GB")
    print(f"  peak memory     {gib:8.2f} GiB")
    print(f"  time            {result['seconds']:8.1f} s\n")
    graphs = result["graphs"]
    rows = [
        (name, f"{graph['bytes'] / 1e3:.0f}", graph["calls"], graph["largest_function"])
        for name, graph in graphs.items()
    ]
    print(common.table(("graph", "kB", "calls", "nodes in its largest function"), rows), "\n")
    bounds = [("peak resident memory, GiB", gib, PEAK_GIB)]
    for name, graph in graphs.items():
        if name.startswith("denoiser") and graph["largest_function"]:  # Without functions each block is there anew.
            bounds.append((f"{name}, MB", graph["bytes"] / 1e6, DENOISER_MB))
        if re.match("|".join(BLOCK_GRAPHS), name):
            bounds.append((f"{name}, nodes in a block", graph["largest_function"], BLOCK_NODES))
    return common.broken_bounds(bounds)


def main() -> int:
    """The script."""
    parser = common.parser(__doc__)
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16", help="of the bundle")
    parser.add_argument("--stored", choices=["bf16", "fp32"], default="bf16", help="of the checkpoint's transformer")
    options = parser.parse_args()
    return common.each(
        common.families(options),
        options,
        lambda family, folder: export(family, folder, precision=options.precision, stored=options.stored),
        report,
    )


if __name__ == "__main__":
    common.start(main)
