"""Pictures of other tools, as those tools write them."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from zimgkit.engines.errors import UsageError
from zimgkit.runtime.pictures.foreign import PATHS, recognize
from zimgkit.runtime.pictures.metadata import read

ALL = {
    "prompt": "a cat", "negative_prompt": "bad", "seed": 2**40, "num_inference_steps": 8, "cfg_scale": 4.5,
    "width": 64, "height": 96,
}  # fmt: skip
SIDE = {"seed": 2**40, "steps": 8, "width": 64, "height": 96}


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


Z_IMAGE = {
    "3": node("KSampler", seed=2**40, steps=8, cfg=4.5, sampler_name="res_multistep", denoise=1.0, model=["11", 0],
              positive=["6", 0], negative=["7", 0], latent_image=["13", 0]),
    "6": node("CLIPTextEncode", text="a cat", clip=["18", 0]),
    "7": node("CLIPTextEncode", text="bad", clip=["18", 0]),
    "8": node("VAEDecode", samples=["3", 0], vae=["17", 0]),
    "9": node("SaveImage", filename_prefix="x", images=["8", 0]),
    "11": node("ModelSamplingAuraFlow", shift=3, model=["16", 0]),
    "13": node("EmptySD3LatentImage", width=64, height=96, batch_size=1),
    "16": node("UNETLoader", unet_name="z.safetensors"),
}  # fmt: skip
CUSTOM = {
    "1": node("SamplerCustomAdvanced", noise=["2", 0], guider=["3", 0], sigmas=["4", 0], latent_image=["5", 0]),
    "2": node("RandomNoise", noise_seed=["9", 0]),
    "3": node("CFGGuider", cfg=4.5, positive=["6", 0], negative=["7", 0]),
    "4": node("BasicScheduler", steps=8, scheduler="simple", denoise=1),
    "5": node("EmptyLatentImage", width=64, height=96),
    "6": node("FluxGuidance", guidance=3.5, conditioning=["8", 0]),
    "7": node("CLIPTextEncode", text="bad"),
    "8": node("CLIPTextEncode", text=["10", 0]),
    "9": node("PrimitiveInt", value=2**40),
    "10": node("PrimitiveString", value="a cat"),
}
XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><exif:UserComment>\n <rdf:Alt>\n  <rdf:li xml:lang="x-default">'
    "{&quot;c&quot;:&quot;a cat&quot;,&quot;uc&quot;:&quot;bad&quot;,&quot;scale&quot;:4.5,&quot;steps&quot;:8,"
    "&quot;seed&quot;:1099511627776,&quot;size&quot;:&quot;64x96&quot;,&quot;sampler&quot;:&quot;Euler A&quot;}"
    "</rdf:li></rdf:Alt></exif:UserComment></x:xmpmeta>"
)
TOOLS: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {
    "ComfyUI": ({"prompt": json.dumps(Z_IMAGE), "workflow": "{}"}, ()),
    "ComfyUI ": ({"prompt": json.dumps(CUSTOM)}, ()),
    "InvokeAI": (
        {"invokeai_metadata": json.dumps(
            {"positive_prompt": "a cat", "negative_prompt": "bad", "cfg_scale": 4.5, "scheduler": "euler", "loras": [],
             "model": {"name": "z"}, **SIDE})},
        ("scheduler", "model"),
    ),
    "Fooocus": (
        {"parameters": json.dumps(
            {"prompt": "a cat", "negative_prompt": "bad", "guidance_scale": 4.5, "resolution": "(64, 96)", "steps": 8,
             "seed": str(2**40), "sampler": "dpmpp"}), "fooocus_scheme": "fooocus"},
        ("sampler",),
    ),
    "SwarmUI": (
        {"parameters": json.dumps(
            {"sui_image_params": {"prompt": "a cat", "negativeprompt": "bad", "cfgscale": 4.5, "model": "z", **SIDE}})},
        ("model",),
    ),
    "NovelAI": (
        {"Software": "NovelAI", "Description": "a cat",
         "Comment": json.dumps({"prompt": "a cat", "uc": "bad", "scale": 4.5, "sampler": "k_euler", **SIDE})},
        ("sampler",),
    ),
    "Draw Things": ({"XML:com.adobe.xmp": XMP}, ("sampler",)),
    "Easy Diffusion": (
        {"prompt": "a cat", "negative_prompt": "bad", "seed": str(2**40), "num_inference_steps": "8", "width": "64",
         "guidance_scale": "4.5", "height": "96", "use_lora_model": "x"},
        ("use_lora_model",),
    ),
}  # fmt: skip


def png(path: Path, texts: dict[str, str]) -> Path:
    chunks = PngImagePlugin.PngInfo()
    for name, text in texts.items():
        (chunks.add_itxt if name.startswith("XML") else chunks.add_text)(name, text)
    Image.new("RGB", (8, 8)).save(path, pnginfo=chunks)
    return path


@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool(tmp_path: Path, tool: str) -> None:
    texts, left = TOOLS[tool]
    said: list[str] = []
    record = read(png(tmp_path / "p.png", texts), said.append)
    assert record.call() == ALL
    assert record.version == tool.strip()
    expected = f"{tmp_path / 'p.png'} was made by {tool}, of which is not taken over: {', '.join(left)}"
    assert said == ([expected] if left else [])


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
@pytest.mark.parametrize("tool", ["ComfyUI", "Fooocus", "SwarmUI"])
def test_a_tool_in_exif(tmp_path: Path, suffix: str, tool: str) -> None:
    texts, _ = TOOLS[tool]
    exif = Image.Exif()
    if tool == "ComfyUI":
        exif[0x0110], exif[0x010F] = f"prompt:{texts['prompt']}", "workflow:{}"
    elif tool == "Fooocus":
        exif[0x9286] = texts["parameters"]
    else:
        exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + texts["parameters"].encode("utf-16-be")
    Image.new("RGB", (8, 8)).save(tmp_path / f"p.{suffix}", exif=exif)
    assert read(tmp_path / f"p.{suffix}").call() == ALL


def graph(**changes: Any) -> dict[str, Any]:
    found = recognize({"prompt": json.dumps({**Z_IMAGE, **changes})})
    assert found is not None
    return found.call | {"left": found.left}


def test_graphs_of_comfyui() -> None:
    assert graph(**{"7": node("ConditioningZeroOut", conditioning=["6", 0])})["negative_prompt"] == ""
    lora = graph(**{"20": node("LoraLoaderModelOnly", lora_name="x", model=["16", 0])})
    assert lora == ALL | {"left": ("LoraLoaderModelOnly",)}
    # A second pass has the same prompt, and other steps: only that on which both agree is taken.
    second = graph(
        **{"30": {**Z_IMAGE["3"], "inputs": {**Z_IMAGE["3"]["inputs"], "steps": 4, "latent_image": ["3", 0]}}}
    )
    assert second == {k: v for k, v in ALL.items() if k != "num_inference_steps"} | {"left": ("num_inference_steps",)}
    joined = graph(**{"6": node("ConditioningCombine", conditioning_1=["7", 0], conditioning_2=["7", 0])})
    assert "prompt" not in joined and joined["left"] == ("prompt",)
    assert "prompt" not in graph(**{"6": node("Loop", text=["6", 0])})
    assert "prompt" not in graph(**{"6": node("Dangling", text=["99", 0])})
    nan = json.dumps({**Z_IMAGE, "6": {**Z_IMAGE["6"], "is_changed": [float("nan")]}})
    assert (recognize({"prompt": nan}) or pytest.fail()).call == ALL
    only_workflow = recognize({"workflow": "{}"})
    assert only_workflow is not None and (only_workflow.tool, only_workflow.call) == ("ComfyUI", {})


def test_a_tool_that_is_not_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="carries no generation parameters, and was made by Firefly 3; name one"):
        read(png(tmp_path / "p.png", {"Software": "Firefly 3"}))


JUNK: list[Any] = [None, True, -1, 10**400, 1e400, 1.5, "", "1e3", "x" * 99, [], ["3", 0], [3], {}, {"a": [1]}]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([tool for tool in TOOLS if tool != "Draw Things"]), st.data())
def test_junk_gives_parameters_of_their_types_or_none(tool: str, data: st.DataObject) -> None:
    texts = dict(TOOLS[tool][0])
    chunk = data.draw(st.sampled_from(sorted(texts)))
    text = texts[chunk]
    if text.startswith("{") and data.draw(st.booleans()):
        value = json.loads(text)
        within = value
        while isinstance(within, dict) and within:
            key = data.draw(st.sampled_from(sorted(within)))
            if isinstance(within[key], dict) and data.draw(st.booleans()):
                within = within[key]
            else:
                within[key] = data.draw(st.sampled_from(JUNK))
                break
        texts[chunk] = json.dumps(value)
    else:
        cut = data.draw(st.integers(0, len(text)))
        texts[chunk] = (
            text[:cut] + data.draw(st.sampled_from(["", "[" * 100_000, '"', "9" * 5000, "\ud800"])) + text[cut:]
        )
    found = recognize(texts)
    if found is not None:
        for name, value in found.call.items():
            kinds = {"prompt": str, "negative_prompt": str, "cfg_scale": float}
            assert name in PATHS and type(value) is kinds.get(name, int)
        assert all(isinstance(name, str) for name in found.left)


def test_long_chains_and_many_nodes_take_no_time() -> None:
    chain = {str(i): node("Next", text=[str(i + 1), 0]) for i in range(100, 5_000)}
    started = time.perf_counter()
    assert "prompt" not in graph(**chain, **{"6": node("Start", text=["100", 0])})
    assert recognize({"XML:com.adobe.xmp": "<exif:UserComment>" * 50_000 + " " * 50_000}) is None
    assert time.perf_counter() - started < 5
