"""The curve of a loss as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

WIDTH, HEIGHT, MARGIN = 960, 480, 56


def write_curve(path: Path, losses: Sequence[float], title: str) -> None:
    """Draw the losses of all steps, and their running average, on a logarithmic scale.

    Args:
        path: a PNG file.
        losses: of step 1, 2 and so on; positive.
        title: what it is the loss of.
    """
    from PIL import Image, ImageDraw

    smooth = _running_average(losses)
    # The first steps and single outliers would flatten the rest.
    ranked = sorted(losses)
    low, high = math.log(ranked[0]), math.log(max(ranked[int(0.99 * (len(ranked) - 1))], smooth[-1]))
    high = max(high, low + 1e-6)
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(image)

    def points(values: Sequence[float]) -> list[tuple[float, float]]:
        count = max(len(values) - 1, 1)
        return [
            (
                MARGIN + (WIDTH - 2 * MARGIN) * index / count,
                HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * (min(math.log(value), high) - low) / (high - low),
            )
            for index, value in enumerate(values)
        ]

    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * share
        draw.line([(MARGIN, y), (WIDTH - MARGIN, y)], fill="#dddddd")
        draw.text((4, y - 6), f"{math.exp(low + share * (high - low)):.4g}", fill="black")
        x = MARGIN + (WIDTH - 2 * MARGIN) * share
        draw.text((x - 10, HEIGHT - MARGIN + 8), f"{round(share * len(losses))}", fill="black")
    if len(losses) > 1:
        draw.line(points(losses), fill="#b8cbe6")
        draw.line(points(smooth), fill="#1f4e9c", width=2)
    draw.text((MARGIN, 16), f"{title}: {smooth[-1]:.4g} after {len(losses)} steps", fill="black")
    image.save(path)


def _running_average(losses: Sequence[float]) -> list[float]:
    average, result = losses[0], []
    for index, loss in enumerate(losses):
        # An equal average of all at first, an exponential one after a hundred.
        average += (loss - average) / min(index + 1, 100)
        result.append(average)
    return result
