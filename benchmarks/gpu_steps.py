"""One denoising step at full size on a GPU: diffusers eager and compiled against zimgkit's backends.

The transformer has its real config and random weights, made on the device. Each contestant runs in a process of its
own, so that its memory is its own and its end is not the others'. Latents come from the host's memory and the velocity
goes back there, for all alike; a step is one forward without guidance.

What to run, on one H100 or one RTX 4090:

    python benchmarks/gpu_steps.py --json benchmarks/results/gpu_steps.json
    python benchmarks/gpu_steps.py --family FAMILY --layers 20           # where all do not fit
    python benchmarks/gpu_steps.py --tiny --device cpu --width 64 --height 64 --tokens 20      # tries the script

Disk: the weights in bfloat16 (12.3 GB and 40.9 GB), and with TensorRT its plan, nearly as much again.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import common
import device_memory
import flops
from random_checkpoint import weight_bytes
from step_contestants import CONTESTANTS, Settings

WORKER = Path(__file__).with_name("step_contestants.py")
COMPILED_AHEAD = ("tensorrt",)
"""Contestants that need ``zimg-export compile`` first."""
SPARE_BYTES = 1 << 30
"""Of disk, for graphs, caches and tables."""


def compare(folder: Path, settings: Settings, names: list[str]) -> dict[str, Any]:
    """Let the contestants run one after the other on one checkpoint.

    Args:
        folder: an empty folder.
        settings: what they have in common.
        names: of the contestants.

    Returns:
        ``card``: what the driver says of the device; ``flops`` of a step; ``contestants``: name -> its figures, or
        ``failed``, the reason that it has none.

    Raises:
        SystemExit: the disk is too small, or the checkpoint or the reference cannot be made.
    """
    check_space(folder, settings, names)
    settings.save(folder)
    env = common.own_cache(folder)
    common.run([sys.executable, WORKER, folder, "prepare"], env)
    card = json.loads((folder / "prepare.json").read_text())
    contestants = {}
    for name in names:
        contestants[name] = run(folder, settings, name, card.get("uuid"), env)
        print(f"  {name}: {contestants[name].get('failed', 'done')}", flush=True)
    size = settings.height, settings.width, settings.tokens
    count = flops.of_step(settings.family, settings.config(), *size)
    return {"settings": vars(settings), "card": card, "flops": count, "contestants": contestants}


def check_space(folder: Path, settings: Settings, names: list[str]) -> None:
    """Say how much disk is needed.

    Raises:
        SystemExit: there is less.
    """
    weights = weight_bytes(settings.config())
    plans = weights * sum(name in COMPILED_AHEAD for name in names)
    needed, free = weights + plans + SPARE_BYTES, shutil.disk_usage(folder).free
    state = f"{folder.parent} has {free / 1e9:.1f} GB free, and {settings.family} needs {needed / 1e9:.1f} GB"
    if needed > free:
        raise SystemExit(f"{state}; name another disk with --folder, or cut --layers")
    print(state, flush=True)


def run(folder: Path, settings: Settings, name: str, uuid: str | None, env: dict[str, str]) -> dict[str, Any]:
    """Run one contestant in a process of its own, after compiling what has to be compiled ahead."""
    ahead = {}
    if name in COMPILED_AHEAD:
        done = compile_ahead(folder, settings, name, env)
        if done.exit_code:
            return {"failed": f"zimg-export compile: {reason(done)}"}
        ahead = {"compile_s": done.seconds, "compile_peak_bytes": done.peak_bytes}
    with device_memory.watch(uuid) as device:
        done = common.measure([sys.executable, WORKER, folder, name], env)
    written = folder / f"{name}.json"
    if done.exit_code or not written.exists():
        return {"failed": reason(done)}
    found: dict[str, Any] = json.loads(written.read_text())
    return found | ahead | {"device_peak_bytes": device.beyond, "host_peak_bytes": done.peak_bytes}


def compile_ahead(folder: Path, settings: Settings, backend: str, env: dict[str, str]) -> common.Measured:
    """Compile what the step needs, for its one size."""
    command = [common.console_script("zimg-export"), "compile", str(folder / "bundle"), "--backend", backend]
    command += ["--size", f"{settings.width}x{settings.height}", "--max-prompt-tokens", str(settings.tokens)]
    return common.measure([*command, "--component", "conditioner", "--component", "denoiser", "--quiet"], env)


def reason(done: common.Measured) -> str:
    """Why a process failed: its last line, or the signal that ended it."""
    if done.exit_code < 0:
        return f"ended by {signal.Signals(-done.exit_code).name}"
    lines = done.output.strip().splitlines()
    return lines[-1] if lines else f"exit code {done.exit_code}"


def report(result: dict[str, Any]) -> str:
    """The table, and who did not run."""
    settings, card = result["settings"], result["card"].get("card", "CPU")
    peak = flops.PEAK_TFLOPS.get(card)
    rows, failed = [], []
    for name, figures in result["contestants"].items():
        if "failed" in figures:
            failed.append(f"{name} did not run: {figures['failed']}")
            continue
        median, device = statistics.median(figures["seconds"]), figures["device_peak_bytes"]
        speed = result["flops"] / median / 1e12
        rows.append(
            (
                name,
                f"{1e3 * median:.1f}",
                f"{1e3 * min(figures['seconds']):.1f}",
                f"{speed:.1f}",
                f"{speed / peak:.0%}" if peak else "-",
                "-" if device is None else f"{device / 2**30:.2f}",
                f"{figures['host_peak_bytes'] / 2**30:.2f}",
                f"{figures['first_step_s'] + figures.get('compile_s', 0):.0f}",
                f"{figures['relative_l2']:.1e}",
                f"{figures['max_error']:.1e}",
            )
        )
    header = ["", "median ms", "min ms", "TFLOP/s", "of peak", "device GiB", "host GiB", "start s", "rel. L2", "max"]
    what = f"{settings['family']}, {settings['width']}x{settings['height']}, {settings['tokens']} tokens on {card}"
    return "\n".join(
        [
            f"\n{what}: {result['flops'] / 1e12:.3f} TFLOP a step; {settings['repeats']} steps each",
            *([common.table(header, rows)] if rows else []),
            *failed,
        ]
    )


def main() -> None:
    """The script."""
    parser = common.parser(__doc__)
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS), metavar="NAME")
    parser.add_argument("--height", type=int, default=1024, help="in pixels")
    parser.add_argument("--width", type=int, default=1024, help="in pixels")
    parser.add_argument("--tokens", type=int, default=128, help="of the prompt")
    parser.add_argument("--layers", type=int, help="of the transformer [default: all]")
    parser.add_argument("--tiny", action="store_true", help="a tiny transformer, to try the script")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="CUDA_VISIBLE_DEVICES picks the GPU")
    parser.add_argument("--seed", type=int, default=0, help="of weights and inputs")
    parser.add_argument("--warmup", type=int, default=3, help="steps that do not count, after the first")
    parser.add_argument("--repeats", type=int, default=20, help="steps that count")
    parsed = parser.parse_args()
    options = vars(parsed).copy()
    _, names, where, path = (options.pop(name) for name in ("family", "contestants", "folder", "json"))
    facts, results = common.machine() | {"cuda_visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES")}, []
    for each in common.families(parsed):
        with tempfile.TemporaryDirectory(prefix="zimg-gpu-steps-", dir=where) as folder:
            results.append(compare(Path(folder), Settings(each, **options), names))
        print(report(results[-1]), flush=True)
        common.save(path, facts, results)


if __name__ == "__main__":
    common.start(main)
