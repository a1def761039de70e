"""Long helps: a command's options under headings, by one table of their names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import click


class GroupedCommand(click.Command):
    """A command that lists its options under the headings of its class."""

    headings: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Heading -> names of parameters; ``--help``, whose name is click's own, stands under the last."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a section for each heading that has options here."""
        heading_of = {name: heading for heading, names in self.headings.items() for name in names}
        sections: dict[str, list[tuple[str, str]]] = {heading: [] for heading in self.headings}
        last = [*sections][-1]
        for parameter in self.get_params(ctx):
            if isinstance(parameter, click.Option) and (record := parameter.get_help_record(ctx)):
                sections[heading_of.get(str(parameter.name), last)].append(record)
        for heading, records in sections.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)


class RunCommand(GroupedCommand):
    """A command of ``zimg-run``."""

    headings: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "Picture": (*("prompt", "negative_prompt", "height", "width", "num_images_per_prompt", "seed", "from_image"),),
        "From a picture": (
            *("image", "input_image", "strength", "denoising_strength", "mask_image", "mask_blur"),
            *("inpaint_blur_size", "inpaint_blur_sigma", "keep_unmasked"),
            *("edit_image_auto_resize", "edit_rope_interpolation", "context_image"),
            *("layers", "resolution"),
        ),
        "ControlNets": ("control_images", "control_masks", "control_inpaint_images"),
        "Regions": ("entities", "eligen_enable_on_negative"),
        "Sampling": (
            *("num_inference_steps", "guidance_scale", "cfg_scale", "cfg_normalization", "cfg_truncation"),
            *("guidance_low", "guidance_high"),
            *("cache", "cache_negative", "cache_order", "cache_reuse", "max_sequence_length"),
        ),
        "Edges": ("low", "high"),
        "An ONNX file": ("onnx", "layout", "size", "scaling", "levels", "invert"),
        "Bundle and device": ("bundle", "bundles", "backend", "device", "devices", "memory", "vae_tiling", "verify"),
        "Server": ("aliases", "host", "port", "max_queue_seconds", "max_body_mb", "grace_seconds", "warm_up"),
        "Who may ask": ("api_key_file", "no_auth", "origins", "hosts", "url_prefixes"),
        "Output": ("output", "columns", "access_log", "quiet", "as_json"),
    }
