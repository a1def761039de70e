"""The cost of quantization against independent runs of the same networks, and the commands that measure it."""

from __future__ import annotations

import json
import shutil
import tomllib
from functools import partial
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest

from tests import quantized
from tests.commands import invoke
from zimgkit.engines import base
from zimgkit.engines.bundle import Bundle, Defaults, Difference
from zimgkit.engines.errors import BundleError, ZimgError
from zimgkit.export.build import Quantizing, build
from zimgkit.export.checkpoints.checkpoint import open_checkpoint
from zimgkit.export.cli.main import main
from zimgkit.export.cli.quantization_options import cost_check
from zimgkit.export.lora.merge import NOTHING
from zimgkit.export.quality import cost, judged, verify
from zimgkit.export.quality.cost import References, baseline, difference, measure, past_bound
from zimgkit.export.quality.references import references
from zimgkit.export.quality.runs import FIRST_SEED, Run, Trial, drawing, open_torch_in
from zimgkit.export.quantization.prompts import cost_prompts
from zimgkit.export.quantization.recipe import Bounds, Recipe, family_recipe
from zimgkit.runtime import demo_models, families
from zimgkit.runtime.commands.cli import main as run
from zimgkit.runtime.pipeline import Pipeline

TRIAL = Trial(("a green ball",), 64, 64, 2)
FAMILIES = ("z-image", "qwen-image")


def float32_runs(bundle: Bundle) -> list[Run]:
    with drawing(bundle, partial(open_torch_in, "float32")) as draw:
        return draw(TRIAL.filled(bundle.manifest))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_compared(family, bundle_of):
    """A float32 bundle in ONNX Runtime draws what it draws in PyTorch, which is what the pipeline draws by itself."""
    bundle = Bundle.open(bundle_of(family))
    (expected,) = float32_runs(bundle)
    recorder = quantized.Recorder("denoiser")
    with Pipeline(bundle, opener=recorder, warn=lambda _: None) as pipeline:
        defaults = bundle.manifest.defaults
        picture = pipeline(
            TRIAL.prompts[0], height=64, width=64, num_inference_steps=2, seed=FIRST_SEED,
            negative_prompt=defaults.negative_prompt, output_type="np",
        ).images[0]  # fmt: skip
    np.testing.assert_allclose(expected.picture, picture, atol=1e-4)
    velocities = [velocity for step in expected.velocities for velocity in step]
    assert len(expected.velocities) == len(expected.latents) == 2
    assert len(velocities) == len(recorder.runs)
    for velocity, (_, other) in zip(velocities, recorder.runs, strict=True):
        latents = families.family_of(bundle.manifest).velocity(other, expected.latents[0])
        np.testing.assert_allclose(velocity, latents, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_forced_runs_see_the_float32_latents(family, bundle_of):
    """Replayed by hand: the other bundle's denoiser on the first one's latents."""
    first, second = (Bundle.open(bundle_of(family, precision)) for precision in ("fp32", "bf16"))
    (expected,) = float32_runs(first)
    fed: list[np.ndarray] = []

    def opener(*given):
        engine = base.open_engine(*given)
        if given[1] == "denoiser":
            original = engine.run

            def watched(feeds, keep=()):
                fed.append(np.array(feeds["hidden_states"]))
                return original(feeds, keep)

            engine.run = watched
        return engine

    trial = TRIAL.filled(first.manifest)
    with drawing(second, opener, backend="onnxruntime") as draw:
        (forced,) = draw(trial, [expected], forced=True)
    fed_alone = list(fed)
    fed.clear()
    with drawing(first, opener, backend="onnxruntime") as draw:
        draw(trial, [expected])
    assert forced.picture is None
    assert len(fed_alone) == len(fed) >= 2
    for one, other in zip(fed_alone, fed, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-3)


def test_what_is_left_open_is_the_bundles_default(bundle_of):
    manifest = Bundle.open(bundle_of("z-image")).manifest
    manifest = msgspec.structs.replace(manifest, defaults=Defaults(8, 0.0, 512, 1024, " "))
    filled = Trial(width=64).filled(manifest)
    assert filled == Trial(cost_prompts(manifest.name), 64, 512, 8, 0.0, " ")
    assert filled.filled(msgspec.structs.replace(manifest, defaults=Defaults(9, 1.0, 1, 2, "x"))) == filled
    assert Trial(("a",)).filled(manifest).prompts == ("a",)


def make_run(seed: int, scale: float = 1.0) -> Run:
    rng = np.random.default_rng(seed)
    draw = partial(rng.standard_normal, dtype=np.float32)
    velocities = [[scale * draw((1, 40)), scale * draw((1, 40))], [scale * draw((1, 40))]]
    return Run(draw(3), velocities, [scale * draw((1, 9)), scale * draw((1, 9))], rng.random((16, 16, 3), np.float32))


def test_differences():
    """Of a run that is half as large again as it should be, and of one that is the same."""
    expected, larger = [make_run(0), make_run(1)], [make_run(0, 1.5), make_run(1, 1.5)]
    for own, other in zip(larger, expected, strict=True):
        own.picture = np.clip(other.picture + np.float32(0.01), None, 2)
    found = difference(expected, larger, larger)
    assert found.velocity_relative == pytest.approx((0.5, 0.5))
    assert found.latents_relative == pytest.approx((0.5, 0.5))
    assert (*found.velocity_cosine, *found.latents_cosine) == pytest.approx((1, 1, 1, 1))
    assert found.psnr == pytest.approx(40, abs=1e-3)
    assert 0.9 < found.ssim < 1
    same = difference(expected, expected, expected)
    assert same.psnr is None and same.ssim == pytest.approx(1)
    assert same.velocity_relative == (0, 0)


def test_the_mean_error_and_the_least_cosine():
    expected, other = [make_run(0), make_run(1)], [make_run(0), make_run(1)]
    other[1].velocities[0][1] = -2 * other[1].velocities[0][1]
    found = difference(expected, other, expected)
    assert found.velocity_relative == pytest.approx((3 / 4, 0))
    assert found.velocity_cosine == pytest.approx((-1, 1))


def test_nan_is_no_cost():
    broken = make_run(0)
    broken.velocities[1][0][0, 3] = np.nan
    with pytest.raises(ZimgError, match="NaN or Inf"):
        difference([make_run(0)], [broken], [make_run(0)])


@pytest.fixture(scope="module")
def costs(bundle_of, quantized_of):
    """Family -> the cost of two precisions of it."""
    found = {}

    def make(family):
        if family not in found:
            references = References(*(Bundle.open(bundle_of(family, name)) for name in ("fp32", "bf16")))
            against = baseline(references, TRIAL)
            found[family] = {
                name: measure(Bundle.open(quantized_of(family, name)), against)
                for name in ("int8-weights", "int4-weights")
            }
        return found[family]

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_four_bits_cost_more_than_eight(family, costs):
    eight, four = costs(family)["int8-weights"], costs(family)["int4-weights"]
    assert (eight.width, eight.height, eight.num_inference_steps, eight.prompts) == (64, 64, 2, TRIAL.prompts)
    assert eight.floor == four.floor
    for entry in (eight.difference, four.difference, eight.floor):
        assert len(entry.velocity_relative) == len(entry.velocity_cosine) == len(entry.latents_relative) == 2
        assert all(0 < value < 1 for value in (*entry.velocity_relative, *entry.latents_relative))
        assert all(0.5 < value < 1 for value in (*entry.velocity_cosine, *entry.latents_cosine))
        assert entry.psnr is not None and 0 < entry.ssim <= 1
    assert max(eight.difference.velocity_relative) < max(four.difference.velocity_relative)
    assert eight.cosine > four.cosine
    assert eight.difference.psnr > four.difference.psnr


def with_bound(bundle: Bundle, bound: float | None) -> Bundle:
    quantization = msgspec.structs.replace(bundle.manifest.quantization, bound=bound)
    return Bundle(bundle.root, msgspec.structs.replace(bundle.manifest, quantization=quantization))


def test_bounds(costs, quantized_of, bundle_of):
    bundle, found = Bundle.open(quantized_of("z-image", "int4-weights")), costs("z-image")["int4-weights"]
    assert bundle.manifest.quantization.bound == family_recipe("z-image").bounds["int4-weights"].cosine
    assert past_bound(with_bound(bundle, None), found) is None
    assert past_bound(with_bound(bundle, found.cosine), found) is None
    assert "and the recipe asks for 0.9999999" in past_bound(with_bound(bundle, 0.9999999), found)
    assert past_bound(Bundle.open(bundle_of("z-image")), found) is None


@pytest.fixture
def copied(quantized_of, tmp_path):
    return Path(shutil.copytree(quantized_of("z-image", "int4-weights"), tmp_path / "b"))


def options(checkpoint: Path, *references: Path) -> tuple[object, ...]:
    named = [argument for reference in references for argument in ("--reference", reference)]
    return ("--model", checkpoint, "--quiet", "--size", "64x64", "--steps", 1, *named)


def test_verify_measures_and_inspect_shows(copied, checkpoint_of, bundle_of, tmp_path):
    checkpoint, (full, half) = checkpoint_of("z-image"), (bundle_of("z-image"), bundle_of("z-image", "bf16"))
    before = (copied / "bundle.json").read_bytes()
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    given = options(checkpoint, full, half)
    silent = invoke(main, "verify", copied, *given, "--no-cost")
    assert silent.code == 0 and (copied / "bundle.json").read_bytes() == before
    refused = invoke(main, "verify", copied, *options(checkpoint, copied))
    refused.assert_refused("is quantized; a reference is a bundle of --precision fp32 or bf16", 2)
    assert (copied / "bundle.json").read_bytes() == before
    result = invoke(main, "verify", copied, *given, "--prompts", tmp_path / "p.txt", "--json")
    assert result.code == 0, result
    data = json.loads(result.out)
    manifest = Bundle.open(copied).manifest
    assert msgspec.to_builtins(manifest.cost) == data["cost"] | {
        "prompts": ("one", "two"),
        **{key: msgspec.to_builtins(getattr(manifest.cost, key)) for key in ("difference", "floor")},
    }
    assert data["cost"]["difference"]["velocity_cosine"] == list(manifest.cost.difference.velocity_cosine)
    assert not manifest.cost.captions
    text = invoke(run, "inspect", copied).out
    assert "cost      against float32, by 2 pictures of 64x64 in 1 steps on onnxruntime" in text
    assert f"SSIM {manifest.cost.difference.ssim:.4f}" in text and "  bfloat16" in text
    # Nothing but the manifest, and of it nothing but the cost.
    assert msgspec.structs.replace(manifest, cost=None) == msgspec.json.decode(before, type=type(manifest))
    assert {path.name for path in tmp_path.iterdir()} == {"b", "p.txt"}


def test_verify_past_the_bound(copied, checkpoint_of, bundle_of):
    bundle = with_bound(Bundle.open(copied), 0.9999999)
    verify.write_manifest(copied, bundle.manifest)
    given = options(checkpoint_of("z-image"), bundle_of("z-image"), bundle_of("z-image", "bf16"))
    result = invoke(main, "verify", copied, *given)
    assert result.code == 0
    assert "and the recipe asks for 0.9999999; leave more linears unquantized with --recipe" in result.err
    strict = invoke(main, "verify", copied, *given, "--strict")
    assert strict.code == 1 and strict.err.count("\n") == 1
    assert "and the recipe asks for 0.9999999; leave more" in strict.err


def test_references_of_another_checkpoint(copied, checkpoint_of, bundle_of):
    refused = invoke(main, "verify", copied, *options(checkpoint_of("z-image"), bundle_of("qwen-image")))
    refused.assert_refused("is of another checkpoint", 2)
    invoke(main, "verify", copied, *options(checkpoint_of("z-image"), copied / "no")).assert_refused("is not a", 1)
    wrong = ("--size", "65x64")
    refused = invoke(main, "verify", copied, "--model", checkpoint_of("z-image"), "--quiet", "--steps", 1, *wrong)
    assert refused.code == 2 and "internal error" not in refused.err


def test_the_judge_is_asked(copied, checkpoint_of, bundle_of, monkeypatch):
    asked = []

    def accuracy(bundle, captions, backend, report):
        asked.append((Bundle.open(bundle).manifest.quantization is None, captions, backend))
        return {"one": 0.5, "two": 0.25}

    monkeypatch.setattr(verify, "accuracy", accuracy)
    given = options(checkpoint_of("z-image"), bundle_of("z-image"), bundle_of("z-image", "bf16"))
    assert invoke(main, "verify", copied, *given, "--judge", 7).code == 0
    assert asked == [(False, 7, "onnxruntime"), (True, 7, "onnxruntime")]
    found = Bundle.open(copied).manifest.cost
    assert (found.captions, found.accuracy["two"], found.float32_accuracy["one"]) == (7, 0.25, 0.5)
    assert "right   50.0% of one thing (50.0%), 25.0% of two things (25.0%): of 7" in invoke(run, "inspect", copied).out


@pytest.fixture
def declared(monkeypatch):
    """The judge that the distribution declares, whether it is installed anew since or not."""
    declared = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]["entry-points"][
        "zimgkit.judges"
    ]
    points = tuple(EntryPoint(name, value, "zimgkit.judges") for name, value in declared.items())
    monkeypatch.setattr(judged, "entry_points", lambda group: points if group == "zimgkit.judges" else ())


def test_the_judge_that_the_distribution_declares(declared):
    shares = judged.accuracy(demo_models.locate("zimg-tiny-z"), 2, "onnxruntime")
    assert shares.keys() == {"one", "two"} and set(shares.values()) <= {0.0, 1.0}


def test_a_judge_that_fails(declared, tmp_path):
    with pytest.raises(ZimgError, match=r"the judge failed: .*not a bundle"):
        judged.accuracy(tmp_path, 1, "onnxruntime")


def test_no_judge(tmp_path, monkeypatch):
    monkeypatch.setattr(judged, "entry_points", lambda group: ())
    with pytest.raises(ZimgError, match=r"no judge of pictures is installed; leave it out with --judge 0"):
        judged.accuracy(tmp_path, 1, "onnxruntime")


def test_a_strict_build_leaves_nothing(checkpoint_of, bundle_of, tmp_path):
    recipe = Recipe((), {"int4-weights": Bounds(0.9999999)})
    given = (bundle_of("z-image"), bundle_of("z-image", "bf16"))
    measuring = verify.Measuring(Trial(("a",), 64, 64, 1), given)
    with pytest.raises(BundleError, match=r"and the recipe asks for 0\.9999999; leave more linears unquantized"):
        build(
            str(checkpoint_of("z-image")), tmp_path / "b", precision="int4-weights",
            quantization=Quantizing(recipe, check=cost_check(measuring, strict=True)),
        )  # fmt: skip
    assert not [*tmp_path.iterdir()]


def test_strict_is_for_quantized_bundles(checkpoint_of, tmp_path):
    given = ("--model", checkpoint_of("z-image"), "--out", tmp_path / "b", "--quiet")
    refused = invoke(main, "build", *given, "--strict")
    known = "fp8, int8, int8-dynamic, int8-weights, int4-weights"
    refused.assert_refused(f"--strict is not for --precision bf16; it is for {known}", 2)
    assert not [*tmp_path.iterdir()]


def test_references_are_built_and_removed(checkpoint_of, bundle_of, tmp_path):
    checkpoint, half = open_checkpoint(str(checkpoint_of("z-image"))), bundle_of("z-image", "bf16")
    with references(checkpoint, NOTHING, tmp_path / "b", [half]) as found:
        assert found.bfloat16.root == half.resolve()
        assert found.float32.manifest.precision == "float32"
        assert found.float32.content_hash("denoiser") == Bundle.open(bundle_of("z-image")).content_hash("denoiser")
        assert len([*tmp_path.iterdir()]) == 1
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(("dtype", "built"), [("bfloat16", ["bfloat16"]), ("float32", ["bfloat16", "float32"])])
def test_one_bundle_of_a_bfloat16_checkpoint_serves_for_both(dtype, built, tmp_path, monkeypatch):
    checkpoint = SimpleNamespace(
        family="z-image", components=("transformer",), tensors=lambda _: {"w": SimpleNamespace(dtype=dtype)}
    )
    monkeypatch.setattr("zimgkit.export.quality.references._build", lambda _, __, folder, *___: folder.name)
    with references(checkpoint, NOTHING, tmp_path / "b") as found:
        assert list(dict.fromkeys((found.bfloat16, found.float32))) == built


def test_a_build_past_the_bound_warns(checkpoint_of, tmp_path, monkeypatch):
    entry = Difference((0.1,), (0.9,), (0.1,), (0.9,), 20.0, 0.5)
    seen = cost.Cost(("a",), 1000, 64, 64, 1, "onnxruntime", entry, entry)
    monkeypatch.setattr(verify.Measuring, "__call__", lambda self, *_: seen)
    out = ("--out", tmp_path / "b", "--precision", "int8-weights", "--cost-size", "64x64", "--quiet")
    result = invoke(main, "build", "--model", checkpoint_of("z-image"), *out)
    assert result.code == 0
    assert (
        "warning: the cosine of a velocity and the float32 network's is 0.90000, and the recipe asks for" in result.err
    )


def test_bad_trials(checkpoint_of, tmp_path):
    for option, value, said in [
        ("--cost-prompts", tmp_path / "no.txt", "cannot be read"),
        ("--cost-size", "big", "'big' is no size"),
    ]:
        given = ("--out", tmp_path / "b", "--precision", "int8-weights", option, value, "--quiet")
        invoke(main, "build", "--model", checkpoint_of("z-image"), *given).assert_refused(said, 2)
    assert not [*tmp_path.iterdir()]
