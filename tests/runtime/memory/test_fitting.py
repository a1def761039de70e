"""What fits, and what would, at the models' full size."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests import handmade
from zimgkit.engines.bundle import CPU_GRAPH, Bundle, CompiledEngine, Component, FileRecord, Quantization
from zimgkit.engines.bundle.manifest import read_manifest
from zimgkit.engines.errors import OutOfMemoryError, UsageError
from zimgkit.runtime import demo_models
from zimgkit.runtime.families import family_of
from zimgkit.runtime.memory import fitting, needs
from zimgkit.runtime.memory.fitting import (
    Picture,
    Setting,
    budget_of,
    choices_that_take_less,
    fit,
    line,
    needs_in,
    smaller,
    summary,
)
from zimgkit.runtime.memory.machine import UNLIMITED, Free
from zimgkit.runtime.memory.needs import BASE, on_host
from zimgkit.runtime.memory.plan import Budget
from zimgkit.runtime.memory.streaming import within

GB = 10**9
WIDTHS: dict[str, dict[str, Any]] = {
    "z-image": {
        "text_encoder": {"hidden_size": 2560, "intermediate_size": 9728},
        "transformer": {"dim": 3840},
        "vae": {"block_out_channels": [128, 256, 512, 512]},
    },
    "qwen-image": {
        "text_encoder": {"hidden_size": 3584, "intermediate_size": 18944},
        "transformer": {"num_attention_heads": 24, "attention_head_dim": 128},
        "vae": {"base_dim": 96, "dim_mult": [1, 2, 4, 4]},
    },
}
CONFIG = {
    carried.family: {name: config | WIDTHS[carried.family].get(name, {}) for name, config in carried.config.items()}
    for carried in (read_manifest(demo_models.locate(name)) for name in demo_models.NAMES)
}
PARAMETERS = {
    "z-image": {"text_encoder": 4.0e9, "conditioner": 0.4e9, "denoiser": 5.8e9, "vae_decoder": 0.05e9},
    "qwen-image": {"text_encoder": 7.1e9, "conditioner": 0.01e9, "denoiser": 13.6e9, "vae_decoder": 0.05e9},
}
STORED = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0, "int8-weights": 1.0, "int4-weights": 0.55}


@pytest.fixture(autouse=True)
def _all_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "find_spec", lambda package: None if package == "openvino" else object())
    monkeypatch.setattr(needs, "adds_integers_exactly", lambda: True)


def where(family: str = "z-image", precision: str = "bfloat16", **more: Any) -> Setting:
    components = {
        name: Component(
            (),
            graphs={"float32": "x.onnx", CPU_GRAPH: "y.onnx"},
            parameters=int(count),
            weight_bytes=int(count * (STORED[precision] if name in ("text_encoder", "denoiser") else 2)),
        )
        for name, count in PARAMETERS[family].items()
    } | {"modulation": Component((), weight_bytes=13 * GB)}
    own = precision if precision in ("float32", "bfloat16") else "bfloat16"
    quantization = None if own == precision else Quantization(precision)
    manifest = handmade.manifest(
        family, precision=own, quantization=quantization, components=components, config=CONFIG[family]
    )
    setting = {"backend": "onnxruntime", "host": True} | more
    return Setting(Bundle(Path("/bundle"), manifest), family_of(manifest), **setting)


def picture(size: int = 1024) -> Picture:
    return Picture(size, size, 40)


@pytest.mark.parametrize(
    ("setting", "size", "allowed", "stay", "tiled"),
    [
        (where(), 512, 30, 4, False),
        (where(), 512, 16, 1, False),
        (where(precision="int8-weights"), 512, 8 * 1.07, 1, False),
        (where("qwen-image", "int8-weights"), 1328, 24, 1, False),
        (where("qwen-image", "int8-weights"), 1328, 17.2, 0, False),
        (where("qwen-image", "int4-weights"), 2048, 14.5, 0, True),
    ],
)
def test_what_stays_open(setting: Setting, size: int, allowed: float, stay: int, tiled: bool) -> None:
    found = fit(setting, picture(size), Budget(total=int(allowed * GB)))
    assert (len(found.stay), found.tiled) == (stay, tiled)
    assert found.peak <= allowed * GB


def test_what_widens_its_weights_when_it_is_opened_takes_that_too(monkeypatch: pytest.MonkeyPatch) -> None:
    setting, budget = where(precision="int8-weights"), Budget(own=24 * GB, limit="the machine")
    assert fit(setting, picture(512), budget).peak < 24 * GB
    monkeypatch.setattr(needs, "adds_integers_exactly", lambda: False)
    with pytest.raises(OutOfMemoryError, match="for the denoiser"):
        fit(setting, picture(512), budget)


def test_weights_that_are_mapped_are_no_reason_to_refuse_what_the_user_did_not_bound() -> None:
    found = fit(where(), picture(512), Budget(own=8 * GB, limit="the machine"))
    assert found.rereads == ("text_encoder", "denoiser")
    assert line(found, "-").endswith("the weights of text_encoder, denoiser are read again in every run")


@pytest.mark.parametrize("precision", ["float32", "int8", "int8-weights", "int4-weights"])
def test_copies_of_weights_are_made_where_they_fit(precision: str) -> None:
    bytes_of = {"float32": 4, "int4-weights": 0.66}.get(precision, 1) * 5.8
    copied = fit(where(precision=precision), picture(512), Budget(own=int((1.1 * bytes_of + 4) * GB)))
    assert not copied.in_place and not copied.rereads
    short = fit(where(precision=precision), picture(512), Budget(own=int(max(0.9 * bytes_of, 3) * GB)))
    assert short.in_place
    assert "ONNX Runtime makes no copies of weights" in line(short, "-") and summary(short, "-")["in_place"]
    assert not fit(where(precision=precision, backend="torch"), picture(512), short.budget).in_place


@pytest.mark.parametrize(
    ("setting", "size", "budget", "message"),
    [
        (
            where(), 1024, Budget(total=8 * GB),
            "1024x1024 takes 14.2 GB for the denoiser alone, and memory=8.0 GB is allowed; "
            "what fits: a bundle built with --precision int4-weights",
        ),
        (
            where(precision="float32"), 512, Budget(total=16 * GB),
            "512x512 takes 23.. GB for the denoiser alone, and memory=16.0 GB is allowed; "
            "what fits: a bundle built with --precision bf16",
        ),
        (
            where(precision="int8-weights"), 2048, Budget(own=6 * GB, limit="the machine"),
            "2048x2048 takes .* for the denoiser alone, and 6.0 GB are free .the machine.; what fits: 1.*x1",
        ),
        (
            where(precision="int8-weights", vae_tiling="off"), 2048, Budget(own=8 * GB, limit="the machine"),
            "what fits: vae_tiling=auto, or 12.*x12",
        ),
        (where(), 1024, Budget(total=GB), "and memory=1.0 GB is allowed; it takes 1.* GB at the least, for 256x256"),
        (
            where(), 512, Budget(address_space=8 * GB),
            "512x512 takes 13.* GB for the denoiser alone, and 8.0 GB are left of RLIMIT_AS; what fits: .*int8-weights",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_names_what_would(setting: Setting, size: int, budget: Budget, message: str) -> None:
    with pytest.raises(OutOfMemoryError) as refused:
        fit(setting, picture(size), budget)
    assert re.search(message, str(refused.value)), str(refused.value)


def test_every_choice_that_is_named_fits() -> None:
    for budget in (Budget(own=amount * GB, limit="the machine") for amount in range(2, 20)):
        for size in (1024, 1536, 2048):
            try:
                fit(where(precision="int8-weights"), picture(size), budget)
            except OutOfMemoryError as error:
                if found := re.search(r"what fits: .*?(\d+)x(\d+)", str(error)):
                    side = int(found[1])
                    fit(where(precision="int8-weights"), picture(side), budget)
                    with pytest.raises(OutOfMemoryError):
                        fit(where(precision="int8-weights"), picture(side + 16), budget)


def test_where_memory_ran_out_though_it_should_not_something_smaller_is_named() -> None:
    setting, asked = where("qwen-image", "int8-weights"), Picture(1328, 1664, 40)
    assert choices_that_take_less(setting, asked) == "a bundle built with --precision int4-weights"
    tiny = choices_that_take_less(where(precision="int4-weights"), picture(2048))
    width, height = map(int, re.search(r"(\d+)x(\d+)", tiny).groups())  # type: ignore[union-attr]
    assert 1024 <= width == height < 2048


def test_smaller_pictures_have_the_same_shape() -> None:
    sizes = [(size.width, size.height) for size in smaller(Picture(768, 1024, 40))]
    assert sizes[0] == (1008, 752)
    assert sizes[-1] == (336, 256)
    assert all(width % 16 == height % 16 == 0 and abs(width / height - 4 / 3) < 0.06 for width, height in sizes)
    assert list(smaller(Picture(128, 512, 40))) == []


class TestTiles:
    def test_asked_for(self) -> None:
        found = fit(where("qwen-image", vae_tiling="on"), picture(1024), Budget())
        assert found.tiled
        assert summary(found, "512/384")["vae_tiling"] == "512/384"
        assert not fit(where("qwen-image", vae_tiling="on"), picture(512), Budget()).tiled

    def test_an_engine_that_does_not_take_them(self) -> None:
        setting = where("qwen-image", vae_tiling="on", tiles_are_served=False)
        with pytest.raises(UsageError, match=r"not compiled for tiles of 512x512; .* --size 512x512 --size"):
            fit(setting, picture(1024), Budget())
        tight = Budget(own=7 * GB, limit="the machine")
        small = where("qwen-image", "int4-weights")
        assert fit(small, picture(2048), tight).tiled
        with pytest.raises(OutOfMemoryError, match="vae_decoder"):
            fit(where("qwen-image", "int4-weights", tiles_are_served=False), picture(2048), tight)


class TestDevices:
    ENGINES = tuple(
        CompiledEngine(
            name, f"{name}.plan", "tensorrt", "tensorrt", "11", "sm90", "hash", (), memory_bytes=GB, streamable=True
        )
        for name in PARAMETERS["z-image"]
    )

    def setting(self) -> Setting:
        found = where()
        files = {f"{name}.plan": FileRecord(int(2 * count), "") for name, count in PARAMETERS["z-image"].items()}
        manifest = handmade.manifest(
            precision="bfloat16", components=found.bundle.manifest.components, config=CONFIG["z-image"],
            engines=self.ENGINES, files=files,
        )  # fmt: skip
        return Setting(Bundle(Path("/bundle"), manifest), found.family, "tensorrt", host=False)

    def test_plans_count_with_their_working_memory(self) -> None:
        needs = needs_in(self.setting(), picture())
        assert (needs["denoiser"].held, needs["denoiser"].working) == (12_600_000_000, 0)

    @pytest.mark.parametrize(("allowed", "stay"), [(30, 4), (24, 2), (16, 1)])
    def test_what_stays_open(self, allowed: int, stay: int) -> None:
        assert len(fit(self.setting(), picture(), Budget(total=allowed * GB)).stay) == stay

    @pytest.mark.parametrize(("allowed", "kept"), [(8, 7), (13, 12), (1, 0)])
    def test_plans_keep_as_many_weights_as_are_allowed(self, allowed: int, kept: int) -> None:
        """And then they fit."""
        setting = self.setting()
        found = within(setting.bundle, "tensorrt", None, allowed * GB)
        assert found.manifest.engines[2].weight_streaming_budget == kept * GB - (BASE if kept else 0)
        if kept:
            assert fit(replace(setting, bundle=found), picture(), Budget(total=allowed * GB)).peak <= allowed * GB
        others = within(setting.bundle, "tensorrt-rtx", None, allowed * GB)
        assert others.manifest.engines == self.ENGINES

    @pytest.mark.parametrize("backend", ["torch", "torch-compiled"])
    def test_pytorch_streams_what_does_not_fit(self, backend: str) -> None:
        setting = replace(where(), backend=backend, host=False)
        with pytest.raises(OutOfMemoryError):
            fit(setting, picture(), Budget(total=10 * GB))
        found = within(setting.bundle, backend, "cuda:1", 10 * GB)
        assert found.weights_budget == 5 * GB
        assert fit(replace(setting, bundle=found), picture(), Budget(total=10 * GB)).peak <= 10 * GB
        assert (
            within(setting.bundle, backend, {"denoiser": "cuda", "text_encoder": "cpu"}, GB).weights_budget == GB // 2
        )
        assert within(setting.bundle, backend, "cpu", GB) is setting.bundle

    @pytest.mark.parametrize(
        ("backend", "device", "host"),
        [("onnxruntime", "cpu", True), ("torch", "cuda:1", False), ("tensorrt", None, False), ("openvino", "CPU", True),
         ("tensorrt-rtx", None, False), ("openvino", None, True)],
    )  # fmt: skip
    def test_where_it_computes(self, backend: str, device: str | None, host: bool) -> None:
        assert on_host(backend, device) is host


class TestBudget:
    @pytest.fixture(autouse=True)
    def _free(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(fitting, "free_memory", lambda: Free(10 * GB, "the machine", 50 * GB))

    def test_what_is_open_counts_as_free(self) -> None:
        found = budget_of("auto", host=True, addresses=5 * GB, held=GB)
        assert found == Budget(own=11 * GB, limit="the machine", address_space=55 * GB)
        assert budget_of("50%", host=True, held=2 * GB).total == 6 * GB

    def test_what_the_user_allows_is_not_more_than_is_free(self) -> None:
        found = budget_of("100GB", host=True)
        assert (found.total, found.own, found.bound) == (100 * GB, 10 * GB, 10 * GB)

    def test_of_a_device_only_the_user_knows(self) -> None:
        assert budget_of("auto", host=False) == Budget()
        assert budget_of(5, host=False) == Budget(total=5)
        with pytest.raises(UsageError, match="memory is '50%'; of a device nobody knows how much is free"):
            budget_of("50%", host=False)
        assert summary(fit(where(host=False), picture(), Budget()), "-")["budget"] is None
        assert Budget().bound == UNLIMITED


@pytest.mark.parametrize("family", ["z-image", "qwen-image"])
def test_scores_count_where_attention_keeps_them(family: str) -> None:
    """Carried models of before there were graphs for CPUs; the least is what ``benchmarks/engine_memory.py`` found."""
    name = {"z-image": "zimg-tiny-z", "qwen-image": "zimg-tiny-qwen"}[family]
    bundle = Bundle.open(demo_models.locate(name), verify=False)
    setting = Setting(bundle, family_of(bundle.manifest), "onnxruntime", True)
    found = needs_in(setting, picture(1024))
    assert found["vae_decoder"].working > 1100 << 20
    assert found["denoiser"].working > {"z-image": 576, "qwen-image": 222}[family] << 20
    without = needs_in(replace(setting, backend="torch"), picture(1024))
    assert without["vae_decoder"].working < 600 << 20
    assert without["denoiser"].working < 60 << 20


def test_what_is_encoded_counts_at_its_own_size() -> None:
    setting = where("qwen-image", "float32")
    encoder = {"vae_encoder": setting.bundle.manifest.components["vae_decoder"]}
    manifest = msgspec.structs.replace(setting.bundle.manifest, components=setting.bundle.manifest.components | encoder)
    setting = replace(setting, bundle=replace(setting.bundle, manifest=manifest))
    small, large = (replace(picture(512), encoded=(side, side)) for side in (512, 1024))
    working = [needs_in(setting, each)["vae_encoder"].working for each in (small, large)]
    assert working[1] == pytest.approx(4 * working[0])
    assert "vae_encoder" not in needs_in(setting, picture(512))
    assert needs_in(setting, large)["vae_decoder"].working == working[0]
    assert fit(replace(setting, vae_tiling="on"), large, Budget()).tiled
    assert not fit(replace(setting, vae_tiling="on"), small, Budget()).tiled
    assert next(each.encoded for each in smaller(small)) == (496, 496)
    assert next(each.encoded for each in smaller(large)) == (1024, 1024)


@pytest.mark.parametrize(("family", "tokens", "width"), [("z-image", 4096 + 64, 3840), ("qwen-image", 4096 + 6, 3072)])
def test_a_cache_keeps_residuals(family: str, tokens: int, width: int) -> None:
    """In float32, of all tokens at the most: the prompt's 40, without a template of 34 or filled up to 64."""
    plain, cached = (needs_in(where(family), replace(picture(), residuals=count)) for count in (0, 5))
    assert cached["denoiser"].working - plain["denoiser"].working == 5 * 4 * tokens * width
    assert cached | {"denoiser": plain["denoiser"]} == plain


def test_pieces_are_in_the_place_of_the_denoiser() -> None:
    setting = where(host=False)
    manifest = setting.bundle.manifest
    pieces = {
        f"denoiser.{name}": Component((), weight_bytes=size) for name, size in (("head", 2), ("body", 9), ("tail", 1))
    }
    cut = msgspec.structs.replace(manifest, components=manifest.components | pieces)
    setting = replace(setting, bundle=replace(setting.bundle, manifest=cut))
    assert needs_in(setting, replace(picture(), pieces=tuple(pieces)))["denoiser"].held == 12
