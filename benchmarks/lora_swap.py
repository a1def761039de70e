"""Another LoRA for a bundle: ``zimg-export swap-lora`` against ``zimg-export build --lora``, on mid-size random models.

The checkpoint is in bfloat16, as most are. Both commands are timed whole, from start to end: a first build, which
traces the networks, and another one, which finds them traced. Exits with 1 where a swap is not 20 times as fast as the
first.

    python benchmarks/lora_swap.py                        # all families, LoRAs on attention and on all linears
    python benchmarks/lora_swap.py --family FAMILY --repeats 5 --json swap.json
    python benchmarks/lora_swap.py --precision int8-weights
"""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import common
import families

RATIO = 20.0
PRECISIONS = ("bf16", "int8-weights", "int4-weights")
"""Those that need no calibration, which would be counted as a part of the build."""
RANK = 32
TARGETS = {
    "attention": ("to_q", "to_k", "to_v", "to_out.0"),
    "all linears": ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
                    "w1", "w2", "w3", "net.0.proj", "net.2", "img_mod.1", "txt_mod.1", "adaLN_modulation.0"),
}  # fmt: skip
"""What a LoRA is trained on -> ends of the names of the linears it changes."""


def write_checkpoint(family: str, folder: Path, overrides: Mapping[str, Mapping[str, Any]]) -> None:
    """Save a random checkpoint in bfloat16."""
    import torch

    pipeline = common.reference().FAMILIES[family](**overrides)
    pipeline.to(torch.bfloat16).save_pretrained(folder)


def write_lora(path: Path, checkpoint: Path, targets: tuple[str, ...], seed: int) -> None:
    """Write a random LoRA in bfloat16, in the keys of diffusers."""
    import torch
    from safetensors.torch import save_file

    from zimgkit.export.checkpoints.checkpoint import open_checkpoint

    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, info in open_checkpoint(str(checkpoint)).tensors("transformer").items():
        module = name.removesuffix(".weight")
        if len(info.shape) == 2 and module.endswith(targets):
            for letter, shape in (("A", (RANK, info.shape[1])), ("B", (info.shape[0], RANK))):
                key = f"transformer.{module}.lora_{letter}.weight"
                state[key] = (0.02 * torch.randn(shape, generator=generator)).bfloat16()
    save_file(state, path)


def compare(
    family: str, folder: Path, *, precision: str, repeats: int, overrides: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Build with one LoRA, then swap to another one and back, for each kind of targets.

    Args:
        family: its name.
        folder: an empty folder, on the disk that shall be measured.
        precision: of the bundle.
        repeats: how often to swap.
        overrides: what makes the tests' tiny models larger.
    """
    checkpoint, exporter = folder / "checkpoint", common.console_script("zimg-export")
    write_checkpoint(family, checkpoint, overrides)
    results = {}
    for kind, targets in TARGETS.items():
        # Each build traces its networks, as a first one does.
        env = {"XDG_CACHE_HOME": str(folder / f"{kind}.cache")}
        bundle, loras = folder / f"{kind}.bundle", [folder / f"{kind}-{seed}.safetensors" for seed in (1, 2)]
        for seed, lora in enumerate(loras, start=1):
            write_lora(lora, checkpoint, targets, seed)
        what = ["--model", checkpoint, "--lora", loras[0], "--precision", precision]
        built = common.run([exporter, "build", *what, "--out", bundle, "--quiet"], env)
        again = common.run([exporter, "build", *what, "--out", folder / f"{kind}.again", "--quiet"], env)
        shutil.rmtree(folder / f"{kind}.again")
        swaps = [
            common.run([exporter, "swap-lora", bundle, "--lora", loras[(turn + 1) % 2], "--quiet"], env)
            for turn in range(repeats)
        ]
        # Linked files lie in folders of their own.
        sizes = {path.relative_to(bundle): path.stat().st_size for path in bundle.rglob("*.safetensors")}
        results[kind] = {
            "build_seconds": round(built.seconds, 2),
            "rebuild_seconds": round(again.seconds, 2),
            "swap_seconds": [round(swap.seconds, 2) for swap in swaps],
            "swap_peak_bytes": max(swap.peak_bytes for swap in swaps),
            "touched_bytes": sum(size for path, size in sizes.items() if ".lora" in path.name),
            "weight_bytes": sum(sizes.values()),
        }
    return {"family": family, "precision": precision, "rank": RANK, "targets": results}


def report(result: Mapping[str, Any]) -> int:
    """Print a result; the exit code."""
    rows, bounds = [], []
    for kind, found in result["targets"].items():
        swap = statistics.median(found["swap_seconds"])
        ratio = found["build_seconds"] / swap
        rows.append(
            (
                kind,
                f"{found['touched_bytes'] / 1e6:.0f} of {found['weight_bytes'] / 1e6:.0f} MB",
                f"{found['build_seconds']:.2f} s",
                f"{found['rebuild_seconds']:.2f} s",
                f"{swap:.2f} s",
                f"{ratio:.1f}",
                f"{found['swap_peak_bytes'] / 2**20:.0f} MiB",
            )
        )
        bounds.append((f"{kind}, a swap's share of a build's time", 1 / ratio, 1 / RATIO))
    print(f"\n{result['family']}, {result['precision']}, rank {result['rank']}\n")
    header = ("LoRA on", "touched", "build", "build again", "swap", "build / swap", "peak memory of a swap")
    print(common.table(header, rows), "\n")
    return common.broken_bounds(bounds)


def main() -> int:
    """The script."""
    parser = common.parser(__doc__)
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16", help="of the bundles [default: bf16]")
    parser.add_argument("--repeats", type=int, default=3, help="how often to swap")
    options = parser.parse_args()

    def compare_one(family: str, folder: Path) -> dict[str, Any]:
        overrides = families.family(family).mid_size
        return compare(family, folder, precision=options.precision, repeats=options.repeats, overrides=overrides)

    return common.each(common.families(options), options, compare_one, report)


if __name__ == "__main__":
    common.start(main)
