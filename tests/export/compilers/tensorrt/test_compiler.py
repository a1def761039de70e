"""Every graph through a real TensorRT compiler: it parses, its types are sound, it compiles, its attention is fused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImageControlNetModel, QwenImageTransformer2DModel, ZImageControlNetModel
from filelock import FileLock
from onnx import TensorProto, helper

from tests.references.checkpoints import blockwise_shapes
from zimgkit.engines.bundle import Bundle, Component, TensorSpec
from zimgkit.engines.errors import BackendError
from zimgkit.export import build as building
from zimgkit.export.build import build
from zimgkit.export.compilers.shape_profiles import ServedShapes, shape_profiles
from zimgkit.export.compilers.tensorrt.compiler import DEFAULT_OPTIONS, CompiledPlan, CompilerOptions, compile_plan
from zimgkit.export.compilers.tensorrt.graph import Graph, read_graph
from zimgkit.export.graphs.assemble import assemble_all
from zimgkit.runtime.progress import silent

pytestmark = pytest.mark.usefixtures("compiler")

FAMILIES = ("z-image", "qwen-image")
TASKS = ("image-to-image", "inpaint")
VAE = ("vae_encoder", "vae_decoder")
COMPONENTS = ("text_encoder", "conditioner", "denoiser", *VAE)
SERVED = {
    "static": ServedShapes(sizes=((256, 256),)),
    "two sizes": ServedShapes(sizes=((256, 256), (320, 192)), batch=2),
    "size range": ServedShapes(size_range=((128, 128), (256, 256), (512, 512)), max_prompt_tokens=300),
}
ONE_BLOCK = {
    "z-image": {
        "transformer": {"n_layers": 1, "n_refiner_layers": 1},
        "text_encoder": {"num_hidden_layers": 2, "vocab_size": 1024},
    },
    "qwen-image": {
        "transformer": {"num_layers": 1},
        "text_encoder": {"num_hidden_layers": 1, "vocab_size": 1024},
    },
}
"""The real configs with one block of each kind; Z-Image does not read the text encoder's last layer."""


def net_of(family: str, checkpoint: Path) -> dict[str, tuple[int, ...]]:
    """The tensors of a ControlNet for that checkpoint: Blockwise with a mask, or of Fun."""
    if family == "qwen-image":
        return blockwise_shapes(json.loads((checkpoint / "transformer/config.json").read_text()), 68)
    with torch.device("meta"):
        net = ZImageControlNetModel([0], [0], 33, "control_noise_refiner", n_refiner_layers=1)
    return {key: tuple(value.shape) for key, value in net.state_dict().items()}


CONTROLLED = "denoiser.control.net"
ATTENTIONS = {
    "z-image": {"text_encoder": 1, "conditioner": 1, "denoiser": 2, CONTROLLED: 4} | dict.fromkeys(VAE, 1),
    "qwen-image": {"text_encoder": 1, "conditioner": 0, "denoiser": 1, CONTROLLED: 1} | dict.fromkeys(VAE, 1),
}
"""How many there are then."""


def compile_component(
    bundle: Bundle,
    name: str,
    shapes: ServedShapes,
    file: Path,
    options: CompilerOptions = DEFAULT_OPTIONS,
    report: Any = silent,
) -> tuple[Graph, CompiledPlan]:
    ranges = shape_profiles(bundle.manifest, shapes)[name]
    graph = read_graph(bundle, name, ranges)
    return graph, compile_plan(graph, bundle.component(name), ranges, file, options, report)


@pytest.mark.parametrize("shapes", SERVED)
@pytest.mark.parametrize("name", COMPONENTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_tiny(family, name, shapes, bundle_of, tmp_path):
    seen: list[tuple[str, int, int]] = []
    bundle, file = Bundle.open(bundle_of(family, "bf16", tasks=TASKS)), tmp_path / "x.plan"
    _, plan = compile_component(bundle, name, SERVED[shapes], file, report=lambda *given: seen.append(given))
    assert plan.file == file
    assert [path.name for path in tmp_path.iterdir()] == ["x.plan"]
    # Weights are in it; a constant that several layers take may be in it once more.
    assert file.stat().st_size > bundle.component(name).weight_bytes / 2
    assert plan.layers
    # A VAE has one head of all its channels; the others' heads are 16 wide here.
    assert name in VAE or plan.unfused == ()
    assert not plan.warnings
    done = [entry[1] for entry in seen]
    assert {(stage, total) for stage, _, total in seen} == {(f"compile {name}", 1000)}
    assert done == sorted(done) and done[0] >= 0
    assert done[-1] == 1000 and done.count(1000) == 1
    assert len(set(done)) > 20  # It moves.


def assemble_once() -> Callable[..., Any]:
    """``assemble_all`` for a component's first graph, which is given again for the one for CPUs: half of the time."""
    made: dict[str, Any] = {}

    def assemble_or_repeat(plans: Any, *given: Any) -> Any:
        key = plans[0].name
        if key not in made:
            made[key] = assemble_all(plans, *given)
        return made[key]

    return assemble_or_repeat


@pytest.fixture(scope="session")
def one_block_of(shared_folder: Path) -> Callable[[str], Bundle]:
    """``one_block_of(family)``: a bundle of the real widths, its weights holes; built once."""

    def make(family: str) -> Bundle:
        sys.path.append(str(Path(__file__).resolve().parents[4] / "benchmarks"))
        import sparse_checkpoint

        folder = shared_folder / f"one-block-{family}"
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                checkpoint = shared_folder / f"one-block-checkpoint-{family}"
                sparse_checkpoint.write(family, checkpoint, overrides=ONE_BLOCK[family])
                net = checkpoint / "net.safetensors"
                sparse_checkpoint.write_holes(net, "bfloat16", net_of(family, checkpoint), 1)
                with pytest.MonkeyPatch.context() as patch:
                    for module in ("writing", "controls.graphs"):
                        patch.setattr(f"zimgkit.export.{module}.assemble_all", assemble_once())
                    build(str(checkpoint), folder, precision="bf16", tasks=TASKS, controlnets=[str(net)])
        return Bundle.open(folder, verify=False)

    return make


@pytest.fixture(scope="session")
def beside_residuals(shared_folder: Path, checkpoint_of: Callable[..., Path]) -> Bundle:
    """A tiny bundle with a ControlNet of InstantX's."""
    folder = shared_folder / "beside-residuals"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            checkpoint = checkpoint_of("qwen-image")
            net = shared_folder / "residuals" / "net"
            config = QwenImageTransformer2DModel.load_config(checkpoint / "transformer") | {"num_layers": 1}
            QwenImageControlNetModel.from_config(config).bfloat16().save_pretrained(net)
            build(str(checkpoint), folder, precision="bf16", controlnets=[str(net)])
    return Bundle.open(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_real_width(family, one_block_of, tmp_path):
    """One block of each kind at its real width, and the whole VAE; one after the other, for each takes gigabytes."""
    bundle = one_block_of(family)
    one_size = ServedShapes(sizes=((1024, 1024),))
    several = ServedShapes(size_range=((512, 512), (1024, 1024), (1536, 1536)))
    for name in ATTENTIONS[family]:
        for shapes in (one_size, several):
            if shapes is several and name in ("text_encoder", "conditioner"):
                continue  # They are the same for all sizes.
            graph, plan = compile_component(bundle, name, shapes, tmp_path / "x.plan")
            plan.file.unlink()
            # The VAE's one head of 384 or 512 numbers has no fused kernel, and that is said.
            assert plan.unfused == (graph.attentions if name in VAE else ())
            assert len(graph.attentions) == ATTENTIONS[family][name]


TWO_LAYERS = {"z-image": {"n_layers": 2, "n_refiner_layers": 1}, "qwen-image": {"num_layers": 2}}


@pytest.mark.parametrize("family", FAMILIES)
def test_head_body_and_tail_at_real_width(family, tmp_path, monkeypatch):
    """Of a denoiser of two layers: one is the head's, one the body's; the tail attends to nothing."""
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[4] / "benchmarks")
    import sparse_checkpoint

    layers = ONE_BLOCK[family] | {"transformer": TWO_LAYERS[family]}
    sparse_checkpoint.write(family, tmp_path / "checkpoint", overrides=layers)
    monkeypatch.setattr("zimgkit.export.writing.assemble_all", assemble_once())
    parts_of = building.parts_of
    monkeypatch.setattr(building, "parts_of", lambda *given: {"denoiser": parts_of(*given)["denoiser"]})
    building.build(str(tmp_path / "checkpoint"), tmp_path / "bundle", precision="bf16", cut_denoiser=True)
    bundle, found = Bundle.open(tmp_path / "bundle", verify=False), []
    for piece in bundle.manifest.pieces("denoiser"):
        several = ServedShapes(size_range=((512, 512), (1024, 1024), (1536, 1536)))
        graph, plan = compile_component(bundle, piece, several, tmp_path / "x.plan")
        plan.file.unlink()
        assert plan.unfused == ()
        found.append(len(graph.attentions))
    assert found == [2 if family == "z-image" else 1, 1, 0]


@pytest.mark.parametrize("shapes", SERVED)
def test_a_controlnet_with_blocks_of_its_own(shapes, beside_residuals, tmp_path):
    """InstantX's, whose prompt has a length of its own."""
    graph, plan = compile_component(beside_residuals, CONTROLLED, SERVED[shapes], tmp_path / "x.plan")
    assert len(graph.attentions) == 1 + 2
    assert plan.unfused == () and not plan.warnings


def test_attention_in_float32_is_computed_in_parts(bundle_of, tmp_path):
    bundle = Bundle.open(bundle_of("qwen-image"))
    for name in ("text_encoder", "denoiser"):
        graph, plan = compile_component(bundle, name, SERVED["size range"], tmp_path / "x.plan")
        assert plan.unfused == graph.attentions != ()


def net(nodes: Sequence[Any], ends: dict[str, int]) -> tuple[Graph, Component]:
    """A graph of (n, 4) tensors, the last of which it gives."""
    infos = [helper.make_tensor_value_info(name, kind, ["n", 4]) for name, kind in ends.items()]
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("elsewhere", 1)]
    made = helper.make_model(helper.make_graph(nodes, "net", infos[:-1], infos[-1:]), opset_imports=opsets)
    inputs = {name: TensorSpec("float32", ("n", 4)) for name in list(ends)[:-1]}
    return Graph("net", made.SerializeToString(), {}, ()), Component((), {"float32": "net.onnx"}, inputs)


FLOAT, BFLOAT16 = TensorProto.FLOAT, TensorProto.BFLOAT16
RANGES = ({"n": (1, 2, 8)},)
ADD = net([helper.make_node("Add", ["a", "b"], ["c"], name="sum")], {"a": FLOAT, "b": FLOAT, "c": FLOAT})


@pytest.mark.parametrize(
    ("graph", "said"),
    [
        (
            net([helper.make_node("Add", ["a", "b"], ["c"], name="sum")], {"a": BFLOAT16, "b": FLOAT, "c": FLOAT}),
            "TensorRT cannot read net: .*sum: .* must have same input types. But they are of types BFloat16 and Float",
        ),
        (
            net([helper.make_node("Mystery", ["a"], ["c"], name="it", domain="elsewhere")], {"a": FLOAT, "c": FLOAT}),
            r"TensorRT cannot read net: .*Plugin not found.* \(node it, Mystery\); report this",
        ),
        ((Graph("net", b"no graph at all", {}, ()), Component(())), "TensorRT cannot read net: .*Failed to parse the"),
    ],
)
def test_a_graph_that_is_refused(graph, said, tmp_path, capfd):
    with pytest.raises(BackendError, match=said) as caught:
        compile_plan(*graph, RANGES, tmp_path / "x.plan")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


def test_ranges_that_are_refused(tmp_path):
    with pytest.raises(BackendError, match=r"cannot compile net: .*satisfy MIN<=OPT<=MAX.*; try another --work"):
        compile_plan(*ADD, ({"n": (8, 2, 1)},), tmp_path / "x.plan")


def test_scratch_memory_that_is_too_small(tmp_path):
    with pytest.raises(BackendError, match=r"TensorRT cannot compile net: .*workspace.*; try another --workspace"):
        compile_plan(*ADD, RANGES, tmp_path / "x.plan", CompilerOptions(workspace_bytes=0))


@pytest.mark.parametrize("option", ["stripped", "refittable"])
def test_what_this_compiler_does_not_do(option, bundle_of, tmp_path):
    bundle = Bundle.open(bundle_of("qwen-image", "bf16"))
    with pytest.raises(BackendError, match=r"compile conditioner: .*; try it without --refittable and --stripped"):
        compile_component(
            bundle, "conditioner", SERVED["static"], tmp_path / "x.plan", CompilerOptions(**{option: True})
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options",
    [
        CompilerOptions(workspace_bytes=1 << 28),
        CompilerOptions(weight_streaming=True),
        CompilerOptions(optimization_level=0),
    ],
    ids=["workspace", "streaming", "level"],
)
def test_options(options, bundle_of, tmp_path):
    bundle = Bundle.open(bundle_of("qwen-image", "bf16"))
    _, plan = compile_component(bundle, "denoiser", SERVED["static"], tmp_path / "x.plan", options)
    assert plan.unfused == ()


def test_the_timing_cache(tmp_path):
    """Written beside and renamed, and read the next time."""
    path = tmp_path / "of" / "gpu.cache"
    for _ in range(2):
        compile_plan(*ADD, RANGES, tmp_path / "x.plan", CompilerOptions(timing_cache=path))
        assert [entry.name for entry in path.parent.iterdir()] == ["gpu.cache"]
        assert path.stat().st_size


@pytest.mark.parametrize("content", [b"", b"garbage" * 10, b"ptrtd\0\0\0"])
def test_a_damaged_timing_cache_is_made_again(tmp_path, content):
    path = tmp_path / "gpu.cache"
    path.write_bytes(content)
    plan = compile_plan(*ADD, RANGES, tmp_path / "x.plan", CompilerOptions(timing_cache=path))
    assert path.stat().st_size > 100
    assert not any("cannot be written" in warning for warning in plan.warnings)


def test_a_timing_cache_that_cannot_be_written(tmp_path):
    """It costs the timings, and a warning, but not the plan."""
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "gpu.cache"):
        plan = compile_plan(*ADD, RANGES, tmp_path / "x.plan", CompilerOptions(timing_cache=path))
        assert plan.file.stat().st_size
        assert sum(f"the timing cache {path} cannot be written" in warning for warning in plan.warnings) == 1


@pytest.mark.parametrize("after", [0, 50])
def test_interrupted(after, bundle_of, tmp_path):
    """Ctrl-C falls into the compiler's call of ``report``."""
    calls = []

    def stop(*given: Any) -> None:
        calls.append(given)
        if len(calls) > after:
            raise KeyboardInterrupt

    bundle = Bundle.open(bundle_of("qwen-image", "bf16"))
    with pytest.raises(KeyboardInterrupt):
        compile_component(bundle, "denoiser", SERVED["static"], tmp_path / "x.plan", report=stop)
    assert not list(tmp_path.iterdir())
    assert len(calls) < after + 20  # It stops soon.
