"""``zimg-export compile`` and ``zimg-export build --backend tensorrt``, as their users meet them."""

from __future__ import annotations

import inspect
import json
import shutil
from typing import Any

import pytest

import zimgkit.export.build as building
import zimgkit.export.cli.main as cli
import zimgkit.export.compilers.compile as compiling
from tests.commands import invoke
from zimgkit.engines.bundle import MANIFEST, Bundle
from zimgkit.engines.errors import BackendError, install
from zimgkit.engines.tensorrt import api as tensorrt_api
from zimgkit.export.cli.compile import compiled_text
from zimgkit.export.cli.compile_options import compile_arguments
from zimgkit.export.compilers.shape_profiles import ServedShapes
from zimgkit.export.compilers.tensorrt.compiler import CompilerOptions

PLAIN: dict[str, Any] = {
    "sizes": (), "min_size": None, "opt_size": None, "max_size": None, "max_prompt_tokens": None, "batch": 1,
    "components": (), "weight_streaming_budget": None, "workspace": None, "optimization_level": None,
    "refittable": False, "stripped": False, "plugins": False, "force": False,
}  # fmt: skip


def test_options_become_arguments():
    assert compile_arguments(**PLAIN) == {
        "shapes": ServedShapes(), "components": (), "options": CompilerOptions(), "weight_streaming_budget": None,
        "force": False,
    }  # fmt: skip
    options = {
        "sizes": ("1024x768", "64x64"), "min_size": "256x256", "max_size": "2048x1024", "max_prompt_tokens": 77,
        "batch": 4, "components": ("denoiser",), "weight_streaming_budget": "8GB", "workspace": "512MiB",
        "optimization_level": 5, "refittable": True, "stripped": True, "plugins": True, "force": True,
    }  # fmt: skip
    assert compile_arguments(**(PLAIN | options)) == {
        "shapes": ServedShapes(((1024, 768), (64, 64)), ((256, 256), None, (2048, 1024)), 77, 4),
        "components": ("denoiser",),
        "options": CompilerOptions(1 << 29, refittable=True, stripped=True, plugins=True, optimization_level=5),
        "weight_streaming_budget": 8 * 10**9,
        "force": True,
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "big"], "'big' is no size"),
        (["--size", "100x64"], "the size 100x64 cannot be drawn"),
        (["--min-size", "64x64"], "--min-size and --opt-size need --max-size; give all three, or --size"),
        (["--opt-size", "64x64", "--size", "64x64"], "need --max-size"),
        (["--max-size", "64"], "'64' is no size"),
        (["--min-size", "128x128", "--max-size", "64x64"], "give them in rising order"),
        (["--max-prompt-tokens", "0"], "max_prompt_tokens is 0"),
        (["--max-prompt-tokens", "many"], "'many' is not a valid integer"),
        (["--batch", "0"], "batch is 0"),
        (["--component", "unet"], "no graph called 'unet'"),
        (["--weight-streaming-budget", "-1"], "'-1' is no amount of memory"),
        (["--workspace", "99999999999GB"], "is no amount of memory"),
        (["--optimization-level", "6"], "6 is not in the range 0<=x<=5"),
        (["--backend", "onnxruntime"], "'onnxruntime' is not one of"),
        (["--backend", "tensorrt-rtx", "--workspace", "1GB"], "the tensorrt-rtx backend has no options"),
        (["--speed"], "No such option"),
    ],
)
def test_wrong_use(bundle_of, arguments, message):
    invoke(cli.main, "compile", bundle_of("qwen-image", "bf16"), *arguments).assert_refused(message, 2)


def test_wrong_use_without_a_bundle(tmp_path):
    invoke(cli.main, "compile").assert_refused("Missing argument 'BUNDLE'", 2)
    invoke(cli.main, "compile", tmp_path).assert_refused("is not a bundle: it has no bundle.json; make one with", 1)


def test_help_needs_no_compiler(monkeypatch):
    monkeypatch.setattr(tensorrt_api, "MODULES", ())
    for command in ("compile", "build"):
        result = invoke(cli.main, command, "--help")
        assert (result.code, result.err) == (0, "")
        assert "--weight-streaming-budget" in result.out


def test_what_to_install(bundle_of, monkeypatch, tmp_path):
    monkeypatch.setattr(tensorrt_api, "MODULES", ("tensorrt_of_nowhere",))
    message = f"TensorRT is not installed; {install('tensorrt')}"
    invoke(cli.main, "compile", bundle_of("qwen-image", "bf16")).assert_refused(message, 1)
    # Said before anything is fetched or built.
    build = ("build", "--model", tmp_path / "nowhere", "--out", tmp_path / "out", "--backend", "tensorrt")
    invoke(cli.main, *build).assert_refused(message, 1)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def bundle(compiler, bundle_of, tmp_path):
    return shutil.copytree(bundle_of("qwen-image", "bf16"), tmp_path / "bundle")


def run(bundle, *arguments):
    result = invoke(cli.main, "compile", bundle, "--size", "64x64", "--quiet", *arguments)
    assert (result.code, result.err) == (0, "")
    return result.out


def test_json(bundle):
    data = json.loads(run(bundle, "--component", "denoiser", "--component", "conditioner", "--json"))
    assert data["path"] == str(bundle)
    denoiser, conditioner = data["engines"]
    (_, entry) = Bundle.open(bundle).manifest.engines
    assert conditioner["file"] == entry.file
    assert [list(ends) for ends in entry.profiles[0].values()] == list(conditioner["profiles"][0].values())
    assert conditioner["bytes"] == (bundle / entry.file).stat().st_size
    assert (denoiser["component"], denoiser["backend"], denoiser["device"]) == ("denoiser", "tensorrt", "any")
    assert denoiser["attention"] == [2, 0] and denoiser["unfused_attention"] == denoiser["warnings"] == []
    assert not denoiser["up_to_date"] and "layers" not in denoiser
    again = json.loads(run(bundle, "--component", "denoiser", "--detailed", "--json"))["engines"][0]
    assert again["up_to_date"] and "layer_kinds" not in again
    detailed = json.loads(run(bundle, "--component", "denoiser", "--detailed", "--force", "--json"))["engines"][0]
    kinds = [layer["kind"] for layer in detailed["layers"]]
    assert detailed["layer_kinds"] == {kind: kinds.count(kind) for kind in set(kinds)}
    assert any("mha" in layer["name"] for layer in detailed["layers"])
    assert any("transformer_blocks.0" in node for layer in detailed["layers"] for node in layer["nodes"])


def test_text(bundle):
    lines = run(bundle, "--component", "vae_decoder", "--component", "text_encoder").splitlines()
    folder = f"engines/{Bundle.open(bundle).manifest.engines[0].file.split('/')[1]}"
    assert lines[0].startswith("vae_decoder  ") and f" MB  {folder}/vae_decoder-" in lines[0]
    assert lines[1:4] == [
        "  serves     batch 1, height 8, width 8",
        "  attention  0 of 1 in one fused kernel each",
        "  unfused    decoder.mid_block.attentions.0",
    ]
    assert lines[4].startswith("  layers     ") and " kgen" in lines[4]
    assert lines[5].startswith("text_encoder  ")
    drop = Bundle.open(bundle).manifest.text.drop
    assert lines[6] == f"  serves     tokens {drop + 1}…{drop + 128}…{drop + 512}"
    again = run(bundle, "--component", "text_encoder").splitlines()
    assert again[0].startswith(f"text_encoder  up to date  {folder}/text_encoder-")
    detailed = run(bundle, "--component", "text_encoder", "--detailed", "--force").splitlines()
    assert len(detailed) > len(again) + 5
    assert any("_gemm_mha" in line for line in detailed)


def test_warnings_are_printed():
    engine = {"component": "net", "up_to_date": False, "bytes": 1, "file": "f", "profiles": [], "warnings": ["slow"]}
    assert compiled_text({"engines": [engine]}).splitlines() == ["net  0.0 MB  f", "  warning    slow"]


def test_a_refusal_names_the_component_and_the_cause(bundle):
    result = invoke(cli.main, "compile", bundle, "--component", "conditioner", "--stripped", "--quiet")
    result.assert_refused("TensorRT cannot compile conditioner: ", 1)
    assert "try it without --refittable and --stripped" in result.err


BUILD = ("--precision", "bf16", "--quiet")


@pytest.fixture
def built(bundle_of, monkeypatch):
    """In place of half a minute's work: what it gives of the tests' checkpoint, copied to ``--out``."""
    signature = inspect.signature(building.build)

    def build(*given: Any, **options: Any) -> Bundle:
        arguments = signature.bind(*given, **options).arguments
        return Bundle.open(shutil.copytree(bundle_of("qwen-image", arguments["precision"]), arguments["out"]))

    monkeypatch.setattr(building, "build", build)


def test_build_and_compile(compiler, built, tmp_path):
    out = tmp_path / "bundle"
    arguments = ("--backend", "tensorrt", "--max-size", "128x128", "--min-size", "64x64", "--max-prompt-tokens", 64)
    result = invoke(cli.main, "build", "--model", "x", "--out", out, *BUILD, *arguments)
    assert (result.code, result.err) == (0, "")
    bundle = Bundle.open(out)
    assert [engine.component for engine in bundle.manifest.engines] == [
        name for name, component in bundle.manifest.components.items() if component.graphs
    ]
    for engine in bundle.manifest.engines:
        assert f"engine of {engine.component}, tensorrt_rtx {compiler.__version__}, any" in result.out
        assert f" MB  {engine.file}" in result.out
    assert "  serves     batch 1, height 8…16…16, width 8…16…16" in result.out.splitlines()


def test_a_bundle_is_kept_whose_compilation_fails(compiler, built, tmp_path, monkeypatch):
    out = tmp_path / "bundle"
    arguments = ("--model", "x", "--out", out, *BUILD, "--backend", "tensorrt", "--size", "64x64")
    result = invoke(cli.main, "build", *arguments, "--stripped")
    result.assert_refused("TensorRT cannot compile text_encoder: ", 1)
    kept = f"the bundle is whole without it: zimg-export compile {out} tries again"
    assert f"try it without --refittable and --stripped, which not every TensorRT supports; {kept}" in result.err
    assert Bundle.open(out).manifest.engines == ()
    assert {path.name for path in out.iterdir() if path.is_file()} >= {MANIFEST, "denoiser.onnx"}

    def refuse(*given: Any) -> None:
        raise BackendError("no kernel")

    shutil.rmtree(out)
    monkeypatch.setattr(compiling, "compile_plan", refuse)
    invoke(cli.main, "build", *arguments).assert_refused(f"no kernel; {kept}", 1)
    Bundle.open(out)


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["--size", "512x512"], "--size"),
        (["--max-prompt-tokens", "100"], "--max-prompt-tokens"),
        (["--batch", "1"], "--batch"),
        (["--detailed"], "--detailed"),
        (["--force", "--stripped"], "--stripped"),
        (["--weight-streaming-budget", "8GB", "--component", "x"], "--component"),
    ],
)
def test_options_of_engines_without_engines(tmp_path, arguments, option):
    result = invoke(cli.main, "build", "--model", "Qwen-Image", "--out", tmp_path / "bundle", *arguments)
    result.assert_refused(f"{option} is for engines; add --backend tensorrt", 2)
    assert list(tmp_path.iterdir()) == []


def test_wrong_options_are_found_before_the_build(tmp_path):
    for backend in ([], ["--backend", "tensorrt"]):
        result = invoke(cli.main, "build", "--model", "x", "--out", tmp_path / "b", "--size", "big", *backend)
        result.assert_refused("'big' is no size", 2)
