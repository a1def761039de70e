from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.commands import invoke
from zimgkit.engines.errors import BundleError, OutputError, UsageError
from zimgkit.runtime import Pipeline
from zimgkit.runtime.commands.cli import main
from zimgkit.runtime.commands.sheet import draw_sheet, prompts_of, rows_of
from zimgkit.runtime.pictures.sheet import GAP, MARGIN, PAPER, compose


def pictures(*colours: str, size: tuple[int, int] = (128, 96)) -> list[Image.Image]:
    return [Image.new("RGB", size, colour) for colour in colours]


@pytest.mark.parametrize(("cells", "columns"), [(1, 4), (3, 2), (4, 2), (5, 4), (12, 4)])
@pytest.mark.parametrize("bundles", [1, 2, 3])
def test_every_picture_lies_in_its_cell(cells: int, columns: int, bundles: int) -> None:
    names = ["red", "lime", "blue", "black", "yellow"]
    made = [pictures(*(names[(cell + index) % 5] for index in range(bundles))) for cell in range(cells)]
    page = compose([f"number {cell}" for cell in range(cells)], made, columns)
    across = bundles * (128 + GAP) - GAP + 2 * MARGIN
    rows = -(-cells // min(columns, cells))
    assert page.width == min(columns, cells) * across
    assert page.height % rows == 0
    pixels = np.asarray(page)
    for cell, own in enumerate(made):
        row, column = divmod(cell, min(columns, cells))
        x, y = column * across + MARGIN, row * page.height // rows + MARGIN
        for picture in own:
            assert np.array_equal(pixels[y : y + 96, x : x + 128], np.asarray(picture))
            x += 128 + GAP
        caption = pixels[y + 96 + 2 : (row + 1) * page.height // rows, column * across : (column + 1) * across]
        assert (caption != PAPER).any(axis=-1).sum() > 30


def test_long_captions_wrap_within_their_cell() -> None:
    long = "a large orange crescent moon to the right of a small light green rhombus on a striped lavender background"
    page = compose([long, "short"], [pictures("red"), pictures("blue")], 2)
    pixels = np.asarray(page)
    below_the_frames = MARGIN + 96 + 1
    assert (pixels[below_the_frames:, 148 - MARGIN : 148 + MARGIN] == PAPER).all()
    assert page.height > 96 + 2 * MARGIN + 5 * 14


def test_a_caption_without_letters_in_any_font_is_numbered() -> None:
    numbered = compose(["prompt 1"], [pictures("red")], 4)
    assert np.array_equal(np.asarray(compose(["𰻝"], [pictures("red")], 4)), np.asarray(numbered))


def test_prompts_are_read(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\ufeff# a comment\na red circle\n\n  红色的圆 \r\n", encoding="utf-8")
    assert prompts_of(file) == ["a red circle", "红色的圆"]


def test_prompts_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        prompts_of(tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UsageError, match="cannot be read"):
        prompts_of(tmp_path / "latin.txt")
    (tmp_path / "empty.txt").write_text("# nothing\n")
    with pytest.raises(UsageError, match="holds 0 prompts"):
        prompts_of(tmp_path / "empty.txt")
    (tmp_path / "many.txt").write_text("a\n" * 1001)
    with pytest.raises(UsageError, match="holds 1001 prompts"):
        prompts_of(tmp_path / "many.txt")


def test_a_sheet_of_both_models(tmp_path: Path) -> None:
    call = {"seed": 3, "num_inference_steps": 2, "cfg_scale": None}
    names = [Path("zimg-tiny-z"), Path("zimg-tiny-qwen")]
    made = draw_sheet(["a red circle", "a blue star"], tmp_path / "sheet.png", call, bundles=names, columns=1)
    page = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert [bundle["name"] for bundle in made["bundles"]] == ["zimg-tiny-z", "zimg-tiny-qwen"]
    assert (made["height"], made["width"]) == page.shape[:2]
    for index, name in enumerate(names):
        with Pipeline.open(name) as pipeline:
            negative = pipeline.bundle.manifest.defaults.negative_prompt
            drawn = pipeline("a red circle", seed=3, num_inference_steps=2, negative_prompt=negative).images[0]
        x = MARGIN + index * (128 + GAP)
        assert np.array_equal(page[MARGIN : MARGIN + 128, x : x + 128], np.asarray(drawn))


@pytest.mark.parametrize(
    ("name", "column", "file", "prompt"),
    [
        ("zimg-tiny-z", "control_image", "edges.png", "a blue square left of a red oval"),
        ("zimg-tiny-qwen-edit", "image", "pair.png", "remove the square"),
    ],
)
def test_a_table_names_what_controls_a_prompt_or_is_edited(
    name: str, column: str, file: str, prompt: str, tmp_path: Path
) -> None:
    """In a cell: the picture that is given, and what is drawn by it."""
    table, given = tmp_path / "t.csv", Path(__file__).parents[3] / "docs" / "pictures" / file
    table.write_text(f"prompt,{column}\n{prompt},{given}\n", "utf-8")
    texts, inputs = rows_of(table)
    draw_sheet(texts, tmp_path / "s.png", {"num_inference_steps": 4}, bundles=[Path(name)], inputs=inputs)
    page = np.asarray(Image.open(tmp_path / "s.png"))
    assert page.shape[1] == 2 * MARGIN + 256 + GAP
    pixels = page[MARGIN : MARGIN + 128, MARGIN:]
    assert np.array_equal(pixels[:, :128], np.asarray(Image.open(given).convert("RGB")))
    with Pipeline.open(name) as pipeline:
        call = {"negative_prompt": pipeline.bundle.manifest.defaults.negative_prompt, column: given}
        drawn = pipeline(texts[0], seed=0, num_inference_steps=4, **call).images[0]
    assert np.array_equal(pixels[:, 128 + GAP : 256 + GAP], np.asarray(drawn))


def test_a_table_has_lists_in_json(tmp_path: Path) -> None:
    """Of pictures, which come first in a cell; and of regions, whose prompts and masks are lists even of one."""
    given = pictures("red", "blue", size=(128, 128))
    for number, picture in enumerate(given):
        picture.save(tmp_path / f"{number}.png")
    table, page = tmp_path / "t.csv", tmp_path / "s.png"
    table.write_text('prompt,image\n"one, two","[""0.png"", ""1.png""]"\n', "utf-8")
    prompts, inputs = rows_of(table)
    assert inputs == [{"image": [tmp_path / "0.png", tmp_path / "1.png"]}]
    bundles = [Path("zimg-tiny-qwen-edit")]
    draw_sheet(prompts, page, {"num_inference_steps": 1}, bundles=bundles, inputs=inputs)
    row = np.asarray(Image.open(page))[MARGIN : MARGIN + 128, MARGIN:]
    assert all(np.array_equal(row[:, n * (128 + GAP) :][:, :128], np.asarray(given[n])) for n in range(2))
    table.write_text(
        'prompt,eligen_entity_prompts,eligen_entity_masks\na,"[""b""]",0.png\na,c,"[""0.png""]"\n', "utf-8"
    )
    assert rows_of(table)[1] == [
        {"eligen_entity_prompts": [text], "eligen_entity_masks": [tmp_path / "0.png"]} for text in ("b", "c")
    ]


def test_a_table_names_a_picture_for_each_prompt(tmp_path: Path) -> None:
    """In a cell: the picture before, the mask, what is drawn. A file's name is one from where the table lies."""
    (before,), mask = pictures("lime", size=(64, 48)), Image.new("1", (64, 48))
    mask.paste(1, (32, 0, 64, 48))
    before.save(tmp_path / "before.png")
    mask.save(tmp_path / "mask.png")
    table, page, names = tmp_path / "t.csv", tmp_path / "s.png", [Path("zimg-tiny-z")]
    table.write_text('\ufeffprompt,image,mask_image\n"one, two",before.png,mask.png\nthree,before.png,\n', "utf-8")
    texts, inputs = rows_of(table)
    assert texts == ["one, two", "three"]
    draw_sheet(texts, page, {"num_inference_steps": 3}, bundles=names, inputs=inputs, columns=1)
    pixels = np.asarray(Image.open(page))
    first, second = (pixels[y : y + 48, MARGIN:] for y in (MARGIN, MARGIN + len(pixels) // 2))
    cell = [first[:, x : x + 64] for x in range(0, 3 * (64 + GAP), 64 + GAP)]
    assert np.array_equal(cell[0], np.asarray(before))
    assert np.array_equal(cell[1], np.asarray(mask.convert("RGB")))
    assert np.array_equal(cell[2][:, :32], cell[0][:, :32])
    assert not np.array_equal(cell[2][:, 32:], cell[0][:, 32:])
    assert np.array_equal(second[:, :64], np.asarray(before))
    assert (second[:, 2 * (64 + GAP) : 3 * (64 + GAP)] == PAPER).all()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("image\na.png\n", "has the columns image; name them prompt, image, mask_image"),
        ("prompt,strength\na,1\n", "has the columns prompt, strength"),
        ("", "has the columns ;"),
        ("prompt,image\n", "holds 0 prompts"),
        ("prompt,image\n,a.png\n", "row 1 of .* has no prompt"),
        ("prompt,image\na,b,c.png\n", "row 1 of .* too many columns; quote prompts with commas"),
        ('prompt,image\na,"[1]"\n', 'image of row 1 of .* is no list of texts; write \\["one", "two"\\]'),
        ("prompt,image\na,[\n", "image of row 1 of .* is no list of texts"),
        ("prompt,image\na,[]\n", "image of row 1 of .* is no list of texts"),
        ("prompt\n\0\n" + 200_000 * "a", "cannot be read"),
    ],
)
def test_tables_that_cannot_be_read(table: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(table)
    with pytest.raises(UsageError, match=message):
        rows_of(tmp_path / "t.csv")
    (tmp_path / "t.csv").write_text("prompt,image\na,none.png\n")
    result = invoke(main, "sheet", tmp_path / "t.csv", "-o", tmp_path / "s.png")
    result.assert_refused("none.png does not exist", 2)


def test_what_cannot_be_drawn(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="columns is 0"):
        draw_sheet(["a"], tmp_path / "s.png", {}, bundles=[Path("zimg-tiny-z")], columns=0)
    with pytest.raises(UsageError, match="names no format"):
        draw_sheet(["a"], tmp_path / "s.bmp", {}, bundles=[Path("zimg-tiny-z")])
    with pytest.raises(OutputError, match="does not exist"):
        draw_sheet(["a"], tmp_path / "none" / "s.png", {}, bundles=[Path("zimg-tiny-z")])
    with pytest.raises(BundleError, match="is not a bundle"):
        draw_sheet(["a"], tmp_path / "s.png", {}, bundles=[tmp_path])
    assert not list(tmp_path.iterdir())


def test_the_command(tmp_path: Path) -> None:
    prompts, page = tmp_path / "prompts.txt", tmp_path / "s.webp"
    prompts.write_text("a red circle\n")
    done = invoke(main, "sheet", prompts, "--num-inference-steps", 1, "--output", page)
    assert (done.code, done.out) == (0, f"{page}\n")
    assert Image.open(page).width == 128 + 2 * MARGIN
    invoke(main, "sheet", tmp_path / "none.txt").assert_refused("none.txt cannot be read", 2)
    invoke(main, "sheet", prompts, "--columns", 0).assert_refused("columns is 0", 2)


def test_what_no_font_shows_is_told(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a circle\n𰻝 \x1b[31m\n", "utf-8")
    small = ("--num-inference-steps", 1, "--height", 32, "--width", 32, "--quiet", "-o", tmp_path / "s.png")
    result = invoke(main, "sheet", tmp_path / "p.txt", *small)
    assert (result.code, result.out) == (0, f"{tmp_path / 's.png'}\nprompt 2: 𰻝 \\x1b[31m\n")
    report = json.loads(invoke(main, "sheet", tmp_path / "p.txt", *small, "--json").out)
    assert report["numbered"] == {"prompt 2": "𰻝 \x1b[31m"}


def test_a_sheet_takes_what_generate_takes(tmp_path: Path) -> None:
    small = ("--num-inference-steps", 1, "--quiet")
    prompts, one, page = tmp_path / "p.txt", tmp_path / "one.png", tmp_path / "page.png"
    invoke(main, "generate", "a red circle", "--seed", 5, "--num-images", 2, "-o", one, *small)
    second = tmp_path / "one-2.png"
    cells = [np.asarray(Image.open(tmp_path / f"one-{number}.png")) for number in (1, 2)]
    tall, wide, _ = cells[0].shape

    def drawn(*arguments: object) -> list[np.ndarray]:
        result = invoke(main, "sheet", *arguments, "-o", page, "--quiet")
        assert (result.code, result.err) == (0, ""), result
        pixels = np.asarray(Image.open(page))[MARGIN : MARGIN + tall]
        starts = range(MARGIN, pixels.shape[1] - MARGIN, wide + GAP)
        return [pixels[:, start : start + wide] for start in starts]

    prompts.write_text("a red circle\n")
    several = drawn(prompts, "--seed", 5, "--num-images", 2, "--num-inference-steps", 1)
    assert len(several) == 2 and all(map(np.array_equal, several, cells))
    assert [np.array_equal(picture, cells[1]) for picture in drawn("--from-image", second)] == [True]
    prompts.write_text("a blue star\n")
    invoke(main, "generate", "a blue star", "--seed", 5, "-o", one, *small)
    assert np.array_equal(drawn(prompts, "--from-image", tmp_path / "one-1.png")[0], np.asarray(Image.open(one)))
    invoke(main, "sheet").assert_refused("there is nothing to draw; name a file of prompts, or give --from-image", 2)
    many = invoke(main, "sheet", prompts, "--num-images", 1000, "--num-inference-steps", 1, "--columns", 0)
    many.assert_refused("columns is 0", 2)
    prompts.write_text("a\nb\n")
    invoke(main, "sheet", prompts, "--num-images", 501).assert_refused("draw at most 1000 pictures", 2)
