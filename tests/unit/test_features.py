"""The store of feature maps: what it finds again, what a killed writer may leave behind, what it refuses.

C channels, h x w positions of a feature map.
"""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from torch import Tensor

from efficap.data.features import INDEX_FILE, MAPS_FILE, FeatureStore, Stamp, stamp
from efficap.data.pictures import PictureError
from efficap.errors import InputError
from efficap.models.build import build_model
from efficap.training.feature_cache import encoder_digest

SHAPE = (3, 2, 2)  # C, h, w: 24 bytes each
PREPROCESSING = {"image_size": 64, "interpolation": "bicubic", "crop_pct": 1.0}


def pictures(count: int) -> list[Stamp]:
    return [(f"{number}.jpg", 1000 + number, 10**18 + number) for number in range(count)]


def maps(count: int, first: int = 0) -> Tensor:
    """(count, C, h, w), of numbers that bfloat16 holds exactly; each map is another."""
    return torch.arange(first, first + count).view(-1, 1, 1, 1) + torch.linspace(0, 0.5, 3).view(
        3, 1, 1
    ).expand(SHAPE)


def filled(folder: Path, count: int, batch: int = 2) -> FeatureStore:
    store = FeatureStore(folder, SHAPE)
    with store.writing():
        for first in range(0, count, batch):
            size = min(batch, count - first)
            store.append(pictures(count)[first : first + size], maps(size, first))
    return store


def assert_holds(store: FeatureStore, count: int) -> None:
    held = store.maps_of(pictures(count))
    for place, expected in enumerate(maps(count)):
        assert held[place].dtype == torch.bfloat16
        assert torch.equal(held[place].float(), expected)


def test_maps_come_back_by_picture(tmp_path: Path) -> None:
    written = filled(tmp_path / "store", 5)
    assert_holds(written, 5)
    opened = FeatureStore(tmp_path / "store", SHAPE)
    assert_holds(opened, 5)
    assert opened.lacking(pictures(7)) == [5, 6]
    turned = opened.maps_of(reversed(pictures(5)))
    assert torch.equal(turned[0].float(), maps(1, 4)[0])


def test_maps_are_rounded_to_bfloat16(tmp_path: Path) -> None:
    exact = torch.randn(2, *SHAPE)
    store = FeatureStore(tmp_path, SHAPE)
    with store.writing():
        store.append(pictures(2), exact)
    held = store.maps_of(pictures(2))
    assert torch.equal(torch.stack([held[0], held[1]]), exact.bfloat16())


def test_a_picture_without_a_map_is_no_picture(tmp_path: Path) -> None:
    held = filled(tmp_path, 2).maps_of([pictures(2)[1], None, ("other.jpg", 1, 1)])
    assert torch.equal(held[0].float(), maps(1, 1)[0])
    for place in (1, 2):
        with pytest.raises(PictureError, match="not encoded"):
            held[place]
    with pytest.raises(PictureError, match="not encoded"):
        FeatureStore(tmp_path / "empty", SHAPE).maps_of([None])[0]


@pytest.mark.parametrize("file", [MAPS_FILE, INDEX_FILE])
def test_whatever_a_killed_writer_left_is_completed_and_right(tmp_path: Path, file: str) -> None:
    """Cut at every byte: no map is read that was not written whole, and the next writer makes all good."""
    filled(tmp_path / "whole", 3, batch=1)
    size = (tmp_path / "whole" / file).stat().st_size
    for length in range(size):
        folder = tmp_path / "cut"
        shutil.copytree(tmp_path / "whole", folder)
        with (folder / file).open("r+b") as cut:
            cut.truncate(length)
        store = FeatureStore(folder, SHAPE)
        lacking = store.lacking(pictures(3))
        assert lacking == list(range(3 - len(lacking), 3))
        assert_holds(store, 3 - len(lacking))
        if file == MAPS_FILE:
            assert 3 - len(lacking) == length // 24
        with store.writing():
            for place in store.lacking(pictures(3)):
                store.append([pictures(3)[place]], maps(1, place))
        for complete in (store, FeatureStore(folder, SHAPE)):
            assert complete.lacking(pictures(3)) == []
            assert_holds(complete, 3)
        assert (folder / MAPS_FILE).stat().st_size == 3 * 24
        shutil.rmtree(folder)


@pytest.mark.parametrize("rest", [b"\0" * 40, b"[1, 2]\n", b"no json\n", b"null\n"])
def test_what_follows_a_line_that_is_none_is_not_trusted(tmp_path: Path, rest: bytes) -> None:
    filled(tmp_path, 3)
    lines = (tmp_path / INDEX_FILE).read_bytes().splitlines(keepends=True)
    (tmp_path / INDEX_FILE).write_bytes(lines[0] + rest + lines[2])
    assert FeatureStore(tmp_path, SHAPE).lacking(pictures(3)) == [1, 2]


def test_a_failing_writer_keeps_what_came_before(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, SHAPE)

    def write_and_fail() -> None:
        with store.writing():
            store.append(pictures(1), maps(1))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_and_fail()
    assert_holds(FeatureStore(tmp_path, SHAPE), 1)


def test_a_second_writer_waits_and_finds_what_the_first_wrote(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """`flock` binds to the open file, so that threads exclude each other as processes do."""
    from threading import Event, Thread

    first, second = FeatureStore(tmp_path, SHAPE), FeatureStore(tmp_path, SHAPE)
    found: list[list[int]] = []
    begun = Event()

    def write_second() -> None:
        begun.set()
        with second.writing():
            found.append(second.lacking(pictures(2)))

    with first.writing():
        thread = Thread(target=write_second)
        thread.start()
        begun.wait()
        thread.join(0.2)
        assert not found
        first.append(pictures(2), maps(2))
    thread.join()
    assert found == [[]]
    assert "another process writes to" in capfd.readouterr().err


def test_readers_are_not_disturbed_by_a_writer(tmp_path: Path) -> None:
    held = filled(tmp_path, 2).maps_of(pictures(2))
    later = FeatureStore(tmp_path, SHAPE)
    with later.writing():
        later.append([("0.jpg", 5, 5)], maps(1, 9))
    assert torch.equal(held[0].float(), maps(1)[0])
    changed = later.maps_of([("0.jpg", 5, 5), pictures(1)[0]])
    assert torch.equal(changed[0].float(), maps(1, 9)[0])
    assert torch.equal(changed[1].float(), maps(1)[0]), "the picture as it was may come back"


def test_a_loader_process_is_given_a_name_and_not_the_maps(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, (64, 16, 16))
    with store.writing():
        store.append(pictures(8), torch.randn(8, 64, 16, 16))
    held = store.maps_of(pictures(8))
    pickled = pickle.dumps(held)
    assert len(pickled) < 1000
    assert torch.equal(pickle.loads(pickled)[3], held[3])


def test_a_map_is_a_view_of_the_file(tmp_path: Path) -> None:
    held = filled(tmp_path, 3).maps_of(pictures(3))
    assert held[2].data_ptr() - held[0].data_ptr() == 2 * 24
    with (tmp_path / MAPS_FILE).open("r+b") as file:
        file.write(b"\x80\x3f")  # 1.0 in bfloat16
    assert held[0][0, 0, 0] == 1


@pytest.mark.parametrize("done", ["read", "written"])
def test_a_folder_that_cannot_be_used_names_the_setting(tmp_path: Path, done: str) -> None:
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "below"
    if done == "read":
        folder = tmp_path / "store"
        (folder / MAPS_FILE).mkdir(parents=True)
        (folder / INDEX_FILE).mkdir()
    match = rf"cannot be {done} \(.*data.feature_cache_dir=DIR"
    with pytest.raises(InputError, match=match), FeatureStore(folder, SHAPE).writing():
        pytest.fail("nothing can be written")


def test_a_disk_without_room_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    store = FeatureStore(tmp_path, SHAPE)
    store.check_room(4)
    with pytest.raises(
        InputError, match=r"needs 0.00 GiB for 5 pictures.* 0.00 GiB free; .*feature_cache_dir"
    ):
        store.check_room(5)


def test_a_stamp_changes_with_size_and_time(tmp_path: Path) -> None:
    import os

    file = tmp_path / "a.jpg"
    assert stamp("a.jpg", file) is None
    file.write_bytes(b"one")
    os.utime(file, ns=(0, 1_000_000_001))
    assert stamp("a.jpg", file) == ("a.jpg", 3, 1_000_000_001)


def digest(preprocessing: dict[str, Any] | None = None, seed: int = 0, **changes: Any) -> str:
    torch.manual_seed(seed)
    encoder = build_model(tiny_model(encoder__frozen=True, **changes), 11).encoder
    return encoder_digest(encoder, "name", {**PREPROCESSING, **(preprocessing or {})})


def test_the_digest_tells_apart_whatever_changes_a_map() -> None:
    assert digest() == digest()
    others = [
        digest(seed=1),
        digest(encoder__mean=[0.4, 0.5, 0.5]),
        digest(encoder__std=[0.5, 0.5, 0.4]),
        *(digest({key: value}) for key, value in
          (("image_size", 96), ("interpolation", "bilinear"), ("crop_pct", 0.9))),
    ]  # fmt: skip
    assert len({digest(), *others}) == 7


def test_the_digest_sees_batchnorms_statistics() -> None:
    encoder = build_model(tiny_model(encoder__frozen=True), 11).encoder
    before = encoder_digest(encoder, "name", PREPROCESSING)
    next(buffer for name, buffer in encoder.named_buffers() if name.endswith("running_var")).mul_(1.5)
    assert encoder_digest(encoder, "name", PREPROCESSING) != before
    assert encoder_digest(encoder, "another", PREPROCESSING) != before


def test_a_frozen_encoder_keeps_no_graph_in_training() -> None:
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    frozen, learning = (
        build_model(tiny_model(encoder__frozen=value), 11).train().encoder for value in (True, False)
    )
    assert frozen(images).grad_fn is None
    assert learning(images).grad_fn is not None
