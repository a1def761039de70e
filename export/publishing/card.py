"""A bundle's model card: what it was made from, under which licence, what it costs, and how it is run.

https://huggingface.co/docs/hub/model-cards
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from zimgkit.engines.bundle import Cost, Manifest
from zimgkit.engines.errors import ZimgError
from zimgkit.export.checkpoints import catalog
from zimgkit.runtime import demo_models

UNKNOWN = "unknown"
LICENCE = re.compile(r"^license:[ \t]*[\"']?([\w.-]+)", re.MULTILINE)
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def card(manifest: Manifest, repository: str, licence: str) -> str:
    """The text of ``README.md``.

    Args:
        manifest: the bundle's.
        repository: ``owner/name``, where it will lie.
        licence: as hubs call it, or :data:`UNKNOWN`.
    """
    base = base_of(manifest)
    head = [
        f"license: {licence}",
        *([f"base_model: {base}"] if base else []),
        *(["base_model_relation: quantized"] if base and manifest.quantized else []),
        "library_name: zimgkit",
        f"pipeline_tag: {'image-to-image' if manifest.tasks[0] != 'text-to-image' else 'text-to-image'}",
        "tags: [zimgkit, onnx]",
    ]
    text = [
        f"# {manifest.name} for zimgkit",
        f"A bundle of graphs and weights that zimgkit {manifest.zimgkit_version} made and runs without PyTorch:",
        f'```\nzimg-run generate "a red fox" --bundle {repository}\n```',
        "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in _rows(manifest, base, licence))]),
    ]
    return "---\n" + "\n".join(head) + "\n---\n\n" + "\n\n".join(text) + "\n"


def _rows(manifest: Manifest, base: str, licence: str) -> Iterator[tuple[str, str]]:
    source = manifest.checkpoint
    yield "made from", f"[{base}](https://huggingface.co/{base})" if base else f"{manifest.name}, a local checkpoint"
    if base and source.revision:
        yield "revision", f"`{source.revision}`"
    unknown = "unknown: it was neither given nor found with the checkpoint; whoever uploaded this has to say"
    yield "licence", unknown if licence == UNKNOWN else licence
    yield "family", manifest.family
    yield "tasks", ", ".join(manifest.tasks)
    yield "precision", manifest.quantized or manifest.precision
    if manifest.cost is not None:
        yield "what the precision costs", _cost(manifest.cost)
    elif manifest.quantized:
        yield "what the precision costs", "not measured"
    yield "LoRAs merged", ", ".join(f"{lora.file} at {lora.scale:g}" for lora in manifest.loras) or "none"
    if manifest.engines:
        compiled = {f"{engine.compiler} {engine.version} for {engine.device}" for engine in manifest.engines}
        yield "compiled engines", ", ".join(sorted(compiled))
    yield "size", f"{sum(record.size for record in manifest.files.values()) / 1e9:.2f} GB"
    defaults = manifest.defaults
    size = f"{defaults.width}x{defaults.height}"
    yield "recommended", f"{defaults.num_inference_steps} steps, guidance scale {defaults.guidance_scale:g}, {size}"


def _cost(cost: Cost) -> str:
    psnr = "" if cost.difference.psnr is None else f", PSNR {cost.difference.psnr:.1f} dB"
    where = f"{len(cost.prompts)} prompts, {cost.width}x{cost.height}, {cost.num_inference_steps} steps, {cost.backend}"
    worst = f"cosine of every velocity at least {cost.cosine:.5f}, SSIM {cost.difference.ssim:.4f}{psnr}"
    return f"beside float32: {worst} ({where})"


def base_of(manifest: Manifest) -> str:
    """The hub id of the checkpoint that a bundle was made from; empty where it is local or comes with zimgkit."""
    model = manifest.checkpoint.model
    if Path(model).is_absolute() or os.path.lexists(demo_models.locate(model)):
        return ""
    with contextlib.suppress(ZimgError):
        model = catalog.resolve(model)
    return model if HUB_ID.fullmatch(model) else ""


def licence_of(manifest: Manifest) -> str:
    """The licence of the checkpoint that a bundle was made from, by its card here or on a hub; or :data:`UNKNOWN`."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        text = (demo_models.locate(manifest.checkpoint.model) / "README.md").read_text(encoding="utf-8")
        if (parts := text.split("---")) and len(parts) > 2 and (match := LICENCE.search(parts[1])):
            return match[1]
    if base := base_of(manifest):
        with contextlib.suppress(Exception):  # No network, no such model: then nobody says.
            from huggingface_hub import HfApi

            data = HfApi().model_info(base).card_data
            found = data.get("license") if data is not None else None
            return found if isinstance(found, str) and found else UNKNOWN
    return UNKNOWN


def public(text: bytes) -> bytes:
    """A manifest without the places of files on this machine: of each path its last part."""
    manifest = json.loads(text)
    for source in manifest["sources"].values():
        source["model"] = _last(source["model"])
    for lora in manifest.get("loras", ()):
        lora["source"] = _last(lora["source"])
    return (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode()


def _last(place: str) -> str:
    is_local = place.startswith(("/", ".", "~")) or os.path.lexists(place)
    return Path(place).name if is_local else place
