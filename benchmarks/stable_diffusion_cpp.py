"""stable-diffusion.cpp as a contestant of ``cpu_peers.py``: its program converts a checkpoint, and draws.

Each picture is a process. Its times are taken where its log says that something is done; reading the files does not
count. https://github.com/leejet/stable-diffusion.cpp
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import common
import numpy as np
from clock import STEP, WHOLE, Spent
from numpy.typing import NDArray

from zimgkit.engines.tensors import safetensors
from zimgkit.export.networks.registry import WEIGHT_FILES

TYPES = ("f32", "bf16", "q8_0", "q4_0")
"""Of weights; a VAE's convolutions are in float16 in each."""
OPTIONS = {"transformer": "--diffusion-model", "text_encoder": "--llm", "vae": "--vae"}
PREFIXES = {"transformer": "", "text_encoder": "model."}
"""Component that is converted -> what comes before the names of its tensors."""
PARTS, FUSED = ("to_q", "to_k", "to_v"), "qkv"
"""Of attention, in the order in which the program has them in one."""
START = "generate_image "
DONE = {
    "get_learned_condition completed": "text encoder",
    "sampling completed": STEP,
    "decode_first_stage completed": "VAE decoder",
    "generate_image completed": WHOLE,
}
"""What it logs -> the component that this is the end of."""


def convert(program: Path, model: Path, folder: Path, kind: str) -> dict[str, Path]:
    """Write a checkpoint's text encoder and transformer in one of its types of weights, unless they are there.

    Args:
        program: its ``sd-cli``.
        model: a checkpoint of diffusers, in float32, each component one file.
        folder: where the files go.
        kind: of :data:`TYPES`.

    Returns:
        Component -> its file.

    Raises:
        SystemExit: it failed.
    """
    files = {part: model / part / f"{WEIGHT_FILES[part]}.safetensors" for part in OPTIONS}
    for part, prefix in PREFIXES.items():
        made = partial(rename, files[part], prefix=prefix)
        files[part] = _once(folder / f"{part}-f32.safetensors", made)
        if kind != "f32":
            command: list[str | Path] = [program, "-M", "convert", "--type", kind, "-m", files[part], "-o"]
            files[part] = _once(folder / f"{part}-{kind}.gguf", partial(_run, command))
    return files


def _run(command: list[str | Path], target: Path) -> None:
    common.run([*command, target])


def _once(target: Path, make: Callable[[Path], object]) -> Path:
    unfinished = target.with_stem(f"{target.stem}-unfinished")
    if not target.exists():
        make(unfinished)
        unfinished.rename(target)
    return target


def rename(source: Path, target: Path, prefix: str) -> None:
    """Write tensors by the names that the program knows: after a prefix, and those of query, key and value as one."""
    infos = safetensors.read_header(source)
    groups: dict[str, list[str]] = {}
    for name in infos:
        groups.setdefault(prefix + re.sub(rf"\b({'|'.join(PARTS)})\b", FUSED, name), []).append(name)
    for names in groups.values():
        names.sort(key=lambda name: [part not in name for part in PARTS])
    tensors = {
        name: (infos[parts[0]].dtype, (sum(infos[part].shape[0] for part in parts), *infos[parts[0]].shape[1:]))
        for name, parts in groups.items()
    }
    pieces = {name: [safetensors.view(infos[part]) for part in parts] for name, parts in groups.items()}
    safetensors.write(target, tensors, pieces)


def draw(
    program: Path, files: dict[str, Path], prompt: str, size: int, steps: int
) -> tuple[NDArray[np.float32], dict[str, Spent]]:
    """Draw a picture without guidance, on all cores, as its guide says: with flash attention.

    Args:
        program: its ``sd-cli``.
        files: component -> its file.
        prompt: of whatever.
        size: height and width in pixels.
        steps: denoising steps.

    Returns:
        The picture, (1, size, size, 3), 0 ... 1, and what each component took, all steps together.

    Raises:
        RuntimeError: it failed, or its log is not the expected one; with what it said.
    """
    from PIL import Image

    with tempfile.TemporaryDirectory(dir=files["transformer"].parent) as folder:
        picture, log = Path(folder) / "picture.png", Path(folder) / "errors"
        command = [str(program), "-p", prompt, "-o", str(picture), "-H", str(size), "-W", str(size), "--seed", "0"]
        command += ["--steps", str(steps), "--cfg-scale", "1", "--diffusion-fa", "--rng", "cpu"]
        command += ["-t", str(common.machine()["cores"])]
        command += [text for part, file in files.items() for text in (OPTIONS[part], str(file))]
        with log.open("w") as errors, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors) as process:
            lines, marks = [], []
            for line in process.stdout or ():
                marks.append((line.decode("utf-8", "replace"), Spent(time.perf_counter(), _cpu_seconds(process.pid))))
                lines.append(marks[-1][0])
        spent = components(marks)
        if process.returncode or set(spent) != set(DONE.values()):
            said = " ".join((log.read_text("utf-8", "replace") or "".join(lines[-3:])).split())
            raise RuntimeError(f"{program.name} ended with {process.returncode}: {said[:200]}")
        image = np.asarray(Image.open(picture).convert("RGB"), np.float32)
    return image[None] / 255, spent


def components(marks: Iterable[tuple[str, Spent]]) -> dict[str, Spent]:
    """What each component took.

    Args:
        marks: lines of the log, and the clocks when they came.
    """
    found: dict[str, Spent] = {}
    start = last = None
    for line, clocks in marks:
        if start is None and START in line:
            start = last = clocks
        name = next((name for what, name in DONE.items() if re.search(rf"\b{what}", line)), None)
        if name and start and last:
            since = start if name == WHOLE else last
            found[name] = clocks.since(since)
            last = clocks
    return found


def _cpu_seconds(process: int) -> float:
    """Of all threads of a process; https://docs.kernel.org/filesystems/proc.html."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
