from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw

from tests.training import toy
from zimgkit.engines.errors import UsageError, ZimgError
from zimgkit.training.beside import ControlPictures, Entities, check_extras
from zimgkit.training.dataset import Dataset, DatasetError, read_dataset

ENTITIES = ("eligen_entity_prompts", "eligen_entity_masks")


def regions(folder: Path, **changed: Any) -> Dataset:
    """Two rows with two entities each, in the left and the right half."""
    toy.dataset(folder, [(32, 64)], count=2)
    (folder / "metadata.csv").unlink()
    for number, left in enumerate((0, 32)):
        mask = Image.new("L", (64, 32))
        ImageDraw.Draw(mask).rectangle((left, 0, left + 31, 31), fill=255)
        mask.save(folder / f"mask{number}.png")
    Image.new("L", (64, 32)).save(folder / "nothing.png")
    row = {"prompt": "both", ENTITIES[0]: ["a", "bb"], ENTITIES[1]: ["mask0.png", "mask1.png"]}
    rows = [{"image": "0.png", **row}, {"image": "1.png", **row, **changed}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return read_dataset(folder, files=("image", ENTITIES[1]), extras=ENTITIES)


TEXTS = {name: torch.full((length, 3), float(length)) for name, length in {"a": 1, "bb": 2, "both": 4, "": 5}.items()}


def test_entities_come_before_the_whole_and_are_left_out_with_the_prompt(tmp_path: Path) -> None:
    entities = Entities(regions(tmp_path), TEXTS, "")
    found = entities.load(torch.tensor([0, 1]), torch.tensor([False, True]))
    assert found["text"].shape == (2, 3 * 5, 3)
    assert found["mask"].view(2, 3, 5).sum(dim=2).tolist() == [[1, 2, 4], [0, 0, 5]]
    assert found["text"].view(2, 3, 5, 3)[0, :, 0, 0].tolist() == [1, 2, 4]
    assert found["regions"].shape == (2, 2, 8)
    assert found["regions"][0].int().tolist() == [[1, 1, 0, 0] * 2, [0, 0, 1, 1] * 2]
    assert not found["regions"][1].any()
    assert entities.kind(0) == 2


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "fewer masks": ({ENTITIES[1]: ["mask0.png"]}, "line 2: 2 prompts and 1 masks of entities"),
    "no list": ({ENTITIES[0]: "a"}, "line 2: eligen_entity_prompts is no list of texts"),
    "an empty prompt": ({ENTITIES[0]: ["a", " "]}, "line 2: eligen_entity_prompts is no list of texts"),
    "an empty mask": ({ENTITIES[1]: ["mask0.png", "nothing.png"]}, "nothing.png covers nothing"),
    "no entities": ({ENTITIES[0]: [], ENTITIES[1]: []}, "line 2: 0 prompts and 0 masks"),
}


@pytest.mark.parametrize(("changed", "message"), BAD.values(), ids=BAD.keys())
def test_bad_entities_are_named_by_row(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(DatasetError) as error:
        Entities(regions(tmp_path, **changed), TEXTS, "")
    assert message in str(error.value)
    assert "metadata.jsonl, line 2" in str(error.value)


def test_what_controls_is_as_large_as_the_image(tmp_path: Path) -> None:
    toy.dataset(tmp_path, [(32, 32), (32, 48)])
    (tmp_path / "metadata.csv").write_text("image,prompt,control_image\n0.png,a,2.png\n0.png,a,1.png\n")
    dataset = read_dataset(tmp_path, files=("image", "control_image"), extras=("control_image",))
    with pytest.raises(DatasetError, match=r"line 3: control_image is 48x32, and the image 32x32; make it"):
        ControlPictures(dataset, None, "control_image")  # type: ignore[arg-type]


def test_a_mask_that_breaks_off_is_named(tmp_path: Path) -> None:
    dataset = regions(tmp_path)
    whole = (tmp_path / "mask1.png").read_bytes()
    (tmp_path / "mask1.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DatasetError, match=r"mask1\.png cannot be read"):
        Entities(dataset, TEXTS, "")


@pytest.mark.parametrize(
    ("extras", "files", "message"),
    [
        (("depth",), (), "--extra-inputs has depth; known are control_image"),
        (("edit_image",), ("image",), "--data-file-keys has not"),
        (("eligen_entity_prompts",), (), "only one of eligen_entity_prompts and eligen_entity_masks; name both"),
    ],
)
def test_columns_that_make_no_sense(extras: tuple[str, ...], files: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError) as error:
        check_extras(extras, files)
    assert message in str(error.value)
    assert isinstance(error.value, ZimgError)
