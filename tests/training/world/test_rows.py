from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from zimgkit.training.dataset import read_dataset
from zimgkit.training.world.edits import KINDS, edit
from zimgkit.training.world.render import edges_row, edits_row, regions_row, write_rows
from zimgkit.training.world.sampling import held_out
from zimgkit.training.world.scattered import box_of, scattered

COLUMNS = {
    "edges": (edges_row, ("control_image",), ("control_image",)),
    "regions": (regions_row, ("eligen_entity_masks",), ("eligen_entity_prompts", "eligen_entity_masks")),
    "edits": (edits_row, ("edit_image",), ("edit_image",)),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_rows_are_a_dataset_and_the_first_do_not_depend_on_how_many(tmp_path: Path, name: str) -> None:
    if name == "edges":
        pytest.importorskip("cv2", reason="opencv-python-headless is not installed")
    row, files, extras = COLUMNS[name]
    for folder, count in (("few", 2), ("more", 3)):
        write_rows(tmp_path / folder, count, row("train"), seed=5)
    few = read_dataset(tmp_path / "few", files=("image", *files), extras=extras)
    more = read_dataset(tmp_path / "more", files=("image", *files), extras=extras)
    assert len(few.rows) == 2
    for one, other in zip(few.rows, more.rows, strict=False):
        assert (one.prompt, one.values) == (other.prompt, other.values)
        for picture in (one.image, *one.pictures[files[0]]):
            again = tmp_path / "more" / picture.relative_to(tmp_path / "few")
            assert Image.open(picture).tobytes() == Image.open(again).tobytes()


def test_scattered_things_lie_in_boxes_that_do_not_meet() -> None:
    for seed in range(30):
        scene = scattered(seed, "test")
        assert scattered(seed, "test") == scene and held_out(scene)
        assert not held_out(scattered(seed))
        covered = set()
        for thing in scene.things:
            left, top, right, bottom = box_of(thing)
            assert min(left, top) >= 0 and max(right, bottom) <= 128
            assert left <= thing.x - thing.radius and thing.x + thing.radius <= right
            cells = {(x, y) for x in range(left, right, 16) for y in range(top, bottom, 16)}
            assert not cells & covered
            covered |= cells


@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_names_what_changes_and_training_holds_back_what_tests_show(kind: str) -> None:
    for seed in range(10):
        made = edit(seed, "test", kind)
        assert edit(seed, "test", kind) == made
        first = made.before[0]
        assert made.after.background == first.background
        assert len({*made.after.things} ^ {*first.things}) in (1, 2)
        shapes = {thing.shape for thing in (*first.things, *made.after.things)}
        assert any(shape in made.instruction for shape in (*shapes, "shape"))
        assert len(made.after.things) - len(first.things) == {"add": 1, "remove": -1}.get(kind, 0)
        assert not held_out(edit(seed, "train", kind).after)
