"""What other tools write into their pictures, as parameters of a call. Nothing in it is trusted.

==============  ==========================================================================================
ComfyUI         ``prompt``: the graph that was run, as JSON; in WebP and JPEG behind ``prompt:`` in EXIF
InvokeAI        ``invokeai_metadata``: JSON
Fooocus         ``parameters`` or ``UserComment``: JSON
SwarmUI         ``parameters`` or ``UserComment``: JSON below ``sui_image_params``
NovelAI         ``Comment``: JSON
Draw Things     JSON in the ``UserComment`` of the XMP
Easy Diffusion  a text chunk for each parameter
==============  ==========================================================================================

All of them count guidance as a CFG scale, of which 1 is off.
"""

from __future__ import annotations

import contextlib
import html
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

LONGEST = 1 << 23
"""Characters of JSON that are read."""
DEEPEST = 32
"""Links that are followed in a graph."""
DIGITS = re.compile(r"-?\d{1,20}")
XMP = "XML:com.adobe.xmp"
DRAW_THINGS = re.compile(r"<exif:UserComment>\s*<rdf:Alt>\s*<rdf:li[^>]{0,99}>([^<]*)</rdf:li>")
TOOLS: dict[str, dict[str, str]] = {
    "InvokeAI": {"positive_prompt": "prompt"},
    "Fooocus": {"guidance_scale": "cfg_scale"},
    "SwarmUI": {"negativeprompt": "negative_prompt", "cfgscale": "cfg_scale"},
    "NovelAI": {"uc": "negative_prompt", "scale": "cfg_scale"},
    "Draw Things": {"c": "prompt", "uc": "negative_prompt", "scale": "cfg_scale"},
    "Easy Diffusion": {"guidance_scale": "cfg_scale", "num_inference_steps": "num_inference_steps"},
}
"""What each calls a parameter, where that is not in :data:`COMMON`."""
COMMON = {name: name for name in ("prompt", "negative_prompt", "seed", "width", "height", "cfg_scale")} | {
    "steps": "num_inference_steps"
}
TYPES: dict[str, type] = {"prompt": str, "negative_prompt": str, "cfg_scale": float}
"""Parameter -> its type; of the others it is ``int``."""

TEXTS = ("text", "prompt", "t5xxl", "text_g", "string", "value", "conditioning")
PATHS: dict[str, tuple[str, ...]] = {
    "prompt": ("positive", "guider", *TEXTS),
    "negative_prompt": ("negative", "guider", *TEXTS),
    "seed": ("seed", "noise_seed", "noise", "value"),
    "num_inference_steps": ("steps", "sigmas", "value"),
    "cfg_scale": ("cfg", "guider", "value"),
    "width": ("width", "latent_image", "samples", "value"),
    "height": ("height", "latent_image", "samples", "value"),
}
"""Parameter -> inputs of ComfyUI's nodes that lead from a sampler to its value."""
PLUMBING = re.compile(r"(Save|Preview|VAEDecode|ModelSampling)|(UNET|CLIP|DualCLIP|VAE|Checkpoint)Loader")
"""Nodes of every graph, which are not worth a warning."""
SAMPLERS = ("KSampler", "KSamplerAdvanced", "SamplerCustom", "SamplerCustomAdvanced")


@dataclass(frozen=True)
class Foreign:
    """What a tool has written."""

    tool: str
    call: dict[str, Any]
    """Parameters of a call by name, of their types; their ranges are not checked."""
    left: tuple[str, ...]
    """Names of what else made the picture, as the tool calls it."""


def recognize(texts: Mapping[str, str]) -> Foreign | None:
    """Read the texts of a picture by their names, if they are of a known tool; else None."""
    parameters = _object(texts.get("parameters"))
    graph = next((g for text in (texts.get("prompt"), texts.get("parameters")) if (g := _graph(_object(text)))), None)
    if graph:
        return _comfy(graph)
    if "workflow" in texts:
        return Foreign("ComfyUI", {}, ("the graph that was run",))
    swarm, xmp = parameters.get("sui_image_params"), DRAW_THINGS.search(texts.get(XMP, "")[:LONGEST])
    found: dict[str, Any] = {
        "InvokeAI": _object(texts.get("invokeai_metadata")),
        "SwarmUI": swarm if isinstance(swarm, dict) else {},
        "Fooocus": parameters if "prompt" in parameters else {},
        "NovelAI": _object(texts.get("Comment")) if texts.get("Software") == "NovelAI" else {},
        "Draw Things": _object(html.unescape(xmp[1])) if xmp else {},
        "Easy Diffusion": texts if "num_inference_steps" in texts else {},
    }
    return next((_flat(tool, values) for tool, values in found.items() if values), None)


def _flat(tool: str, values: Mapping[str, Any]) -> Foreign:
    """A tool whose parameters lie side by side."""
    names, call = COMMON | TOOLS[tool], {}
    for key, name in names.items():
        value = _typed(values.get(key), TYPES.get(name, int))
        if value is not None:
            call[name] = value
    for key in ("size", "resolution"):  # "512x768" or "(512, 768)"
        if sizes := re.fullmatch(r"\D?(\d{1,6})\D{1,2}(\d{1,6})\D?", str(values.get(key))[:20]):
            call |= {"width": int(sizes[1]), "height": int(sizes[2])}
            names[key] = "size"
    left = (key for key, value in values.items() if value and key not in names)
    return Foreign(tool, call, tuple(left))


def _comfy(graph: Mapping[str, Mapping[str, Any]]) -> Foreign:
    """The parameters on which all samplers of a graph agree."""
    samplers = [key for key, node in graph.items() if node["class_type"] in SAMPLERS]
    call: dict[str, Any] = {}
    passed = set(samplers)
    for name, path in PATHS.items():
        values = {_typed(_follow(graph, sampler, path, passed), TYPES.get(name, int)) for sampler in samplers}
        if len(values) == 1 and (value := values.pop()) is not None:
            call[name] = value
    left = [name for name in PATHS if name not in call and name != "negative_prompt"]
    others = (str(node["class_type"]) for key, node in graph.items() if key not in passed)
    left += [name for name in others if not PLUMBING.match(name)]
    return Foreign("ComfyUI", call, tuple(dict.fromkeys(left)))


def _follow(graph: Mapping[str, Mapping[str, Any]], key: str, path: Collection[str], passed: set[str]) -> Any:
    """The value that links lead to from a node, by inputs of these names; None where they lead nowhere."""
    for _ in range(DEEPEST):
        node = graph[key]
        passed.add(key)
        if node["class_type"] == "ConditioningZeroOut":
            return ""
        if node["class_type"] == "BasicGuider" and "negative" in path:
            return None
        value = next((node["inputs"][name] for name in path if name in node["inputs"]), None)
        if not isinstance(value, list):
            return value
        if not value or not isinstance(value[0], str) or value[0] not in graph:
            return None
        key = value[0]
    return None


def _graph(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The nodes of a graph of ComfyUI; none if it is no such graph."""
    return {
        key: node
        for key, node in found.items()
        if isinstance(node, dict) and isinstance(node.get("class_type"), str) and isinstance(node.get("inputs"), dict)
    }


def _object(text: str | None) -> dict[str, Any]:
    """A JSON object; empty where the text is none."""
    if not text or len(text) > LONGEST or not text.lstrip().startswith("{"):
        return {}
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _typed(value: Any, kind: type) -> Any:
    """A value, or a text that says one, as the type of its parameter; or None."""
    if kind is str:
        return value if isinstance(value, str) else None
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    text = str(value).strip()[:40].removesuffix(".0")
    if kind is int:
        return int(text) if DIGITS.fullmatch(text) else None
    with contextlib.suppress(ValueError):
        return float(text)
    return None
