"""Swapping the LoRAs of a bundle: the weights of a build, nothing else touched, the old bundle whole until the end."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
from filelock import FileLock

from tests.commands import invoke
from tests.export.lora.swapping import contents, states, swap
from zimgkit.engines.base import open_engine
from zimgkit.engines.bundle import CPU_GRAPH, MANIFEST, Bundle, CompiledEngine, FileRecord, sha256, write_manifest
from zimgkit.engines.tensors.safetensors import view
from zimgkit.export.build import build
from zimgkit.export.checkpoints.checkpoint import open_checkpoint
from zimgkit.export.cli.main import main
from zimgkit.export.components import parts_of
from zimgkit.export.lora import swap as swaps
from zimgkit.export.lora.graphs import initializers, read_graph
from zimgkit.export.quality.verify import verify
from zimgkit.runtime.commands.cli import main as run

FAMILIES = ["z-image", "qwen-image"]
PRECISIONS = {"z-image": "bf16", "qwen-image": "fp32"}


@pytest.fixture(scope="session")
def built(shared_folder, checkpoint_of, loras_of):
    """``built(family)``: a bundle built with the first LoRA at 0.7 and the second at -0.5.

    Z-Image's checkpoint is cast to bfloat16, and its base weights are not kept; Qwen-Image's is linked, and they are.
    """

    def make(family: str) -> Path:
        folder = shared_folder / f"with-loras-{family}"
        precision, keep_base = PRECISIONS[family], family == "qwen-image"
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                first, second, _ = loras_of(family)
                loras = [f"{first}:0.7", f"{second}:-0.5"]
                build(str(checkpoint_of(family)), folder, precision=precision, loras=loras, keep_base=keep_base)
        return folder

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_a_swap_gives_what_a_build_gives(family, built, bundle_of, loras_of, checkpoint_of, copy_of):
    plain = bundle_of(family, PRECISIONS[family])
    bundle, before = copy_of(plain), contents(plain)
    first, second, third = loras_of(family)
    expected = contents(built(family))
    assert {key for key in before if before[key] != expected[key]}
    swap(bundle, f"{second}:-0.5", f"{first}:0.7")
    assert contents(bundle) == expected
    result = verify(bundle, str(checkpoint_of(family)))
    assert result["passed"], result
    assert not any(entry["different"] for entry in result["components"].values())
    # On to another set, and to none: then it is the bundle it was.
    swap(bundle, third)
    assert contents(bundle) not in (before, expected)
    swap(bundle)
    assert contents(bundle) == before
    old, new = Bundle.open(plain), Bundle.open(bundle)
    with_graphs = [name for name, component in old.manifest.components.items() if component.graphs]
    assert all(old.source_hash(name) == new.source_hash(name) for name in with_graphs)
    assert {f.sha256 for f in old.manifest.files.values()} == {f.sha256 for f in new.manifest.files.values()}


def test_from_a_build_with_loras(built, bundle_of, loras_of, checkpoint_of, copy_of):
    """Its base files hold none of what LoRAs touch: that comes from the checkpoint, and each weight is there once."""
    family = "z-image"
    bundle = copy_of(built(family))
    manifest = Bundle.open(bundle).manifest
    assert verify(bundle, str(checkpoint_of(family)))["passed"]
    assert [(lora.file, lora.scale) for lora in manifest.loras if lora.scale > 0] == [("0.safetensors", 0.7)]
    size = sum(file.stat().st_size for file in bundle.glob("*.safetensors"))
    assert size < 1.02 * sum(component.weight_bytes for component in manifest.components.values()) + 20_000
    plain = copy_of(bundle_of(family, "bf16"), "plain")
    swap(bundle, loras_of(family)[2])
    swap(plain, loras_of(family)[2])
    assert contents(bundle) == contents(plain)
    swap(bundle)
    assert contents(bundle) == contents(bundle_of(family, "bf16"))


def test_keeping_the_base_does_without_the_checkpoint(built, bundle_of, loras_of, copy_of):
    bundle, plain = copy_of(built("qwen-image")), bundle_of("qwen-image")
    write_manifest(bundle, elsewhere(bundle))
    first, second, _ = loras_of("qwen-image")
    swap(bundle, second, keep_base=True)
    swap(bundle)
    assert contents(bundle) == contents(plain)
    swap(bundle, f"{first}:0.7", f"{second}:-0.5")
    assert contents(bundle) == contents(built("qwen-image"))


def elsewhere(bundle):
    """The manifest of a bundle whose checkpoint is gone."""
    manifest = Bundle.open(bundle).manifest
    return msgspec.structs.replace(
        manifest, sources={"checkpoint": msgspec.structs.replace(manifest.checkpoint, model="/gone")}
    )


def test_a_swap_can_begin_to_keep_the_base(built, loras_of, checkpoint_of, copy_of, tmp_path):
    bundle, expected = copy_of(built("z-image")), contents(built("z-image"))
    first, second, third = loras_of("z-image")
    swap(bundle, third, keep_base=True)
    write_manifest(bundle, elsewhere(bundle))
    swap(bundle, f"{first}:0.7", f"{second}:-0.5", allow_unmatched=True)
    assert contents(bundle) == expected


def test_without_the_checkpoint(built, loras_of, checkpoint_of, copy_of, tmp_path):
    bundle = copy_of(built("z-image"))
    write_manifest(bundle, elsewhere(bundle))
    before = states(bundle)
    result = invoke(main, "swap-lora", bundle, "--lora", loras_of("z-image")[0], "--quiet")
    result.assert_refused("has not all base weights, and its checkpoint cannot be opened", 1)
    assert "name it with --model" in result.err
    other = checkpoint_of("z-image", 0, transformer={"n_layers": 3})
    result = invoke(main, "swap-lora", bundle, "--lora", loras_of("z-image")[0], "--model", other, "--quiet")
    result.assert_refused("is not the checkpoint that", 1)
    assert states(bundle) == before
    moved = shutil.copytree(checkpoint_of("z-image"), tmp_path / "moved")
    assert invoke(main, "swap-lora", bundle, "--model", moved, "--quiet").code == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_out_leaves_the_bundle_alone_and_shares_its_files(family, bundle_of, loras_of, copy_of, tmp_path):
    bundle, out = copy_of(bundle_of(family, "fp32")), tmp_path / "folder" / "out"
    before, weights = states(bundle), contents(bundle)
    result = invoke(main, "swap-lora", bundle, "--out", out, "--lora", loras_of(family)[1], "--quiet", "--json")
    assert (result.code, result.err) == (0, "")
    assert states(bundle) == before
    assert json.loads(result.out)["loras"] == [{"source": str(loras_of(family)[1]), "scale": 1.0}]
    swap(bundle, loras_of(family)[1])
    assert contents(out) == contents(bundle) != weights
    shared = {name for name, state in states(out).items() if state in before.values()}
    untouched = {
        "tokenizer.json",
        "vae_decoder.onnx",
        "text_encoder.onnx",
        "diffusion_pytorch_model.safetensors",
    }
    assert shared >= untouched
    invoke(main, "swap-lora", bundle, "--out", out, "--quiet").assert_refused("exists already", 1)
    invoke(main, "swap-lora", bundle, "--out", bundle, "--quiet").assert_refused("is the bundle itself", 2)
    assert invoke(main, "swap-lora", bundle, "--out", out, "--overwrite", "--quiet").code == 0
    assert contents(out) == weights


def test_across_disks_files_are_copied(bundle_of, loras_of, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(swaps.os, "link", refuse)
    swap(bundle_of("z-image", "fp32"), out=tmp_path / "out")
    assert contents(tmp_path / "out") == contents(bundle_of("z-image", "fp32"))


def test_scale_zero_is_none(bundle_of, loras_of, copy_of):
    bundle = copy_of(bundle_of("z-image", "bf16"))
    before = states(bundle)
    swapped = swap(bundle, f"{loras_of('z-image')[0]}:0")
    assert swapped.written == 0
    assert swapped.bundle.manifest.loras == ()
    assert {name for name, state in states(bundle).items() if state != before.get(name)} == {MANIFEST}


def test_modulation_is_reached(bundle_of, loras_of, copy_of):
    """The table of a schedule is another one: its key in the cache has the hash of those weights."""
    bundle = copy_of(bundle_of("qwen-image", "fp32"))
    before = Bundle.open(bundle)
    swap(bundle, loras_of("qwen-image")[0])
    after = Bundle.open(bundle)
    assert before.content_hash("modulation") != after.content_hash("modulation")
    name = "transformer_blocks.0.img_mod.1.weight"
    assert view(after.tensors("modulation")[name]).tobytes() != view(before.tensors("modulation")[name]).tobytes()


@pytest.fixture
def with_engines(copy_of, bundle_of):
    """A bundle with an engine of the denoiser and one of the VAE."""
    bundle = Bundle.open(copy_of(bundle_of("z-image", "fp32")))
    engines, files = [], dict(bundle.manifest.files)
    for component in ("denoiser", "vae_decoder"):
        file = f"engines/tensorrt-11-sm90/{component}.plan"
        (bundle.root / file).parent.mkdir(parents=True, exist_ok=True)
        (bundle.root / file).write_bytes(component.encode())
        files[file] = FileRecord(len(component), sha256(bundle.root / file))
        source = bundle.source_hash(component)
        engines.append(CompiledEngine(component, file, "tensorrt", "tensorrt", "11", "sm90", source, ()))
    write_manifest(bundle.root, msgspec.structs.replace(bundle.manifest, engines=tuple(engines), files=files))
    return bundle.root


def test_engines_of_what_changed_are_stale(with_engines, loras_of, tmp_path):
    lora, out = loras_of("z-image")[1], tmp_path / "out"
    result = invoke(main, "swap-lora", with_engines, "--lora", lora, "--out", out, "--quiet", "--json")
    # A new bundle has no use for it.
    assert [engine.component for engine in Bundle.open(out).manifest.engines] == ["vae_decoder"]
    assert not (out / "engines/tensorrt-11-sm90/denoiser.plan").exists()
    result = invoke(main, "swap-lora", with_engines, "--lora", lora, "--quiet", "--json")
    assert json.loads(result.out)["stale_engines"] == ["denoiser"]
    assert f"zimg-export compile {with_engines} compiles them again" in result.err
    assert result.err.count("\n") == 1
    bundle = Bundle.open(with_engines)
    (plan,) = bundle.engines("denoiser", "tensorrt")
    assert plan.source != bundle.source_hash("denoiser")
    found = json.loads(invoke(run, "inspect", with_engines, "--json").out)["engines"]
    assert [engine["stale"] for engine in found] == [True, False]
    again = f"stale    compiled from other weights; zimg-export compile {with_engines} --backend tensorrt compiles"
    assert invoke(run, "inspect", with_engines).out.count(again) == 1
    # Back again, it is fresh again.
    result = invoke(main, "swap-lora", with_engines, "--quiet", "--json")
    assert (json.loads(result.out)["stale_engines"], result.err) == ([], "")
    assert plan.source == Bundle.open(with_engines).source_hash("denoiser")


@pytest.fixture
def refittable(with_engines, bundle_of, tmp_path, monkeypatch):
    """The same, where the denoiser's engine is an imitated plan that can be refitted; it opens what it is told to."""
    from tests import fake_tensorrt

    fake_tensorrt.install(monkeypatch)
    bundle = Bundle.open(with_engines)
    source = Bundle.open(shutil.copytree(bundle_of("z-image", "fp32"), tmp_path / "compiled from"))
    component = bundle.component("denoiser")
    names = list(contents_of(source, "denoiser"))
    # As if q and k were multiplied at once.
    joined = [[f"layers.0.attention.to_{letter}.weight" for letter in "qk"]]
    plan, changes = bundle.manifest.engines[0], {"refit": names, "joined": joined}
    graph = source.file(component.graphs[CPU_GRAPH])
    fake_tensorrt.write_plan(bundle.root / plan.file, graph, component.inputs, component.outputs, (), False, changes)
    entry = msgspec.structs.replace(plan, version=fake_tensorrt.VERSION, refittable=True)
    engines = (entry, *bundle.manifest.engines[1:])
    record = FileRecord((bundle.root / plan.file).stat().st_size, sha256(bundle.root / plan.file))
    files = bundle.manifest.files | {plan.file: record}
    write_manifest(bundle.root, msgspec.structs.replace(bundle.manifest, engines=engines, files=files))
    return bundle.root


def contents_of(bundle, component):
    """The tensors of one component's graph."""
    return initializers(read_graph(bundle.file(bundle.component(component).graphs["float32"])))


def test_a_refittable_engine_takes_what_changed(refittable, loras_of, checkpoint_of, tmp_path):
    from zimgkit.export.compilers.compile import _compiled_for
    from zimgkit.export.quality.verify import _random_inputs

    part = parts_of(open_checkpoint(str(checkpoint_of("z-image"))))["denoiser"]
    feeds = _random_inputs(part, 0)

    def check(root, *names):
        bundle = Bundle.open(root)
        engine = open_engine(bundle, "denoiser", "tensorrt")
        expected = open_engine(bundle, "denoiser").run(feeds)["velocity"]
        np.testing.assert_allclose(engine.run(feeds)["velocity"], expected, rtol=1e-5, atol=1e-6)
        exchanged = engine._plan._engine.exchanged
        assert {name.split(".")[-2] for name in exchanged} == set(names)
        return exchanged

    _, second, third = loras_of("z-image")
    check(refittable)
    compiled = Bundle.open(refittable).engines("denoiser", "tensorrt")[0]
    result = invoke(main, "swap-lora", refittable, "--lora", second, "--quiet", "--json")
    found = json.loads(result.out)
    assert (found["stale_engines"], found["refitted_engines"], result.err) == ([], ["denoiser"], "")
    tensors = Bundle.open(refittable).engines("denoiser", "tensorrt")[0].refit.tensors
    assert {name.split(".")[-2] for name in tensors} == {"to_k", "to_v", "0"}
    assert f"takes    {len(tensors)} other weights whenever it is loaded" in invoke(run, "inspect", refittable).out
    # Of what is multiplied at once, all is exchanged.
    exchanged = check(refittable, "to_q", "to_k", "to_v", "0")
    assert [name for name in exchanged if name.endswith("to_q.weight")] == ["layers.0.attention.to_q.weight"]
    # A compilation takes it for up to date.
    entry = Bundle.open(refittable).engines("denoiser", "tensorrt")[0]
    wanted = msgspec.structs.replace(compiled, source=Bundle.open(refittable).source_hash("denoiser"))
    assert _compiled_for(entry) == _compiled_for(wanted) != _compiled_for(compiled)
    # Another set on top: what either touched. A new bundle takes the engine along.
    out = tmp_path / "out"
    result = invoke(main, "swap-lora", refittable, "--lora", third, "--out", out, "--quiet")
    assert "the engines of denoiser take them whenever they are loaded" in result.out
    check(out, "to_q", "to_k", "to_v", "0", "w1", "w2", "w3")
    # And none, as it was compiled.
    found = json.loads(invoke(main, "swap-lora", refittable, "--quiet", "--json").out)
    assert (found["stale_engines"], found["refitted_engines"]) == ([], [])
    check(refittable)
    assert Bundle.open(refittable).engines("denoiser", "tensorrt") == [compiled]


def killed_at(number, bundle, arguments, options):
    """Swap in a process that is killed when it does its ``number``-th thing to a file; whether it came that far."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] != 0
    count, root = 0, str(bundle.parent)

    def watch(event, details):
        nonlocal count
        if event in {"open", "os.rename", "os.remove", "os.link", "os.mkdir"} and str(details[0]).startswith(root):
            writes = event != "open" or (details[2] or 0) & (os.O_WRONLY | os.O_RDWR)
            count += bool(writes)
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    try:
        swap(bundle, *arguments, **options)
    except BaseException:
        os._exit(0)
    os._exit(0)


def test_a_kill_at_any_point_leaves_a_whole_bundle(quantized_of, loras_of, copy_of):
    source = quantized_of("z-image", "int8")
    lora = loras_of("z-image")[1]
    old = contents(source)
    swapped = copy_of(source, "swapped")
    swap(swapped, lora)
    new, merged, results = contents(swapped), Bundle.open(swapped).manifest.loras, []
    shutil.rmtree(swapped)
    for number in range(1, 200):
        bundle = copy_of(source)
        if not killed_at(number, bundle, [lora], {}):
            break
        opened = Bundle.open(bundle)
        opened.verify(afresh=True)
        results.append(opened.manifest.loras == merged)
        # The next one clears what was left, and does it.
        swap(bundle, lora)
        assert contents(bundle) == new
        shutil.rmtree(bundle)
    assert old != new
    assert len(results) > 8
    assert results == sorted(results)
    assert any(results)


def test_a_kill_on_the_way_to_another_folder(built, loras_of, copy_of, tmp_path):
    bundle, out = copy_of(built("z-image")), tmp_path / "out"
    before, results = states(bundle), []
    for number in range(1, 200):
        if not killed_at(number, bundle, [loras_of("z-image")[1]], {"out": out}):
            break
        assert states(bundle) == before
        results.append(out.exists())
        if out.exists():
            Bundle.open(out).verify(afresh=True)
            shutil.rmtree(out)
    Bundle.open(out).verify(afresh=True)
    assert len(results) > 8
    assert results == sorted(results)


@pytest.mark.parametrize("place", ["write_wanted", "write_manifest", "point_to"])
def test_a_disk_that_fills_up(place, built, loras_of, copy_of, monkeypatch):
    bundle = copy_of(built("z-image"))
    before = states(bundle)

    def fill(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(swaps, place, fill)
    result = invoke(main, "swap-lora", bundle, "--lora", loras_of("z-image")[1], "--quiet")
    result.assert_refused("No space left on device); free some space", 1)
    assert states(bundle) == before


def test_a_disk_too_small(built, loras_of, copy_of, monkeypatch):
    bundle = copy_of(built("z-image"))
    before = states(bundle)
    usage = shutil.disk_usage(bundle)
    monkeypatch.setattr(swaps.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    result = invoke(main, "swap-lora", bundle, "--lora", loras_of("z-image")[1], "--quiet")
    result.assert_refused("GB free, and the swap needs", 1)
    assert states(bundle) == before


def test_bad_loras_leave_the_bundle_alone(bundle_of, loras_of, copy_of, tmp_path):
    bundle = copy_of(bundle_of("z-image", "fp32"))
    before = states(bundle)
    for lora, message, code in (
        (loras_of("qwen-image")[0], "no LoRA for z-image", 1),
        (f"{loras_of('z-image')[0]}:much", "which is no number", 2),
        (tmp_path / "none.safetensors", "there is no LoRA", 1),
        (tmp_path / "lora.pt", "there is no LoRA", 1),
    ):
        invoke(main, "swap-lora", bundle, "--lora", lora, "--quiet").assert_refused(message, code)
        assert states(bundle) == before
    invoke(main, "swap-lora", tmp_path / "nothing", "--quiet").assert_refused("is not a bundle", 1)


def test_a_bundle_is_swapped_by_one_at_a_time(bundle_of, copy_of):
    bundle = copy_of(bundle_of("z-image", "fp32"))
    from zimgkit.engines.bundle.locks import only_writer_of

    with only_writer_of(bundle):
        invoke(main, "swap-lora", bundle, "--quiet").assert_refused("another process is writing", 1)


def test_known_loras_bring_their_settings(bundle_of, loras_of, copy_of, tmp_path):
    bundle = copy_of(bundle_of("qwen-image", "fp32"))
    before = Bundle.open(bundle).manifest
    lora = shutil.copy(loras_of("qwen-image")[1], tmp_path / "Qwen-Image-Lightning-8steps-V1.1.safetensors")
    manifest = swap(bundle, lora).bundle.manifest
    assert (manifest.defaults.num_inference_steps, manifest.defaults.guidance_scale) == (8, 1.0)
    assert manifest.scheduler["shift_terminal"] is None
    manifest = swap(bundle, lora, num_inference_steps=4, guidance_scale=2.5).bundle.manifest
    assert (manifest.defaults.num_inference_steps, manifest.defaults.guidance_scale) == (4, 2.5)
    manifest = swap(bundle).bundle.manifest
    assert (manifest.defaults, manifest.scheduler) == (before.defaults, before.scheduler)
    assert manifest.base_defaults is manifest.base_scheduler is None


def test_inspect_shows_the_loras(built, loras_of):
    bundle = built("z-image")
    first, second, _ = loras_of("z-image")
    found = json.loads(invoke(run, "inspect", bundle, "--json").out)["loras"]
    assert sorted((lora["source"], lora["scale"], lora["sha256"]) for lora in found) == sorted(
        [(str(first), 0.7, sha256(first)), (str(second), -0.5, sha256(second))]
    )
    assert f"LoRA      {first} at 0.7" in invoke(run, "inspect", bundle).out


def test_pictures_say_what_was_merged(built, bundle_of, tmp_path):
    call = ("--prompt", "a circle", "--height", 32, "--width", 32, "--num-inference-steps", 1, "--quiet", "--json")
    picture = tmp_path / "picture.png"
    made = invoke(run, "generate", "--bundle", built("qwen-image"), "--output", picture, *call)
    found = json.loads(made.out)["parameters"]["loras"]
    assert "0.safetensors:0.7 (" in found
    again = ("--from-image", picture, "--quiet", "--output", tmp_path / "again.png")
    assert invoke(run, "generate", "--bundle", built("qwen-image"), *again).err == ""
    plain = invoke(run, "generate", "--bundle", bundle_of("qwen-image"), *again)
    assert plain.code == 0
    assert f"was made with {found}, and this bundle has no LoRA" in plain.err


def test_verify_needs_the_loras(built, bundle_of, loras_of, checkpoint_of, copy_of, tmp_path):
    lora = shutil.copy(loras_of("z-image")[1], tmp_path / "lora.safetensors")
    bundle = copy_of(bundle_of("z-image", "fp32"))
    swap(bundle, lora)
    shutil.copy(loras_of("z-image")[2], lora)
    result = invoke(main, "verify", bundle, "--model", checkpoint_of("z-image"), "--quiet")
    result.assert_refused("is not the LoRA that", 1)
    lora.unlink()
    result = invoke(main, "verify", bundle, "--model", checkpoint_of("z-image"), "--quiet")
    result.assert_refused("there is no LoRA", 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_components_come_from_where_the_swap_looks(family, checkpoint_of):
    parts = parts_of(open_checkpoint(str(checkpoint_of(family))))
    own = {name: part.source for name, part in parts.items() if part.source != "vae"}
    assert own.items() <= swaps.LORA_SOURCES.items()


def test_no_torch_is_loaded(quantized_of, loras_of, copy_of):
    bundle = copy_of(quantized_of("z-image", "int8"))
    code = (
        "import sys\nfrom zimgkit.export.cli.main import main\ntry:\n    main()\n"
        "finally:\n    assert not {'torch', 'transformers', 'onnxruntime'} & sys.modules.keys()"
    )
    command = [sys.executable, "-c", code, "swap-lora", bundle, "--lora", f"{loras_of('z-image')[0]}:0.1", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "0.safetensors at 0.1" in done.stdout


def test_the_engine_takes_what_was_swapped(bundle_of, loras_of, copy_of):
    """An engine that is open goes on with the weights it has; the next one has the new ones."""
    bundle = copy_of(bundle_of("z-image", "fp32"))
    from zimgkit.export.quality.verify import _random_inputs

    part = parts_of(open_checkpoint(Bundle.open(bundle).manifest.checkpoint.model))["denoiser"]
    feeds = _random_inputs(part, 0)
    engine = open_engine(Bundle.open(bundle), "denoiser")
    before = engine.run(feeds)["velocity"]
    swap(bundle, loras_of("z-image")[0])
    assert (engine.run(feeds)["velocity"] == before).all()
    assert (open_engine(Bundle.open(bundle), "denoiser").run(feeds)["velocity"] != before).any()
