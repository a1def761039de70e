"""What the pieces of a denoiser that is cut compute besides, see :mod:`zimgkit.export.attachments.cut`."""

from __future__ import annotations

from torch import Tensor, nn

SAMPLED = 128
"""About how many channels of a token the change is measured in."""


class Change(nn.Module):
    """What the first block added to its stream, in every so manieth channel."""

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        """Twice (batch, tokens, dim) -> (batch, tokens, some 128 channels) float32."""
        step = max(1, before.shape[-1] // SAMPLED)
        return after[..., ::step].float() - before[..., ::step].float()


class Residual(nn.Module):
    """What the body added to the stream."""

    def forward(self, head: Tensor, body: Tensor) -> Tensor:
        """Twice (batch, tokens, dim) -> (batch, tokens, dim) float32."""
        return body.float() - head.float()


class Restore(nn.Module):
    """The stream after the body, of that before it and a combination of residuals."""

    def forward(self, head: Tensor, residual: Tensor, older: Tensor, weights: Tensor) -> Tensor:
        """(batch, tokens, dim), likewise in float32, twice, (2,) float32 -> (batch, tokens, dim)."""
        return (head.float() + (weights[0] * residual + weights[1] * older)).to(head.dtype)
