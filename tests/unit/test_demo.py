"""The built-in data set: what its folder holds, how its splits differ, and what its captions say."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from dataclasses import replace
from itertools import combinations
from math import hypot
from pathlib import Path
from random import Random

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from efficap.data.demo import write_demo, writing
from efficap.data.demo.__main__ import main
from efficap.data.demo.captions import Wording, write_caption, write_references
from efficap.data.demo.drawing import bounding_box, draw_scene
from efficap.data.demo.layout import Spot
from efficap.data.demo.scenes import (
    BACKGROUNDS,
    COLOURS,
    LENGTHS,
    SHAPES,
    TEXTURES,
    Look,
    Part,
    Scene,
    sample_scene,
)
from efficap.data.demo.splits import sample_splits
from efficap.errors import InputError

SIZES = {"train": 6, "val": 2, "test": 2, "irregular": 3}
REGULAR = ("train", "val", "test")
scenes = st.builds(lambda seed, odd: sample_scene(Random(seed), irregular=odd), st.integers(0), st.booleans())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def traits(split_scenes: Iterable[Scene]) -> set[tuple[str, str]]:
    """Every (colour, shape) and (texture, shape) that the scenes show."""
    looks = [part.look for scene in split_scenes for part in scene.parts]
    return {(look.colour, look.shape) for look in looks} | {(look.texture, look.shape) for look in looks}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "data"
    write_demo(folder, sizes=SIZES)
    return folder


def test_the_same_seed_writes_the_same_bytes(demo: Path, tmp_path: Path) -> None:
    write_demo(tmp_path / "again", sizes=SIZES)
    assert contents(tmp_path / "again") == contents(demo)


def test_another_seed_writes_other_pictures_and_captions(demo: Path, tmp_path: Path) -> None:
    write_demo(tmp_path / "other", seed=1, sizes=SIZES)
    one, other = contents(demo), contents(tmp_path / "other")
    assert one.keys() == other.keys()
    assert not [name for name in one if one[name] == other[name]]


def test_the_table_lists_five_different_captions_of_every_picture(demo: Path) -> None:
    table = pd.read_csv(demo / "captions.csv")
    assert list(table.columns) == ["file_name", "caption", "split"]
    assert not table.isna().to_numpy().any()
    by_picture = table.groupby("file_name")
    assert (by_picture["caption"].nunique() == 5).all()
    assert (by_picture.size() == 5).all()
    assert by_picture["split"].first().value_counts().to_dict() == SIZES


def test_every_listed_picture_is_an_rgb_jpeg_of_128_pixels_and_no_other_is_there(demo: Path) -> None:
    listed = set(pd.read_csv(demo / "captions.csv")["file_name"])
    assert listed == {path.name for path in (demo / "images").iterdir()}
    for name in listed:
        with Image.open(demo / "images" / name) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (128, 128))


def test_a_larger_split_begins_with_the_scenes_of_a_smaller_one() -> None:
    few, many = list(sample_splits(0, {"test": 3})), list(sample_splits(0, {"test": 9}))
    assert many[:3] == few


def test_irregular_pictures_each_show_a_combination_that_no_other_split_has() -> None:
    drawn = list(sample_splits(0, {"train": 1000, "val": 300, "test": 300, "irregular": 300}))
    regular = traits(scene for split, _, scene in drawn if split in REGULAR)
    for split, name, scene in drawn:
        if split == "irregular":
            assert traits([scene]) - regular, name


def test_every_colour_shape_texture_and_size_of_the_irregular_split_occurs_in_training() -> None:
    drawn = list(sample_splits(0, {"train": 500, "irregular": 300}))
    words: dict[str, set[str]] = {"train": set(), "irregular": set()}
    for split, _, scene in drawn:
        words[split].update(word for part in scene.parts for word in part.look)
    assert words["irregular"] == words["train"] == {*COLOURS, *SHAPES, *TEXTURES, *LENGTHS}


def test_no_scene_comes_twice_even_when_chance_repeats_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = [sample_scene(Random(number)) for number in range(4)]
    # The same description with another grain is still the same scene.
    monkeypatch.setattr(
        "efficap.data.demo.splits.sample_scene",
        lambda rng, irregular: replace(rng.choice(pool), grain=rng.getrandbits(32)),
    )
    drawn = [scene.description for _, _, scene in sample_splits(0, {"train": 2, "val": 1, "test": 1})]
    assert len(set(drawn)) == 4


@given(scenes)
@settings(deadline=None)
def test_objects_lie_in_the_picture_apart_from_each_other_and_as_their_relation_says(scene: Scene) -> None:
    spots = [spot for part in scene.parts for spot in part.spots]
    for spot in spots:
        assert spot.diameter / 2 + 0.02 < min(spot.x, spot.y, 1 - spot.x, 1 - spot.y)
    if scene.relation == "inside":
        inner, outer = spots
        assert hypot(inner.x - outer.x, inner.y - outer.y) + inner.diameter / 2 < outer.diameter / 2
        return
    for one, other in combinations(spots, 2):
        assert hypot(one.x - other.x, one.y - other.y) > (one.diameter + other.diameter) / 2 + 0.045
    if scene.relation != "and" and scene.relation:
        first, second = spots
        right, down = second.x - first.x, second.y - first.y
        assert {"left": right, "right": -right, "above": down, "below": -down}[scene.relation] > 0.25


@given(scenes, st.integers(0))
@settings(deadline=None)
def test_every_reference_names_the_colour_shape_and_number_of_each_part(scene: Scene, seed: int) -> None:
    for caption in write_references(scene, Random(seed)):
        words = caption.split()
        for look, spots in scene.parts:
            plural = f"{look.shape}es" if look.shape == "cross" else f"{look.shape}s"
            noun = look.shape if len(spots) == 1 else plural
            assert words[words.index(noun) - 1] == look.colour, caption
            if len(spots) > 1:
                assert {2: {"two", "pair"}, 3: {"three"}, 4: {"four"}}[len(spots)] & set(words), caption
        colours = {part.look.colour for part in scene.parts}
        assert not (set(COLOURS) - colours) & set(words), caption


@given(scenes)
@settings(deadline=None)
def test_the_commonest_caption_tells_sizes_textures_relation_and_background(scene: Scene) -> None:
    caption = write_caption(scene)
    for part in scene.parts:
        assert part.look.size in caption
        assert part.look.texture == "plain" or f"{part.look.texture} {part.look.colour}" in caption
    assert scene.relation in caption
    others = [write_caption(replace(scene, background=name)) for name in BACKGROUNDS]
    assert others.count(caption) == 1


def test_captions_agree_in_article_and_number() -> None:
    def caption(count: int, colour: str, shape: str, *, turned: bool = False) -> str:
        part = Part(Look("small", "plain", colour, shape), (Spot(0.5, 0.5, 0.25, 0.0),) * count)
        wording = Wording(frame="there {be} {}", size=False, place=False, turned=turned)
        return write_caption(Scene((part,), "", "night", 0), wording)

    assert caption(1, "orange", "star") == "there is an orange star"
    assert caption(1, "red", "cross") == "there is a red cross"
    assert caption(3, "red", "cross") == "there are three red crosses"
    assert caption(2, "blue", "circle", turned=True) == "there is a pair of blue circles"
    assert caption(4, "blue", "circle", turned=True) == "there is a group of four blue circles"


@pytest.mark.parametrize(
    ("relation", "plain", "turned"),
    [
        ("left", "a red heart to the left of two blue stars", "two blue stars to the right of a red heart"),
        ("right", "a red heart to the right of two blue stars", "two blue stars to the left of a red heart"),
        ("above", "a red heart above two blue stars", "two blue stars below a red heart"),
        ("below", "a red heart below two blue stars", "two blue stars above a red heart"),
        ("inside", "a red heart inside two blue stars", "two blue stars with a red heart inside"),
        ("and", "a red heart and two blue stars", "two blue stars and a red heart"),
    ],
)
def test_turning_a_caption_around_keeps_its_meaning(relation: str, plain: str, turned: str) -> None:
    spot = Spot(0.5, 0.5, 0.25, 0.0)
    heart, stars = Look("small", "plain", "red", "heart"), Look("small", "plain", "blue", "star")
    scene = Scene((Part(heart, (spot,)), Part(stars, (spot, spot))), relation, "wood", 0)
    wording = Wording(frame="there {be} {}", size=False, place=False)
    assert write_caption(scene, wording) == f"there is {plain}"
    assert write_caption(scene, replace(wording, turned=True)) == f"there are {turned}"


@given(scenes)
@settings(deadline=None)
def test_no_object_has_a_colour_that_its_background_hides(scene: Scene) -> None:
    assert not {part.look.colour for part in scene.parts} & BACKGROUNDS[scene.background]


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_objects_stand_out_from_their_background(background: str) -> None:
    for seed in range(300):
        scene = sample_scene(Random(seed))
        if scene.background != background or len(scene.parts) > 1:
            continue
        picture = np.asarray(draw_scene(scene, 128), np.float32)
        spot = scene.parts[0].spots[0]
        x, y, reach = round(spot.x * 128), round(spot.y * 128), round(spot.diameter * 128 / 5)
        inside = picture[y - reach : y + reach, x - reach : x + reach].reshape(-1, 3)
        border = np.concatenate([picture[:4].reshape(-1, 3), picture[-4:].reshape(-1, 3)])
        assert np.abs(np.median(inside, 0) - np.median(border, 0)).max() > 60, (seed, scene)


@given(scenes)
@settings(deadline=None, max_examples=30)
def test_boxes_enclose_what_is_drawn_and_no_more(scene: Scene) -> None:
    plain = draw_scene(replace(scene, parts=()), 128)
    (look, spots), *_ = scene.parts
    alone = draw_scene(replace(scene, parts=(Part(look, spots[:1]),)), 128)
    # Where the picture without the object differs by more than by a shadow, which takes 2/5 of each channel.
    before, after = np.asarray(plain, np.float32), np.asarray(alone, np.float32)
    changed = ((after < 0.55 * before - 6) | (after > before + 12)).any(axis=2)
    rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
    drawn = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    box = [128 * edge for edge in bounding_box(look, spots[0])]
    assert np.abs(np.subtract(box, drawn)).max() < 3.5


def test_every_object_has_its_row_of_boxes(demo: Path) -> None:
    boxes = pd.read_csv(demo / "boxes.csv")
    objects = [
        (f"{name}.jpg", part.look.colour, part.look.shape)
        for _, name, scene in sample_splits(0, SIZES)
        for part in scene.parts
        for _ in part.spots
    ]
    assert list(boxes[["file_name", "colour", "shape"]].itertuples(index=False, name=None)) == objects
    assert boxes[["left", "top", "right", "bottom"]].stack().between(0, 1).all()


def test_a_demo_drawn_before_there_were_boxes_is_given_them(demo: Path, tmp_path: Path) -> None:
    whole = contents(demo)
    shutil.copytree(demo, tmp_path / "old")
    (tmp_path / "old" / "boxes.csv").unlink()
    write_demo(tmp_path / "old", sizes=SIZES)
    assert contents(tmp_path / "old") == whole


def test_a_second_call_leaves_the_files_alone(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "draw_scene", lambda *_: pytest.fail("drawn again"))
    before = {path: path.stat().st_mtime_ns for path in demo.rglob("*")}
    assert write_demo(demo, sizes=SIZES) == demo / "captions.csv"
    assert {path: path.stat().st_mtime_ns for path in demo.rglob("*")} == before


def test_a_folder_with_other_files_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("all of it")
    with pytest.raises(InputError, match="new or empty"):
        write_demo(tmp_path, sizes=SIZES)
    assert contents(tmp_path) == {"thesis.txt": b"all of it"}


def test_a_demo_drawn_with_another_seed_is_refused_and_kept(demo: Path) -> None:
    before = contents(demo)
    with pytest.raises(InputError, match="name another folder, or delete this one"):
        write_demo(demo, seed=5, sizes=SIZES)
    assert contents(demo) == before


def test_a_demo_that_lost_a_picture_is_refused(tmp_path: Path) -> None:
    table = write_demo(tmp_path / "data", sizes={"test": 2})
    (table.parent / "images" / "test_00001.jpg").unlink()
    with pytest.raises(InputError, match="1 of 2 pictures"):
        write_demo(tmp_path / "data", sizes={"test": 2})


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("mine")
    with pytest.raises(InputError, match="is a file"):
        write_demo(tmp_path / "data", sizes=SIZES)


def test_an_interrupted_run_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []

    def draw_two(scene: Scene, image_size: int) -> Image.Image:
        drawn.append(scene)
        if len(drawn) > 2:
            raise KeyboardInterrupt
        return draw_scene(scene, image_size)

    monkeypatch.setattr(writing, "draw_scene", draw_two)
    with pytest.raises(KeyboardInterrupt):
        write_demo(tmp_path / "data", sizes=SIZES)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_seen_at_the_final_path_before_all_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename, steps = Path.rename, []

    def watch(self: Path, target: Path) -> Path:
        steps.append((target.exists(), len(list(self.glob("images/*.jpg"))), (self / "demo.json").is_file()))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", watch)
    write_demo(tmp_path / "data", sizes=SIZES)
    assert steps == [(False, sum(SIZES.values()), True)]


def test_a_copy_finished_by_another_process_meanwhile_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename, folder = Path.rename, tmp_path / "data"

    def overtaken(self: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "rename", rename)
        monkeypatch.setattr(os, "getpid", lambda: -1)
        write_demo(folder, sizes=SIZES)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", overtaken)
    table = write_demo(folder, sizes=SIZES)
    assert len(pd.read_csv(table)) == 5 * sum(SIZES.values())
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sizes": {"dev": 3}}, "'dev'; the splits are train, val, test, irregular"),
        ({"sizes": {"train": -1}}, "must be at least 0"),
        ({"sizes": {}}, "no picture"),
        ({"image_size": 32}, "image_size=32 must be at least 64"),
    ],
)
def test_a_bad_argument_is_refused_before_anything_is_written(
    arguments: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        write_demo(tmp_path / "data", **arguments)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_the_command_prints_the_path_or_one_line_of_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "efficap.data.demo.__main__.write_demo", lambda out, **_: write_demo(out, sizes=SIZES)
    )
    assert main([str(tmp_path / "data")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "data" / "captions.csv")
    (tmp_path / "thesis.txt").touch()
    assert main([str(tmp_path)]) == 1
    assert capsys.readouterr().err.count("\n") == 1
