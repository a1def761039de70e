"""Every file that is read, damaged: it is taken or refused in one line, soon, and nothing else is raised.

Each surface is what reads one kind of file, in a folder with copies of the models that zimgkit carries.
"""

from __future__ import annotations

import io
import json
import shutil
import struct
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from tests import mutations
from zimgkit.engines.base import open_engine
from zimgkit.engines.bundle import Bundle, TextConfig
from zimgkit.engines.errors import ZimgError
from zimgkit.engines.tensors.safetensors import read_header, view, write
from zimgkit.export.checkpoints.catalog import defaults_for
from zimgkit.export.checkpoints.checkpoint import open_checkpoint
from zimgkit.export.checkpoints.tokenizer import export_tokenizer
from zimgkit.export.components import parts_of
from zimgkit.export.inspect import checkpoint_summary, checkpoint_text
from zimgkit.export.lora.formats import read_lora
from zimgkit.export.lora.source import find_lora
from zimgkit.export.networks import registry
from zimgkit.export.quantization.recipe import read_recipe
from zimgkit.export.quantization.statistics import InputStatistics, Statistics
from zimgkit.runtime import demo_models
from zimgkit.runtime.commands.generate import generate
from zimgkit.runtime.commands.inspect import bundle_summary, bundle_text
from zimgkit.runtime.diffusion.latents import vae_normalization
from zimgkit.runtime.diffusion.schedule import read_scheduler
from zimgkit.runtime.disk_cache import cached_array
from zimgkit.runtime.pictures import metadata
from zimgkit.runtime.pipeline import Pipeline
from zimgkit.runtime.request import check
from zimgkit.runtime.text.prompts import read_prompts
from zimgkit.runtime.text.tokenizer import PromptTokenizer

SECONDS = 5
"""Of processors, that no attempt takes."""
Damage = Iterator[tuple[str, bytes]]
Surface = tuple[Path, Callable[[], object]]
"""The file to damage, and what reads it."""
ENGINES: dict[tuple[str, str], Any] = {}


def outcome(attempt: Callable[[], object]) -> str:
    """What became of an attempt: "taken", "refused" or what is wrong with how it ended."""
    started = time.process_time()
    try:
        with warnings.catch_warnings(action="ignore"):
            attempt()
        found = "taken"
    except (ZimgError, click.ClickException, OSError) as error:
        found = "refused" if len(str(error)) < 2000 else f"refused in {len(str(error))} characters"
    except Exception as error:
        found = f"{type(error).__name__}: {str(error)[:300]}"
    seconds = time.process_time() - started
    return found if seconds < SECONDS else f"{found} after {seconds:.1f} s"


def failures(surface: Surface, damage: list[tuple[str, bytes]]) -> dict[str, str]:
    """What is wrong, by mutation."""
    file, attempt = surface
    whole, found = file.read_bytes(), {}
    for what, data in damage:
        file.unlink()
        file.write_bytes(data)
        result = outcome(attempt)
        if result not in {"taken", "refused"}:
            found[what] = result
    file.unlink()
    file.write_bytes(whole)
    assert outcome(attempt) == "taken"
    return found


def keep_open(bundle: Bundle, component: str, backend: str, device: str | None) -> Any:
    """Open an engine, once for all manifests that say the same of it."""
    key = (bundle.manifest.family, repr(bundle.manifest.components.get(component)))
    if key not in ENGINES:
        ENGINES[key] = open_engine(bundle, component, backend=backend, device=device)
        ENGINES[key].close = lambda: None
    return ENGINES[key]


def draw(folder: Path) -> None:
    summary = bundle_summary(folder)
    bundle_text(summary)
    json.dumps(summary)
    with Pipeline(Bundle.open(folder), opener=keep_open, device="cpu") as pipeline:
        pipeline("a red circle", height=32, width=32, num_inference_steps=1, seed=0)
        # What the bundle's own defaults ask for.
        check(pipeline.bundle.manifest, pipeline.session.family, prompt="a")


def plan(folder: Path) -> None:
    """What a build does before it reads weights."""
    summary = checkpoint_summary(str(folder))
    checkpoint_text(summary)
    json.dumps(summary)
    checkpoint = open_checkpoint(str(folder))
    scheduler = checkpoint.config("scheduler")
    read_scheduler(scheduler)
    defaults_for(folder, checkpoint.family, scheduler)
    vae_normalization(checkpoint.config("vae"))
    parts_of(checkpoint)


def tokenize(folder: Path) -> None:
    target = folder / "made"
    shutil.rmtree(target, ignore_errors=True)
    text = export_tokenizer(folder / "tokenizer", target, TEXT, chat_template=True)
    PromptTokenizer(target / "tokenizer.json", text).encode("a red circle")


def merge(file: Path) -> None:
    lora = read_lora(find_lora(str(file)))
    for module in lora.modules:
        lora.change(module)


def redraw(folder: Path, picture: Path) -> None:
    """A picture's own parameters, made small."""
    generate(folder, folder / "again.png", SMALL, from_image=picture, device="cpu")


def encode(tokenizer: Path) -> None:
    PromptTokenizer(tokenizer, TEXT).encode("a red circle")


def redraw_text(folder: Path, text: Path, key: str) -> None:
    """A picture whose chunk of this name holds the text."""
    info, picture = PngImagePlugin.PngInfo(), folder / "told.png"
    info.add_itxt(key, text.read_bytes().decode("utf-8", "surrogateescape").encode("utf-8", "replace").decode())
    Image.new("RGB", (32, 32)).save(picture, pnginfo=info)
    redraw(folder, picture)


def read_header_text(file: Path, text: Path, attempt: Callable[[], object]) -> None:
    """A safetensors file with a text in the place of its header."""
    data, header = file.read_bytes(), text.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    file.write_bytes(len(header).to_bytes(8, "little") + header + data[start:])
    try:
        attempt()
    finally:
        file.write_bytes(data)


def merge_with(file: Path, config: Path) -> None:
    """A LoRA in whose header a text is peft's config."""
    header = {name: (info.dtype, info.shape) for name, info in read_header(file).items()}
    told = {"lora_adapter_metadata": config.read_bytes().decode("utf-8", "replace")}
    pieces = {name: [np.array(view(info))] for name, info in read_header(file).items()}
    write(file.with_name("told.safetensors"), header, pieces, told)
    merge(file.with_name("told.safetensors"))


SMALL = {"height": 32, "width": 32, "num_inference_steps": 1}
CALL = SMALL | {"prompt": "a red circle", "seed": 0}
TEXT = TextConfig("<", ">", 1, 64, 32)


def surfaces(root: Path) -> dict[str, Surface]:
    """Make copies of all kinds of files, and say what reads each."""
    found: dict[str, Surface] = {}
    for name in demo_models.NAMES:
        folder = root / name
        shutil.copytree(demo_models.FOLDER / name, folder)
        found[f"{name}/bundle.json"] = folder / "bundle.json", partial(draw, folder)
        parts = [f"{source}/config" for source in registry.WEIGHT_FILES if (folder / source).is_dir()]
        for config in ("model_index", "scheduler/scheduler_config", *parts):
            found[f"{name}/{config}.json"] = folder / f"{config}.json", partial(plan, folder)
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            found[f"{name}/{file}"] = folder / "tokenizer" / file, partial(tokenize, folder)
        tokenizer = shutil.copy(folder / "tokenizer" / "tokenizer.json", root / f"{name}.json")
        found[f"{name}/tokenizer of a bundle"] = tokenizer, partial(encode, tokenizer)
    folder = root / demo_models.DEFAULT
    sharded = root / "sharded"
    shutil.copytree(folder, sharded)
    weights = sharded / "transformer" / "diffusion_pytorch_model.safetensors"
    index = weights.with_name(f"{weights.name}.index.json")
    places = dict.fromkeys(read_header(weights), weights.name)
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    found["index of shards"] = index, partial(plan, sharded)

    lora = root / "adapter_model.safetensors"
    shutil.copy(demo_models.locate_lora(demo_models.LORAS[0]), lora)
    config = root / "adapter_config.json"
    config.write_text('{"r": 4, "lora_alpha": 8, "alpha_pattern": {"to_q": 3, "to_(k|v)": 2}, "use_rslora": false}')
    found["adapter_config.json"] = config, partial(merge, lora)

    prompts = root / "prompts.txt"
    prompts.write_text("# some\na red circle\r\nein grüner Kreis\n")
    found["prompts"] = prompts, partial(read_prompts, prompts)
    recipe = root / "recipe.toml"
    rule = 'component = "denoiser"\ntensors = ["layers.-1.*"]\nreason = "x"'
    recipe.write_text(f"[[keep]]\n{rule}\n[bounds.int8]\ncosine = 0.9\n")
    found["recipe"] = recipe, partial(read_recipe, recipe)

    picture = root / "picture.png"
    generate(folder, picture, CALL)
    found["picture"] = picture, partial(redraw, folder, picture)
    for key in ("zimg", "parameters"):
        with Image.open(picture) as image:
            text = root / f"{key}.txt"
            text.write_text(image.info[key])
        found[f"text of a picture: {key}"] = text, partial(redraw_text, folder, text, key)
    jpeg = picture.with_suffix(".jpg")
    generate(folder, jpeg, CALL)
    found["JPEG"] = jpeg, partial(metadata.read, jpeg)

    calibration = root / "made.calibration.safetensors"
    statistics = Statistics({"denoiser": {"layers.0.w1": InputStatistics.empty(8)}}, {"denoiser": {}}, {"prompts": 1})
    statistics.save(calibration)
    found["calibration"] = calibration, partial(Statistics.load, calibration)
    small = root / "small.safetensors"
    ends = {"lora_A.weight": (2, 128), "lora_B.weight": (128, 2), "alpha": ()}
    values = {f"layers.0.attention.to_q.{end}": np.ones(shape, np.float32) for end, shape in ends.items()}
    peft = {"lora_adapter_metadata": '{"transformer.r": 2, "transformer.lora_alpha": 4}'}
    shapes = {name: ("float32", value.shape) for name, value in values.items()}
    write(small, shapes, {name: [value] for name, value in values.items()}, peft)
    for kind, file, attempt in (
        ("LoRA", small, partial(merge, small)),
        ("calibration", calibration, partial(Statistics.load, calibration)),
        ("checkpoint", sharded / "vae" / "diffusion_pytorch_model.safetensors", partial(plan, sharded)),
    ):
        data, text = file.read_bytes(), root / f"{kind}.header.json"
        text.write_bytes(data[8 : 8 + int.from_bytes(data[:8], "little")])
        found[f"header of a {kind}"] = text, partial(read_header_text, file, text, attempt)
    nested = root / "metadata.json"
    nested.write_text(peft["lora_adapter_metadata"])
    found["a LoRA's metadata"] = nested, partial(merge_with, small, nested)
    return found


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Surface]:
    return surfaces(tmp_path_factory.mktemp("surfaces"))


def test_damaged_files(table: dict[str, Surface]) -> None:
    wrong = {}
    for seed, (name, surface) in enumerate(table.items()):
        data = surface[0].read_bytes()
        damage = list(mutations.of_bytes(data, seed, 1))
        if surface[0].suffix == ".json":
            damage += mutations.of_json(data.decode(), seed, 12)
        wrong |= {f"{name}: {what}": result for what, result in failures(surface, damage).items()}
    assert not wrong


@pytest.mark.parametrize("what", ["number", "text", "null", "list"])
@pytest.mark.parametrize("place", ["config.transformer.in_channels", "config.vae.scaling_factor", "scheduler.shift"])
def test_the_message_names_key_and_value(table: dict[str, Surface], place: str, what: str) -> None:
    file, attempt = table["zimg-tiny-z/bundle.json"]
    whole, value = file.read_text(), {"number": -3.5, "text": "3.0", "null": None, "list": [3.0]}[what]
    manifest = json.loads(whole)
    holder: Any = manifest
    *keys, last = place.split(".")
    for key in keys:
        holder = holder[key]
    holder[last] = value
    file.write_text(json.dumps(manifest))
    try:
        with pytest.raises(ZimgError) as caught:
            attempt()
    finally:
        file.write_text(whole)
    if place != "config.vae.scaling_factor" or value is not None:
        assert f"{'.'.join(keys)}: {last} is {value!r} (expected" in str(caught.value)
    assert str(file) in str(caught.value)


def test_a_picture_that_claims_to_be_huge(tmp_path: Path) -> None:
    data = io.BytesIO()
    Image.new("RGB", (8, 8)).save(data, "PNG")
    header = struct.pack(">II", 100_000, 100_000)
    body = b"IHDR" + header + data.getvalue()[24:29]
    file = tmp_path / "huge.png"
    file.write_bytes(data.getvalue()[:12] + body + struct.pack(">I", zlib.crc32(body)) + data.getvalue()[33:])
    assert outcome(partial(metadata.read, file)) == "refused"


def test_damaged_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def get() -> None:
        found = cached_array("kind", "key", (3, 5), np.dtype(np.float32), lambda array: array.fill(2))
        assert np.array_equal(found, np.full((3, 5), 2, np.float32))

    get()
    (file,) = tmp_path.glob("zimgkit/kind/*")
    for what, data in mutations.of_bytes(file.read_bytes(), 0, 20):
        file.unlink()
        file.write_bytes(data)
        assert outcome(get) == "taken", what
