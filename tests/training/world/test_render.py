"""``python -m zimgkit.training.world``: dataset folders."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from PIL import Image

from tests.commands import invoke
from zimgkit.engines.errors import OutputError
from zimgkit.training.world.__main__ import main
from zimgkit.training.world.captions import caption
from zimgkit.training.world.drawing import draw
from zimgkit.training.world.render import write_dataset
from zimgkit.training.world.sampling import sample


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metadata.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_a_dataset(tmp_path: Path) -> None:
    folder = tmp_path / "world"
    result = invoke(main, folder, "--count", 30, "--seed", 3, "--split", "test")
    assert (result.code, result.err) == (0, "")
    assert result.out == f"{folder}  30 pictures\n"
    table = rows(folder)
    assert list(table[0]) == ["image", "prompt"]
    assert len(table) == 30 == len(list((folder / "images").iterdir()))
    assert sorted(path.name for path in folder.iterdir()) == ["images", "metadata.csv"]
    for index, row in enumerate(table):
        scene = sample((3 << 32) + index, "test")
        assert row["prompt"] == caption(scene)
        with Image.open(folder / row["image"]) as image:
            assert image.tobytes() == draw(scene).tobytes()
    assert any(not row["prompt"].isascii() for row in table)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["world"]


def test_more_of_a_seed_begin_alike_and_seeds_differ(tmp_path: Path) -> None:
    for name, count, seed in (("few", 5, 0), ("many", 9, 0), ("other", 9, 1)):
        write_dataset(tmp_path / name, count, seed=seed)
    assert rows(tmp_path / "many")[:5] == rows(tmp_path / "few")
    assert not {row["prompt"] for row in rows(tmp_path / "many")} & {row["prompt"] for row in rows(tmp_path / "other")}


def test_progress_and_size(tmp_path: Path) -> None:
    reports: list[tuple[str, int, int]] = []
    write_dataset(tmp_path / "w", 3, size=(160, 144), report=lambda *report: reports.append(report))
    assert reports == [("drawing", done, 3) for done in (1, 2, 3)]
    for row in rows(tmp_path / "w"):
        with Image.open(tmp_path / "w" / row["image"]) as image:
            assert image.size == (160, 144)


def test_an_interrupted_command_leaves_nothing(tmp_path: Path) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path / "w", 5, report=stop)
    assert list(tmp_path.iterdir()) == []


def test_folders_that_exist(tmp_path: Path) -> None:
    folder = tmp_path / "w"
    write_dataset(folder, 2)
    with pytest.raises(OutputError, match="exists already"):
        write_dataset(folder, 1)
    assert len(rows(folder)) == 2
    invoke(main, folder, "--count", 1).assert_refused("exists already", 1)
    assert invoke(main, folder, "--count", 1, "--overwrite", "--quiet").code == 0
    assert len(rows(folder)) == 1
    other = tmp_path / "other"
    other.mkdir()
    (other / "file").touch()
    invoke(main, other, "--count", 1, "--overwrite").assert_refused("has no metadata.csv", 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing option '--count'"),
        (["--count", 0], "'--count'"),
        (["--count", 1, "--seed", -1], "'--seed'"),
        (["--count", 1, "--split", "all"], "'--split'"),
        (["--count", 1, "--size", 100, 128], "'--size'"),
        (["--count", 1, "--size", 128, 130], "multiples of 16 from 128"),
    ],
    ids=str,
)
def test_bad_arguments(tmp_path: Path, arguments: list[object], message: str) -> None:
    invoke(main, tmp_path / "w", *arguments).assert_refused(message, 2)
    assert list(tmp_path.iterdir()) == []


def test_datasets_for_adapters(tmp_path: Path) -> None:
    """The same scenes, drawn as outlines; and scenes with the concept, which captions name in both languages."""
    write_dataset(tmp_path / "plain", 20)
    write_dataset(tmp_path / "outlined", 20, outlined=True)
    result = invoke(main, tmp_path / "concept", "--count", 20, "--concept")
    assert result.code == 0
    plain, outlined, concept = (rows(tmp_path / name) for name in ("plain", "outlined", "concept"))
    assert [row["prompt"] for row in plain] == [row["prompt"] for row in outlined]
    assert (tmp_path / "plain" / "images" / "000003.png").read_bytes() != (
        tmp_path / "outlined" / "images" / "000003.png"
    ).read_bytes()
    assert all("bolt" in row["prompt"] or "闪电" in row["prompt"] for row in concept[::2])
    assert [row["prompt"] for row in concept[1::2]] == [row["prompt"] for row in plain[1::2]]
    assert not any("bolt" in row["prompt"] or "闪电" in row["prompt"] for row in plain)
