"""How light the runtime is: seconds to start, memory beyond the weights, megabytes to install.

Exits with 1 where a bound is broken.

python benchmarks/footprint.py
python benchmarks/footprint.py --no-install      # without setting up a fresh environment, which needs a package index
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest.mock import patch

import common
import families

from zimgkit.export.networks.registry import FAMILIES

START_SECONDS = 0.5
BEYOND_WEIGHTS_MB = 150
INSTALL_MB = 250
BOUNDED_SIZE = 256
"""Side of the picture that the bound on memory is about. What is beyond the weights grows with the picture."""

BOUNDED = ("zimg-run --help", "import zimgkit.runtime", "import Pipeline")
PIPELINE = families.family(next(iter(FAMILIES))).pipeline
IMPORTS = {
    "import zimgkit.runtime": "import zimgkit.runtime",
    "import Pipeline": "from zimgkit.runtime import Pipeline",
    "python alone": "pass",
    "numpy and onnxruntime": "import numpy, onnxruntime",
    f"diffusers' {PIPELINE}": f"from diffusers import {PIPELINE}",
}
"""What is timed -> the code a fresh interpreter runs. The last ones are there for comparison."""

INSTALLERS = {"pip", "setuptools"}
DIFFUSERS = ("diffusers", "transformers", "torch")


def starts(repeats: int) -> dict[str, dict[str, float]]:
    """Median seconds and peak bytes of fresh interpreters; those that fail, as nothing is installed, are left out."""
    commands = {"zimg-run --help": [common.console_script("zimg-run"), "--help"]}
    commands |= {name: [sys.executable, "-c", code] for name, code in IMPORTS.items()}
    found = {}
    for name, command in commands.items():
        # The first run may have to read files from the disk, and does not count.
        runs = [common.measure(command) for _ in range(repeats + 1)][1:]
        if not any(run.exit_code for run in runs):
            seconds = statistics.median(run.seconds for run in runs)
            found[name] = {"seconds": round(seconds, 3), "peak_bytes": max(run.peak_bytes for run in runs)}
    return found


def demo_bundle(family: str, folder: Path) -> Path:
    """Build the family's demo in float32, as ``make demo`` does."""
    exporter, checkpoint, bundle = common.console_script("zimg-export"), folder / "checkpoint", folder / "bundle"
    common.run([exporter, "demo-checkpoint", checkpoint, "--family", family])
    common.run([exporter, "build", "--model", checkpoint, "--out", bundle, "--precision", "fp32", "--quiet"])
    return bundle


def generation(bundle: Path, size: int, steps: int) -> dict[str, int]:
    """Peak memory of ``zimg-run generate`` on a bundle.

    Beyond the weights means: peak resident memory of the whole process, interpreter, libraries, mapped files and
    activations, less the bytes that the manifest gives for the weights of all components.
    """
    request = ["--prompt", "a red circle", "--seed", "0", "--num-inference-steps", str(steps)]
    picture = ["--height", str(size), "--width", str(size), "--output", bundle.with_suffix(".png")]
    runner = common.console_script("zimg-run")
    done = common.run([runner, "generate", "--bundle", bundle, *request, *picture, "--quiet"])
    manifest = json.loads((bundle / "bundle.json").read_bytes())
    weights = sum(component["weight_bytes"] for component in manifest["components"].values())
    return {"peak_bytes": done.peak_bytes, "weight_bytes": weights, "beyond_bytes": done.peak_bytes - weights}


def generations(sizes: Sequence[int], steps: int) -> dict[str, dict[int, dict[str, int]]]:
    """Family -> size in pixels -> peak memory of drawing a picture with its demo."""
    found = {}
    for family in FAMILIES:
        with (
            tempfile.TemporaryDirectory(prefix="zimg-footprint-") as folder,
            patch.dict(os.environ, common.own_cache(Path(folder))),
        ):
            bundle = demo_bundle(family, Path(folder))
            found[family] = {size: generation(bundle, size, steps) for size in sizes}
    return found


def installed() -> dict[str, Any]:
    """The size of a base install of zimgkit in a fresh environment, without the installers themselves."""
    with tempfile.TemporaryDirectory(prefix="zimg-footprint-") as folder:
        common.run([sys.executable, "-m", "venv", folder])
        common.run([f"{folder}/bin/python", "-m", "pip", "install", "--quiet", common.ROOT])
        site = next(Path(folder).glob("lib/python*/site-packages"))
        packages = {dist.name: dist for dist in metadata.distributions(path=[str(site)])}
        sizes = {name: size_of(dist) for name, dist in packages.items() if name not in INSTALLERS}
        others = [path for path in site.iterdir() if path.name.partition("-")[0] in INSTALLERS]
        total = _tree_size(site) - sum(_tree_size(path) for path in others)
    return {"bytes": total, "packages": dict(sorted(sizes.items(), key=lambda item: -item[1]))}


def size_of(dist: metadata.Distribution) -> int:
    """What the files of an installed package take, as its RECORD lists them."""
    paths = [Path(str(dist.locate_file(file))) for file in dist.files or ()]
    return sum(path.stat().st_size for path in paths if path.is_file())


def _tree_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def requirements(names: tuple[str, ...]) -> dict[str, int]:
    """Packages of this environment, all they need, and the bytes each takes; nothing where one is missing."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    found: dict[str, int] = {}
    wanted = list(names)
    while wanted:
        name = canonicalize_name(wanted.pop())
        if name in found:
            continue
        try:
            dist = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            if name in names:
                return {}
            continue
        found[name] = size_of(dist)
        needed = [Requirement(line) for line in dist.requires or ()]
        wanted += [need.name for need in needed if need.marker is None or need.marker.evaluate({"extra": ""})]
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def report(results: dict[str, Any]) -> int:
    """Print the results; the exit code."""
    rows = [
        (name, f"{times['seconds']:.2f}", f"{times['peak_bytes'] / 1e6:.0f}")
        for name, times in results["start"].items()
    ]
    print(common.table(("start", "s", "MB"), rows), "\n")
    bounds = [(f"{name}, s", results["start"][name]["seconds"], START_SECONDS) for name in BOUNDED]
    peaks = [(family, size, peak) for family, sizes in results["generation"].items() for size, peak in sizes.items()]
    names = ("peak_bytes", "weight_bytes", "beyond_bytes")
    rows = [(f"{family} {size}x{size}", *(f"{peak[name] / 1e6:.1f}" for name in names)) for family, size, peak in peaks]
    print(common.table(("demo picture", "peak MB", "weights MB", "beyond MB"), rows), "\n")
    for family, size, peak in peaks:
        if size == BOUNDED_SIZE:
            bounds.append((f"{family} demo, MB beyond the weights", peak["beyond_bytes"] / 1e6, BEYOND_WEIGHTS_MB))
    for name in ("install", "diffusers"):
        if found := results.get(name):
            largest = [f"{package} {size / 1e6:.0f}" for package, size in list(found["packages"].items())[:5]]
            print(f"{name}: {found['bytes'] / 1e6:.0f} MB ({', '.join(largest)} …)")
    if "install" in results:
        bounds.append(("base install, MB", results["install"]["bytes"] / 1e6, INSTALL_MB))
    print()
    return common.broken_bounds(bounds)


def main() -> int:
    """The script."""
    parser = common.parser(__doc__, family=False, folder=False)
    parser.add_argument("--repeats", type=int, default=5, help="interpreters started of each kind")
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[BOUNDED_SIZE], help="of the demo's pictures, in pixels"
    )
    parser.add_argument("--steps", type=int, default=4, help="denoising steps of the demo's pictures")
    parser.add_argument("--no-install", action="store_true", help="do not measure a fresh install")
    options = parser.parse_args()
    results: dict[str, Any] = {
        "start": starts(options.repeats),
        "generation": generations(options.sizes, options.steps),
    }
    if not options.no_install:
        results["install"] = installed()
    if packages := requirements(DIFFUSERS):
        results["diffusers"] = {"bytes": sum(packages.values()), "packages": packages}
    common.save(options.json, common.machine(), results)
    return report(results)


if __name__ == "__main__":
    common.start(main)
