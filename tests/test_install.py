"""zimgkit as a user installs it: from its wheel and its source distribution, into empty environments, each extra alone.

pip installs from the index it is set up for, under the constraints of the development environment.
"""

from __future__ import annotations

import configparser
import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import click
import httpx
import pytest
from filelock import FileLock
from PIL import Image

from tests.runtime.loopback_hub import LoopbackHub
from zimgkit.engines.bundle import Bundle
from zimgkit.engines.errors import install
from zimgkit.export.cli.main import cli as export_cli
from zimgkit.runtime import demo_models
from zimgkit.runtime.commands.cli import cli as run_cli
from zimgkit.training.cli import cli as training_cli
from zimgkit.training.world.__main__ import cli as world_cli

ROOT = Path(__file__).parent.parent
PACKAGES = ("engines", "export", "plugins", "runtime", "training")
EXTRAS: dict[str, list[str]] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
GIGABYTES = ("tensorrt", "onnxruntime-ep-nv-tensorrt-rtx")
"""Requirements that are not installed: they bring CUDA. The compiler that the other tests use stands in for both."""
COMMANDS = {
    ("zimg-run",): run_cli,
    ("zimg-export",): export_cli,
    ("python", "-m", "zimgkit.training"): training_cli,
    ("python", "-m", "zimgkit.training.world"): world_cli,
}
NOT_RUN = {
    'eval "$(_ZIMG_RUN_COMPLETE=bash_source zimg-run)"': "for a shell; tests/runtime/commands/test_completion.py does",
    'eval "$(_ZIMG_RUN_COMPLETE=zsh_source zimg-run)"': "for a shell that is not here",
    "_ZIMG_RUN_COMPLETE=fish_source zimg-run | source": "likewise",
    "make demo": "sets up an environment as the lines above it do",
    "make test": "runs this test",
    'zimg-run generate --bundle z-image-turbo --prompt "…" --backend torch': "test_torch_and_train draws less",
    "pip install '.[openvino]'": "test_openvino does",
    "pip install '.[tensorrt]'": "gigabytes of CUDA; test_tensorrt_and_tensorrt_rtx installs the rest",
    "pip install '.[serve]'": "test_serve does",
    "zimg-run serve --bundle z-image-turbo": "it goes on until it is told to end; test_serve ends it",
    "zimg-export compile z-image-turbo --size 1024x1024 --size 832x1216": "likewise; it compiles a smaller size",
    "zimg-run preprocess canny photo.png edges.png": "test_control does",
    "zimg-export i2l Z-Image one.png two.png --out style.safetensors": "gigabytes; tests/export/i2l makes some",
    'zimg-run generate "…" --bundle owner/name': "test_modelscope_and_hub fetches one",
    "zimg-run generate --bundle z-image-turbo --backend tensorrt"
    ' --prompt "a red fox in fresh snow, early light"': "needs a GPU",
}
"""Lines of the README that the test of it does not type, and why."""


@dataclass(frozen=True)
class Environment:
    """An environment without pip, into which this environment's pip installs."""

    folder: Path

    def install(self, *requirements: str) -> None:
        self.run("pip", "install", *requirements)

    def run(self, *command: str, cwd: Path = ROOT.parent, **variables: str) -> subprocess.CompletedProcess[str]:
        """Type a command in it, which has to succeed."""
        done = self.attempt(*command, cwd=cwd, **variables)
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
        return done

    def attempt(self, *command: str, cwd: Path = ROOT.parent, **variables: str) -> subprocess.CompletedProcess[str]:
        """Type a command in it."""
        python = str(self.folder / "bin" / "python")
        name, *arguments = command
        if name == "pip":
            action, *arguments = arguments
            how = ("--quiet", "--no-compile", "--constraint", str(ROOT / "constraints-dev.txt"))
            whole = [sys.executable, "-m", "pip", "--python", python, action, *how, *arguments]
        else:
            whole = [str(self.folder / "bin" / name), *arguments]
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
        path = f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        return subprocess.run(
            whole, cwd=cwd, env=kept | {"PATH": path} | variables, capture_output=True, text=True, check=False
        )

    def start(self, name: str, *arguments: str, cwd: Path) -> subprocess.Popen[str]:
        """Start a command in it that goes on."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
        whole = [str(self.folder / "bin" / name), *arguments]
        return subprocess.Popen(whole, cwd=cwd, env=kept, stderr=subprocess.PIPE, text=True)

    def refuses(self, *command: str, cwd: Path, says: str, **variables: str) -> None:
        """Type a command that ends in one line with ``says`` in it."""
        done = self.attempt(*command, cwd=cwd, **variables)
        assert done.returncode == 1, done
        assert says in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[Environment]:
    """An empty one. Several hundred megabytes may go into it, so it does not outlive the test."""
    folder = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    yield Environment(folder)
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def distributions(shared_folder: Path) -> Path:
    """A folder with the wheel, the source distribution, that unpacked, and the wheel built from it."""
    folder = shared_folder / "distributions"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            part = folder.with_suffix(".part")
            _hatchling(ROOT, part)
            with tarfile.open(next(part.glob("*.tar.gz"))) as archive:
                archive.extractall(part, filter="data")
            _hatchling(next(path for path in part.iterdir() if path.is_dir()), part / "again", "--target", "wheel")
            part.rename(folder)
    return folder


def _hatchling(source: Path, out: Path, *options: str) -> None:
    command = [sys.executable, "-m", "hatchling", "build", *options, "--directory", str(out)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def wheel(distributions: Path) -> Path:
    return next(distributions.glob("*.whl"))


@pytest.fixture
def clone(distributions: Path, tmp_path: Path) -> Path:
    """The unpacked source distribution, which has all that a clone has but git's own files and the links."""
    (source,) = distributions.glob("zimgkit-*/")
    return shutil.copytree(source, tmp_path / "zimgkit")


class TestDistributions:
    def test_the_wheel_holds_the_packages_and_nothing_else(self, wheel: Path) -> None:
        with zipfile.ZipFile(wheel) as archive:
            assert not any(stat.S_ISLNK(entry.external_attr >> 16) for entry in archive.infolist())
            found = {name: archive.read(name) for name in archive.namelist()}
        files = [path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file()]
        own = {f"zimgkit/{file.relative_to(ROOT)}": file for file in files if "__pycache__" not in file.parts}
        own |= {f"zimgkit/{file.name}": file for file in (ROOT / "src/zimgkit").iterdir() if file.is_file()}
        assert {name for name in found if ".dist-info/" not in name} == set(own)
        assert all(found[name] == file.read_bytes() for name, file in own.items())
        for name in demo_models.ALL:
            assert f"zimgkit/runtime/demo_models/{name}/bundle.json" in found
        (info,) = {name.split("/")[0] for name in found} - {"zimgkit"}
        assert found[f"{info}/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()
        entry_points = configparser.ConfigParser()
        entry_points.read_string(found[f"{info}/entry_points.txt"].decode())
        assert {group: list(entry_points[group]) for group in entry_points.sections()} == {
            "console_scripts": ["zimg-export", "zimg-run"],
            "zimgkit.judges": ["demo"],
        }

    def test_the_source_distribution_builds_the_same_wheel(self, distributions: Path, wheel: Path) -> None:
        assert (distributions / "again" / wheel.name).read_bytes() == wheel.read_bytes()


def test_whoever_is_told_to_install_something_can() -> None:
    """Every extra that an error or a page names exists, and none says to install zimgkit from the package index."""
    files = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    for folder in (*PACKAGES, "docs", "benchmarks"):
        files += [file for file in (ROOT / folder).rglob("*") if file.suffix in (".py", ".md")]
    named: set[str] = set()
    for file in files:
        text = file.read_text()
        assert not re.search(r"pip install '?zimg", text), file
        named.update(re.findall(r"""pip install [^`\n]*'\.\[([a-z-]+)\]'|install\("([a-z-]+)"\)""", text))
    named = {name for pair in named for name in pair if name}
    assert {"export", "openvino", "tensorrt", "tensorrt-rtx", "torch", "modelscope", "train"} <= named <= set(EXTRAS)


def commands() -> Iterator[tuple[str, ...]]:
    """Every command and subcommand."""
    for words, command in COMMANDS.items():
        yield words
        if isinstance(command, click.Group):
            yield from ((*words, name) for name in command.commands)


def test_base(environment: Environment, wheel: Path, tmp_path: Path) -> None:
    """A picture, every command's help, and for each extra what is said where it is missing."""
    environment.install(str(wheel))
    environment.run("zimg-run", "generate", "--prompt", "a red circle", "--num-inference-steps", "2", cwd=tmp_path)
    assert Image.open(tmp_path / "out.png").size == (128, 128)
    assert "zimg-tiny-qwen" in environment.run("zimg-run", "inspect", "zimg-tiny-qwen").stdout
    for words in commands():
        shown = environment.run(*words, "--help").stdout
        assert shown.startswith("Usage: ") and "--help" in shown, words
    assert environment.attempt("python", "-c", "import torch").returncode == 1

    lacking = {
        "openvino": "zimg-run generate --backend openvino --prompt a",
        "torch": "zimg-run generate --backend torch --prompt a",
        "tensorrt": "zimg-run generate --backend tensorrt --bundle bundle --prompt a",
        "tensorrt-rtx": "zimg-export compile bundle --backend tensorrt-rtx",
        "export": "zimg-export build --model a --out b",
        "lora": "zimg-export swap-lora bundle",
        "control": "zimg-run preprocess canny out.png edges.png",
        "modelscope": "zimg-export inspect a/b/style.safetensors --source modelscope",
        "serve": "zimg-run serve",
        "train": "python -m zimgkit.training lora zimg-tiny-z data style.safetensors",
    }
    # For tests, for Ray's own command, for `make plugins`; tokenizers bring the hub's client.
    others = {"browser", "dev", "ray", "kernels", "hub"}
    assert set(lacking) == set(EXTRAS) - others, "a new extra needs a line here and a test below"
    shutil.copytree(demo_models.locate("zimg-tiny-z"), tmp_path / "bundle")
    for extra, line in lacking.items():
        environment.refuses(*shlex.split(line), cwd=tmp_path, says=install(extra))


def test_torch_and_train(environment: Environment, wheel: Path, tmp_path: Path) -> None:
    """Train has all that torch has, so it may come after it."""
    environment.install(f"{wheel}[torch]")
    draw = ("generate", "--backend", "torch", "--prompt", "a red circle", "--num-inference-steps", "2")
    environment.run("zimg-run", *draw, cwd=tmp_path)
    assert (tmp_path / "out.png").exists()
    environment.refuses("zimg-export", "build", "--model", "a", "--out", "b", cwd=tmp_path, says=install("export"))
    environment.install(f"{wheel}[train]")
    environment.run("python", "-m", "zimgkit.training.world", "data", "--count", "2", cwd=tmp_path)
    lora = ("lora", "zimg-tiny-z", "data", "style.safetensors", "--steps", "1")
    environment.run("python", "-m", "zimgkit.training", *lora, cwd=tmp_path)
    assert (tmp_path / "style.safetensors").exists()


def test_lora(environment: Environment, wheel: Path, tmp_path: Path) -> None:
    """A LoRA is swapped in, and draws, without PyTorch."""
    environment.install(f"{wheel}[lora]")
    lora = ("zimg-tiny-qwen", "--lora", "zimg-tiny-qwen-4steps", "--out", "fast")
    environment.run("zimg-export", "swap-lora", *lora, cwd=tmp_path)
    drawn = environment.run("zimg-run", "generate", "a red circle", "--bundle", "fast", "--json", cwd=tmp_path)
    assert json.loads(drawn.stdout)["parameters"]["num_inference_steps"] == 4
    assert environment.attempt("python", "-c", "import torch").returncode == 1
    environment.refuses("zimg-export", "build", "--model", "a", "--out", "b", cwd=tmp_path, says=install("export"))


def test_control(environment: Environment, wheel: Path, tmp_path: Path) -> None:
    """Edges of a picture."""
    environment.install(f"{wheel}[control]")
    Image.new("RGB", (64, 48)).save(tmp_path / "photo.png")
    environment.run("zimg-run", "preprocess", "canny", "photo.png", "edges.png", cwd=tmp_path)
    assert Image.open(tmp_path / "edges.png").size == (64, 48)


def test_openvino(environment: Environment, wheel: Path, tmp_path: Path) -> None:
    """Installed alone it draws, and is not taken unasked where it would not help: for a model so small."""
    environment.install(f"{wheel}[openvino]")
    draw = ("generate", "--prompt", "a red circle", "--num-inference-steps", "2", "--json")
    for options, name in (((), "onnxruntime"), (("--backend", "openvino"), "openvino")):
        drawn = json.loads(environment.run("zimg-run", *draw, *options, cwd=tmp_path, HOME=str(tmp_path)).stdout)
        assert drawn["backend"]["name"] == name
    assert not (tmp_path / "intel").exists()


def test_tensorrt_and_tensorrt_rtx(environment: Environment, wheel: Path, tmp_path: Path) -> None:
    """What is installed of tensorrt-rtx here is a part of tensorrt's, so that one comes first.

    Neither extra is whole: what brings CUDA stays out. Where this environment has the compiler, it stands in, and
    an engine is compiled; to run one takes a GPU, but all that a run imports is there.
    """
    found = find_spec("tensorrt_rtx")
    compiler = str(Path(found.origin).parents[1]) if found and found.origin else ""
    shutil.copytree(demo_models.locate("zimg-tiny-z"), tmp_path / "bundle")
    for backend, missing in (("tensorrt-rtx", "the TensorRT for RTX plugin"), ("tensorrt", "TensorRT")):
        light = [name for name in EXTRAS[backend] if re.split("[><=]", name)[0] not in GIGABYTES]
        assert len(light) == len(EXTRAS[backend]) - 1
        environment.install(str(wheel), *light)
        compile_it = ("zimg-export", "compile", "bundle", "--backend", backend, "--size", "128x128")
        environment.refuses(*compile_it, cwd=tmp_path, says=f"{missing} ")
        environment.refuses(*compile_it, cwd=tmp_path, says=install(backend))
        if not compiler:
            continue
        compiled = environment.attempt(*compile_it, cwd=tmp_path, PYTHONPATH=compiler)
        if backend == "tensorrt":
            assert "denoiser" in compiled.stdout, compiled.stderr
        draw = ("generate", "--bundle", "bundle", "--backend", backend, "--prompt", "a")
        drawn = environment.attempt("zimg-run", *draw, cwd=tmp_path, PYTHONPATH=compiler)
        assert "pip install" not in compiled.stderr + drawn.stderr


def test_modelscope_and_hub(environment: Environment, wheel: Path, tmp_path: Path) -> None:
    """A LoRA is fetched and described without the export extra, and so is a bundle."""
    environment.install(f"{wheel}[modelscope]")
    lora = demo_models.locate_lora("zimg-tiny-z-bolt")
    with LoopbackHub() as hub:
        hub.add("a/b", {"style.safetensors": lora.read_bytes()})
        where = {"MODELSCOPE_ENDPOINT": hub.url, "NO_PROXY": "*", "HOME": str(tmp_path)}
        where |= {"MODELSCOPE_CACHE": str(tmp_path / "hub"), "MODELSCOPE_HOME": str(tmp_path / "home")}
        inspect = ("zimg-export", "inspect", "a/b/style.safetensors", "--source", "modelscope")
        assert "z-image" in environment.run(*inspect, cwd=tmp_path, **where).stdout
        environment.install(f"{wheel}[hub]")
        root = demo_models.locate("zimg-tiny-z")
        bundle = Bundle.open(root)
        names = ("bundle.json", *bundle.manifest.files)
        hub.add("a/bundle", {name: (root / name).read_bytes() for name in names})
        where = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "*", "HOME": str(tmp_path)}
        where |= {"HF_HUB_OFFLINE": "0"}
        assert "z-image" in environment.run("zimg-run", "inspect", "a/bundle", cwd=tmp_path, **where).stdout


def test_serve(environment: Environment, wheel: Path, tmp_path: Path) -> None:
    """Installed alone, it answers, draws, and ends when it is told to."""
    environment.install(f"{wheel}[serve]")
    (here := tmp_path / "here").mkdir()
    with environment.start("zimg-run", "serve", "--port", "0", cwd=here) as process:
        assert process.stderr
        address = next(found[1] for line in process.stderr if (found := re.search(r"ready: (http://[^\s/]+)", line)))
        body = {"prompt": "a red circle", "num_inference_steps": 2}
        answer = httpx.post(f"{address}/v1/images/generations", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        process.terminate()
        assert process.wait(60) == 0
    assert not list(here.iterdir())


def test_the_readme(environment: Environment, clone: Path) -> None:
    """Its lines as they stand, one after another, in a clone and an empty environment; small models stand in.

    A folder with a model's name is taken for that model, so nothing is fetched. The lines up to the first picture
    meet an environment without extras, those below ``pip install '.[export]'`` one with that alone.
    """
    pieces = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    lines = [line for kind, text in pieces if not kind for line in text.splitlines() if line]
    typed = [shlex.split(line, comments=True) for line in lines]
    assert [shlex.split(line) for line in NOT_RUN if shlex.split(line) not in typed] == []
    assert typed[0] == ["pip", "install", "."]
    _stand_ins(clone)
    for words in typed:
        if words not in [shlex.split(line) for line in NOT_RUN]:
            environment.run(*words, cwd=clone)
    (example,) = (text for kind, text in pieces if kind == "python")
    (clone / "fox.png").unlink()
    environment.run("python", "-c", example, cwd=clone)
    assert Image.open(clone / "fox.png").size == (1024, 768)
    assert {kind for kind, _ in pieces} == {"", "python"}


def _stand_ins(folder: Path) -> None:
    """Under the names that the README uses: checkpoints, a bundle, LoRAs and prompts."""
    for name, model in (("Z-Image-Turbo", "zimg-tiny-z"), ("z-image", "zimg-tiny-z"), ("Qwen-Image", "zimg-tiny-qwen")):
        shutil.copytree(demo_models.locate(model), folder / name)
    for name, lora in (("style", "zimg-tiny-z-outlined"), ("other", "zimg-tiny-z-bolt")):
        shutil.copy(demo_models.locate_lora(lora), folder / f"{name}.safetensors")
    (folder / "prompts.txt").write_text("a red circle\n")
