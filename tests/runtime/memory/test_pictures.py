"""Pictures with little memory: whole or in tiles, refused or right, with the models that zimgkit carries."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image

import zimgkit.runtime.session as sessions
from tests.commands import invoke
from zimgkit.engines.base import Engine, open_engine
from zimgkit.engines.bundle import Bundle
from zimgkit.engines.choice import Choice
from zimgkit.engines.errors import BundleError, OutOfMemoryError, UsageError
from zimgkit.runtime import Pipeline, demo_models
from zimgkit.runtime.commands.cli import main
from zimgkit.runtime.families import family_of
from zimgkit.runtime.memory import needs
from zimgkit.runtime.memory.fitting import needs_in
from zimgkit.runtime.memory.needs import BASE
from zimgkit.runtime.memory.plan import Budget, opened_bytes, peak_of
from zimgkit.runtime.pictures.metadata import read
from zimgkit.runtime.pictures.resizing import to_pixels
from zimgkit.runtime.pictures.tiles import SCALE, Tiling, ignored, run_tiled
from zimgkit.runtime.request import check

MODELS = ("zimg-tiny-z", "zimg-tiny-qwen")
CALL: dict[str, Any] = {"prompt": "a red circle", "seed": 1, "num_inference_steps": 2, "output_type": "np"}
GRADIENT = np.stack(np.meshgrid(range(0, 256, 2), range(0, 256, 4), [90]), -1)[:, :, 0].astype(np.uint8)
ALL = ["text_encoder", "conditioner", "denoiser", "vae_decoder"]


class Opened:
    """Opens engines, and notes which; those of the VAE may have too little memory for many latents."""

    def __init__(self, room: int = 10**9) -> None:
        self.room = room
        """The longest side of latents that the VAE takes."""
        self.names: list[str] = []
        self.sides: list[tuple[int, int]] = []

    def __call__(self, bundle: Bundle, component: str, backend: str, device: str | None) -> Engine:
        self.names.append(component)
        engine = open_engine(bundle, component, backend, device)
        if component not in ("vae_encoder", "vae_decoder"):
            return engine
        run, scale = engine.run, 8 if component == "vae_encoder" else 1

        def limited(feeds: Any, keep: Any = ()) -> Any:
            height, width = next(iter(feeds.values())).shape[2:]
            self.sides.append((height // scale, width // scale))
            if max(self.sides[-1]) > self.room:
                raise OutOfMemoryError("the device is full", "buy memory")
            return run(feeds, keep)

        engine.run = limited  # type: ignore[method-assign]
        return engine


@pytest.fixture(params=MODELS)
def bundle(request: pytest.FixtureRequest) -> Bundle:
    return Bundle.open(demo_models.locate(request.param))


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[Tiling]:
    """Tiles of 64 pixels, so that small pictures have some."""
    tiling = Tiling(64, 32, is_close=False)
    for family in ("z_image.ZImage", "qwen_image.QwenImage"):
        monkeypatch.setattr(f"zimgkit.runtime.families.{family}.TILING", tiling)
    yield tiling


def psnr(found: Any, expected: Any) -> float:
    return float(-10 * np.log10(np.mean((found - expected) ** 2) + 1e-20))


def test_what_cannot_fit_is_refused_before_anything_is_opened(bundle: Bundle) -> None:
    opened = Opened()
    with Pipeline(bundle, memory="150MB", opener=opened) as pipeline:
        with pytest.raises(OutOfMemoryError, match=r"^128x128 takes 2\d\d MB .* and memory=150 MB is allowed; "):
            pipeline(**CALL)
        with pytest.raises(OutOfMemoryError):
            pipeline.plan(**CALL)
    assert opened.names == []


@pytest.mark.parametrize("memory", ["0", -1, "lots", "0%"])
def test_budgets_that_are_none(bundle: Bundle, memory: Any) -> None:
    with pytest.raises(UsageError, match=r"^memory is "):
        Pipeline(bundle, memory=memory)


def test_with_memory_enough_all_stays_open_and_with_little_what_fits(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Opened()
    with Pipeline(bundle, opener=opened) as pipeline:
        plain = pipeline(**CALL).images
        assert np.array_equal(pipeline(**CALL).images, plain)
        assert opened.names == ALL
        session = pipeline.session
        request = check(bundle.manifest, session.family, **CALL)
        needs = needs_in(session._setting(request), session._picture(request))
        tight = Budget(total=peak_of(needs, ["vae_decoder"], opened_bytes)[0])
        monkeypatch.setattr(sessions, "budget_of", lambda memory, **more: tight)
        opened.names.clear()
        assert pipeline.plan(**CALL).stay == ("vae_decoder",)
        for _ in range(2):
            assert np.array_equal(pipeline(**CALL).images, plain)
            assert session.engines.opened == ["vae_decoder"]


class TestTiles:
    def test_asked_for(self, bundle: Bundle, small_tiles: Tiling) -> None:
        opened, warnings, reports = Opened(), [], []
        size = {"height": 96, "width": 160}
        with Pipeline(bundle) as pipeline:
            whole = pipeline(**CALL, **size).images
        with Pipeline(
            bundle, opener=opened, warn=warnings.append, report=lambda *report: reports.append(report), vae_tiling="on"
        ) as pipeline:
            found = pipeline(**CALL, **size).images
            pipeline(**CALL, **size)
            assert sum("tiles (64/32), which changes it a little" in warning for warning in warnings) == 1
            assert set(opened.sides) == {(8, 8)}
            assert len(opened.sides) == 2 * small_tiles.count(96, 160) == 2 * 8
            tiles = [report[1:] for report in reports if report[0] == "decode"]
            assert tiles[: len(tiles) // 2][1:-1] == [(done, 8) for done in range(9)]
            pipeline.disable_vae_tiling()
            assert np.array_equal(pipeline(**CALL, **size).images, whole)
            pipeline.enable_vae_tiling()
            assert np.array_equal(pipeline(**CALL, **size).images, found)
        assert 20 < psnr(found, whole) < 80

    def test_pictures_no_larger_than_a_tile_are_decoded_whole(self, bundle: Bundle) -> None:
        with Pipeline(bundle) as plain, Pipeline(bundle, vae_tiling="on") as tiled:
            assert np.array_equal(plain(**CALL).images, tiled(**CALL).images)

    @pytest.mark.parametrize("vae_tiling", ["auto", "off"])
    def test_where_memory_runs_out_over_the_whole(self, bundle: Bundle, small_tiles: Tiling, vae_tiling: str) -> None:
        opened = Opened(room=8)
        with Pipeline(bundle, opener=opened, warn=lambda message: None, vae_tiling=vae_tiling) as pipeline:
            if vae_tiling == "auto":
                found = pipeline(**CALL).images
                assert pipeline.session.tiling.tiles(128, 128) == "64/32"
                with Pipeline(bundle, vae_tiling="on", warn=lambda message: None) as asked:
                    assert np.array_equal(asked(**CALL).images, found)
            else:
                with pytest.raises(OutOfMemoryError, match="the device is full"):
                    pipeline(**CALL)

    def test_pictures_are_encoded_in_tiles(self, bundle: Bundle, small_tiles: Tiling) -> None:
        opened, short, warnings = Opened(), Opened(room=8), []
        call = CALL | {"height": 96, "width": 160, "image": GRADIENT, "strength": 1.0, "num_inference_steps": 1}
        with Pipeline(bundle) as pipeline:
            whole = pipeline(**call).images
        with Pipeline(bundle, opener=opened, warn=warnings.append, vae_tiling="on") as pipeline:
            found = pipeline(**call).images
            assert opened.sides == [(8, 8)] * 16
            assert sum("the picture is encoded in tiles (64/32)" in warning for warning in warnings) == 1
            pipeline(**call)
            assert len(opened.sides) == 24  # Its latents are kept.
            pipeline.disable_vae_tiling()
            assert np.array_equal(pipeline(**call).images, whole)
        with Pipeline(bundle, opener=short, warn=lambda message: None) as pipeline:
            assert np.array_equal(pipeline(**call).images, found)
            assert short.sides == [(12, 20), *[(8, 8)] * 16]
        assert 20 < psnr(found, whole) < 80

    def test_where_norms_are_of_single_pixels_tiles_are_close(self) -> None:
        bundle = Bundle.open(demo_models.locate("zimg-tiny-qwen"))
        family = family_of(bundle.manifest)
        pixels = to_pixels(Image.fromarray(GRADIENT).resize((640, 512)))

        def check(component: str, name: str, given: Any, scales: tuple[int, int]) -> Any:
            with closing(open_engine(bundle, component, "onnxruntime", "cpu")) as engine:

                def run(part: Any) -> Any:
                    return next(iter(engine.run({name: part}).values()))

                whole, tiled = run(given), run_tiled(run, given, family.TILING, scales, ignored)
            assert 40 < psnr(tiled / whole.std(), whole / whole.std()) < 80
            return whole

        moments = check("vae_encoder", "image", pixels, (1, SCALE))
        check("vae_decoder", "latents", moments[:, : moments.shape[1] // 2], (SCALE, 1))

    def test_there_are_three_ways(self, bundle: Bundle) -> None:
        with pytest.raises(UsageError, match=r"vae_tiling is 'always'; choose of auto, on, off"):
            Pipeline(bundle, vae_tiling="always")

    def test_a_picture_tells_of_its_tiles_and_is_drawn_again_with_them(
        self, tmp_path: Path, small_tiles: Tiling
    ) -> None:
        first, again = tmp_path / "first.png", tmp_path / "again.png"
        done = invoke(main, "generate", "a", "--num-inference-steps", 1, "--vae-tiling", "on", "-o", first, "--json")
        assert json.loads(done.out)["memory"]["vae_tiling"] == "64/32"
        assert "the VAE takes tiles (64/32)\n" in done.err
        assert read(first).vae_tiling == "64/32"
        assert "VAE tiling: 64/32" in read(first).to_text()
        assert invoke(main, "generate", "--from-image", first, "-o", again).code == 0
        assert first.read_bytes() == again.read_bytes()


class TestChoice:
    """What ``auto`` takes where memory is short."""

    CALL: ClassVar = {"height": 64, "width": 64, "seed": 0, "num_inference_steps": 1, "output_type": "np"}

    @pytest.fixture(autouse=True)
    def _openvino_is_best(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sessions, "choose_backend", lambda *_: Choice("openvino", "it is faster"))

    def least(self, backend: str) -> int:
        with Pipeline.open("zimg-tiny-z", backend=backend, memory_budget=0) as pipeline:
            return pipeline.plan("a", **self.CALL).peak

    def test_another_backend_that_fits(self) -> None:
        least = self.least("onnxruntime")
        assert least < self.least("openvino")
        with Pipeline.open("zimg-tiny-z", memory=least, memory_budget=0) as pipeline:
            found = pipeline("a", **self.CALL).images
            assert pipeline.session.choice == ("onnxruntime", "the memory is short for openvino", False)
        with Pipeline.open("zimg-tiny-z", backend="onnxruntime") as pipeline:
            np.testing.assert_array_equal(found, pipeline("a", **self.CALL).images)

    def test_none_fits(self) -> None:
        with Pipeline.open("zimg-tiny-z", memory=10**6, memory_budget=0) as pipeline:
            with pytest.raises(OutOfMemoryError, match="memory=1 MB is allowed"):
                pipeline("a", **self.CALL)
            assert pipeline.session.choice.backend == "openvino"

    def test_one_that_was_named_is_obeyed(self) -> None:
        least = self.least("onnxruntime")
        with (
            Pipeline.open("zimg-tiny-z", backend="openvino", memory=least, memory_budget=0) as pipeline,
            pytest.raises(OutOfMemoryError, match=r"memory=.* is allowed"),
        ):
            pipeline("a", **self.CALL)


def test_where_copies_of_weights_do_not_fit_none_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    call = TestChoice.CALL
    with Pipeline.open("zimg-tiny-z", backend="onnxruntime") as pipeline:
        least = pipeline.plan("a", **call).peak
        expected = pipeline("a", **call).images
        assert not pipeline.bundle.in_place
    monkeypatch.setitem(needs.COPIES, ("onnxruntime", "bfloat16"), 20.0)
    with Pipeline.open("zimg-tiny-z", backend="onnxruntime", memory=least) as pipeline:
        assert pipeline.plan("a", **call).in_place and pipeline.bundle.in_place
        np.testing.assert_allclose(pipeline("a", **call).images, expected, atol=1e-3)
        assert pipeline.session.engines.bundle.in_place


class TestCommand:
    def test_what_it_says(self, tmp_path: Path) -> None:
        call = ("generate", "a", "--num-inference-steps", 1, "-o", tmp_path / "a.png", "--json")
        plain = invoke(main, *call)
        assert plain.err == ""
        found = json.loads(plain.out)["memory"]
        assert BASE < found["peak"] < found["budget"]
        assert (found["stay"], found["in_turn"], found["read_again"], found["vae_tiling"]) == ([], ALL, [], None)
        done = invoke(main, *call, "--memory", "1GB")
        assert done.err.startswith("memory: at most 2")
        assert done.err.endswith(" of 1.0 GB; text_encoder, conditioner, denoiser, vae_decoder opened in turn\n")
        assert json.loads(done.out)["memory"]["budget"] == 10**9

    def test_what_does_not_fit(self, tmp_path: Path) -> None:
        done = invoke(main, "generate", "a", "--memory", "150MB", "-o", tmp_path / "a.png")
        done.assert_refused("and memory=150 MB is allowed; it takes 2", 1)
        done = invoke(main, "generate", "a", "--memory", "0GB", "-o", tmp_path / "a.png")
        done.assert_refused("memory is '0GB'; give an amount such as 8GB", 2)
        assert list(tmp_path.iterdir()) == []

    def test_it_is_refused_before_a_byte_of_the_weights_is_read(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def changed(bundle: Bundle, names: Any = None, *_: Any) -> None:
            if names is None or names:
                raise BundleError("it was changed", "build it again")

        monkeypatch.setattr(Bundle, "verify", changed)
        call = ("generate", "a", "-o", tmp_path / "a.png")
        invoke(main, *call, "--memory", "150MB").assert_refused("memory=150 MB is allowed", 1)
        invoke(main, *call).assert_refused("it was changed", 1)

    def test_a_sheet_fits_as_well(self, tmp_path: Path) -> None:
        prompts = tmp_path / "prompts.txt"
        prompts.write_text("a\n")
        call = ("sheet", prompts, "--num-inference-steps", 1, "-o", tmp_path / "a.png", "--json")
        (made,) = json.loads(invoke(main, *call).out)["bundles"]
        assert made["memory"]["stay"] == ALL
        invoke(main, *call, "--memory", "1MB").assert_refused("memory=1 MB is allowed", 1)


@pytest.mark.parametrize("mebibytes", [150, 900, 1400])
def test_a_limited_process_draws_the_right_picture_or_refuses(tmp_path: Path, mebibytes: int) -> None:
    """Within a limit on its address space, which libraries and threads take their part of."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (mebibytes << 20, mebibytes << 20))

    out = tmp_path / "a.png"
    command = [sys.executable, "-m", "zimgkit.runtime", "generate", "a", "--seed", "1", "--num-inference-steps", "1"]
    done = subprocess.run(
        [*command, "-o", str(out)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        preexec_fn=limit,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    if done.returncode:
        assert done.returncode == 1
        assert done.stderr.startswith("zimg-run: error: 128x128 takes "), done.stderr
        assert done.stderr.count("\n") == 1
        assert "left of RLIMIT_AS; " in done.stderr
        assert not out.exists()
        assert mebibytes < 1400
    else:
        invoke(main, *command[3:], "-o", tmp_path / "free.png")
        assert out.read_bytes() == (tmp_path / "free.png").read_bytes()


def test_where_it_runs_out_all_the_same_something_smaller_is_named(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(bundle: Bundle, component: str, backend: str, device: str | None) -> Any:
        raise OutOfMemoryError(f"no room for {component}", "buy memory")

    advice: Callable[..., str] = lambda where, picture: "64x64"  # noqa: E731
    with Pipeline(bundle, opener=full) as pipeline:
        with pytest.raises(OutOfMemoryError, match=r"^no room for text_encoder; buy memory$"):
            pipeline(**CALL)  # It is small already.
        monkeypatch.setattr(sessions, "choices_that_take_less", advice)
        with pytest.raises(OutOfMemoryError, match=r"^no room for text_encoder; less is taken by 64x64$"):
            pipeline(**CALL)
