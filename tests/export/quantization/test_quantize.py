"""What becomes of a component's tensors: element types, names, values, against plain algebra in torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from zimgkit.engines.errors import CheckpointError, UsageError
from zimgkit.engines.tensors.safetensors import read_header
from zimgkit.export.networks.parts import Part
from zimgkit.export.quantization.formats import SCHEMES
from zimgkit.export.quantization.quantize import QuantizationSettings, linear_weights, quantize
from zimgkit.export.quantization.recipe import Keep, Recipe
from zimgkit.export.quantization.statistics import BINS, InputStatistics, Statistics
from zimgkit.export.weights import stream as weights
from zimgkit.export.weights.stream import Wanted, export_weights

WIDTH = 32


class Net(nn.Module):
    """Two linears that read one input, one that reads another, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(WIDTH, 48), nn.Linear(WIDTH, 16, bias=False)
        self.out = nn.Linear(48, WIDTH)
        self.norm = nn.RMSNorm(WIDTH)


PART = Part("transformer", Net)


@pytest.fixture
def wanted(tmp_path: Path) -> dict[str, Wanted]:
    folder = tmp_path / "transformer"
    folder.mkdir()
    torch.manual_seed(0)
    state = {name: value.bfloat16() for name, value in Net().state_dict().items()}
    state["q.weight"][:, 5] *= 50  # A column that weighs much.
    save_file({f"model.{name}": value for name, value in state.items()}, folder / "m.safetensors")
    infos = read_header(folder / "m.safetensors")
    return {name: Wanted(infos[f"model.{name}"], tuple(value.shape)) for name, value in state.items()}


def statistics(seed: int = 0) -> Statistics:
    generator = torch.Generator().manual_seed(seed)
    inputs = {}
    for name, width in (("model.q.weight", WIDTH), ("model.out.weight", 48)):
        values = torch.randn(500, width, generator=generator).abs()
        values[:, 3] *= 100
        entry = InputStatistics.empty(width)
        entry.add(values.amax(0).numpy(), lambda top, v=values: torch.histc(v, BINS, 0, top).double().numpy())
        inputs[name] = entry
    readers = {"model.q.weight": "model.q.weight", "model.k.weight": "model.q.weight"}
    return Statistics({"denoiser": inputs}, {"denoiser": readers | {"model.out.weight": "model.out.weight"}})


def settings(precision: str, *keep: str, **changes: object) -> QuantizationSettings:
    rules = (Keep("denoiser", keep, "because"),) if keep else ()
    found = statistics() if SCHEMES[precision].activations else None
    return QuantizationSettings(precision, Recipe(rules), **({"statistics": found} | changes))


def export(wanted: dict[str, Wanted], how: QuantizationSettings, folder: Path) -> dict[str, torch.Tensor]:
    quantized = quantize("denoiser", PART, wanted, how)
    folder.mkdir()
    export_weights({"denoiser": quantized.wanted}, "bfloat16", folder)
    return load_file(folder / "denoiser.safetensors")


def source(wanted: dict[str, Wanted]) -> dict[str, torch.Tensor]:
    return load_file(wanted["q.weight"].source.file)


def test_linears_of_a_part():
    assert linear_weights(PART) == ["q.weight", "k.weight", "out.weight"]


@pytest.mark.parametrize("piece", [8, 64, 1 << 24])
@pytest.mark.parametrize("precision", ["int8-weights", "int4-weights"])
def test_weights_alone(precision, piece, wanted, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "PIECE", piece)
    found, original = export(wanted, settings(precision, "k.*"), tmp_path / "out"), source(wanted)
    assert set(found) == {*original, "model.q.weight.scale", "model.out.weight.scale"}
    for name, value in original.items():
        if name not in ("model.q.weight", "model.out.weight"):
            assert torch.equal(found[name], value), name
            continue
        stored, scale = found[name], found[f"{name}.scale"]
        assert scale.dtype == torch.bfloat16
        if precision == "int8-weights":
            assert stored.dtype == torch.int8
            scale = scale[:, None]
        else:
            assert stored.dtype == torch.uint8 and stored.shape == (value.shape[0], value.shape[1] // 2)
            signed = stored.view(torch.int8)
            stored = torch.stack([(signed << 4) >> 4, signed >> 4], -1).flatten(1)
            scale = scale.repeat_interleave(value.shape[1] // scale.shape[1], 1)
        scale = scale.float()
        assert torch.equal(stored.float(), (value.float() / scale).round())
        assert ((stored * scale - value.float()).abs() <= scale / 2 * 1.001).all()


@pytest.mark.parametrize(("precision", "largest"), [("int8", 127), ("fp8", 448)])
def test_inputs_too(precision, largest, wanted, tmp_path):
    found = export(wanted, settings(precision, smooth=0.0), tmp_path / "out")
    scales = {name for name in found if name.endswith(".input_scale")}
    assert scales == {"model.q.weight.input_scale", "model.out.weight.input_scale"}
    assert not any(name.endswith(".smooth") for name in found)
    for name in scales:
        absmax = statistics().inputs["denoiser"][name.removesuffix(".input_scale")].absmax
        assert found[name].shape == ()
        assert absmax / largest <= found[name].item() <= absmax / largest * 1.01


def test_smoothing_changes_no_product(wanted, tmp_path):
    """Inputs divided, weights multiplied: the same sums, and a smaller range of inputs."""
    found, original = export(wanted, settings("int8"), tmp_path / "out"), source(wanted)
    entry = statistics().inputs["denoiser"]["model.q.weight"]
    smooth = found["model.q.weight.smooth"].float()
    assert smooth.log2().frac().abs().max() == 0
    reach = (torch.from_numpy(entry.channels) * smooth).max().item()
    assert reach < entry.absmax / 3
    assert reach / 127 <= found["model.q.weight.input_scale"].item() <= reach / 127 * 1.01
    for name in ("model.q.weight", "model.k.weight"):
        back = found[name].float() * found[f"{name}.scale"].float()[:, None] * smooth
        bound = found[f"{name}.scale"].float()[:, None] / 2 * smooth * 1.001
        assert ((back - original[name].float()).abs() <= bound).all()
    assert "model.k.weight.smooth" not in found
    # The paper's factors, with the columns of both weights that read the input.
    columns = torch.maximum(*(original[f"model.{x}.weight"].float().abs().amax(0) for x in "qk"))
    expected = (torch.from_numpy(entry.channels) / columns).sqrt()
    assert (1 / smooth / expected).log2().abs().max() <= 0.5 + 1e-5


def test_an_inputs_scales_follow_its_first_reader_even_where_that_is_kept(wanted, tmp_path):
    found = export(wanted, settings("int8", "q.*"), tmp_path / "out")
    assert {"model.q.weight.input_scale", "model.q.weight.smooth", "model.k.weight.scale"} <= set(found)
    assert found["model.q.weight"].dtype == torch.bfloat16 and "model.q.weight.scale" not in found


@pytest.mark.parametrize("precision", SCHEMES)
def test_what_the_host_multiplies_is_int8_in_every_precision(precision, wanted):
    # Which have biases, all of them.
    part = Part("transformer", shapes={name: want.shape for name, want in wanted.items()} | {"k.bias": (32,)})
    quantized = quantize("modulation", part, wanted, QuantizationSettings(precision, Recipe()))
    assert set(quantized.quantized) == {"q.weight", "k.weight", "out.weight"}
    assert {quantized.wanted[name].dtype("bfloat16") for name in quantized.quantized} == {"int8"}
    assert not any(name.endswith((".input_scale", ".smooth")) for name in quantized.wanted)


def test_what_is_kept_and_why(wanted):
    quantized = quantize("denoiser", PART, wanted, settings("int8-weights", "k.*"))
    assert quantized.quantized == ("q.weight", "out.weight")
    assert quantized.unquantized == {"model.k.weight": "because"}
    everything = quantize("denoiser", PART, wanted, settings("fp8", "*"))
    assert not everything.quantized and everything.wanted == wanted


def test_rows_that_no_block_divides_are_kept(tmp_path):
    save_file({"weight": torch.ones(4, 24)}, tmp_path / "m.safetensors")
    info = read_header(tmp_path / "m.safetensors")["weight"]
    part = Part("transformer", lambda: nn.Sequential(nn.Linear(24, 4, bias=False)))
    quantized = quantize("denoiser", part, {"0.weight": Wanted(info, (4, 24))}, settings("int4-weights"))
    assert quantized.unquantized == {"weight": "no block size divides its rows"}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number(bad, wanted, tmp_path):
    file = wanted["q.weight"].source.file
    state = load_file(file)
    state["model.out.weight"][3, 3] = bad
    save_file(state, file)
    for number, precision in enumerate(SCHEMES):
        with pytest.raises(
            CheckpointError, match=r"m\.safetensors: 'model\.out\.weight' has 1 value that is NaN or inf"
        ):
            export(wanted, settings(precision), tmp_path / str(number))


def test_a_weight_too_large_for_a_scale(wanted, tmp_path):
    """As it is, or times the factors that smooth its inputs."""
    file = wanted["q.weight"].source.file
    state = load_file(file)
    state["model.out.weight"][3, 3] = 3.3895e38
    save_file(state, file)
    with pytest.raises(CheckpointError, match=r"'model\.out\.weight' has values up to 3\.39e\+38, which have no scale"):
        export(wanted, settings("int8-weights"), tmp_path / "weights")
    state["model.out.weight"][3, 3] = 1
    state["model.out.weight"][4] = 1e37
    save_file(state, file)
    found = statistics()
    found.inputs["denoiser"]["model.out.weight"].channels[:] = 1e6
    with pytest.raises(CheckpointError, match=r"'model\.out\.weight' has values up to .*, which have no scale"):
        export(wanted, settings("fp8", statistics=found, smooth=1.0), tmp_path / "smooth")


def test_an_input_too_large_for_a_scale(wanted, recwarn):
    found = statistics()
    found.inputs["denoiser"]["model.q.weight"].channels[7] = 3.4e38
    with pytest.raises(UsageError, match=r"has inputs of model\.q\.weight up to 3\.4e\+38, which have no scale"):
        quantize("denoiser", PART, wanted, settings("fp8", statistics=found))
    assert not recwarn


def test_statistics_of_another_model(wanted):
    other = statistics()
    other.readers["denoiser"].pop("model.k.weight")
    with pytest.raises(UsageError, match=r"nothing of model\.k\.weight"):
        quantize("denoiser", PART, wanted, settings("fp8", statistics=other))
    other = statistics()
    other.inputs["denoiser"]["model.q.weight"].channels = np.ones(8, np.float32)
    with pytest.raises(UsageError, match=r"has 8 channels before model\.q\.weight, not 32"):
        quantize("denoiser", PART, wanted, settings("fp8", statistics=other))


def test_a_linear_whose_result_is_never_read(wanted):
    found = statistics()
    found.inputs["denoiser"].pop("model.out.weight")
    assert quantize("denoiser", PART, wanted, settings("fp8", statistics=found)).unquantized == {
        "model.out.weight": "nothing reads its result"
    }


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (QuantizationSettings("fp9", Recipe()), "no precision is called 'fp9'; choose one of fp8"),
        (settings("int8", range="mean"), "no range is called 'mean'"),
        (settings("int8", smooth=1.5), r"alpha is 1\.5; give a number from 0 to 1"),
        (settings("int8", smooth=float("nan")), "alpha is nan"),
        (settings("int8", range="mse"), "'mse' needs the distribution of inputs before they are smoothed; add --smoot"),
        (settings("int8-weights", smooth=0.5), "int8-weights does not quantize inputs"),
        (QuantizationSettings("fp8", Recipe((Keep("vae", ("*",), "x"),))), "the recipe names the component 'vae'"),
    ],
)
def test_settings_that_do_not_fit(how, said):
    with pytest.raises(UsageError, match=said):
        how.check()


def test_a_calibration_is_needed(wanted):
    with pytest.raises(UsageError, match="fp8 needs a calibration"):
        quantize("denoiser", PART, wanted, settings("fp8", statistics=None))
