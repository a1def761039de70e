"""The headings of ``zimg-export``'s helps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from zimgkit.runtime.commands.headings import GroupedCommand


class ExportCommand(GroupedCommand):
    """A command of ``zimg-export``."""

    headings: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "Checkpoint": (
            *("model", "base", "transformer", "text_encoder", "vae"),
            *("revision", "source", "family", "tasks"),
        ),
        "Networks": ("generator", "siglip", "dinov3"),
        "LoRA": ("loras", "positive_only_loras", "keep_base", "allow_unmatched"),
        "ControlNets": ("controlnets",),
        "Precision": ("precision", "card", "recipe", "range_", "smooth", "target", "by"),
        "Calibration, for fp8 and int8": (
            *("prompts", "calibration", "from_bundle", "calibration_size", "calibration_steps", "calibration_image"),
            "calibration_device",
        ),
        "What it costs": (
            *("cost", "measure", "strict", "cost_prompts", "cost_size", "cost_steps", "cost_images"),
            *("references", "judge", "seed"),
        ),
        "The mask": ("target_speed", "target_error", "name", "cache_order"),
        "Engines and devices": (
            *("backend", "device", "memory", "components", "weight_streaming_budget", "workspace"),
            *("optimization_level", "refittable", "stripped", "plugins", "force"),
        ),
        "What compiled engines serve": (*("sizes", "min_size", "opt_size", "max_size", "max_prompt_tokens", "batch"),),
        "What the server has": ("instance_kind", "bundle_on_server"),
        "What the bundle recommends": ("num_inference_steps", "guidance_scale"),
        "Output": ("kind", "out", "private", "licence", "overwrite", "cut_denoiser", "detailed", "quiet", "as_json"),
    }
