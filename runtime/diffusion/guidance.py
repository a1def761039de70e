"""Classifier-free guidance (Ho and Salimans 2022): from two predictions, with and without the prompt, to one.

With ``pos`` and ``neg`` the predictions for the prompt and the negative prompt, three rules are in use:

==================  ====================  ============================  ==========
rule                prediction            then                          off at
==================  ====================  ============================  ==========
plain               neg + s (pos - neg)                                 s = 1
norm-preserving     neg + s (pos - neg)   each token gets pos's norm    s = 1
norm-capped         pos + g (pos - neg)   optionally a cap on its norm  g = 0
==================  ====================  ============================  ==========

DiffSynth's ``cfg_scale`` is the ``s`` of the first form everywhere, and so is g + 1 of the second.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from zimgkit.runtime.diffusion.schedule import NUM_TRAIN_TIMESTEPS, timesteps


def acts(sigma: float, cfg_truncation: float = 1.0, guidance_low: float = 0.0, guidance_high: float = 1.0) -> bool:
    """Whether a step at a noise level is guided; a step that is not takes one prediction in the place of two.

    Args:
        sigma: the noise level, from 1 to 0.
        cfg_truncation: guidance is off where 1 - sigma exceeds it, as in diffusers' ``ZImagePipeline``.
        guidance_low: it is off below this noise level: interval guidance (Kynkäänniemi et al. 2024).
        guidance_high: it is off above this noise level.
    """
    level = np.float32(sigma)
    # Rounded as the reference rounds it.
    time = (np.float32(NUM_TRAIN_TIMESTEPS) - timesteps(level)) / np.float32(NUM_TRAIN_TIMESTEPS)
    within = np.float32(guidance_low) <= level <= np.float32(guidance_high)
    return bool(within) and not float(time) > cfg_truncation


def plain_guidance(
    positive: NDArray[np.float32], negative: NDArray[np.float32], guidance_scale: float
) -> NDArray[np.float32]:
    """Combine as diffusers' ``QwenImageLayeredPipeline`` does without ``cfg_normalize``; arguments as below."""
    combined: NDArray[np.float32] = negative + np.float32(guidance_scale) * (positive - negative)
    return combined


def norm_preserving_guidance(
    positive: NDArray[np.float32], negative: NDArray[np.float32], guidance_scale: float
) -> NDArray[np.float32]:
    """Combine as diffusers' ``QwenImagePipeline`` does (there ``true_cfg_scale``), norms kept token by token.

    A token whose combination is zero stays zero; the reference divides by its norm and gives NaN.

    Args:
        positive: float32 (batch, tokens, channels), the packed prediction for the prompt.
        negative: float32 of the same shape, for the negative prompt.
        guidance_scale: 1 gives ``positive``.

    Returns:
        float32 of the same shape.
    """
    combined = plain_guidance(positive, negative, guidance_scale)
    norm = np.linalg.norm(combined, axis=-1, keepdims=True)
    wanted = np.linalg.norm(positive, axis=-1, keepdims=True)
    rescaled: NDArray[np.float32] = combined * np.divide(wanted, norm, out=np.ones_like(norm), where=norm > 0)
    return rescaled


def norm_capped_guidance(
    positive: NDArray[np.float32],
    negative: NDArray[np.float32],
    guidance_scale: float,
    cfg_normalization: float = 0.0,
) -> NDArray[np.float32]:
    """Combine as diffusers' ``ZImagePipeline`` does.

    Args:
        positive: float32 (batch, ...), the prediction for the prompt. The network's output and the velocity,
            which is its negative, serve alike.
        negative: float32 of the same shape, for the negative prompt.
        guidance_scale: 0 gives ``positive``.
        cfg_normalization: c > 0 (or True, which counts as 1) scales a sample down where its norm exceeds c times
            that of ``positive``; 0 or less (or False) leaves it.

    Returns:
        float32 of the same shape.
    """
    combined: NDArray[np.float32] = positive + np.float32(guidance_scale) * (positive - negative)
    if cfg_normalization <= 0:
        return combined
    limit = _sample_norms(positive) * np.float32(cfg_normalization)
    norm = _sample_norms(combined)
    # A norm above its limit is above zero, so nothing is divided by zero.
    factor = np.divide(limit, norm, out=np.ones_like(norm), where=norm > limit)
    capped: NDArray[np.float32] = combined * factor
    return capped


def _sample_norms(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """The norm of each sample, shaped to broadcast: (batch, 1, ...)."""
    norms: NDArray[np.float32] = np.linalg.norm(values.reshape(len(values), -1), axis=1)
    return norms.reshape(-1, *[1] * (values.ndim - 1))
