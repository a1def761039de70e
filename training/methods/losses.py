"""What a student is trained for, as modules that return the loss of a batch.

A student takes the Euler steps of its own schedule, without guidance: x + (sigma_next - sigma) velocity(x, sigma).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zimgkit.training.families import TrainingFamily


class Student(nn.Module):
    """A transformer that is asked for velocities."""

    def __init__(self, family: TrainingFamily, transformer: Any) -> None:
        super().__init__()
        self.family = family
        self.transformer = transformer

    def velocity(self, latents: Tensor, sigmas: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """Of latents (batch, channels, h, w) at noise levels (batch,), float32."""
        dtype = next(self.transformer.parameters()).dtype
        out = self.family.velocity(self.transformer, latents.to(dtype), sigmas.to(dtype), text.to(dtype), mask)
        return out.float()


class DirectDistillation(Student):
    """The student draws in its few steps from the teacher's noise, and is to end where the teacher ended.

    The loss is the mean squared error of the last latents, and goes back through all steps: ``DirectDistillLoss`` of
    DiffSynth-Studio (https://github.com/modelscope/DiffSynth-Studio, docs/en/Training/Direct_Distill.md).
    """

    def forward(self, trajectory: Tensor, sigmas: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """The loss.

        Args:
            trajectory: (batch, points, channels, h, w) float32; the first is noise, the last the teacher's picture.
            sigmas: (batch, steps + 1) float32, the student's, the same in every row.
            text: the text model's rows (batch, tokens, hidden).
            mask: (batch, tokens) bool.
        """
        latents = trajectory[:, 0]
        for step in range(sigmas.shape[1] - 1):
            velocity = self.velocity(latents, sigmas[:, step], text, mask)
            latents = latents + (sigmas[:, step + 1] - sigmas[:, step])[:, None, None, None] * velocity
        return (latents - trajectory[:, -1]).square().mean()


class TrajectoryImitation(Student):
    """From a point of the teacher's way the student is to reach the next one in one step.

    The mean squared error of the velocity that leads there: ``TrajectoryImitationLoss.align_trajectory`` of
    DiffSynth-Studio, at one of the points at a time. Its other part compares pictures, and has no gradient there:
    the steps that lead to them are detached.
    """

    def forward(self, trajectory: Tensor, sigmas: Tensor, step: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """The loss.

        Args:
            trajectory: (batch, steps + 1, channels, h, w) float32, the teacher's latents at the student's sigmas.
            sigmas: (batch, steps + 1) float32.
            step: (batch,) int64, which point of each row.
            text: the text model's rows (batch, tokens, hidden).
            mask: (batch, tokens) bool.
        """
        rows = torch.arange(len(step), device=step.device)
        latents, goal = trajectory[rows, step], trajectory[rows, step + 1]
        sigma, after = sigmas[rows, step], sigmas[rows, step + 1]
        wanted = (goal - latents) / (after - sigma)[:, None, None, None]
        return (self.velocity(latents, sigma, text, mask) - wanted).square().mean()
