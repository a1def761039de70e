from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from zimgkit.training.dataset import read_dataset
from zimgkit.training.world.edits import KINDS, OF_ONE_SCENE, edit_to_judge, edit_to_learn
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
def test_an_edit_names_what_changes(kind: str) -> None:
    for seed in range(10):
        made = edit_to_judge(seed, kind)
        assert edit_to_judge(seed, kind) == made
        assert held_out(made.after) or kind in {"remove", "move"}
        first = made.before[0]
        assert made.after.background == first.background
        assert len({*made.after.things} ^ {*first.things}) in (1, 2)
        shapes = {thing.shape for thing in (*first.things, *made.after.things)}
        assert any(shape in made.instruction for shape in (*shapes, "shape"))
        assert len(made.after.things) - len(first.things) == {"add": 1, "remove": -1}.get(kind, 0)


def test_training_asks_for_different_things_of_a_scene_and_shows_nothing_that_is_held_out() -> None:
    made = [edit_to_learn(seed) for seed in range(40 * OF_ONE_SCENE)]
    assert made == [edit_to_learn(seed) for seed in range(40 * OF_ONE_SCENE)]
    assert {each.kind for each in made} == {*KINDS}
    assert not any(held_out(scene) for each in made for scene in (*each.before, each.after))
    for first in range(0, len(made), OF_ONE_SCENE):
        group = made[first : first + OF_ONE_SCENE]
        assert len({each.before[0] for each in group}) == 1
        assert len({(each.instruction, each.before) for each in group}) == OF_ONE_SCENE
