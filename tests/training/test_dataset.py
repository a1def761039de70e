from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.training import toy
from zimgkit.training.dataset import DatasetError, draw_batch, load_pictures, read_dataset


def test_rows_are_read(tmp_path: Path) -> None:
    dataset = read_dataset(toy.dataset(tmp_path, [(32, 48), (64, 32)]))
    assert len(dataset.rows) == 6
    assert dataset.rows[0].prompt == "一个red的square"
    assert dataset.rows[1].prompt == "a green circle, large"
    assert [row.size for row in dataset.rows[:2]] == [(32, 48), (64, 32)]
    assert {size: rows.tolist() for size, rows in dataset.buckets().items()} == {
        (32, 48): [0, 2, 4],
        (64, 32): [1, 3, 5],
    }


def test_more_columns_in_any_order_and_empty_lines(tmp_path: Path) -> None:
    toy.dataset(tmp_path)
    (tmp_path / "metadata.csv").write_text("prompt,seed,image\n\na circle,7, 1.png \n", encoding="utf-8-sig")
    assert [(row.image.name, row.prompt) for row in read_dataset(tmp_path).rows] == [("1.png", "a circle")]


def test_pictures_are_scaled(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 32, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    loaded = load_pictures([tmp_path / "a.png"])
    np.testing.assert_allclose(loaded[0].permute(1, 2, 0).numpy(), pixels / 127.5 - 1, atol=1e-6)


def test_batches_are_of_one_size_and_every_row_is_drawn(tmp_path: Path) -> None:
    buckets = read_dataset(toy.dataset(tmp_path, [(32, 32), (32, 48), (32, 32)])).buckets()
    generator = torch.Generator().manual_seed(0)
    drawn = {size: [] for size in buckets}
    for _ in range(300):
        size, rows = draw_batch(buckets, 2, generator)
        drawn[size] += rows.tolist()
    assert {size: set(rows) for size, rows in drawn.items()} == {s: set(rows.tolist()) for s, rows in buckets.items()}
    # Every row as often as every other, whatever its size.
    assert 0.57 < len(drawn[(32, 32)]) / 600 < 0.77


BAD = {
    "no columns": ("", "has the columns none"),
    "other columns": ("file,text\n0.png,x\n", "has the columns file,text; name them image,prompt"),
    "no rows": ("image,prompt\n", "has no rows"),
    "too many fields": (
        "image,prompt\n0.png,a circle\n1.png,red, large\n",
        "line 3: broken row, 3 fields instead of 2",
    ),
    "too few fields": ("image,prompt\n0.png\n", "line 2: broken row, 1 fields"),
    "an open quote": ('image,prompt\n0.png,"a circle\n', "line 2: broken row"),
    "an empty caption": ("image,prompt\n0.png,a\n1.png,  \n", "line 3: the caption of 1.png is empty"),
    "no image": ("image,prompt\n9.png,a circle\n", "9.png is missing; add the picture"),
    "no name": ("image,prompt\n,a circle\n", "line 2: '' is no picture"),
    "a way out": ("image,prompt\n../0.png,a circle\n", "'../0.png' is no picture in the dataset's folder"),
    "an absolute path": ("image,prompt\n/etc/0.png,a circle\n", "is no picture in the dataset's folder"),
    "not a picture": ("image,prompt\nmetadata.csv,a circle\n", "is no picture that can be read"),
    "a wrong size": (
        "image,prompt\nodd.png,a circle\n",
        "odd.png is 40x32; both sides must be multiples of 16: crop it to 32x32",
    ),
}


@pytest.mark.parametrize(("text", "message"), BAD.values(), ids=BAD.keys())
def test_bad_datasets_are_named(tmp_path: Path, text: str, message: str) -> None:
    toy.dataset(tmp_path)
    Image.new("RGB", (40, 32)).save(tmp_path / "odd.png")
    (tmp_path / "metadata.csv").write_text(text, encoding="utf-8")
    with pytest.raises(DatasetError) as error:
        read_dataset(tmp_path)
    assert message in str(error.value)
    assert "metadata.csv" in str(error.value)


def test_no_metadata(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"metadata.csv is missing; a dataset is a folder with one \(image,prompt\)"):
        read_dataset(tmp_path)
    (tmp_path / "metadata.csv").write_bytes(b"image,prompt\n\xff\xfe\n")
    with pytest.raises(DatasetError, match="UTF-8"):
        read_dataset(tmp_path)


def test_a_picture_cut_short(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(DatasetError, match=r"a\.png cannot be read"):
        load_pictures([tmp_path / "a.png"])


TABLES = {
    "metadata.csv": 'image,prompt,masks,seed\n0.png,"a, b","[""1.png"", ""2.png""]",3\n',
    "metadata.jsonl": '\n{"image": "0.png", "prompt": "a, b", "masks": ["1.png", "2.png"], "seed": 3}\n',
    "metadata.json": '[{"image": "0.png", "prompt": "a, b", "masks": ["1.png", "2.png"], "seed": 3}]',
}


@pytest.mark.parametrize("name", TABLES)
def test_columns_name_files_and_give_values(tmp_path: Path, name: str) -> None:
    toy.dataset(tmp_path)
    (tmp_path / "metadata.csv").unlink()
    (tmp_path / name).write_text(TABLES[name])
    (row,) = read_dataset(tmp_path, files=("image", "masks"), extras=("masks", "seed")).rows
    assert row.prompt == "a, b"
    assert row.pictures == {"masks": (tmp_path / "1.png", tmp_path / "2.png")}
    assert str(row.values["seed"]) == "3"


BAD_TABLES = {
    "a row without a column": ("jsonl", '{"image": "0.png", "prompt": "a"}\n', "line 1: there is no masks, only"),
    "broken JSON": ("jsonl", '{"image": "0.png", "prompt": "a", "masks": "1.png"}\n{"image"\n', "line 2: broken JSON"),
    "no object": ("json", '["0.png"]', "row 1: '0.png' is no object"),
    "no list": ("json", "{}", "holds no list"),
    "a missing mask": ("jsonl", '{"image": "0.png", "prompt": "a", "masks": ["9.png"]}', "line 1: "),
    "a mask that is a number": ("json", '[{"image": "0.png", "prompt": "a", "masks": [1]}]', "row 1: '' is no picture"),
    "two images": ("json", '[{"image": ["0.png", "1.png"], "prompt": "a", "masks": []}]', "row 1: 2 images are named"),
    "a prompt that is none": ("json", '[{"image": "0.png", "prompt": 3, "masks": []}]', "caption of 0.png is empty"),
}


@pytest.mark.parametrize(("kind", "text", "message"), BAD_TABLES.values(), ids=BAD_TABLES.keys())
def test_bad_tables_are_named(tmp_path: Path, kind: str, text: str, message: str) -> None:
    toy.dataset(tmp_path)
    (tmp_path / "metadata.csv").unlink()
    (tmp_path / f"metadata.{kind}").write_text(text)
    with pytest.raises(DatasetError) as error:
        read_dataset(tmp_path, files=("image", "masks"), extras=("masks",))
    assert message in str(error.value)
    assert f"metadata.{kind}" in str(error.value)


def test_large_pictures_are_reduced_and_cropped(tmp_path: Path) -> None:
    toy.dataset(tmp_path, [(100, 200)], count=1)
    dataset = read_dataset(tmp_path, max_pixels=64 * 128)
    assert dataset.rows[0].size == (64, 128)
    assert dataset.load([dataset.rows[0].image]).shape == (1, 3, 64, 128)
    assert read_dataset(tmp_path, max_pixels=10**6).rows[0].size == (96, 192)
