"""Compile the transformers at their real widths and depths with TensorRT: time and peak memory.

The network is cut into as few chunks of whole blocks as this machine's memory allows; each chunk is a network of its
own, with its embedders and its last layer, random weights and an engine. Needs no GPU where TensorRT for RTX is
installed, as it is for the tests (``make test-tensorrt`` lays it out, ``PYTHONPATH=.venv/tensorrt`` finds it).

    python benchmarks/compile_full.py
    python benchmarks/compile_full.py --family FAMILY --blocks 5 --min-size 512x512 --max-size 1536x1536
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import common
import families
import random_checkpoint

PEAK_PER_WEIGHT = 3.2
"""Peak memory of a compilation, in bytes of weights: what it took here, and a little more."""
USABLE = 0.8
"""How much of the memory a compilation may take."""
REFINERS = "n_refiner_layers"


def chunks(family: str, *, tiny: bool, blocks: int | None) -> list[dict[str, Any]]:
    """The configs of the chunks: all blocks of the network, no more than so many in one.

    Args:
        family: its name.
        tiny: of the tests' width, for a trial.
        blocks: the most in one chunk; what the memory allows when None.
    """
    whole = random_checkpoint.transformer_config(family, tiny=tiny)
    key = families.family(family).depth
    depth = whole[key]
    most = blocks or max(1, int(_memory() * USABLE / PEAK_PER_WEIGHT / block_bytes(family, whole)))
    count = -(-depth // most)
    layers = [depth // count + (index < depth % count) for index in range(count)]
    cut = [whole | {key: number} for number in layers]
    # The blocks that refine the image before it meets the caption are in the first chunk.
    return [config | ({REFINERS: 0} if REFINERS in config and index else {}) for index, config in enumerate(cut)]


def block_bytes(family: str, config: dict[str, Any]) -> int:
    """How large a block's weights are in bfloat16, without what is hoisted out of the denoiser."""
    from zimgkit.export.networks.registry import parts

    def denoiser(layers: int) -> int:
        part = parts(family, "transformer", config | {families.family(family).depth: layers})["denoiser"]
        return 2 * sum(math.prod(shape) for shape in part.parameters().values())

    return denoiser(2) - denoiser(1)


def _memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def compile_chunk(family: str, config: dict[str, Any], folder: Path, sizes: list[str]) -> dict[str, Any]:
    """Write a chunk's checkpoint, build its bundle and compile its denoiser, all of which is removed at the end.

    Returns:
        ``blocks``; ``weight_bytes`` of the denoiser; ``plan_bytes``; ``seconds`` and ``peak_bytes`` of the compilation;
        ``attention``, how many are fused and how many are not.
    """
    model, bundle = folder / "checkpoint", folder / "bundle"
    exporter, cache = common.console_script("zimg-export"), common.own_cache(folder)
    try:
        random_checkpoint.write(family, model, config)
        common.run([exporter, "build", "--model", model, "--out", bundle, "--quiet"], cache)
        command = [exporter, "compile", bundle, "--component", "denoiser", *sizes, "--quiet", "--json"]
        done = common.run(command, cache)
        manifest = json.loads((bundle / "bundle.json").read_bytes())
    finally:
        for path in (model, bundle):
            shutil.rmtree(path, ignore_errors=True)
    (engine,) = json.loads(done.output[done.output.index("{\n") :])["engines"]
    return {
        "blocks": config[families.family(family).depth] + config.get(REFINERS, 0),
        "weight_bytes": manifest["components"]["denoiser"]["weight_bytes"],
        "plan_bytes": engine["bytes"],
        "seconds": round(done.seconds, 1),
        "peak_bytes": done.peak_bytes,
        "attention": engine["attention"],
        "compiler": f"{engine['compiler']} {engine['version']}",
    }


def report(family: str, found: list[dict[str, Any]]) -> None:
    """Print what was found, chunk by chunk and together."""
    header = ("chunk", "blocks", "weights GB", "plan GB", "seconds", "peak GB", "peak / weights", "fused attention")
    rows = []
    for index, chunk in enumerate(found, 1):
        sizes = (f"{chunk[name] / 1e9:.2f}" for name in ("weight_bytes", "plan_bytes"))
        peak = (f"{chunk['peak_bytes'] / 1e9:.2f}", f"{chunk['peak_bytes'] / chunk['weight_bytes']:.2f}")
        fused = f"{chunk['attention'][0]} of {sum(chunk['attention'])}"
        rows.append((str(index), str(chunk["blocks"]), *sizes, f"{chunk['seconds']:.0f}", *peak, fused))
    blocks, weights = (sum(chunk[name] for chunk in found) for name in ("blocks", "weight_bytes"))
    print(f"\n{family}: {blocks} blocks, {weights / 1e9:.2f} GB, {found[0]['compiler']}")
    print(common.table(header, rows))


def main() -> None:
    """The script."""
    parser = common.parser(__doc__)
    parser.add_argument("--blocks", type=int, help="the most blocks in one engine [default: what the memory allows]")
    parser.add_argument("--first", type=int, help="compile only so many chunks")
    parser.add_argument("--size", default="1024x1024", help="the one size to serve")
    parser.add_argument("--min-size", help="with --max-size: serve a span of sizes instead")
    parser.add_argument("--max-size", help="the largest of it")
    parser.add_argument("--tiny", action="store_true", help="tiny blocks, for a trial")
    options = parser.parse_args()
    span = [f"--{name}={getattr(options, name.replace('-', '_'))}" for name in ("min-size", "max-size")]
    sizes = span if options.max_size else ["--size", options.size]
    facts, results = common.machine(), {}
    for family in common.families(options):
        configs = chunks(family, tiny=options.tiny, blocks=options.blocks)
        found = []
        for number, config in enumerate(configs[: options.first], 1):
            with tempfile.TemporaryDirectory(prefix="zimg-compile-full-", dir=options.folder) as folder:
                found.append(compile_chunk(family, config, Path(folder), sizes))
            print(f"  {family}: chunk {number} of {len(configs)} in {found[-1]['seconds']:.0f} s", flush=True)
        report(family, found)
        results[family] = {"chunks": found, "of": len(configs)}
    common.save(options.json, facts, results)


if __name__ == "__main__":
    common.start(main)
