"""The first steps at half the size: pictures of a trained model, how far they are off, what the judge says.

While much noise is in the latents, their high frequencies are noise alone. In the orthonormal DCT the low frequencies
of a picture of twice the sides are twice those of the small one, and noise has the same strength in all. So both show
the same where the small one has the level s / (2 - s) and the whole one s. The first steps are taken at those levels,
what they reached is scaled by the quotient of the levels, and the high frequencies are those of the seed's own noise.
Source: Spectral Progressive Diffusion (arXiv 2605.18736), and ``dct_rewind`` of SGLang. As ``guidance.py`` measures.

    taskset -c 0 python benchmarks/progressive.py --json benchmarks/results/progressive.json
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import common
import numpy as np
from guidance import compare, report
from numpy.typing import NDArray

from zimgkit.runtime import Pipeline, demo_models
from zimgkit.runtime.families import Family
from zimgkit.runtime.job import Schedule
from zimgkit.runtime.request import check

Array = NDArray[np.float32]
SHARES = (0.0, 0.4, 0.5, 0.6)
LATENT = 8
"""Pixels of a latent's sides."""


def dct(count: int) -> Array:
    """The orthonormal DCT-II of so many numbers, a matrix."""
    index = np.arange(count)
    matrix = np.cos(np.pi / count * index[:, None] * (index + 0.5)) * math.sqrt(2 / count)
    matrix[0] /= math.sqrt(2)
    return matrix.astype(np.float32)


def resizing(many: int, few: int) -> Array:
    """(few, many): to the frequencies of many numbers, and back from the first few of them."""
    found: Array = dct(few).T @ dct(many)[:few]
    return found


def low_frequencies(latents: Array) -> Array:
    """Latents (..., h, w) at half the sides; noise of unit strength stays that."""
    rows, columns = latents.shape[-2:]
    found: Array = resizing(rows, rows // 2) @ latents @ resizing(columns, columns // 2).T
    return found


def with_low_frequencies(latents: Array, low: Array) -> Array:
    """Latents (..., h, w) whose low frequencies are those of latents of half the sides."""
    rows, columns = latents.shape[-2:]
    change = resizing(rows, rows // 2).T @ (low - low_frequencies(latents)) @ resizing(columns, columns // 2)
    found: Array = latents + change
    return found


def to_noise(family: Family, latents: Array, height: int, width: int) -> Array:
    """Latents in the shape that noise is drawn in: what the family does to noise, undone."""
    shape = (1, *family.noise_shape(height, width))
    order = family.from_noise(np.arange(math.prod(shape), dtype=np.float32).reshape(shape)).ravel().astype(np.int64)
    found = np.empty(order.size, np.float32)
    found[order] = latents.ravel()
    return found.reshape(shape)


class Progressive:
    """Draws a picture as a pipeline does, a share of the steps at half the size; sides are multiples of 32."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline, self.bundle = pipeline, pipeline.bundle

    def __call__(self, prompt: str, *, share: float = 0.0, **call: Any) -> Any:
        """A picture of one prompt, like a pipeline's output."""
        session, family = self.pipeline.session, self.pipeline.session.family
        request = check(self.bundle.manifest, family, prompt=prompt, **call)
        (whole,) = session.begin(request)
        sigmas = whole.schedule.sigmas
        steps = min(round(share * len(whole.schedule)), len(whole.schedule) - 1)
        if steps:
            height, width = request.height // 2, request.width // 2
            (half,) = session.begin(replace(request, height=height, width=width))
            levels = sigmas[: steps + 1] / (2 - sigmas[: steps + 1])
            inputs = family.schedule_inputs(self.bundle, levels[:-1])
            half.schedule = Schedule(np.append(levels, np.float32(0)), inputs)
            noise = to_noise(family, whole.latents, *request.size)
            half.latents = family.from_noise(low_frequencies(noise))
            for _ in range(steps):
                session.step([half])
            low = sigmas[steps] / levels[steps] * to_noise(family, half.latents, height, width)
            whole.latents = family.from_noise(with_low_frequencies(sigmas[steps] * noise, low))
            whole.step = steps
            half.release()
        while not whole.is_denoised:
            session.step([whole])
        return SimpleNamespace(images=[session.finish(whole)])


def main() -> int:
    """The script."""
    parser = common.parser(__doc__, family=False)
    parser.add_argument("--model", action="append", help="of a trained model [default: those that zimgkit carries]")
    parser.add_argument("--captions", type=int, default=200, help="half of one thing, half of two")
    parser.add_argument("--steps", type=int, help="of each picture [default: the bundle's]")
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="of the steps at half the size")
    options = parser.parse_args()
    call = {"num_inference_steps": options.steps} if options.steps else {}
    ways = {f"{share:.0%} of the steps": {"share": share} for share in options.shares}

    def compare_one(model: str, folder: Path) -> dict[str, Any]:
        with Pipeline.open(model, backend="onnxruntime", warn=lambda _: None) as pipeline:
            found = compare(Progressive(pipeline), ways, call, options.captions)
        return {"model": model, "captions": options.captions, "call": call, "ways": found}

    return common.each(options.model or demo_models.NAMES, options, compare_one, report)


if __name__ == "__main__":
    common.start(main)
