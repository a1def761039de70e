"""Parameters in pictures: exact round trips, and what other tools write."""

from __future__ import annotations

import contextlib
import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from zimgkit.engines.errors import UsageError
from zimgkit.runtime.pictures.metadata import Parameters, from_json, from_text, read
from zimgkit.runtime.pictures.saving import save

SUFFIXES = [".png", ".jpg", ".webp"]
PICTURE = Image.fromarray(np.zeros((8, 8, 3), np.uint8))
FULL = Parameters(
    prompt="a cat, 4k",
    negative_prompt="blurry, low quality",
    height=768,
    width=1024,
    num_inference_steps=8,
    guidance_scale=3.0,
    cfg_scale=4.0,
    cfg_normalization=1.0,
    cfg_truncation=0.75,
    guidance_low=0.25,
    max_sequence_length=512,
    seed=42,
    num_images=4,
    image_index=2,
    model="Z-Image-Turbo",
    family="z-image",
    precision="bfloat16",
    backend="onnxruntime",
    version="zimgkit 0.1.0",
)
AWKWARD = [
    "",
    " ",
    "a cat",
    "two\nlines\n\nand a gap",
    "Steps: 3, Sampler: Euler, Seed: 7",
    "Negative prompt: nothing\nSteps: 3, CFG scale: 2, Seed: 1, Size: 1x1",
    "\"quoted\" 'twice' \\ \\n {} %s",
    "一只猫：坐在窗台上，窗外是夜晚。",
    "🌸👩‍👩‍👧‍👦 café e\u0301 \u202e",
    "carriage\r\nreturn\rnul\0tab\t end ",
    "x" * 10_000,
    "长" * 10_000,
]


def as_the_web_ui_reads(text: str) -> dict[str, str]:
    """The web UI's own way of reading: line by line, and pairs in the last one."""
    *lines, last = text.strip().split("\n")
    fields = {"prompt": "", "negative": ""}
    into = "prompt"
    for raw in lines:
        line = raw.strip()
        if line.startswith("Negative prompt:"):
            into, line = "negative", line[len("Negative prompt:") :].strip()
        fields[into] = f"{fields[into]}\n{line}" if fields[into] else line
    for key, value in re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last):
        fields[key] = json.loads(value) if value[:1] == '"' else value
    return fields


def test_text_is_what_the_web_ui_writes() -> None:
    assert FULL.to_text() == (
        "a cat, 4k\nNegative prompt: blurry, low quality\n"
        "Steps: 8, Sampler: Euler, CFG scale: 4, Seed: 42, Size: 1024x768, Model: Z-Image-Turbo, Guidance scale: 3, "
        "CFG normalization: 1, CFG truncation: 0.75, Guidance low: 0.25, Max sequence length: 512, "
        "Num images: 4, Image index: 2, Family: z-image, Precision: bfloat16, Backend: onnxruntime, "
        "Version: zimgkit 0.1.0"
    )


@pytest.mark.parametrize("prompt", ["a cat", "two\nlines", "Steps: 3, Sampler: x, Seed: 7", "猫，🌸"])
@pytest.mark.parametrize("negative", [None, "blurry", "two\nlines: really"])
def test_the_web_ui_understands_the_text(prompt: str, negative: str | None) -> None:
    parameters = Parameters(
        prompt=prompt, negative_prompt=negative, height=64, width=48, num_inference_steps=9, cfg_scale=0.1 + 0.2,
        seed=2**64 - 1, model='odd: "name", really', version="zimg 1",
    )  # fmt: skip
    fields = as_the_web_ui_reads(parameters.to_text())
    assert fields["prompt"] == prompt
    assert fields["negative"] == (negative or "")
    assert (fields["Steps"], fields["Seed"], fields["Size"]) == ("9", str(2**64 - 1), "48x64")
    assert float(fields["CFG scale"]) == 0.1 + 0.2
    assert fields["Model"] == 'odd: "name", really'
    assert from_text(parameters.to_text()) == parameters


def test_text_and_back() -> None:
    assert from_text(FULL.to_text()) == FULL
    assert from_text(Parameters(prompt="").to_text()) == Parameters(prompt="Sampler: Euler")
    empty = Parameters(prompt="", seed=1, num_inference_steps=2)
    assert from_text(empty.to_text()) == empty


WEB_UI = (
    "masterpiece, (best quality:1.2), <lora:add_detail:0.5>, night: city\n"
    "second line\n"
    "Negative prompt: lowres, bad anatomy\n"
    "second negative line\n"
    "Steps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7.5, Seed: 965400086, Size: 512x768, Model hash: 45dee52b, "
    'Model: dream/shaper_8, Denoising strength: 0.7, Lora hashes: "add_detail: 7c6bad76eb54, b: 12", Version: v1.9.4'
)


def test_text_of_the_web_ui() -> None:
    assert from_text(WEB_UI) == Parameters(
        prompt="masterpiece, (best quality:1.2), <lora:add_detail:0.5>, night: city\nsecond line",
        negative_prompt="lowres, bad anatomy\nsecond negative line",
        height=768,
        width=512,
        num_inference_steps=20,
        cfg_scale=7.5,
        seed=965400086,
        strength=0.7,
        model="dream/shaper_8",
        version="v1.9.4",
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("only a prompt", {"prompt": "only a prompt"}),
        ("a prompt, size: large", {"prompt": "a prompt, size: large"}),
        ("a\nSteps: many, CFG scale: 7, Seed: , Size: big", {"prompt": "a", "cfg_scale": 7.0}),
        ("a\nSteps: 3, Seed: 1, Size: 5x", {"prompt": "a", "num_inference_steps": 3, "seed": 1, "width": 5}),
        (
            'a\nSteps: 3, Seed: 1, Model: "un\\x',
            {"prompt": "a", "num_inference_steps": 3, "seed": 1, "model": '"un\\x'},
        ),
        ("Negative prompt: b", {"prompt": "", "negative_prompt": "b"}),
        ("", {"prompt": ""}),
    ],
)
def test_text_of_any_tool_is_read_as_far_as_it_goes(text: str, expected: dict[str, Any]) -> None:
    assert from_text(text) == Parameters(**expected)


@pytest.mark.parametrize(("piece", "end"), [("word ", ""), (" " * 5, "x"), ('a:"', ""), ("key: value, ", "")])
def test_long_text_is_read_in_time_that_grows_with_its_length(piece: str, end: str) -> None:
    """Four times the text takes four times as long; going over it again and again would take sixteen times."""

    def seconds(count: int) -> float:
        """Of this thread's own work, which others on the machine hardly change; the least of some."""
        text, found = piece * count + end, []
        for _ in range(3):
            start = time.thread_time()
            from_text(text)
            found.append(time.thread_time() - start)
        return min(found)

    assert seconds(40_000) < 8 * seconds(10_000)


numbers = st.none() | st.floats(allow_nan=False, allow_infinity=False)
counts = st.none() | st.integers(0, 2**31)
any_parameters = st.builds(
    Parameters,
    prompt=st.text(max_size=300) | st.sampled_from(AWKWARD),
    negative_prompt=st.none() | st.text(max_size=100),
    height=counts,
    width=counts,
    num_inference_steps=counts,
    sigmas=st.none() | st.lists(st.floats(0, 1), max_size=9).map(tuple),
    guidance_scale=numbers,
    cfg_scale=numbers,
    cfg_normalization=numbers,
    cfg_truncation=numbers,
    max_sequence_length=counts,
    seed=st.none() | st.integers(-(2**63), 2**64 - 1),
    num_images=st.integers(1, 9),
    image_index=st.just(0),
    model=st.none() | st.text(max_size=50),
    family=st.none() | st.text(max_size=20),
    version=st.none() | st.text(max_size=20),
)


@given(parameters=any_parameters)
@settings(max_examples=300, deadline=None)
def test_the_exact_copy_is_exact(parameters: Parameters) -> None:
    assert from_json(parameters.to_json()) == parameters


@pytest.mark.parametrize("suffix", SUFFIXES)
@given(parameters=any_parameters)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_round_trip_through_a_file(tmp_path: Path, suffix: str, parameters: Parameters) -> None:
    path = tmp_path / f"picture{suffix}"
    save(PICTURE, path, parameters)
    assert read(path) == parameters


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("prompt", AWKWARD, ids=lambda prompt: ascii(prompt[:20]))
def test_awkward_prompts_through_a_file(tmp_path: Path, suffix: str, prompt: str) -> None:
    for parameters in (Parameters(prompt=prompt, seed=1), Parameters(prompt="a", negative_prompt=prompt, seed=1)):
        save(PICTURE, tmp_path / f"picture{suffix}", parameters)
        assert read(tmp_path / f"picture{suffix}") == parameters


@pytest.mark.parametrize(("prompt", "chunk"), [("café", b"tEXt"), ("猫", b"iTXt")])
def test_png_chunks_as_viewers_look_for_them(tmp_path: Path, prompt: str, chunk: bytes) -> None:
    path = tmp_path / "picture.png"
    parameters = Parameters(prompt=prompt, num_inference_steps=3, seed=4, cfg_scale=1.0)
    save(PICTURE, path, parameters)
    data = path.read_bytes()
    assert chunk + b"parameters\0" in data
    assert data.index(b"parameters\0") < data.index(b"IDAT")
    with Image.open(path) as image:
        assert image.text["parameters"] == f"{prompt}\nSteps: 3, Sampler: Euler, CFG scale: 1, Seed: 4"
        assert json.loads(image.text["zimg"])["prompt"] == prompt


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".webp"])
def test_exif_as_viewers_look_for_it(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"picture{suffix}"
    save(PICTURE, path, Parameters(prompt="猫 cat", num_inference_steps=3, seed=4, cfg_scale=1.0))
    data = path.read_bytes()
    text = "猫 cat\nSteps: 3, Sampler: Euler, CFG scale: 1, Seed: 4"
    assert b"UNICODE\0" + text.encode("utf-16-be") in data
    with Image.open(path) as image:
        image.load()
        assert image.getexif().get_ifd(0x8769)[0x9286] == b"UNICODE\0" + text.encode("utf-16-be")


def test_a_long_prompt_in_a_jpeg_gives_up_the_text_before_the_exact_copy(tmp_path: Path) -> None:
    path = tmp_path / "picture.jpg"
    save(PICTURE, path, Parameters(prompt="x" * 40_000, seed=3))
    assert read(path) == Parameters(prompt="x" * 40_000, seed=3)
    assert b"UNICODE" not in path.read_bytes()
    save(PICTURE, path, Parameters(prompt="x" * 100_000, seed=3))
    with pytest.raises(UsageError, match="carries no generation parameters"):
        read(path)
    for suffix in (".png", ".webp"):
        save(PICTURE, tmp_path / f"picture{suffix}", Parameters(prompt="长" * 100_000, seed=3))
        assert read(tmp_path / f"picture{suffix}").prompt == "长" * 100_000


def exif(comment: bytes) -> dict[str, Any]:
    tags = Image.Exif()
    tags.get_ifd(0x8769)[0x9286] = comment
    return {"exif": tags.tobytes()}


@pytest.mark.parametrize(
    "comment",
    [
        b"UNICODE\0" + WEB_UI.encode("utf-16-be"),
        b"UNICODE\0" + WEB_UI.encode("utf-16-le"),
        b"ASCII\0\0\0" + WEB_UI.encode(),
        b"\0" * 8 + WEB_UI.encode() + b"\0",
    ],
)
@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_comments_of_other_tools(tmp_path: Path, suffix: str, comment: bytes) -> None:
    PICTURE.save(tmp_path / f"other{suffix}", **exif(comment))
    assert read(tmp_path / f"other{suffix}") == from_text(WEB_UI)


@pytest.mark.parametrize("exact", [None, "", "{}", "not json", '{"prompt": 3}', '{"prompt": "a", "seed": "b"}'])
def test_png_of_other_tools_or_with_a_broken_exact_copy(tmp_path: Path, exact: str | None) -> None:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("parameters", WEB_UI)
    if exact is not None:
        chunks.add_text("zimg", exact)
    PICTURE.save(tmp_path / "other.png", pnginfo=chunks)
    assert read(tmp_path / "other.png") == from_text(WEB_UI)


def test_a_newer_exact_copy_with_fields_unknown_here(tmp_path: Path) -> None:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("zimg", '{"prompt": "a", "seed": 3, "new_field": [1, 2]}')
    PICTURE.save(tmp_path / "newer.png", pnginfo=chunks)
    assert read(tmp_path / "newer.png") == Parameters(prompt="a", seed=3)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_picture_without_parameters(tmp_path: Path, suffix: str) -> None:
    save(PICTURE, tmp_path / f"bare{suffix}")
    with pytest.raises(UsageError, match="carries no generation parameters; name one as it was written"):
        read(tmp_path / f"bare{suffix}")


@pytest.mark.parametrize(("index", "count"), [(4, 4), (-1, 4), (0, 0), (0, 10**9)])
def test_an_impossible_place_among_pictures(tmp_path: Path, index: int, count: int) -> None:
    save(PICTURE, tmp_path / "odd.png", Parameters(prompt="a", seed=1, num_images=count, image_index=index))
    with pytest.raises(UsageError, match=f"picture {index} of {count}, which cannot be"):
        read(tmp_path / "odd.png")


def test_no_picture(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"lost\.png does not exist"):
        read(tmp_path / "lost.png")
    with pytest.raises(UsageError, match="is no picture zimgkit can read"):
        read(tmp_path)
    for content in (b"", b"text", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe1\x00"):
        (tmp_path / "broken.png").write_bytes(content)
        with pytest.raises(UsageError, match="is no picture zimgkit can read"):
            read(tmp_path / "broken.png")


@pytest.mark.parametrize("suffix", SUFFIXES)
@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_picture_never_gives_a_traceback(tmp_path: Path, suffix: str, data: st.DataObject) -> None:
    path = tmp_path / f"picture{suffix}"
    save(PICTURE, path, FULL)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(1, len(content)))])
    with contextlib.suppress(UsageError):
        assert isinstance(read(path), Parameters)
