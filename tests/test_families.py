"""A family is named in its own files, in the two tables and in the tests: a new one changes no other code."""

from __future__ import annotations

import re
import tomllib
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from zimgkit.export.networks import registry
from zimgkit.runtime import families

ROOT = Path(__file__).parent.parent
ROOMS = ("engines", "export", "runtime", "plugins", "training", "benchmarks", "src")

OWN_FILES = (
    "runtime/families/{module}*.py",
    "export/networks/{module}*.py",
    "export/quantization/recipes/{name}.toml",
    "training/families/{module}*.py",
    "benchmarks/families/{module}.py",
)
TABLES = ("runtime/families/__init__.py", "export/networks/registry.py")
ABOUT_THE_PACKAGE = ("src/zimgkit/__init__.py",)

CITATION = re.compile(r"``(?:\w+Pipeline|\w+Transformer2DModel|AutoencoderKL\w+)(?:\.\w+)*``")
"""A class of diffusers, as docstrings cite it."""


def spelled(name: str) -> re.Pattern[str]:
    """All spellings of a family: its words in any case, one sign or none between them, where a word begins."""
    words = "[-_ .]?".join(map(re.escape, name.split("-")))
    return re.compile(f"(?<![a-z])(?i:{words})")


SPELLINGS = {name: spelled(name) for name in registry.FAMILIES}


def named(text: str) -> list[tuple[int, str]]:
    """Where a text names a family, citations of diffusers' classes aside: numbers of lines, and the lines."""
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        rest = CITATION.sub("", line)
        if any(spelling.search(rest) for spelling in SPELLINGS.values()):
            found.append((number, line.strip()))
    return found


def allowed() -> tuple[str, ...]:
    own = (file.format(name=name, module=name.replace("-", "_")) for name in registry.FAMILIES for file in OWN_FILES)
    return (*own, *TABLES, *ABOUT_THE_PACKAGE)


def sources() -> list[Path]:
    """The source files of all rooms, and nothing twice: ``src`` links to the others."""
    files = [path for room in ROOMS for end in ("py", "toml") for path in (ROOT / room).glob(f"**/*.{end}")]
    return sorted({path.resolve().relative_to(ROOT.resolve()) for path in files})


def test_a_family_is_named_in_its_own_files_alone() -> None:
    files = sources()
    assert len(files) > 150
    for path in (
        "engines/base.py",
        "export/build.py",
        "runtime/session.py",
        "training/lora.py",
        "benchmarks/common.py",
    ):
        assert Path(path) in files
    elsewhere = [
        f"{path}:{number}: {line}"
        for path in files
        if not any(fnmatchcase(path.as_posix(), pattern) for pattern in allowed())
        for number, line in named((ROOT / path).read_text("utf-8"))
    ]
    assert not elsewhere, "\n".join(["a family is named where its concept should be:", *elsewhere])


def test_the_project_names_families_in_its_description_alone() -> None:
    lines = (ROOT / "pyproject.toml").read_text("utf-8").splitlines()
    numbers = [number for number, _ in named("\n".join(lines))]
    assert {lines[number - 1].partition(" ")[0] for number in numbers} <= {"description", "keywords"}
    project = tomllib.loads("\n".join(lines))["project"]
    assert all(spelling.search(project["description"]) for spelling in SPELLINGS.values())


@pytest.mark.parametrize("name", registry.FAMILIES)
def test_a_family_has_its_files(name: str) -> None:
    for file in OWN_FILES:
        assert list(ROOT.glob(file.format(name=name, module=name.replace("-", "_")))), file
    assert name == families.family(name).NAME


def test_the_tables_have_the_same_families() -> None:
    assert list(registry.FAMILIES) == list(families.FAMILIES)


@pytest.mark.parametrize(
    "line",
    [
        'if family == "z-image":',
        "def _qwen_image(config):",
        "class ZImageBlock:",
        "# Qwen-Image's modulation",
        "Tongyi-MAI/Z-Image-Turbo",
        "from zimgkit.runtime.families.qwen_image import QwenImage",
        "as Z Image has it",
        "QWENIMAGE = 1",
        "kind = diffusers.QwenImagePipeline",
        "as ``QwenImage`` has it",
    ],
)
def test_every_spelling_is_found(line: str) -> None:
    assert named(f"fine\n{line}\n") == [(2, line)]


@pytest.mark.parametrize(
    "line",
    [
        "Combine as diffusers' ``QwenImagePipeline`` does.",
        "``ZImagePipeline._encode_prompt`` and ``QwenImageTransformer2DModel``",
        "``AutoencoderKLQwenImage`` has means.",
        'Pipeline.open("zimg-tiny-z")',
        "from transformers import Qwen3Model",
        "quiz images, zimg images",
    ],
)
def test_citations_and_other_words_are_let_through(line: str) -> None:
    assert named(line) == []
