"""Opening checkpoints: tiny ones, written by safetensors, transformers and diffusers themselves."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from zimgkit.engines.errors import CheckpointError, UsageError
from zimgkit.engines.tensors.safetensors import TensorInfo
from zimgkit.export.checkpoints.checkpoint import (
    CONFIGS,
    FILES,
    Checkpoint,
    check_tensors,
    open_checkpoint,
    open_configs,
)
from zimgkit.runtime import hub

STEMS = {"transformer": "diffusion_pytorch_model", "text_encoder": "model", "vae": "diffusion_pytorch_model"}
PIPELINES = {
    "z-image": ("ZImagePipeline", "ZImageTransformer2DModel"),
    "qwen-image": ("QwenImagePipeline", "QwenImageTransformer2DModel"),
}


def tensors(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (3, 4), "a.bias": (4,), "b.weight": (2, 3, 1, 5), "scalar": (), "c.0.weight": (7, 1)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def write_shards(folder: Path, stem: str, state: dict[str, torch.Tensor], count: int) -> dict[str, str]:
    """Write weights as one file, or as shards with their index; returns the index."""
    folder.mkdir(parents=True, exist_ok=True)
    if count == 1:
        save_file(state, folder / f"{stem}.safetensors", {"format": "pt"})
        return {}
    index: dict[str, str] = {}
    for i in range(count):
        file, part = f"{stem}-{i + 1:05}-of-{count:05}.safetensors", dict(list(state.items())[i::count])
        save_file(part, folder / file, {"format": "pt"})
        index |= dict.fromkeys(part, file)
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": index})
    (folder / f"{stem}.safetensors.index.json").write_text(text)
    return index


def write(root: Path, family: str = "z-image", shards: int = 1, dtype: torch.dtype = torch.float32) -> Path:
    """Write a checkpoint whose tensors mean nothing."""
    pipeline, transformer = PIPELINES[family]
    for seed, (component, stem) in enumerate(STEMS.items()):
        write_shards(root / component, stem, tensors(seed, dtype), shards)
        (root / component / "config.json").write_text(json.dumps({"component": component}))
    (root / "transformer" / "config.json").write_text(json.dumps({"_class_name": transformer, "n_layers": 2}))
    (root / "scheduler").mkdir()
    (root / "scheduler" / "scheduler_config.json").write_text('{"shift": 3.0}')
    (root / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    return root


def read(info: TensorInfo) -> bytes:
    with info.file.open("rb") as file:
        file.seek(info.offset)
        return file.read(info.nbytes)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def same(found: Any, expected: dict[str, torch.Tensor]) -> None:
    """Names, element types, shapes and bytes are those of the tensors."""
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        info = found[name]
        assert (info.dtype, info.shape) == (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        assert read(info) == raw(tensor)


class TestOpen:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("shards", [1, 2, 5])
    @pytest.mark.parametrize("family", PIPELINES)
    def test_tensors_are_where_safetensors_finds_them(
        self, tmp_path: Path, family: str, shards: int, dtype: torch.dtype
    ) -> None:
        root = write(tmp_path / "mine", family, shards, dtype)
        checkpoint = open_checkpoint(str(root))
        assert (checkpoint.root, checkpoint.name, checkpoint.family) == (root, "mine", family)
        for component in STEMS:
            loaded: dict[str, torch.Tensor] = {}
            for file in (root / component).glob("*.safetensors"):
                loaded |= load_file(file)
            same(checkpoint.tensors(component), loaded)

    def test_configs(self, tmp_path: Path) -> None:
        checkpoint = open_checkpoint(str(write(tmp_path / "mine")))
        assert checkpoint.config("transformer")["n_layers"] == 2
        assert checkpoint.config("vae") == {"component": "vae"}
        assert checkpoint.config("scheduler") == {"shift": 3.0}

    def test_source(self, tmp_path: Path) -> None:
        root = write(tmp_path / "mine", shards=2)
        source = open_checkpoint(str(root)).source
        assert (source.model, source.revision) == (str(root), None)
        weights = list(root.rglob("*.safetensors"))
        assert source.files == {path.relative_to(root).as_posix(): path.stat().st_size for path in weights}

    def test_nothing_is_read_before_it_is_asked_for(self, tmp_path: Path) -> None:
        root = write(tmp_path / "mine")
        checkpoint = open_checkpoint(str(root))
        (root / "vae" / "config.json").unlink()
        (root / "vae" / "diffusion_pytorch_model.safetensors").unlink()
        checkpoint.tensors("transformer")
        for lazily in (checkpoint.config, checkpoint.tensors):
            with pytest.raises(CheckpointError, match="vae"):
                lazily("vae")

    def test_configs_alone(self, tmp_path: Path) -> None:
        root = write(tmp_path / "mine", shards=2)
        whole = open_configs(str(root))
        assert whole == open_checkpoint(str(root))
        (root / SHARD_2).unlink()
        (root / SHARD_2.replace("transformer", "vae")).unlink()
        partial = open_configs(str(root))
        assert partial.config("transformer") == whole.config("transformer")
        assert {name.partition("/")[0] for name in partial.source.files} == {"text_encoder"}
        with pytest.raises(CheckpointError, match="is missing"):
            partial.tensors("transformer")

    def test_relative_paths_and_links(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        # As the cache of huggingface_hub: files are links that lead out of the folder.
        root = write(tmp_path / "models--Qwen--Qwen-Image" / "snapshots" / "0b1c", "qwen-image", 2)
        for i, file in enumerate(root.rglob("*.safetensors")):
            file.rename(tmp_path / f"blob{i}")
            file.symlink_to(tmp_path / f"blob{i}")
        monkeypatch.chdir(root.parent)
        checkpoint = open_checkpoint("./0b1c")
        assert (checkpoint.name, checkpoint.source.revision) == ("Qwen-Image", "0b1c")
        same(checkpoint.tensors("vae"), tensors(2))
        monkeypatch.chdir(root)
        assert open_checkpoint(".").name == "Qwen-Image"
        monkeypatch.setenv("HOME", str(root.parent))
        assert open_checkpoint("~/0b1c").family == "qwen-image"

    @pytest.mark.parametrize("family", PIPELINES)
    def test_without_model_index_the_transformer_tells_the_family(self, tmp_path: Path, family: str) -> None:
        root = write(tmp_path / "mine", family)
        (root / "model_index.json").unlink()
        assert open_checkpoint(str(root)).family == family


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("ZImageImg2ImgPipeline", "z-image"),
        ("ZImageInpaintPipeline", "z-image"),
        ("QwenImageImg2ImgPipeline", "qwen-image"),
        ("QwenImageInpaintPipeline", "qwen-image"),
    ],
)
def test_pipelines_of_the_same_weights(tmp_path: Path, name: str, family: str) -> None:
    root = write(tmp_path / "mine", family)
    (root / "model_index.json").write_text(json.dumps({"_class_name": name}))
    assert (open_checkpoint(str(root)).family, open_checkpoint(str(root)).pipeline) == (family, name)


class TestNames:
    """What stands for a path, a hub id, a short name."""

    @pytest.fixture
    def fetched(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
        asked: list[tuple[Any, ...]] = []
        root = write(tmp_path / "fetched")

        def fetch(model_id: str, *, revision: str | None, source: str, allow: tuple[str, ...]) -> Path:
            asked.append((model_id, revision, source, allow))
            return root

        monkeypatch.setattr(hub, "fetch", fetch)
        monkeypatch.chdir(tmp_path)
        return asked

    def test_short_name(self, fetched: list[tuple[Any, ...]]) -> None:
        open_checkpoint("z-image-turbo", revision="v1", source="modelscope")
        assert fetched == [("Tongyi-MAI/Z-Image-Turbo", "v1", "modelscope", FILES)]

    def test_hub_id(self, fetched: list[tuple[Any, ...]]) -> None:
        open_checkpoint("someone/finetune")
        open_configs("Qwen/Qwen-Image")
        assert fetched == [
            ("someone/finetune", None, "huggingface", ("model_index.json",)),
            ("someone/finetune", None, "huggingface", FILES),
            ("Qwen/Qwen-Image", None, "huggingface", CONFIGS),
        ]

    @pytest.mark.parametrize("name", ["Qwen-Image", "Qwen/Qwen-Image"])
    def test_a_folder_goes_before_the_hub(self, fetched: list[tuple[Any, ...]], tmp_path: Path, name: str) -> None:
        root = write(tmp_path / name, "qwen-image")
        assert open_checkpoint(name).root == root
        assert fetched == []

    @pytest.mark.parametrize(
        "name",
        ["./none", "../none", "/none", "~/none", "a/b/c", "none/", "", " ", "a b", "-x", ".", "x\0y"],
    )
    def test_a_path_that_does_not_exist(self, fetched: list[tuple[Any, ...]], name: str) -> None:
        with pytest.raises(CheckpointError, match=r"does not exist; name a local folder|has no model_index.json"):
            open_checkpoint(name)
        assert fetched == []

    @pytest.mark.parametrize(
        ("url", "asked", "recorded"),
        [
            ("https://huggingface.co/Qwen/Qwen-Image", (None, "huggingface"), ("Qwen/Qwen-Image", None)),
            ("https://hf.co/Qwen/Qwen-Image/tree/v2", ("v2", "huggingface"), ("Qwen/Qwen-Image", "v2")),
            ("https://modelscope.cn/models/Qwen/Qwen-Image/files", (None, "modelscope"),
             ("https://modelscope.cn/models/Qwen/Qwen-Image", None)),
        ],
    )  # fmt: skip
    def test_an_address(self, fetched: list[tuple[Any, ...]], url: str, asked: Any, recorded: Any) -> None:
        source = open_checkpoint(url).source
        assert fetched == [("Qwen/Qwen-Image", *asked, FILES)]
        assert (source.model, source.revision) == recorded

    def test_addresses_of_no_model(self, fetched: list[tuple[Any, ...]]) -> None:
        with pytest.raises(UsageError, match="'https://a/b' is no address of a model; give the address of a model on"):
            open_checkpoint("https://a/b")
        with pytest.raises(
            UsageError, match=r"z.safetensors of o/n is a single file; zimgkit opens models in the diff"
        ):
            open_checkpoint("https://huggingface.co/o/n/blob/main/z.safetensors")
        with pytest.raises(UsageError, match="--revision is b, and the address has a; give one of them"):
            open_checkpoint("https://huggingface.co/o/n/tree/a", revision="b")
        assert fetched == []

    def test_unknown_and_planned_names(self, fetched: list[tuple[Any, ...]]) -> None:
        with pytest.raises(CheckpointError, match="did you mean"):
            open_checkpoint("Z-Image-Trubo")
        for planned in ("Z-Image-Edit", "Tongyi-MAI/Z-Image-Edit"):
            with pytest.raises(CheckpointError, match="does not serve Z-Image-Edit yet"):
                open_checkpoint(planned)
        assert fetched == []

    def test_a_local_folder_has_no_revision(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="no revisions"):
            open_checkpoint(str(write(tmp_path / "mine")), revision="main")


def text_encoder_config() -> Any:
    from transformers import Qwen2_5_VLConfig

    text = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6},
    }
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": 16,
        "window_size": 112,
        "fullatt_block_indexes": [1],
    }
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)


class TestTextEncoderNames:
    """Against the modules of transformers, and files that transformers wrote."""

    @pytest.fixture(scope="class")
    def model(self) -> Any:
        from transformers import Qwen2_5_VLForConditionalGeneration

        torch.manual_seed(0)
        return Qwen2_5_VLForConditionalGeneration(text_encoder_config())

    def check(self, root: Path, text_model: torch.nn.Module) -> Checkpoint:
        checkpoint = open_checkpoint(str(root))
        found = checkpoint.tensors("text_encoder")
        rest = {name for name in found if name.startswith("visual.") or name == "lm_head.weight"}
        same({name: info for name, info in found.items() if name not in rest}, dict(text_model.state_dict()))
        return checkpoint

    @pytest.mark.parametrize("size", ["1GB", "20KB"])
    def test_as_transformers_saves_it(self, tmp_path: Path, model: Any, size: str) -> None:
        root = write(tmp_path / "mine", "qwen-image")
        (root / "text_encoder" / "model.safetensors").unlink()
        model.save_pretrained(root / "text_encoder", max_shard_size=size)
        assert (root / "text_encoder" / "model.safetensors.index.json").is_file() == (size == "20KB")
        self.check(root, model.model.language_model)

    @pytest.mark.parametrize("shards", [1, 3])
    @pytest.mark.parametrize("form", ["old", "new", "inner", "text only", "bare"])
    def test_every_form_of_the_names(self, tmp_path: Path, model: Any, form: str, shards: int) -> None:
        def stored(name: str) -> str:
            assert name.startswith(("model.language_model.", "model.visual.")) or name == "lm_head.weight"
            if form == "old":  # as on the hub
                return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
            if form == "inner":  # the model without its head
                return name.removeprefix("model.")
            if form == "bare":
                return name.removeprefix("model.language_model.")
            return name.replace("model.language_model.", "model.") if form == "text only" else name

        state = {stored(name): tensor.clone() for name, tensor in model.state_dict().items()}
        root = write(tmp_path / "mine", "qwen-image")
        (root / "text_encoder" / "model.safetensors").unlink()
        write_shards(root / "text_encoder", "model", state, shards)
        found = self.check(root, model.model.language_model).tensors("text_encoder")
        assert {info.name for info in found.values()} == set(state)
        assert "lm_head.weight" in found
        if form in ("old", "new", "inner"):
            visual = {f"visual.{name}" for name in model.model.visual.state_dict()}
            assert visual == {name for name in found if name.startswith("visual.")}

    @pytest.mark.parametrize("headed", [False, True])
    def test_qwen3(self, tmp_path: Path, headed: bool) -> None:
        from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

        config = Qwen3Config(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            tie_word_embeddings=not headed,
        )
        torch.manual_seed(1)
        model = Qwen3ForCausalLM(config) if headed else Qwen3Model(config)
        root = write(tmp_path / "mine")
        (root / "text_encoder" / "model.safetensors").unlink()
        model.save_pretrained(root / "text_encoder")
        found = self.check(root, model.model if headed else model).tensors("text_encoder")
        assert ("lm_head.weight" in found) == headed

    def test_two_names_for_one_tensor(self, tmp_path: Path) -> None:
        root = write(tmp_path / "mine")
        state = {"model.norm.weight": torch.ones(2), "norm.weight": torch.ones(2)}
        save_file(state, root / "text_encoder" / "model.safetensors")
        with pytest.raises(CheckpointError, match=r"are both the text_encoder's 'norm.weight'"):
            open_checkpoint(str(root)).tensors("text_encoder")


@pytest.mark.parametrize("size", ["1GB", "20KB"])
def test_transformers_as_diffusers_saves_them(tmp_path: Path, size: str) -> None:
    from diffusers import QwenImageTransformer2DModel

    torch.manual_seed(2)
    model = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    root = write(tmp_path / "mine", "qwen-image")
    (root / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    (root / "model_index.json").unlink()
    model.save_pretrained(root / "transformer", max_shard_size=size)
    checkpoint = open_checkpoint(str(root))
    assert checkpoint.family == "qwen-image"
    assert checkpoint.config("transformer")["axes_dims_rope"] == [8, 4, 4]
    same(checkpoint.tensors("transformer"), model.state_dict())
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    check_tensors(checkpoint.tensors("transformer"), expected, "transformer")


def test_the_prefix_of_single_file_releases(tmp_path: Path) -> None:
    root = write(tmp_path / "mine")
    state = {f"model.diffusion_model.{name}": tensor for name, tensor in tensors(0).items()}
    save_file(state, root / "transformer" / "diffusion_pytorch_model.safetensors")
    same(open_checkpoint(str(root)).tensors("transformer"), tensors(0))


def remove(*names: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        for name in names:
            (root / name).unlink()

    return change


def put(name: str, data: bytes) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        (root / name).write_bytes(data)

    return change


def cut(root: Path) -> None:
    path = root / SHARD_2
    path.write_bytes(path.read_bytes()[:-1])


def cut_header(root: Path) -> None:
    path = root / SHARD_2
    path.write_bytes(path.read_bytes()[:20])


def shard_named(name: Any) -> Callable[[Path], None]:
    return put(INDEX, json.dumps({"weight_map": {"a.weight": name}}).encode())


def emptied(root: Path) -> None:
    for file in (root / "transformer").glob("*.safetensors*"):
        file.unlink()


def pickled(root: Path) -> None:
    (root / "vae" / "diffusion_pytorch_model.safetensors").unlink(missing_ok=True)
    for file in (root / "vae").glob("*.safetensors*"):
        file.unlink()
    (root / "vae" / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))


def disguised(root: Path) -> None:
    (root / SHARD_2).write_bytes(pickle.dumps(Bomb()))


class Bomb:
    """Unpickling it fails the test."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("it was unpickled",))


SHARD_2 = "transformer/diffusion_pytorch_model-00002-of-00002.safetensors"
INDEX = "transformer/diffusion_pytorch_model.safetensors.index.json"
MESSAGES = [
    (remove(SHARD_2), rf"{SHARD_2} is missing; fetch"),
    (cut, rf"{SHARD_2} is cut short: [\d,]+ of [\d,]+ bytes; fetch"),
    (cut_header, rf"{SHARD_2} is no safetensors file, or was cut short; fetch"),
    (put(SHARD_2, b""), rf"{SHARD_2} is no safetensors file"),
    (pickled, r"vae holds a pickle \(diffusion_pytorch_model.bin\) where .* never opens .*; convert it"),
    (disguised, rf"{SHARD_2} .*it looks like a pickle"),
    (remove(INDEX, SHARD_2), r"transformer has 1 of 2 shards, and no index; fetch"),
    (emptied, r"transformer has neither diffusion_pytorch_model.safetensors nor .*index.json; fetch"),
    (
        shard_named("../../x.safetensors"),
        rf"{INDEX} names '../../x.safetensors', which is no safetensors file beside it",
    ),
    (shard_named("/etc/x.safetensors"), r"names '/etc/x.safetensors'"),
    (shard_named("sub/x.safetensors"), r"names 'sub/x.safetensors'"),
    (shard_named("..\\x.safetensors"), r"which is no safetensors file beside it"),
    (shard_named("x.bin"), r"names 'x.bin', which is no safetensors file"),
    (shard_named(".."), r"names '..', which is no safetensors file"),
    (shard_named("x\0.safetensors"), r"is missing"),
    (shard_named("x" * 300 + ".safetensors"), r"cannot be read"),
    (shard_named(7), r"has no readable weight_map"),
    (put(INDEX, b"{}"), r"has no readable weight_map"),
    (put(INDEX, b'{"weight_map": []}'), r"has no readable weight_map"),
    (put(INDEX, b"{"), rf"{INDEX} cannot be read .*; fetch the file again"),
    (put("transformer/config.json", b"[]"), r"transformer/config.json is not a JSON object"),
    (put("transformer/config.json", b'{"a": '), r"transformer/config.json cannot be read"),
    (put("transformer/config.json", b"\xff\xfe\xfa"), r"transformer/config.json cannot be read"),
    (put("transformer/config.json", b"[" * 200_000), r"transformer/config.json cannot be read"),
    (remove("transformer/config.json"), r"transformer/config.json is missing"),
    (lambda root: (root / "transformer").rename(root / "unet"), r"has no folder transformer"),
    (
        put("model_index.json", b'{"_class_name": "FluxPipeline"}'),
        r"class FluxPipeline.*zimgkit serves .*z-image and qwen",
    ),
    (put("model_index.json", b'{"_class_name": "QwenImageControlNetPipeline"}'), r"class QwenImageControlNetPipeline"),
    (put("model_index.json", b'{"_class_name": ["a"]}'), r"the class \['a'\]"),
    (put("model_index.json", b"{}"), r"model_index.json names the class None"),
    (put("model_index.json", b"not json"), r"model_index.json cannot be read"),
    (remove("model_index.json", "transformer/config.json"), r"has no model_index.json; .*diffusers layout"),
]


@pytest.mark.parametrize(("change", "message"), MESSAGES, ids=[message for _, message in MESSAGES])
def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, change: Callable[[Path], None], message: str) -> None:
    root = write(tmp_path / "mine", shards=2)
    change(root)
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint = open_checkpoint(str(root))
        checkpoint.config("transformer")
        checkpoint.tensors("transformer")
    assert "\n" not in str(caught.value)


def test_a_file_of_an_unknown_model(tmp_path: Path) -> None:
    save_file(tensors(0), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"is of a model that zimgkit does not know; zimgkit serves"):
        open_checkpoint(str(tmp_path / "model.safetensors"))


class TestCheckTensors:
    @pytest.fixture
    def infos(self, tmp_path: Path) -> dict[str, TensorInfo]:
        return dict(open_checkpoint(str(write(tmp_path / "mine"))).tensors("transformer"))

    @pytest.fixture
    def expected(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in tensors(0).items()}

    def test_all_is_well(self, infos: dict[str, TensorInfo], expected: dict[str, tuple[int, ...]]) -> None:
        check_tensors(infos, expected, "transformer")

    def test_missing(self, infos: dict[str, TensorInfo], expected: dict[str, tuple[int, ...]]) -> None:
        del infos["a.bias"]
        with pytest.raises(CheckpointError, match=r"the transformer lacks the tensor 'a.bias'; check"):
            check_tensors(infos, expected, "transformer")
        del infos["scalar"]
        with pytest.raises(CheckpointError, match=r"'a.bias' \(and 1 more\); check"):
            check_tensors(infos, expected, "transformer")

    def test_another_model(self, infos: dict[str, TensorInfo], expected: dict[str, tuple[int, ...]]) -> None:
        renamed = {f"model.{name}": shape for name, shape in expected.items()}
        with pytest.raises(CheckpointError, match=r"'model.a.weight' \(and 4 more\); it seems .* of another model"):
            check_tensors(infos, renamed, "transformer")

    def test_unexpected(self, infos: dict[str, TensorInfo], expected: dict[str, tuple[int, ...]]) -> None:
        del expected["b.weight"], expected["c.0.weight"]
        with pytest.raises(
            CheckpointError, match=r"model.safetensors: the transformer has no use for '[bc].* \(and 1 m"
        ):
            check_tensors(infos, expected, "transformer")
        check_tensors(infos, expected, "transformer", ignore=lambda name: name.startswith(("b.", "c.")))
        with pytest.raises(CheckpointError, match=r"no use for 'c.0.weight'; check that its config.json is its own"):
            check_tensors(infos, expected, "transformer", ignore=lambda name: name.startswith("b."))

    def test_shapes(self, infos: dict[str, TensorInfo], expected: dict[str, tuple[int, ...]]) -> None:
        expected["a.weight"] = (4, 3)
        message = r"'a.weight' of the transformer has shape \(3, 4\) instead of \(4, 3\); check .*config.json"
        with pytest.raises(CheckpointError, match=message):
            check_tensors(infos, expected, "transformer")
        expected["scalar"] = (1,)
        with pytest.raises(CheckpointError, match=r"instead of \(4, 3\) \(and 1 more\)"):
            check_tensors(infos, expected, "transformer")

    @pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64])
    def test_element_types(self, tmp_path: Path, expected: dict[str, tuple[int, ...]], dtype: torch.dtype) -> None:
        found = open_checkpoint(str(write(tmp_path / "odd", dtype=dtype))).tensors("transformer")
        name = str(dtype).removeprefix("torch.")
        with pytest.raises(CheckpointError, match=rf"is stored in {name} \(and 4 more\); .*float32, bfloat16, float16"):
            check_tensors(found, expected, "transformer")
