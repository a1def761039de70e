"""Denoising at full size on a GPU: diffusers eager and compiled, and zimgkit in every precision on every backend.

The transformer has its real config and random weights, made on the device; text encoder and VAE are tiny. Each is
measured in a process of its own, so that its memory is its own and its end is not the others': a step, a step that a
cache leaves all but the first block out of, and whole pictures from the prompt's embeddings, with caches and without.
Latents come from the host's memory and the velocity goes back there, for all alike; a step is one forward without
guidance. What does not run here is skipped, and told with the reason.

What to run, on one H100 or one RTX 4090:

    python benchmarks/gpu_steps.py --json benchmarks/results/gpu_steps.json
    python benchmarks/gpu_steps.py --family FAMILY --layers 20           # where all do not fit
    python benchmarks/gpu_steps.py --contestants eager "fp8 tensorrt" "fp8 torch"
    python benchmarks/gpu_steps.py --tiny --device cpu --width 64 --height 64 --tokens 20      # tries the script

Disk: the weights in bfloat16 (12.3 GB and 40.9 GB), of a precision that is quantized about half as much more, and with
TensorRT its plans, nearly twice as much again. One precision is there at a time, beside bfloat16.
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
from step_contestants import CONTESTANTS, FLOATING, PEERS, PICTURE, PRECISIONS, STEP, Settings, measures, result_file

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
        ``card``: what the driver says of the device; ``flops`` of a step; ``contestants``: name -> what is measured ->
        its figures, or ``failed``, the reason that it has none.

    Raises:
        SystemExit: the disk is too small, or the checkpoint or the reference cannot be made.
    """
    check_space(folder, settings, names)
    settings.save(folder)
    env = common.own_cache(folder)
    common.run([sys.executable, WORKER, folder, "prepare"], env)
    card = json.loads((folder / "prepare.json").read_text())
    contestants: dict[str, Any] = {}
    for name in (name for name in names if name in PEERS):
        contestants[name] = measured(folder, settings, name, card.get("uuid"), env)
    for precision in PRECISIONS:
        own = [name for name in names if name.startswith(f"{precision} ")]
        done = common.measure([sys.executable, WORKER, folder, "build", precision], env) if own else None
        for name in own:
            if done and done.exit_code:
                contestants[name] = {STEP: {"failed": f"its bundle: {reason(done)}"}}
            else:
                contestants[name] = measured(folder, settings, name, card.get("uuid"), env)
        if precision != FLOATING:
            shutil.rmtree(folder / precision, ignore_errors=True)
    size = settings.height, settings.width, settings.tokens
    count = flops.of_step(settings.family, settings.config(), *size)
    return {"settings": vars(settings), "card": card, "flops": count, "contestants": contestants}


def backend_of(name: str) -> str:
    """What runs a contestant."""
    return name.rpartition(" ")[2]


def check_space(folder: Path, settings: Settings, names: list[str]) -> None:
    """Say how much disk is needed.

    Raises:
        SystemExit: there is less.
    """
    weights = weight_bytes(settings.config())
    precisions = {name.split()[0] for name in names if name not in PEERS}
    plans = 2 * weights * any(backend_of(name) in COMPILED_AHEAD for name in names)
    needed = weights + weights * bool(precisions - {FLOATING}) // 2 + plans + SPARE_BYTES
    free = shutil.disk_usage(folder).free
    state = f"{folder.parent} has {free / 1e9:.1f} GB free, and {settings.family} needs {needed / 1e9:.1f} GB"
    if needed > free:
        raise SystemExit(f"{state}; name another disk with --folder, or cut --layers")
    print(state, flush=True)


def measured(
    folder: Path, settings: Settings, name: str, uuid: str | None, env: dict[str, str]
) -> dict[str, dict[str, Any]]:
    """Measure a contestant, after compiling what has to be compiled ahead: what is measured -> its figures."""
    ahead: dict[str, Any] = {}
    if backend_of(name) in COMPILED_AHEAD:
        done = compile_ahead(folder, settings, name, env)
        if done.exit_code:
            return {STEP: {"failed": f"zimg-export compile: {reason(done)}"}}
        ahead = {"compile_s": done.seconds, "compile_peak_bytes": done.peak_bytes}
    found = {what: run(folder, name, what, uuid, env) | ahead for what in measures(name)}
    for what, figures in found.items():
        print(f"  {name}, {what}: {figures.get('failed', 'done')}", flush=True)
    return found


def run(folder: Path, name: str, what: str, uuid: str | None, env: dict[str, str]) -> dict[str, Any]:
    """Measure one thing of a contestant in a process of its own."""
    with device_memory.watch(uuid) as device:
        done = common.measure([sys.executable, WORKER, folder, what, name], env)
    written = result_file(folder, name, what)
    if done.exit_code or not written.exists():
        return {"failed": reason(done)}
    found: dict[str, Any] = json.loads(written.read_text())
    return found | {"device_peak_bytes": device.beyond, "host_peak_bytes": done.peak_bytes}


def compile_ahead(folder: Path, settings: Settings, name: str, env: dict[str, str]) -> common.Measured:
    """Compile what steps and pictures need, for their one size."""
    precision, backend = name.split()
    command = [common.console_script("zimg-export"), "compile", str(folder / precision), "--backend", backend]
    command += ["--size", f"{settings.width}x{settings.height}", "--max-prompt-tokens", str(settings.tokens)]
    components = ("conditioner", "denoiser", "denoiser.head", "denoiser.body", "denoiser.tail", "vae_decoder")
    wanted = [word for component in components for word in ("--component", component)]
    return common.measure([*command, *wanted, "--quiet"], env)


def reason(done: common.Measured) -> str:
    """Why a process failed: its last line, or the signal that ended it."""
    if done.exit_code < 0:
        return f"ended by {signal.Signals(-done.exit_code).name}"
    lines = done.output.strip().splitlines()
    return lines[-1] if lines else f"exit code {done.exit_code}"


def report(result: dict[str, Any]) -> str:
    """The tables of steps and of pictures, and what did not run."""
    settings, card = result["settings"], result["card"].get("card", "CPU")
    peak = flops.PEAK_TFLOPS.get(card)
    steps, pictures, failed = [], [], []
    for name, found in result["contestants"].items():
        for what, figures in found.items():
            label = name if what == STEP else f"{name} {what}"
            if "failed" in figures:
                failed.append(f"{label} did not run: {figures['failed']}")
            elif what == PICTURE:
                times = figures["pictures"]
                ratios = (f"{times['off'] / value:.2f}" for cache, value in times.items() if cache != "off")
                pictures.append((name, *(f"{value:.2f}" for value in times.values()), *ratios, *_memory(figures)))
            else:
                speed = result["flops"] / statistics.median(figures["seconds"]) / 1e12
                share = f"{speed / peak:.0%}" if peak and what == STEP else "-"
                steps.append((label, *_step(figures), f"{speed:.1f}" if what == STEP else "-", share, *_memory(figures),
                              f"{figures['first_step_s'] + figures.get('compile_s', 0):.0f}",
                              f"{figures['relative_l2']:.1e}", f"{figures['max_error']:.1e}"))  # fmt: skip
    header = ["", "median ms", "min ms", "TFLOP/s", "of peak", "device GiB", "host GiB", "start s", "rel. L2", "max"]
    whole = ["", "s", "balanced", "fast", "times as fast", "fast", "device GiB", "host GiB"]
    what = f"{settings['family']}, {settings['width']}x{settings['height']}, {settings['tokens']} tokens on {card}"
    return "\n".join(
        [
            f"\n{what}: {result['flops'] / 1e12:.3f} TFLOP a step; {settings['repeats']} steps each",
            *([common.table(header, steps)] if steps else []),
            *([f"\npictures of {settings['steps']} steps", common.table(whole, pictures)] if pictures else []),
            *failed,
        ]
    )


def _step(figures: dict[str, Any]) -> tuple[str, str]:
    return f"{1e3 * statistics.median(figures['seconds']):.1f}", f"{1e3 * min(figures['seconds']):.1f}"


def _memory(figures: dict[str, Any]) -> tuple[str, str]:
    device = figures["device_peak_bytes"]
    return "-" if device is None else f"{device / 2**30:.2f}", f"{figures['host_peak_bytes'] / 2**30:.2f}"


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
    parser.add_argument("--steps", type=int, default=50, help="of a whole picture")
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
