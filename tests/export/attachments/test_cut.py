"""A denoiser cut in three: the pieces one after the other give what the whole gives, and share its weights."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from tests import quantized, reference
from tests.commands import invoke
from tests.export.lora.conftest import loras_of
from tests.export.lora.swapping import contents, swap
from zimgkit.engines.base import open_engine
from zimgkit.engines.bundle import Bundle
from zimgkit.engines.errors import CheckpointError
from zimgkit.export.attachments.control import controlled
from zimgkit.export.attachments.cut import PIECES, cut
from zimgkit.export.build import Quantizing, build
from zimgkit.export.cli.main import main
from zimgkit.export.graphs.plan import record
from zimgkit.export.networks import qwen_image, qwen_image_variants, registry, z_image_omni
from zimgkit.export.networks.parts import Part
from zimgkit.export.networks.qwen_image_control import BlockwiseControlNet, ResidualControlNet, blockwise, residual
from zimgkit.export.networks.z_image import read_config
from zimgkit.export.networks.z_image_control import OWN, PLAIN, SHARED, ControlConfig, FunControlNet, fun
from zimgkit.export.quality.verify import _random_inputs
from zimgkit.export.quantization.statistics import Statistics
from zimgkit.runtime import Pipeline

__all__ = ["loras_of"]

FAMILIES = ("z-image", "qwen-image")
NAMES = tuple(f"denoiser.{piece}" for piece in PIECES)


def denoiser_of(family, **overrides):
    configs = registry.import_module(registry.row(family).demo).CONFIGS
    return registry.parts(family, "transformer", configs["transformer"] | overrides)["denoiser"]


def plan_of(part):
    return record(part.build(torch.bfloat16), part.inputs, part.outputs, part.sizes)


CROSSING = {
    "z-image": {
        "head": (
            ["hidden_states", "sinusoids", "caption", "cos", "sin", "pad"],
            ["time_embedding", "wide_cos", "wide_sin", "head_x", "change"],
        ),
        "body": (["time_embedding", "wide_cos", "wide_sin", "head_x"], ["residual"]),
        "tail": (["pad", "older_residual", "weights", "time_embedding", "head_x", "residual"], ["velocity"]),
    },
    "qwen-image": {
        "head": (
            ["hidden_states", "text", "modulation", "cos", "sin"],
            ["modulation_rows", "wide_cos", "wide_sin", "head_image", "head_text", "change"],
        ),
        "body": (["modulation_rows", "wide_cos", "wide_sin", "head_image", "head_text"], ["residual"]),
        "tail": (["older_residual", "weights", "modulation_rows", "head_image", "residual"], ["velocity"]),
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_crosses(family):
    part = denoiser_of(family)
    plan = plan_of(part)
    pieces = cut(plan, part.cut)
    found = {name: ([entry.name for entry in own.inputs], [*own.outputs]) for name, own in pieces.items()}
    assert found == CROSSING[family]
    known = {entry.name: entry for own in pieces.values() for entry in own.inputs}
    stream = "all_tokens" if family == "z-image" else "image_tokens"
    (head,) = (known[name] for name in ("head_x", "head_image") if name in known)
    assert head.dtype == torch.bfloat16 and head.shape == ("batch", stream, 128)
    for name in ("residual", "older_residual"):
        assert known[name].dtype == torch.float32 and known[name].shape == head.shape
    parameters = [name for own in pieces.values() for name in own.parameters()]
    assert len(parameters) == len(set(parameters)) and set(parameters) == set(plan.parameters())
    added = {*part.cut.repeated, "cut.change", "cut.residual", "cut.restore"}
    calls = [node.target for own in pieces.values() for node in own.calls if node.target not in added]
    assert calls == [node.target for node in plan.calls if node.target not in part.cut.repeated]


@pytest.mark.parametrize(("family", "depth"), [("z-image", "n_layers"), ("qwen-image", "num_layers")])
def test_too_few_blocks(family, depth):
    part = denoiser_of(family, **{depth: 1})
    with pytest.raises(CheckpointError, match="a network of 1 blocks cannot be cut; it takes two or more"):
        cut(plan_of(part), part.cut)


def edited(family, **overrides):
    """The variants of a denoiser, by name."""
    configs = registry.import_module(registry.row(family).demo).CONFIGS["transformer"] | overrides
    if family == "z-image":
        return z_image_omni.edit_parts(configs | {"siglip_feat_dim": 32})["denoiser"].variants
    ways = (qwen_image_variants.edit_parts, qwen_image_variants.entity_parts, qwen_image_variants.edit_entity_parts)
    return {name: part for way in ways for name, part in way(configs)["denoiser"].variants.items()}


VARIANTS = [("z-image", {}), ("qwen-image", {"zero_cond_t": False}), ("qwen-image", {"zero_cond_t": True})]


def check_in_torch(plan, where):
    """Without a graph: each piece is given what it asks for, and the last gives what the whole gives."""
    weights = {}

    def on_cpu(plan):
        def filled(name, value):
            if name not in weights:
                noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(len(weights)))
                weights[name] = reference.scaled(name, noise)
            return weights[name]

        module = copy.deepcopy(plan.module()).to_empty(device="cpu").eval()
        for name, parameter in module.named_parameters():
            parameter.data = filled(name, parameter)
        return module

    example = Part("", inputs=plan.inputs, sizes=plan.sizes)
    feeds = {name: torch.from_numpy(value) for name, value in _random_inputs(example, 0).items()}
    with torch.no_grad():
        expected = on_cpu(plan)(*feeds.values())
        there = feeds | {"weights": torch.tensor([1.5, -0.5])}
        for piece in cut(plan, where).values():
            found = on_cpu(piece)(*(there[entry.name] for entry in piece.inputs))
            there |= zip(piece.outputs, found if isinstance(found, tuple) else (found,), strict=True)
            there |= {"older_residual": there["residual"]} if "residual" in there else {}
    assert expected.std() > 0.01
    torch.testing.assert_close(there["velocity"], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("family", "overrides"), VARIANTS)
def test_variants_are_cut_as_well(family, overrides):
    for part in edited(family, **overrides).values():
        check_in_torch(record(part.build(torch.float32), part.inputs, part.outputs, part.sizes), part.cut)


def nets_of(family):
    """A ControlNet of each kind, by name."""
    config = registry.import_module(registry.row(family).demo).CONFIGS["transformer"]
    if family == "z-image":
        own = read_config(config)
        kinds = {kind or "plain": ControlConfig(16, 1, kind) for kind in (PLAIN, SHARED, OWN)}
        with torch.device("meta"):
            nets = {name: FunControlNet(own, kind).state_dict() for name, kind in kinds.items()}
        make = dict.fromkeys(nets, fun)
    else:
        with torch.device("meta"):
            wide = BlockwiseControlNet(config["num_layers"], 64, 128).state_dict()
            beside = ResidualControlNet(qwen_image.read_config(config), 2, 64).state_dict()
        nets, make = {"wide": wide, "beside": beside}, {"wide": blockwise, "beside": residual}
    return {
        name: make[name](config, {key: tuple(value.shape) for key, value in tensors.items()}, {})
        for name, tensors in nets.items()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_denoisers_with_controlnets_are_cut_as_well(family):
    """Their blocks are in the body but for those that the first of the denoiser's needs."""
    part = denoiser_of(family)
    for name, net in nets_of(family).items():
        plan = controlled(part, {name: net}, torch.float32)
        check_in_torch(plan, part.cut)
        tail = cut(plan, part.cut)["tail"]
        assert not [parameter for parameter in tail.parameters() if parameter.startswith("control.")]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def cut_bundle(family, checkpoint_of, bundle_of, quantized_of, shared_folder, tmp_path):
    """``cut_bundle(precision)``: a bundle whose denoiser is cut as well."""

    def make(precision: str, **options) -> Path:
        if precision in quantized.PRECISIONS:
            quantized_of(family, precision)
            statistics = Statistics.load(shared_folder / f"quantized-{family}" / "statistics.calibration.safetensors")
            options["quantization"] = Quantizing(calibration=statistics)
        out = tmp_path / precision
        build(str(checkpoint_of(family)), out, precision=precision, cut_denoiser=True, **options)
        return out

    return make


def check_pieces(bundle: Bundle, bound: float = 1e-6, backend: str = "onnxruntime") -> None:
    """One after the other they give what the whole gives, at two sizes, what crosses staying on the device or not."""
    family = bundle.manifest.family
    part = registry.parts(family, "transformer", bundle.manifest.config["transformer"])["denoiser"]
    whole, *pieces = (open_engine(bundle, name, backend, "cpu") for name in ("denoiser", *NAMES))
    for which, stays in ((0, True), (1, True), (1, False)):
        feeds = _random_inputs(replace(part, sizes=(part.sizes[which], {})), which)
        expected = whole.run(feeds)["velocity"]
        there = dict(feeds) | {"weights": np.array([1, 0], np.float32)}
        for piece in pieces:
            crossing = [name for name in piece.outputs if stays and name != "velocity"]
            there |= piece.run({name: there[name] for name in piece.inputs}, crossing)
            there |= {"older_residual": there["residual"]} if "residual" in there else {}
        error = np.linalg.norm(there["velocity"] - expected) / np.linalg.norm(expected)
        assert expected.std() > 0 and error <= bound


@pytest.mark.parametrize("precision", ["fp32", "bf16", *quantized.PRECISIONS])
def test_the_pieces_give_what_the_whole_gives(cut_bundle, precision):
    bundle = Bundle.open(cut_bundle(precision))
    check_pieces(bundle)
    check_pieces(bundle, backend="torch")
    whole = bundle.component("denoiser")
    pieces = [bundle.component(name) for name in NAMES]
    assert [piece.variant_of for piece in pieces] == ["denoiser"] * 3 and whole.variant_of is None
    # No byte twice: the pieces' graphs point into the files of the whole's, and are small.
    assert all(piece.weights == whole.weights for piece in pieces)
    assert sum(piece.parameters for piece in pieces) == whole.parameters
    assert sum(piece.weight_bytes for piece in pieces) == whole.weight_bytes
    for compute in whole.graphs:
        places = {}
        for name in NAMES:
            own = bundle.component(name).graphs
            path = bundle.file(own[compute])
            graph = onnx.load(path, load_external_data=False)
            places |= {t.name: [(e.key, e.value) for e in t.external_data] for t in graph.graph.initializer}
            assert path.stat().st_size < 300_000
        graph = onnx.load(bundle.file(whole.graphs[compute]), load_external_data=False)
        assert places == {t.name: [(e.key, e.value) for e in t.external_data] for t in graph.graph.initializer}
    computed = "float32" if precision == "fp32" else "bfloat16"
    for piece in pieces:
        own = onnx.load(bundle.file(next(iter(piece.graphs.values()))), load_external_data=False)
        for entry in own.graph.output:
            dtype = onnx.TensorProto.DataType.Name(entry.type.tensor_type.elem_type).lower()
            told = piece.outputs[entry.name].dtype
            assert dtype in (told, told.replace("float32", "float"))
            known = {"head_x": computed, "head_image": computed, "residual": "float32", "change": "float32"}
            assert told == known.get(entry.name, told)


def test_a_bundle_is_not_cut_unless_asked(bundle_of, family):
    assert not [name for name in Bundle.open(bundle_of(family)).manifest.components if "." in name]


@pytest.mark.parametrize("precision", ["bf16", "int8-weights"])
def test_a_swap_of_loras_changes_the_pieces_too(cut_bundle, loras_of, tmp_path, family, precision):
    """They point into the new file of merged weights, and the old graphs are gone."""
    first, second, _ = loras_of(family)
    bundle = cut_bundle(precision)
    before = contents(bundle)
    swap(bundle, first, f"{second}:-0.5")
    changed = contents(bundle)
    different = {name for name, tensor in before if before[name, tensor] != changed.get((name, tensor))}
    assert different >= {"denoiser", "denoiser.body"}
    opened = Bundle.open(bundle)
    check_pieces(opened)
    whole = opened.component("denoiser")
    assert all(opened.component(name).lora == whole.lora is not None for name in NAMES)
    swap(bundle)
    assert contents(bundle) == before
    check_pieces(Bundle.open(bundle))


def test_the_command(checkpoint_of, tmp_path, family):
    out = tmp_path / "bundle"
    result = invoke(main, "build", "--model", checkpoint_of(family), "--out", out, "--cut-denoiser", "--quiet")
    assert result.code == 0
    assert [name for name in Bundle.open(out).manifest.components if "." in name] == [*NAMES]
    with Pipeline.open(out) as pipeline:
        assert len(pipeline("a cat", height=32, width=32, num_inference_steps=1).images) == 1
