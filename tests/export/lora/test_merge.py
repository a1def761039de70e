"""What of a LoRA goes where, by hand-written algebra, and what is refused."""

from __future__ import annotations

import itertools
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.export.lora import lora_files
from tests.export.lora.lora_files import TARGETS, assert_near, found_by, merged_by, write
from zimgkit.engines.errors import LoraError, UsageError
from zimgkit.export.lora.source import find_lora


@pytest.fixture(params=["z-image", "qwen-image"])
def family(request):
    return request.param


@pytest.fixture
def checkpoint(family, checkpoint_of):
    return checkpoint_of(family)


@pytest.fixture
def weights(checkpoint):
    return state(checkpoint)


def state(checkpoint, component="transformer"):
    (file,) = (checkpoint / component).glob("*.safetensors")
    return load_file(file)


def some(weights, *ends):
    return lora_files.modules(weights, ends)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class TestAlgebra:
    def test_fused_without_alpha_is_split_by_rows(self, checkpoint_of, tmp_path):
        """What diffusers does not split."""
        checkpoint = checkpoint_of("z-image")
        weights = state(checkpoint)
        expected, stored = {}, {}
        for index, name in enumerate(some(weights, "to_q")):
            block = name.removesuffix(".to_q")
            down, up = random(4, 48, seed=index), random(3 * 48, 4, seed=100 + index)
            stored[f"diffusion_model.{block}.qkv.lora_A.weight"] = down
            stored[f"diffusion_model.{block}.qkv.lora_B.weight"] = up
            for part, rows in zip("qkv", (up @ down).split(48), strict=True):
                key = f"{block}.to_{part}.weight"
                expected[key] = weights[key] + rows
        path = write(tmp_path / "lora.safetensors", stored)
        assert_near(merged_by(checkpoint, path), expected)

    def test_names_of_the_original_files(self, checkpoint_of, tmp_path):
        checkpoint = checkpoint_of("z-image")
        weights = state(checkpoint)
        ours = {"x_embedder": "all_x_embedder.2-1", "final_layer.linear": "all_final_layer.2-1.linear"}
        ours["layers.0.attention.out"] = "layers.0.attention.to_out.0"
        named = {theirs: weights[f"{own}.weight"] for theirs, own in ours.items()}
        found = lora_files.pairs(named)
        path = write(tmp_path / "lora.safetensors", lora_files.letters("diffusion_model.")(found))
        expected = {
            f"{own}.weight": named[theirs] + found[theirs][1] @ found[theirs][0] for theirs, own in ours.items()
        }
        assert_near(merged_by(checkpoint, path), expected)

    def test_base_model_prefix(self, checkpoint, weights, tmp_path):
        found = lora_files.pairs(some(weights, "to_q"))
        path = write(tmp_path / "lora.safetensors", lora_files.letters("base_model.model.")(found))
        expected = {f"{n}.weight": weights[f"{n}.weight"] + up @ down for n, (down, up) in found.items()}
        assert_near(merged_by(checkpoint, path), expected)

    @pytest.mark.parametrize("prefix", ["lycoris_", "lora_unet_", "diffusion_model."])
    def test_loha(self, checkpoint, weights, tmp_path, prefix):
        stored, expected = {}, {}
        for index, (name, value) in enumerate(some(weights, "to_q", "to_out.0").items()):
            rows, columns = value.shape
            b1, a1, b2, a2 = random(rows, 3), random(3, columns, seed=1), random(rows, 3, seed=2), random(3, columns)
            key = prefix + (name if prefix.endswith(".") else name.replace(".", "_"))
            stored |= {f"{key}.hada_w1_a": b1, f"{key}.hada_w1_b": a1, f"{key}.hada_w2_a": b2}
            stored |= {f"{key}.hada_w2_b": a2.clone(), f"{key}.alpha": torch.tensor(float(index))}
            expected[f"{name}.weight"] = value + index / 3 * (b1 @ a1) * (b2 @ a2)
        path = write(tmp_path / "lora.safetensors", stored)
        assert_near(merged_by(checkpoint, path), expected)

    @pytest.mark.parametrize("full", [(), ("w1",), ("w2",), ("w1", "w2")])
    def test_lokr(self, checkpoint, weights, tmp_path, full):
        stored, expected = {}, {}
        for name, value in some(weights, "to_k", "to_out.0").items():
            rows, columns = value.shape
            sizes = {"w1": (6, 4), "w2": (rows // 6, columns // 4)}
            sides = {}
            for seed, (part, (height, width)) in enumerate(sizes.items()):
                key = f"lycoris_{name.replace('.', '_')}.lokr_{part}"
                left, right = random(height, 2, seed=seed), random(2, width, seed=9 + seed)
                sides[part] = left @ right
                stored |= {key: sides[part]} if part in full else {f"{key}_a": left, f"{key}_b": right}
            stored[f"lycoris_{name.replace('.', '_')}.alpha"] = torch.tensor(5.0)
            factor = 1 if len(full) == 2 else 5 / 2
            expected[f"{name}.weight"] = value + factor * torch.kron(sides["w1"], sides["w2"])
        path = write(tmp_path / "lora.safetensors", stored)
        assert_near(merged_by(checkpoint, path), expected)

    @pytest.mark.parametrize("axis", [0, 1])
    @pytest.mark.parametrize("scale", [1.0, 0.4, -1.0])
    def test_dora_scale(self, checkpoint, weights, tmp_path, axis, scale, monkeypatch):
        from zimgkit.export.weights import stream as streaming

        monkeypatch.setattr(streaming, "MERGED_PIECE", 500)  # Several pieces for each tensor.
        chosen = some(weights, "to_q", "to_out.0")
        found = lora_files.pairs(chosen)
        stored = lora_files.kohya(found)
        expected = {}
        for index, (name, value) in enumerate(chosen.items()):
            shape = (len(value), 1) if axis == 0 else (1, value.shape[1])
            magnitude = random(*shape, seed=index).abs() + 0.5
            stored[f"lora_unet_{name.replace('.', '_')}.dora_scale"] = magnitude
            down, up = found[name]
            changed = value + lora_files.alpha_of(index) / 4 * up @ down
            dora = magnitude * changed / changed.norm(dim=1 - axis, keepdim=True)
            expected[f"{name}.weight"] = value + scale * (dora - value)
        path = write(tmp_path / "lora.safetensors", stored)
        assert_near(merged_by(checkpoint, f"{path}:{scale}"), expected)

    def test_kernels_of_one_pixel_are_matrices(self, checkpoint, weights, tmp_path):
        found = lora_files.pairs(some(weights, "to_q"))
        stored = {key: value[:, :, None, None] for key, value in lora_files.letters("")(found).items()}
        path = write(tmp_path / "lora.safetensors", stored)
        assert merged_by(checkpoint, path).keys() == {f"{name}.weight" for name in found}

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_widened_first(self, checkpoint, weights, tmp_path, dtype):
        found = {n: (d.to(dtype), u.to(dtype)) for n, (d, u) in lora_files.pairs(some(weights, "to_q")).items()}
        path = write(tmp_path / "lora.safetensors", lora_files.letters("")(found))
        expected = {f"{n}.weight": weights[f"{n}.weight"] + u.float() @ d.float() for n, (d, u) in found.items()}
        assert_near(merged_by(checkpoint, path), expected)

    @pytest.mark.parametrize("name", ["text_encoder.{}", "lora_te_{}", "lora_te1_{}", "base_model.model.model.{}"])
    def test_text_encoder(self, checkpoint_of, tmp_path, name):
        checkpoint = checkpoint_of("z-image")
        weights = state(checkpoint, "text_encoder")
        found = lora_files.pairs(some(weights, "0.self_attn.q_proj", "1.mlp.down_proj"))
        named = {
            name.format(key.replace(".", "_") if name.startswith("lora_te") else key): value
            for key, value in found.items()
        }
        path = write(tmp_path / "lora.safetensors", lora_files.letters("")(named))
        expected = {f"{n}.weight": weights[f"{n}.weight"] + up @ down for n, (down, up) in found.items()}
        assert_near(merged_by(checkpoint, path, component="text_encoder"), expected)


class TestSeveral:
    @pytest.fixture
    def files(self, weights, family, tmp_path):
        ends = (TARGETS[family], TARGETS[family][:3], TARGETS[family][1:5])
        found = [lora_files.pairs(some(weights, *own), seed=seed) for seed, own in enumerate(ends)]
        formats = (lora_files.kohya, lora_files.letters("transformer."), lora_files.letters("", ".default"))
        return [
            write(tmp_path / f"{index}.safetensors", make(own))
            for index, (make, own) in enumerate(zip(formats, found, strict=True))
        ]

    def test_any_order_gives_the_same_bits(self, checkpoint, files):
        arguments = [f"{files[0]}:0.7", f"{files[1]}:-1.3", f"{files[2]}", f"{files[1]}:0.2"]
        first, expected = merged_by(checkpoint, *arguments), found_by(checkpoint, *arguments)

        def sums(found):
            """Each tensor's addends, by their scales, in the order they are added up."""
            return {name: [addend.scale for addend in own] for name, own in found.addends["transformer"].items()}

        for order in itertools.permutations(arguments):
            found = found_by(checkpoint, *order)
            assert found.loras == expected.loras
            assert sums(found) == sums(expected)
        for order in (arguments[::-1], [*arguments[2:], *arguments[:2]]):
            merged = merged_by(checkpoint, *order)
            assert merged.keys() == first.keys()
            assert all(torch.equal(merged[name], value) for name, value in first.items())

    def test_their_changes_add_up(self, checkpoint, weights, files):
        together = merged_by(checkpoint, f"{files[0]}:0.5", f"{files[2]}:-2")
        one, two = merged_by(checkpoint, files[0]), merged_by(checkpoint, files[2])
        expected = {}
        for name in one.keys() | two.keys():
            base = weights[name]
            expected[name] = base + 0.5 * (one.get(name, base) - base) - 2 * (two.get(name, base) - base)
        assert_near(together, expected)

    def test_scale_zero_is_left_out(self, checkpoint, files):
        found, expected = merged_by(checkpoint, f"{files[0]}:0", files[1]), merged_by(checkpoint, files[1])
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        assert found_by(checkpoint, f"{files[0]}:0").loras == ()
        assert merged_by(checkpoint, f"{files[0]}:0.0", f"{files[2]}:-0") == {}

    def test_pieces_change_no_more_than_rounding(self, checkpoint, files, monkeypatch):
        from zimgkit.export.weights import stream as streaming

        whole = merged_by(checkpoint, *files)
        monkeypatch.setattr(streaming, "MERGED_PIECE", 100)
        assert_near(merged_by(checkpoint, *files), whole, 1e-6)


class TestBadInput:
    @pytest.fixture
    def good(self, weights, family):
        return lora_files.letters("transformer.")(lora_files.pairs(some(weights, *TARGETS[family])))

    def refused(self, checkpoint, tmp_path, stored, *messages, **options):
        path = write(tmp_path / "lora.safetensors", stored)
        with pytest.raises(LoraError) as caught:
            found_by(checkpoint, path, **options)
        for message in (str(path), *messages):
            assert message in str(caught.value), caught.value
        assert "\n" not in str(caught.value)

    def test_keys_that_match_nothing_name_the_nearest(self, checkpoint, good, tmp_path, family):
        layers = {"z-image": "layers.7.attention.to_q", "qwen-image": "transformer_blocks.7.attn.to_q"}[family]
        near = {"z-image": "layers.1.attention.to_q", "qwen-image": "transformer_blocks.1.attn.to_q"}[family]
        extra = {f"transformer.{layers}.lora_{letter}.weight": random(4, 4) for letter in "AB"}
        extra |= {f"transformer.{layers}x.lora_{letter}.weight": random(4, 4) for letter in "AB"}
        self.refused(checkpoint, tmp_path, good | extra, f"'transformer.{layers}' means no tensor", "(and 1 more)",
                     f"{near}.weight", "--allow-unmatched")  # fmt: skip
        found = found_by(checkpoint, tmp_path / "lora.safetensors", allow_unmatched=True)
        write(tmp_path / "good.safetensors", good)
        assert found.addends["transformer"].keys() == merged_by(checkpoint, tmp_path / "good.safetensors").keys()
        assert len(found.ignored) == 2

    def test_unknown_keys(self, checkpoint, good, tmp_path):
        odd = {"transformer.something.lora_C.weight": random(2, 2)}
        self.refused(
            checkpoint, tmp_path, good | odd, "'transformer.something.lora_C.weight' is no key that zimgkit knows"
        )
        assert found_by(checkpoint, tmp_path / "lora.safetensors", allow_unmatched=True).ignored

    @pytest.mark.parametrize("allow_unmatched", [False, True])
    def test_another_family(self, family, checkpoint_of, good, tmp_path, allow_unmatched):
        other = {"z-image": "qwen-image", "qwen-image": "z-image"}[family]
        options = {"allow_unmatched": allow_unmatched}
        self.refused(checkpoint_of(other), tmp_path, good, f"no LoRA for {other}", family, **options)

    def test_another_model(self, checkpoint, tmp_path):
        stored = {f"double_blocks.0.img_attn.qkv.lora_{letter}.weight": random(4, 4) for letter in "AB"}
        self.refused(checkpoint, tmp_path, stored, "FLUX")

    def test_wrong_shapes(self, checkpoint, good, tmp_path):
        key = next(key for key in good if "to_q.lora_B" in key)
        self.refused(checkpoint, tmp_path, good | {key: random(50, 4)}, "of shape (50, 48)", "another size")
        self.refused(checkpoint, tmp_path, good | {key: random(48, 5)}, "(48, 5) does not fit (4, 48)")
        self.refused(checkpoint, tmp_path, good | {key: random(48)}, "which is no matrix")
        self.refused(checkpoint, tmp_path, good | {key: random(48, 4, 3, 3)}, "which is no matrix")

    def test_a_half_is_missing(self, checkpoint, good, tmp_path):
        key = next(key for key in good if "lora_A" in key)
        del good[key]
        self.refused(checkpoint, tmp_path, good, "has up and no down")

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_numbers_that_are_none(self, checkpoint, good, tmp_path, value):
        key = list(good)[3]
        good[key][1, 1] = value
        self.refused(checkpoint, tmp_path, good, key, "NaN")

    def test_alpha_that_is_no_number(self, checkpoint, good, tmp_path):
        key = next(iter(good)).partition(".lora_")[0]
        self.refused(checkpoint, tmp_path, good | {f"{key}.alpha": random(3)}, "should be one number")

    def test_norms_that_fit_nothing(self, checkpoint, good, tmp_path):
        key = next(key for key in good if "to_q" in key).partition(".lora_")[0]
        self.refused(
            checkpoint, tmp_path, good | {f"{key}.dora_scale": random(7, 1)}, "fits no weight of shape (48, 48)"
        )

    def test_a_module_twice(self, checkpoint, good, tmp_path):
        key = next(key for key in good if "to_q.lora_A" in key)
        other = key.replace("transformer.", "diffusion_model.", 1)
        more = {other: good[key].clone(), other.replace("_A", "_B"): good[key.replace("_A", "_B")].clone()}
        self.refused(checkpoint, tmp_path, good | more, "are both for")

    def test_two_adapters(self, checkpoint, good, tmp_path):
        key = next(key for key in good if "lora_A" in key)
        more = {key.replace("lora_A", "lora_A.other"): good[key].clone()}
        self.refused(checkpoint, tmp_path, good | more, "has two down matrices")

    def test_no_lora_at_all(self, checkpoint, weights, tmp_path):
        self.refused(checkpoint, tmp_path, weights, "is no LoRA")
        self.refused(checkpoint, tmp_path, {}, "is no LoRA")

    def test_eight_bits(self, checkpoint, good, tmp_path):
        key = next(iter(good))
        self.refused(checkpoint, tmp_path, good | {key: good[key].to(torch.float8_e4m3fn)}, "float8")

    def test_broken_files(self, checkpoint, good, tmp_path):
        path = write(tmp_path / "lora.safetensors", good)
        data = path.read_bytes()
        for content in (b"", data[:100], data[:-3]):
            path.write_bytes(content)
            with pytest.raises(LoraError, match="cut short"):
                found_by(checkpoint, path)

    def test_a_peft_config_that_is_none(self, checkpoint, good, tmp_path):
        path = write(tmp_path / "adapter_model.safetensors", good)
        (tmp_path / "adapter_config.json").write_text("[1")
        with pytest.raises(LoraError, match=r"adapter_config\.json cannot be read"):
            found_by(checkpoint, path)

    def test_columns_of_what_was_one(self, checkpoint_of, tmp_path):
        stored = {f"layers.0.attention.qkv.lora_{letter}.weight": random(*shape)
                  for letter, shape in (("A", (4, 48)), ("B", (144, 4)))}  # fmt: skip
        stored["layers.0.attention.qkv.dora_scale"] = random(1, 48)
        self.refused(checkpoint_of("z-image"), tmp_path, stored, "q, k and v together")


class Boom:
    def __reduce__(self):
        return pytest.fail, ("it was unpickled",)


class TestSource:
    @pytest.fixture
    def file(self, tmp_path):
        save_file({"a": torch.zeros(1)}, tmp_path / "my:lora.safetensors")
        return tmp_path / "my:lora.safetensors"

    @pytest.mark.parametrize(("text", "scale"), [("", 1.0), (":0.8", 0.8), (":-1", -1.0), (":0", 0.0), (":1e-3", 1e-3)])
    def test_scale(self, file, text, scale):
        found = find_lora(f"{file}{text}")
        assert (found.path, found.scale, found.source) == (file, scale, str(file))

    @pytest.mark.parametrize("text", ["strong", "", "0,8", "0.8x", "nan", "inf", "-inf"])
    def test_scales_that_are_no_numbers(self, file, text):
        with pytest.raises(UsageError, match=f"the scale of .*{file.name} is"):
            find_lora(f"{file}:{text}")

    def test_folder(self, file):
        assert find_lora(f"{file.parent}:2").path == file
        shutil.copy(file, file.parent / "other.safetensors")
        with pytest.raises(LoraError, match="holds 2 safetensors files"):
            find_lora(str(file.parent))
        shutil.copy(file, file.parent / "pytorch_lora_weights.safetensors")
        assert find_lora(str(file.parent)).path.name == "pytorch_lora_weights.safetensors"

    def test_empty_folder(self, tmp_path):
        with pytest.raises(LoraError, match="no safetensors file"):
            find_lora(str(tmp_path))

    @pytest.mark.parametrize(
        "name", ["nowhere.safetensors", "/nowhere/at/all.safetensors", "", ":", "a/b", "a/../b.safetensors"]
    )
    def test_missing(self, name, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises((LoraError, UsageError)):
            find_lora(name)

    def test_hub(self, tmp_path, monkeypatch):
        from zimgkit.runtime import hub

        file = tmp_path / "sub" / "lora.safetensors"
        file.parent.mkdir()
        save_file({"a": torch.zeros(1)}, file)
        asked = []

        def fetch(model_id, *, revision, source, allow):
            asked.append((model_id, source, allow))
            return tmp_path

        monkeypatch.setattr(hub, "fetch", fetch)
        for name, scale in (("some/one/", ""), ("some/one:", ":0.5"), ("some/one/", ":2")):
            found = find_lora(f"{name}sub/lora.safetensors{scale}", "modelscope")
            assert (found.path, found.source) == (file, f"{name}sub/lora.safetensors")
            assert found.scale == float(scale[1:] or 1)
            assert asked.pop() == ("some/one", "modelscope", ["sub/lora.safetensors"])
        with pytest.raises(LoraError, match="has no file"):
            find_lora("some/one/other.safetensors")

    @pytest.mark.parametrize("suffix", ["pt", "bin", "ckpt", "pth"])
    def test_a_pickle_by_its_name(self, tmp_path, suffix):
        path = tmp_path / f"lora.{suffix}"
        path.write_bytes(pickle.dumps(Boom()))
        for argument in (
            str(path),
            f"{path}:0.5",
            str(tmp_path),
            f"owner/name/lora.{suffix}",
            f"owner/name:lora.{suffix}",
        ):
            with pytest.raises(LoraError, match="is a pickle, which zimgkit never opens"):
                find_lora(argument)

    @pytest.mark.parametrize("zipped", [False, True])
    def test_a_pickle_by_its_content(self, checkpoint_of, tmp_path, zipped):
        path = tmp_path / "lora.safetensors"
        if zipped:
            torch.save({"a": Boom()}, path)
        else:
            path.write_bytes(pickle.dumps([Boom(), "x" * 1000], protocol=4))
        with pytest.raises(LoraError, match="looks like a pickle"):
            found_by(checkpoint_of("z-image"), path)


def test_what_a_trainer_of_ours_writes(checkpoint_of, tmp_path):
    from zimgkit.training.lora import write_lora

    checkpoint = checkpoint_of("qwen-image")
    weights = state(checkpoint)
    found = lora_files.pairs(some(weights, "img_mod.1", "to_q"))
    named = {
        f"transformer.{n}.lora_{letter}": value
        for n, two in found.items()
        for letter, value in zip("AB", two, strict=True)
    }
    write_lora(tmp_path / "lora.safetensors", named, "float32")
    expected = {f"{n}.weight": weights[f"{n}.weight"] + up @ down for n, (down, up) in found.items()}
    assert_near(merged_by(checkpoint, tmp_path / "lora.safetensors"), expected)


@pytest.mark.parametrize("scale", ["", ":0.5"])
@pytest.mark.parametrize(
    ("url", "asked", "source"),
    [
        ("https://huggingface.co/o/n/blob/main/sub/x.safetensors", (None, "huggingface"), "o/n/sub/x.safetensors"),
        ("https://huggingface.co/o/n/resolve/v1/sub/x.safetensors?download=true", ("v1", "huggingface"),
         "https://huggingface.co/o/n/resolve/v1/sub/x.safetensors"),
        ("https://modelscope.cn/models/o/n/resolve/master/sub/x.safetensors", (None, "modelscope"),
         "https://modelscope.cn/models/o/n/resolve/master/sub/x.safetensors"),
    ],
)  # fmt: skip
def test_a_lora_by_its_address(tmp_path, monkeypatch, url, asked, source, scale):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "x.safetensors").touch()
    calls = []

    def fetch(model, *, revision, source, allow):
        calls.append((model, revision, source, *allow))
        return tmp_path

    monkeypatch.setattr("zimgkit.runtime.hub.fetch", fetch)
    for argument in (url, source):  # The recorded source is found again.
        found = find_lora(f"{argument}{scale}")
        assert (found.path, found.source, found.scale) == (
            tmp_path / "sub/x.safetensors",
            source,
            float(scale[1:] or 1),
        )
    assert calls == [("o/n", *asked, "sub/x.safetensors")] * 2
    with pytest.raises(LoraError, match=r"on a hub a LoRA is a .safetensors file"):
        find_lora(f"https://huggingface.co/o/n{scale}")
    with pytest.raises(UsageError, match="is no address of a model; give"):
        find_lora(f"https://civitai.com/api/download/models/1{scale}")
