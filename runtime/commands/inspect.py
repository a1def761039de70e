"""What a bundle is, as data and as text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from zimgkit.engines.bundle import CPU_GRAPH, Bundle, CacheMask, Quantization
from zimgkit.engines.choice import choose_backend
from zimgkit.runtime import demo_models
from zimgkit.runtime.bundles import open_bundle, place_of
from zimgkit.runtime.progress import Report, silent


def verify_bundle(path: Path, report: Report = silent) -> dict[str, Any]:
    """Hash all of a bundle afresh, and look at where its graphs point.

    Args:
        path: its folder, or the name of one that zimgkit carries.
        report: called with (stage, done, total).

    Returns:
        ``path``, how many ``files`` and ``bytes`` its manifest lists, and ``errors``: a line for each file that is not
        what the manifest says.

    Raises:
        BundleError: it is no bundle.
    """
    bundle = open_bundle(path, verify=False) if place_of(path) else Bundle.read(demo_models.locate(path))
    records = bundle.manifest.files
    errors = [str(error) for error in bundle.mismatches(afresh=True, report=report)]
    size = sum(record.size for record in records.values())
    return {"path": str(bundle.root), "files": len(records), "bytes": size, "errors": errors}


def verified_text(result: dict[str, Any]) -> str:
    """The result of :func:`verify_bundle` for people."""
    whole = f"{result['path']}: all {result['files']} files ({size_text(result['bytes'])}) are what the manifest says"
    return "\n".join(result["errors"]) or whole


def bundle_summary(path: Path) -> dict[str, Any]:
    """Describe a bundle, after checking its files.

    Args:
        path: its folder, or the name of one that zimgkit carries.

    Raises:
        BundleError: it is no bundle, or a file is not what the manifest says.
    """
    bundle = open_bundle(path)
    manifest = bundle.manifest
    components = {}
    for name, component in manifest.components.items():
        components[name] = {
            "weights": list(component.weights),
            "variant_of": component.variant_of,
            "parameters": component.parameters,
            "weight_bytes": component.weight_bytes,
            "graphs": dict(component.graphs),
            "inputs": {key: _spec(value) for key, value in component.inputs.items()},
            "outputs": {key: _spec(value) for key, value in component.outputs.items()},
        }
    return {
        "path": str(bundle.root),
        "name": manifest.name,
        "family": manifest.family,
        "precision": manifest.precision,
        "quantization": _quantization(manifest.quantization),
        "cost": None if manifest.cost is None else msgspec.to_builtins(manifest.cost),
        "caches": msgspec.to_builtins(manifest.caches),
        "schema_version": manifest.schema_version,
        "zimgkit_version": manifest.zimgkit_version,
        "source": msgspec.to_builtins(manifest.checkpoint),
        "backend": choose_backend(manifest)._asdict(),
        "tasks": list(manifest.tasks),
        "defaults": msgspec.to_builtins(manifest.defaults),
        "scheduler": manifest.scheduler,
        "loras": [msgspec.to_builtins(lora) for lora in manifest.loras],
        "controls": [
            msgspec.to_builtins(control) | {"model": manifest.sources[control.source].model}
            for control in manifest.controls
        ],
        "positive_loras": [msgspec.to_builtins(lora) for lora in manifest.positive_loras],
        "components": components,
        "engines": [
            msgspec.json.decode(msgspec.json.encode(engine))
            | {
                "bytes": manifest.files[engine.file].size,
                "stale": engine.serves != bundle.source_hash(engine.component),
            }
            for engine in manifest.engines
        ],
        "bytes": sum(record.size for record in manifest.files.values()),
        "tools": manifest.tools,
    }


def _spec(spec: Any) -> str:
    return f"{spec.dtype}[{', '.join(map(str, spec.shape))}]"


def bundle_text(summary: dict[str, Any]) -> str:
    """The summary for people."""
    defaults, source = summary["defaults"], summary["source"]
    revision = f" at {source['revision']}" if source.get("revision") else ""
    quantization = summary["quantization"]
    precision = quantization["precision"] if quantization else summary["precision"]
    lines = [
        f"{summary['name']}  ({summary['family']}, {precision}, {size_text(summary['bytes'])})",
        f"  path      {summary['path']}",
        f"  source    {source['model']}{revision}",
        "  built by  "
        + ", ".join(f"{k} {v}" for k, v in {"zimgkit": summary["zimgkit_version"], **summary["tools"]}.items()),
        f"  is for    {', '.join(summary['tasks'])}",
        f"  defaults  {defaults['width']}x{defaults['height']}, {defaults['num_inference_steps']} steps, "
        f"guidance scale {defaults['guidance_scale']:g}, negative prompt {defaults['negative_prompt']!r}",
    ]
    lines.append(f"  runs on   {summary['backend']['backend']}: {summary['backend']['reason']}")
    lines.extend(f"  LoRA      {lora['source']} at {lora['scale']:g}" for lora in summary["loras"])
    for control in summary["controls"]:
        takes = " and ".join(control["takes"])
        lines.append(f"  ControlNet {control['name']} ({control['kind']}), of {takes}, from {control['model']}")
    lines.extend(
        f"  LoRA      {lora['source']} at {lora['scale']:g}, for the prompt alone" for lora in summary["positive_loras"]
    )
    lines.extend(_quantization_lines(quantization, summary["precision"]) if quantization else ())
    lines.extend(f"  {line}" for line in (cost_lines(summary["cost"]) if summary["cost"] else ()))
    lines.extend(f"  {line}" for line in cache_lines(msgspec.convert(summary["caches"], dict[str, CacheMask])))
    for name, component in summary["components"].items():
        shares = f", over the weights of {component['variant_of']}" if component["variant_of"] else ""
        lines.append(f"  {name}{shares}")
        lines.append(f"    weights  {component['parameters']:,} parameters, {size_text(component['weight_bytes'])}")
        lines.extend(f"    in       {file}" for file in component["weights"])
        for compute, file in component["graphs"].items():
            use = "for ONNX Runtime on CPUs" if compute == CPU_GRAPH else f"computes in {compute}"
            lines.append(f"    graph    {file}, {use}")
        lines.extend(f"    input    {key}: {spec}" for key, spec in component["inputs"].items())
        lines.extend(f"    output   {key}: {spec}" for key, spec in component["outputs"].items())
    for engine in summary["engines"]:
        compiler = f"{engine['compiler']} {engine['version']}"
        lines.append(f"  engine of {engine['component']}, {compiler}, {engine['device']}, {size_text(engine['bytes'])}")
        lines.append(f"    in       {engine['file']}")
        for profile in engine["profiles"]:
            lines.append("    serves   " + ", ".join(f"{side} {range_text(ends)}" for side, ends in profile.items()))
        if engine["stale"]:
            again = f"zimg-export compile {summary['path']} --backend {engine['backend']}"
            lines.append(f"    stale    compiled from other weights; {again} compiles it again")
        elif refit := engine.get("refit"):
            lines.append(f"    takes    {len(refit['tensors'])} other weights whenever it is loaded")
        fused, parts = engine.get("attention", (0, 0))
        if fused + parts:
            lines.append(f"    fused    {fused} of {fused + parts} attentions")
        narrow, wide = engine.get("products", (0, 0))
        if narrow + wide:
            lines.append(f"    8 bits   {narrow} of {narrow + wide} products of quantized numbers")
    return "\n".join(lines)


def _quantization(quantization: Quantization | None) -> dict[str, Any] | None:
    """How it is quantized, without the list of all weights."""
    if quantization is None:
        return None
    return {key: value for key, value in msgspec.to_builtins(quantization).items() if key != "inputs"}


def _quantization_lines(quantization: dict[str, Any], precision: str) -> list[str]:
    """What was quantized, how, and what was not."""
    how = [f"ranges by {quantization['range']}"] if quantization.get("range") else []
    if quantization.get("smooth"):
        how.append(f"SmoothQuant {quantization['smooth']:g}")
    plan = quantization.get("calibration", {}).get("plan")
    prompts = plan.get("prompts") if isinstance(plan, dict) else None
    if isinstance(prompts, list):
        how.append(f"calibrated on {len(prompts)} prompts")
    lines = [f"  quantized {', '.join((quantization['precision'], *how))}"]
    for component, unquantized in quantization.get("unquantized", {}).items():
        lines.append(f"    kept     {len(unquantized)} linears of {component} in {precision}")
    for component, kept in quantization.get("kept", {}).items():
        if exact := kept.get("exact"):
            lines.append(f"    exact    {exact} linears of {component}, with the integers and scales of the file")
        if rounded := kept.get("rounded"):
            lines.append(
                f"    rounded  {rounded} linears of {component} again: {kept.get('error', 0):.2g} off, relative"
            )
    return lines


def cost_lines(cost: dict[str, Any]) -> list[str]:
    """What a precision costs, for people."""
    size, steps = f"{cost['width']}x{cost['height']}", cost["num_inference_steps"]
    pictures = f"{len(cost['prompts'])} pictures of {size} in {steps} steps"
    lines = [f"cost      against float32, by {pictures} on {cost['backend']}"]
    for name, entry in (("this", cost["difference"]), ("bfloat16", cost["floor"])):
        worst = (
            f"velocity {max(entry['velocity_relative']):.2g} off at most, cosine {min(entry['velocity_cosine']):.5f}"
        )
        latents = f"last latents {entry['latents_relative'][-1]:.2g} off"
        lines.append(f"  {name:<8}{worst}; {latents}; {_picture_text(entry)}")
    lines.extend(_shares_lines(cost, "float32_accuracy", "in float32"))
    return lines


def cache_lines(caches: Mapping[str, CacheMask]) -> list[str]:
    """The masks for block caching, and what they cost beside the same bundle without, for people."""
    lines = []
    for name, mask in caches.items():
        full = f"{mask.steps.count('1')} of {mask.num_inference_steps} steps in full"
        reused = f", of the {mask.reuse}" if mask.reuse else ""
        lines.append(f"cache     {name}: {full}, order {mask.order}{reused}")
        lines.append(f"  steps   {mask.steps}")
        if mask.cost is not None:
            cost = msgspec.to_builtins(mask.cost)
            pictures = f"{len(cost['prompts'])} pictures of {cost['width']}x{cost['height']} on {cost['backend']}"
            lines.append(f"  costs   {_picture_text(cost)}: {pictures}, {cost['speed']:.2f} times as fast")
            lines.extend(_shares_lines(cost, "uncached_accuracy", "without a cache"))
    return lines


def _picture_text(measured: dict[str, Any]) -> str:
    """How near pictures are."""
    if measured["psnr"] is None:
        return "the same"
    lpips = "" if measured.get("lpips") is None else f", LPIPS {measured['lpips']:.4f}"
    return f"PSNR {measured['psnr']:.1f} dB, SSIM {measured['ssim']:.4f}{lpips}"


def _shares_lines(cost: dict[str, Any], other: str, where: str) -> Iterator[str]:
    """What the judge found, where it was asked, beside what it found elsewhere."""
    if captions := cost.get("captions"):
        told, away = {"one": "one thing", "two": "two things"}, cost.get(other, {})
        shares = [
            f"{share:.1%} of {told.get(key, key)} ({away[key]:.1%})" for key, share in cost.get("accuracy", {}).items()
        ]
        yield f"  right   {', '.join(shares)}: of {captions} captions, by the judge (and {where})"


def range_text(ends: Sequence[int]) -> str:
    """The min, opt and max length of a dynamic dimension, for people."""
    low, opt, high = ends
    return str(high) if low == high else f"{low}…{opt}…{high}"


def size_text(size: float) -> str:
    """A number of bytes, for people."""
    for unit in ("B", "kB", "MB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
