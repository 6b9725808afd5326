"""Shards from the tars to the gallery: the same data as a table's, whatever is broken, on any number of ranks."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import compose, tiny_model, tiny_overrides, write_colour_table
from PIL import Image
from started import started_together
from tars import ThisProcess, encoded, jpeg, sample, samples, scenery, tar_bytes, write_tar

from efficap import commands
from efficap.batch import CaptionBatch
from efficap.commands.evaluate import evaluate
from efficap.commands.train import train
from efficap.data import pool, webdataset
from efficap.data.csv import CSVDataModule
from efficap.data.module import CaptionDataModule
from efficap.data.shards.writer import ShardSettings, write_shards
from efficap.data.table import read_table
from efficap.data.webdataset import WebDatasetDataModule
from efficap.errors import InputError
from efficap.evaluation.sheet import contact_sheet
from efficap.models.build import build_model
from efficap.picture_files import MAX_PIXELS
from efficap.tokenizer import CaptionTokenizer
from efficap.training.losses import batch_loss
from efficap.training.module import CaptionModule

pytestmark = pytest.mark.slow
OPEN = 16  # twice data.shuffle_shards
WHOLE = ["data.crop_scale=[1,1]", "data.crop_ratio=[1,1]"]  # the largest square of the centre


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "ProcessPoolExecutor", ThisProcess)


def write_as_shards(folder: Path, out: Path, per_shard: int = 3) -> Path:
    """The table of `folder` as shards, in `out`/train and so on."""
    columns = {"image_column": "file_name", "caption_column": "caption", "split_column": "split"}
    tables, _ = read_table(folder / "captions.csv", folder / "images", **columns)
    for split, table in tables.items():
        write_shards(table, out / split, ShardSettings(per_shard, None, MAX_PIXELS), 1)
    return out


@pytest.fixture
def shards(colour_table: Path, tmp_path: Path) -> Path:
    """`colour_table` as shards: 3 + 3 + 2 pictures to train on, 3 + 1 to validate on, 3 + 1 to test on."""
    return write_as_shards(colour_table, tmp_path / "shards")


def settings(*overrides: str) -> dict[str, Any]:
    arguments: dict[str, Any] = compose("train", "name=test", "output_dir=unused", *overrides)["data"]
    arguments.pop("_target_")
    return arguments


def prepared(data: CaptionDataModule, *splits: str, image_size: int = 64) -> Any:
    tokenizer = CaptionTokenizer.learn(["a red green blue grey picture", "all of it is"], 300)
    data.prepare(
        tokenizer,
        image_size=image_size,
        interpolation="bicubic",
        crop_pct=1.0,
        splits=list(splits or ("train", "val")),
    )
    return data


SMALL = ["data.num_workers=0", "data.batch_size=4", "data.num_threads=1"]


def from_shards(shards: Path, *overrides: str, splits: tuple[str, ...] = ()) -> WebDatasetDataModule:
    data = settings(
        "data=webdataset", f"data.shards={shards}/train", f"data.val_shards={shards}/val", *SMALL, *overrides
    )
    return prepared(WebDatasetDataModule(**data), *splits)


def from_table(folder: Path, *overrides: str) -> CSVDataModule:
    data = settings(
        "data=csv",
        f"data.table={folder}/captions.csv",
        f"data.image_dir={folder}/images",
        *SMALL[:2],
        *overrides,
    )
    return prepared(CSVDataModule(**data))


def seen(batches: Iterable[CaptionBatch], data: CaptionDataModule) -> Counter[tuple[str, str]]:
    """How often each caption came with each picture."""
    return Counter(
        (image_id, data.tokenizer.decode(tokens[:length].tolist()).strip())
        for batch in batches
        for image_id, captions, lengths in zip(batch.image_ids, batch.tokens, batch.lengths, strict=True)
        for tokens, length in zip(captions, lengths.tolist(), strict=True)
        if length
    )


def ids(batches: Iterable[CaptionBatch]) -> list[str]:
    return [image_id for batch in batches for image_id in batch.image_ids]


def losses(data: CaptionDataModule, split: str) -> list[float]:
    """Of a tiny captioner on each batch that evaluation sees."""
    torch.manual_seed(0)
    captioner = build_model(tiny_model(decoder__n_positions=64), data.tokenizer.vocab_size).eval()
    found = []
    with torch.no_grad():
        for batch in data.evaluation_dataloader(split):
            found.append(float(batch_loss(captioner, batch, label_smoothing=0.0)))
    return found


# The same data as a table's


@pytest.mark.parametrize("count", [1, 2])
def test_an_epoch_of_shards_is_an_epoch_of_the_table(count: int, colour_table: Path, shards: Path) -> None:
    table = from_table(colour_table, f"data.captions_per_image={count}")
    data = from_shards(shards, f"data.captions_per_image={count}", "data.caption_field=captions")
    rows = pd.read_csv(colour_table / "captions.csv").query("split == 'train'")
    pairs = Counter(rows[["file_name", "caption"]].itertuples(index=False, name=None))
    total: Counter[tuple[str, str]] = Counter()
    for epoch in range(2 // count * 2):
        theirs, ours = (seen(d.train_dataloader().of_epoch(epoch), d) for d in (table, data))
        assert theirs == ours
        total += ours
    assert total == Counter(dict.fromkeys(pairs, 2)), "each caption as often as any other"


FILTERS = [
    "data.text.min_words=4",
    "data.text.exclude=grey",
    "data.max_tokens=6",
    "data.captions_per_image=2",
]


def test_captions_that_are_left_out_or_cut_are_counted_once_however_often_they_come(
    colour_table: Path, shards: Path
) -> None:
    table = from_table(colour_table, *FILTERS)
    data = from_shards(shards, *FILTERS, "data.caption_field=captions", "data.num_workers=3")
    training, validation = data.train_dataloader(), data.val_dataloader()
    next(training.of_epoch(0))  # and is broken off, with batches read ahead of it
    for epoch in range(3):
        list(training.of_epoch(epoch))
        list(validation)
    assert data.text.left_out == table.text.left_out == {"fewer than 4 words": 8, "matches grey": 2}
    assert data.cut_captions == table.cut_captions > 0
    assert data.notes()[:2] == table.notes()


def test_a_training_on_shards_says_at_its_end_what_was_left_out_of_the_captions(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (shards / "train" / "more.tar").write_bytes(tar_bytes(sample("x", "x", b"<html>")))
    filters = ["data.text.min_words=4", "data.caption_field=captions", "data.max_bad_fraction=0.5"]
    train(compose("train", *overrides(shards, tmp_path / "run", *filters, "trainer.max_epochs=2")))
    printed = capsys.readouterr().out
    assert printed.endswith(
        f"captions not learned: 8 (fewer than 4 words 8)\nrun directory: {tmp_path / 'run'}\n"
    )
    assert printed.count("left out, as they cannot be used: 1 (no picture 1)") == 1, "it was known before"


def test_pictures_come_with_their_own_captions(shards: Path) -> None:
    data = from_shards(shards, *WHOLE)
    for batch in [*data.train_dataloader(), *data.val_dataloader()]:
        for pixels, tokens in zip(batch.images, batch.tokens[:, 0].tolist(), strict=True):
            mean = pixels.float().mean(dim=(1, 2))
            word = ["red", "green", "blue"][int(mean.argmax())] if mean.max() - mean.min() > 50 else "grey"
            assert word in data.tokenizer.decode(tokens)


def test_validation_of_shards_is_validation_of_the_table(colour_table: Path, shards: Path) -> None:
    table, data = from_table(colour_table), from_shards(shards, "data.caption_field=captions")
    theirs, ours = list(table.val_dataloader()), list(data.val_dataloader())
    assert ids(ours) == ids(theirs) == [f"val_{n}.jpg" for n in range(4)]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.references == other.references
        assert torch.equal(mine.tokens, other.tokens)
        assert (mine.images.int() - other.images.int()).abs().max() <= 2
    assert losses(data, "val") == pytest.approx(losses(table, "val"), abs=1e-2)


def test_real_photographs_are_the_same_from_both(shared: Callable[[str], Path], tmp_path: Path) -> None:
    source = shared("flickr8k")
    rows = pd.read_csv(source / "captions.csv")
    rows = rows[
        rows["file_name"].isin(rows.groupby("split")["file_name"].unique().map(lambda f: f[:150]).explode())
    ]
    (tmp_path / "table").mkdir()
    rows.to_csv(tmp_path / "table" / "captions.csv", index=False)
    (tmp_path / "table" / "images").symlink_to(source / "images")
    shards = write_as_shards(tmp_path / "table", tmp_path / "shards", per_shard=40)
    table = from_table(tmp_path / "table", "data.batch_size=50", "data.captions_per_image=5")
    data = from_shards(
        shards, "data.batch_size=50", "data.captions_per_image=5", "data.caption_field=captions"
    )
    assert losses(data, "val") == pytest.approx(losses(table, "val"), abs=1e-2)
    theirs, ours = (seen(d.train_dataloader(), d) for d in (table, data))
    assert theirs == ours
    assert ours.total() == 150 * 5


def test_the_order_follows_from_seed_and_epoch_and_mixes_the_shards(shards: Path) -> None:
    orders = {
        (seed, epoch): tuple(ids(from_shards(shards, f"seed={seed}").train_dataloader().of_epoch(epoch)))
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(set(orders.values())) == 4
    assert orders[0, 1] == tuple(
        ids(from_shards(shards, "data.num_workers=3").train_dataloader().of_epoch(1))
    )
    loader = from_shards(shards).train_dataloader()
    assert tuple(ids(loader.of_epoch(1, first=1))) == orders[0, 1][4:]


# What is broken


def broken_shards(folder: Path) -> Path:
    """Two good shards, and one of each broken kind; 10 good samples to train on, 3 to validate on."""
    train = folder / "train"
    write_tar(train / "good0.tar", samples("0", "1", "2"))
    write_tar(train / "good1.tar", samples("3", "4", "5"))
    members = [
        *samples("6"),
        *sample("bad0", "x", jpeg()[:-50]),
        *sample("bad1", "x", jpeg()[:30]),
        *sample("bad2", "x", b""),
        *sample("bad3", "x", b"<html>"),
        ("bad4.jpg", jpeg()),
        ("bad5.txt", b"x"),
        ("bad6.jpg", jpeg()),
        ("bad6.txt", b" "),
        ("bad7.jpg", jpeg()),
        ("bad7.txt", b"x"),
        ("bad7.json", b"{"),
        *sample("../bad8", "x"),
        *sample("7", "x", encoded(Image.fromarray(scenery(50, 40)), "GIF")),
    ]
    write_tar(train / "samples.tar", members)
    boundary = tar_bytes(samples("8", "9"))
    (train / "boundary.tar").write_bytes(boundary[: tar_end(samples("8", "9"))])
    (train / "middle.tar").write_bytes(tar_bytes(samples("lost"))[:1000])
    (train / "empty.tar").write_bytes(tar_bytes([]))
    (train / "nothing.tar").write_bytes(b"")
    (train / "html.tar").write_bytes(b"<html>" * 200)
    (train / "part.parquet").write_bytes(b"PAR1")
    (train / "good0_stats.json").write_text("{}")
    write_tar(folder / "val" / "v.tar", samples("v0", "v1", "v2"))
    return folder


def tar_end(members: list[tuple[str, bytes]]) -> int:
    return sum(512 + -(-len(data) // 512) * 512 for _, data in members)


REASONS = {
    "truncated": 3,  # two and the one at the cut
    "empty": 1,
    "no picture": 2,
    "no caption": 1,
    "empty caption": 1,
    "broken json": 1,
    "unsafe name": 1,
    "cut tar": 2,
    "empty tar": 2,
    "no tar (invalid header)": 1,
}
LEFT = sorted(f"{shard}/{key}" for shard, keys in {
    "good0": "012", "good1": "345", "samples": "67", "boundary": "89",
}.items() for key in keys)  # fmt: skip


def test_each_good_sample_of_broken_shards_comes_once_an_epoch(tmp_path: Path) -> None:
    data = from_shards(broken_shards(tmp_path), "data.max_bad_fraction=1", "data.batch_size=3")
    assert data.bad_samples.counts == REASONS
    loader = data.train_dataloader()
    for epoch in range(2):
        assert sorted(ids(loader.of_epoch(epoch))) == LEFT
    assert data.bad_samples.counts == REASONS, "counted once"
    assert data.bad_samples.total == len(LEFT) + 3 + sum(REASONS.values())


def overrides(shards: Path, run: Path, *more: str) -> list[str]:
    plain = [o for o in tiny_overrides(shards, run) if "data.table" not in o and "image_dir" not in o]
    return [
        *(o.replace("data=csv", "data=webdataset") for o in plain),
        f"data.shards={shards}/train",
        f"data.val_shards={shards}/val",
        "data.num_threads=1",
        *more,
    ]


@pytest.fixture
def trained_on(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[str]]]:
    """Epoch and image ids of each step that is trained; `validated` as -1."""
    steps: list[tuple[int, list[str]]] = []
    step, validate = CaptionModule.training_step, CaptionModule.validation_step

    def training_step(self: CaptionModule, batch: CaptionBatch, number: int) -> Any:
        steps.append((self.current_epoch, batch.image_ids))
        return step(self, batch, number)

    def validation_step(self: CaptionModule, batch: CaptionBatch, number: int) -> Any:
        steps.append((-1 - self.current_epoch, batch.image_ids))
        return validate(self, batch, number)

    monkeypatch.setattr(CaptionModule, "training_step", training_step)
    monkeypatch.setattr(CaptionModule, "validation_step", validation_step)
    return steps


def of_epoch(steps: list[tuple[int, list[str]]], epoch: int) -> list[str]:
    return [image_id for number, image_ids in steps if number == epoch for image_id in image_ids]


def test_training_goes_through_broken_shards_and_says_what_it_left_out(
    tmp_path: Path, trained_on: list[tuple[int, list[str]]], capsys: pytest.CaptureFixture[str]
) -> None:
    shards = broken_shards(tmp_path / "shards")
    run = train(
        compose(
            "train", *overrides(shards, tmp_path / "run", "data.max_bad_fraction=1", "trainer.max_epochs=2")
        )
    )
    for epoch in range(2):
        assert sorted(of_epoch(trained_on, epoch)) == LEFT
        assert of_epoch(trained_on, -1 - epoch) == ["v/v0", "v/v1", "v/v2"]
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["left_out"] == REASONS
    assert metrics["pairs"] == 20
    printed = capsys.readouterr().out
    assert "left out, as they cannot be used: 15 (truncated 3, " in printed


def test_too_many_bad_samples_stop_the_training_with_their_counts_in_a_line(tmp_path: Path) -> None:
    shards = broken_shards(tmp_path / "shards")
    with pytest.raises(InputError) as error:
        train(compose("train", *overrides(shards, tmp_path / "run")))
    message = str(error.value)
    assert message.startswith("15 (truncated 3, ")
    for reason, count in REASONS.items():
        assert f"{reason} {count}" in message
    assert "of 25 samples cannot be used, more than data.max_bad_fraction=0.01 allows" in message
    assert "samples.tar: bad0 (truncated" in message
    assert "\n" not in message
    assert not (tmp_path / "run").exists()


def test_the_first_bad_sample_is_named_where_none_is_allowed(tmp_path: Path) -> None:
    write_tar(tmp_path / "train" / "0.tar", [*samples("a"), *sample("b", "x", b"<html>")])
    write_tar(tmp_path / "val" / "0.tar", samples("v"))
    with pytest.raises(InputError, match=r"train/0.tar: b \(no picture: .*data.on_bad_sample=skip"):
        from_shards(tmp_path, "data.on_bad_sample=raise")


def overwrite(tar: Path, member: str, new: Callable[[bytes], bytes]) -> None:
    """Other bytes in a member's place, with the tar's size and time as they were."""
    import tarfile

    times = tar.stat()
    with tarfile.open(tar) as archive:
        found = archive.getmember(member)
    whole = tar.read_bytes()
    old = whole[found.offset_data : found.offset_data + found.size]
    assert len(new(old)) == len(old)
    assert new(old) != old
    tar.write_bytes(whole[: found.offset_data] + new(old) + whole[found.offset_data + found.size :])
    os.utime(tar, ns=(times.st_atime_ns, times.st_mtime_ns))


def png(seed: int = 0) -> bytes:
    return encoded(Image.fromarray(scenery(80, 72, seed)), "PNG")


def smaller(data: bytes) -> bytes:
    return encoded(Image.fromarray(scenery(20, 16))).ljust(len(data), b"\0")


DAMAGE: dict[str, tuple[str, Callable[[bytes], bytes], str | None]] = {
    "html": ("1.jpg", lambda data: b"<html>" + data[6:], "no picture"),
    "zeros": ("1.jpg", lambda data: bytes(len(data)), "no picture"),
    "the second half": ("1.jpg", lambda data: data[: len(data) // 2].ljust(len(data), b"\0"), "truncated"),
    "another size": ("1.jpg", smaller, "changed tar"),
    "another size, for Pillow": ("w.bmp", smaller, "changed tar"),
    "a damaged png": ("p.png", lambda data: data[:3000] + b"\xff" * 9 + data[3009:], "unreadable"),
    "for Pillow": ("w.bmp", lambda data: b"<html>" + data[6:], "no picture"),
    "the text": ("1.txt", lambda data: b"\xff" * len(data), "no UTF-8"),
    "the text, blank": ("1.txt", lambda data: b" " * len(data), "empty caption"),
    # DALI fails on these, Pillow does not:
    "a png without its end": ("p.png", lambda data: data[:-12] + bytes(12), None),
    "a png's checksum": ("p.png", lambda data: data[:-16] + bytes(4) + data[-12:], None),
    "a jpeg's comment": ("1.jpg", lambda data: data[:4] + bytes(8) + data[12:], None),
    # And here it is the other way round:
    "a marker in the scan": ("1.jpg", lambda data: data[:900] + b"\xff\xff" + data[902:], None),
}  # fmt: skip


def mixed_shards(folder: Path) -> Path:
    bmp = encoded(Image.fromarray(scenery(80, 72, 3)), "BMP")
    members = [*samples("0", "1", "2"), ("p.png", png()), ("p.txt", b"p"), ("w.bmp", bmp), ("w.txt", b"w")]
    write_tar(folder / "train" / "t.tar", members)
    write_tar(folder / "train" / "u.tar", samples("3", "4", "5"))
    write_tar(folder / "val" / "t.tar", samples("v"))
    return folder


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_sample_that_turns_bad_after_indexing_is_left_out_alone(kind: str, tmp_path: Path) -> None:
    member, damage, reason = DAMAGE[kind]
    shards = mixed_shards(tmp_path)
    data = from_shards(shards, "data.max_bad_fraction=0.2", "data.batch_size=8", *WHOLE)
    everything = sorted(ids(data.train_dataloader()))
    before = pixels_of(data.train_dataloader())
    overwrite(shards / "train" / "t.tar", member, damage)
    loader = data.train_dataloader()
    bad = f"t/{member.partition('.')[0]}"
    for epoch in range(3):
        batches = list(loader.of_epoch(epoch))
        assert len(batches) == 1 == len(loader)
        left = [image_id for image_id in everything if image_id != bad or reason is None]
        assert sorted(ids(batches)) == left
        for image_id, pixels in pixels_of(batches).items():
            if image_id != bad:
                assert (pixels.int() - before[image_id].int()).abs().max() <= 2, "each has its own pixels"
    assert data.bad_samples.counts == ({reason: 1} if reason else {}), "counted once"
    if reason:
        with pytest.raises(InputError, match=rf"t.tar: {bad[2:]} \({reason}.*data.on_bad_sample=skip"):
            list(from_shards(shards, "data.on_bad_sample=raise").train_dataloader())


def pixels_of(batches: Iterable[CaptionBatch]) -> dict[str, torch.Tensor]:
    return {i: pixels for batch in batches for i, pixels in zip(batch.image_ids, batch.images, strict=True)}


def test_bad_samples_of_several_batches_are_left_out_while_others_are_under_way(tmp_path: Path) -> None:
    keys = [f"{n:02}" for n in range(30)]
    tar = write_tar(tmp_path / "train" / "t.tar", samples(*keys))
    write_tar(tmp_path / "val" / "t.tar", samples("v"))
    data = from_shards(tmp_path, "data.max_bad_fraction=1", "data.batch_size=2", "data.num_workers=2")
    bad = ["00", "01", "07", "08", "09", "17", "28", "29"]
    for key in bad:
        overwrite(tar, f"{key}.jpg", lambda data: bytes(len(data)))
    loader = data.train_dataloader()
    expected = [f"t/{key}" for key in keys if key not in bad]
    for epoch in range(2):
        batches = list(loader.of_epoch(epoch))
        assert len(batches) == len(loader), "others come twice for those of which nothing is left"
        assert sorted(set(ids(batches))) == expected
    assert data.bad_samples.counts == {"no picture": len(bad)}
    validation = from_shards(tmp_path, "data.max_bad_fraction=1", f"data.val_shards={tmp_path}/train",
                             f"data.shards={tmp_path}/val", "data.batch_size=2")  # fmt: skip
    assert ids(validation.val_dataloader()) == expected, "in turn; two batches have nothing left"


def test_shards_are_not_indexed_while_other_processes_wait_for_a_broadcast(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a wait ends after half an hour with an error; the one of `first_alone` does not."""
    indexing, sent = webdataset.ensure_indexes, [0, 0]  # broadcasts begun, ended
    seen: list[bool] = []

    def noted(*args: Any, **kwargs: Any) -> Any:
        seen.append(sent[0] == sent[1])
        return indexing(*args, **kwargs)

    def from_first(function: Callable[[], Any], *_: str) -> Any:
        sent[0] += 1
        answer = function()
        sent[1] += 1
        return answer

    monkeypatch.setattr(webdataset, "ensure_indexes", noted)
    monkeypatch.setattr("efficap.commands.train.from_first", from_first)
    train(compose("train", *overrides(shards, tmp_path / "run", "trainer.max_steps=1")))
    assert sent[0] > 1
    assert seen == [True, True], "training and validation shards"


def test_too_many_that_turn_bad_stop_the_training(tmp_path: Path) -> None:
    keys = [f"{n:02}" for n in range(20)]
    tar = write_tar(tmp_path / "shards" / "train" / "t.tar", samples(*keys))
    write_tar(tmp_path / "shards" / "val" / "t.tar", samples("v"))
    from_shards(tmp_path / "shards")
    for key in keys:
        overwrite(tar, f"{key}.jpg", lambda data: bytes(len(data)))
    with pytest.raises(InputError, match=r"\d \(no picture \d\) of 21 samples .* data.max_bad_fraction=0.01"):
        train(compose("train", *overrides(tmp_path / "shards", tmp_path / "run")))


def test_captions_that_no_filter_lets_through_leave_their_pictures_out(shards: Path) -> None:
    data = from_shards(shards, "data.text.exclude=red")
    assert sorted(ids(data.train_dataloader())) == [f"train_{n}.jpg" for n in (1, 2, 3, 5, 6, 7)]
    assert ids(data.val_dataloader()) == [f"val_{n}.jpg" for n in range(4)], "references are not chosen"


def test_a_tar_that_changed_between_two_runs_is_indexed_anew(shards: Path) -> None:
    from_shards(shards)
    tar = shards / "train" / "00000.tar"
    write_tar(tar, samples("new0", "new1"))
    data = from_shards(shards)
    assert sorted(ids(data.train_dataloader()))[:2] == ["00000/new0", "00000/new1"]
    assert data.training_size == 7


# Epochs and validations


def test_a_validation_that_is_broken_off_loses_nothing_of_the_next(shards: Path) -> None:
    data = from_shards(shards, "data.batch_size=1")
    for loader, whole in ((data.val_dataloader(), 4), (data.train_dataloader(), 8)):
        first = ids(loader)
        assert len(first) == len(set(first)) == whole
        for taken in (1, 2, 0):
            abandoned: Iterator[CaptionBatch] = iter(loader)
            for _ in range(taken):
                next(abandoned)
            assert ids(loader) == first
            del abandoned
        assert ids(loader) == first


@pytest.mark.parametrize(
    ("more", "trained", "validated"),
    [
        (("trainer.limit_val_batches=1", "data.batch_size=2"), 8, 2),
        (("trainer.limit_train_batches=1", "data.batch_size=2"), 2, 4),
        (("data.steps_per_epoch=3", "data.batch_size=2"), 6, 4),
        (("data.steps_per_epoch=5", "data.batch_size=3"), 15, 4),
        (("trainer.val_check_interval=1",), 8, 8),
    ],
)
def test_every_epoch_and_validation_has_what_it_should(
    more: tuple[str, ...],
    trained: int,
    validated: int,
    shards: Path,
    tmp_path: Path,
    trained_on: list[tuple[int, list[str]]],
) -> None:
    train(compose("train", *overrides(shards, tmp_path / "run", *more)))
    for epoch in range(3):
        assert len(of_epoch(trained_on, epoch)) == trained
        expected = [f"val_{n}.jpg" for n in range(min(4, validated))] * -(-validated // 4)
        assert of_epoch(trained_on, -1 - epoch) == expected
    if "data.steps_per_epoch=3" in more:
        together = [image_id for epoch in range(3) for image_id in of_epoch(trained_on, epoch)]
        for time in (together[:8], together[8:16]):
            assert len(set(time)) == 8, "the next epoch goes on where this one stopped"
    if trained == 8:
        orders = [of_epoch(trained_on, epoch) for epoch in range(3)]
        assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2])
        assert orders[0] != orders[1] != orders[2]


# Several ranks


class OnRank:
    """The loaders of one of several processes."""

    def __init__(self, data: CaptionDataModule, rank: int, world: int) -> None:
        self.data, self.rank, self.world = data, rank, world

    def train_dataloader(self) -> Any:
        return self._made(self.data.train_dataloader)

    def val_dataloader(self) -> Any:
        return self._made(self.data.val_dataloader)

    def _made(self, loader: Callable[[], Any]) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("efficap.data.module.rank", lambda: self.rank)
            patch.setattr("efficap.data.module.world_size", lambda: self.world)
            return loader()


@pytest.mark.parametrize("sizes", [(5, 1, 7), (1, 1, 1), (9, 0, 2)])
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_uneven_shards_without_loss(sizes: tuple[int, ...], world: int, tmp_path: Path) -> None:
    for shard, size in enumerate(sizes):
        members = samples(*(f"{shard}{n}" for n in range(size)))
        write_tar(tmp_path / "train" / f"{shard}.tar", members or sample("bad", "x", b""))
    write_tar(tmp_path / "val" / "v.tar", samples(*(f"v{n}" for n in range(5))))
    ranks = [
        OnRank(from_shards(tmp_path, "data.batch_size=2", "data.max_bad_fraction=1"), rank, world)
        for rank in range(world)
    ]
    for epoch in range(2):
        loaders = [data.train_dataloader() for data in ranks]
        batches = [list(loader.of_epoch(epoch)) for loader in loaders]
        assert len({len(of_rank) for of_rank in batches} | {len(loader) for loader in loaders}) == 1
        assert all(1 <= len(batch) <= 2 for of_rank in batches for batch in of_rank)
        everything = [image_id for of_rank in batches for image_id in ids(of_rank)]
        assert len(everything) == len(set(everything)) == sum(sizes) - loaders[0].order.lost
        assert loaders[0].order.lost < world
    validation = [image_id for data in ranks for image_id in ids(data.val_dataloader())]
    assert sorted(validation) == [f"v/v{n}" for n in range(5)]


def test_a_rank_whose_batch_is_gone_repeats_one_so_that_all_take_the_same_steps(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "train" / "t.tar", samples(*"01234567"))
    write_tar(tmp_path / "val" / "v.tar", samples("v"))
    ranks = [
        OnRank(from_shards(tmp_path, "data.batch_size=1", "data.max_bad_fraction=1"), rank, 2)
        for rank in range(2)
    ]
    order = ids(ranks[1].train_dataloader())
    overwrite(tar, f"{order[2].removeprefix('t/')}.jpg", lambda data: bytes(len(data)))
    batches = [list(data.train_dataloader()) for data in ranks]
    assert [len(of_rank) for of_rank in batches] == [4, 4]
    assert ids(batches[1]) == [order[0], order[1], order[1], order[3]]


RANKS = """
import os

from efficap.commands.entry import run
from efficap.commands.train import train
from efficap.training.module import CaptionModule


def note(name, sign):
    step = getattr(CaptionModule, name)

    def noted(self, batch, number):
        with open(f"{os.environ['SEEN']}/{self.global_rank}.txt", "a") as file:
            print(sign * (self.current_epoch + 1), *batch.image_ids, file=file)
        return step(self, batch, number)

    setattr(CaptionModule, name, noted)


if __name__ == "__main__":
    note("training_step", 1)
    note("validation_step", -1)
    run("train", train)
"""


def test_two_processes_train_on_uneven_shards(tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    for shard, size in enumerate((5, 1, 7)):
        write_tar(shards / "train" / f"{shard}.tar", samples(*(f"{shard}{n}" for n in range(size))))
    write_tar(shards / "val" / "v.tar", samples(*(f"v{n}" for n in range(5))))
    (tmp_path / "ranks.py").write_text(RANKS)
    arguments = overrides(
        shards,
        tmp_path / "run",
        "trainer.strategy=ddp",
        "trainer.max_epochs=2",
        "data.batch_size=2",
        "trainer.check_val_every_n_epoch=2",
    )
    script = str(tmp_path / "ranks.py")
    with started_together(2, script, *arguments, cwd=tmp_path, SEEN=str(tmp_path)) as ranks:
        statuses = [rank.wait(300) for rank in ranks]
    errors = "".join(rank.errors for rank in ranks)
    assert statuses == [0, 0], errors[-3000:]
    assert errors.count("checking every sample once") == 2, "of train and val, by one of both processes"
    steps = [
        [line.split() for line in (tmp_path / f"{rank}.txt").read_text().splitlines()] for rank in range(2)
    ]
    train_ids = [f"{shard}/{shard}{n}" for shard, size in enumerate((5, 1, 7)) for n in range(size)]
    for epoch in ("1", "2"):
        batches = [[image_ids for number, *image_ids in of_rank if number == epoch] for of_rank in steps]
        assert len(batches[0]) == len(batches[1]) == 4
        assert sorted(i for of_rank in batches for batch in of_rank for i in batch) == train_ids
    validated = [
        image_id for of_rank in steps for number, *batch in of_rank if number == "-2" for image_id in batch
    ]
    assert sorted(validated) == [f"v/v{n}" for n in range(5)]
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (metrics["steps"], metrics["epochs"]) == (8, 2)


# What is refused, and what comes after the training


def test_a_tar_in_two_splits_is_refused(shards: Path) -> None:
    with pytest.raises(
        InputError, match=r"train/00000.tar is in data.shards and in data.val_shards; a model is not"
    ):
        from_shards(shards, f"data.val_shards=[{shards}/val,{shards}/train/00000.tar]")


def test_pictures_of_the_same_name_are_refused_in_validation_and_no_matter_in_training(
    tmp_path: Path,
) -> None:
    write_tar(
        tmp_path / "train" / "t.tar", [*sample("a", "x", image_id="7"), *sample("b", "y", image_id="7")]
    )
    write_tar(tmp_path / "val" / "v.tar", [*sample("a", "x", image_id="7"), *sample("b", "y", image_id="7")])
    with pytest.raises(
        InputError, match=r"data.val_shards: .*v.tar: a and .*v.tar: b are both called 7; scores"
    ):
        from_shards(tmp_path)
    data = from_shards(tmp_path, splits=("train",))
    assert ids(data.train_dataloader()) == ["7", "7"]
    with pytest.raises(InputError, match=r"data.shards: .*t.tar: a and .*t.tar: b are both called 7; scores"):
        data.evaluation_dataloader("train")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["data.val_shards=null"], r"data.val_shards is not given: add data.val_shards=SHARDS"),
        (["data.shards={shards}/none/*.tar"], r"data.shards=.*none/\*.tar matches no tar; .* holds "),
        (
            ["data.val_shards={shards}/train/00007.tar"],
            r"data.val_shards=.* matches no tar; .* holds 00000.tar",
        ),
        (
            ["data.shards='{shards}/train/{{00000..00007}}.tar'"],
            r"5 of 8 do not exist, the first is .*00003.tar",
        ),
        (["data.shuffle_shards=0"], r"data.shuffle_shards=0 must be at least 1"),
        (["data.caption_field=text"], r"no caption"),
    ],
)
def test_shards_that_cannot_be_used_are_one_line(
    more: list[str], message: str, shards: Path, tmp_path: Path
) -> None:
    more = [word.format(shards=shards) for word in more]
    with pytest.raises(Exception, match=message) as error:
        train(compose("train", *overrides(shards, tmp_path / "run", *more)))
    cause = error.value if isinstance(error.value, InputError) else error.value.__cause__
    assert isinstance(cause, InputError)
    assert "\n" not in str(cause)


@pytest.mark.parametrize(
    ("members", "bad"), [(sample("a", "x", b"<html>"), r"1 \(no picture 1\)"), ([], r"1 \(empty tar 1\)")]
)
def test_shards_without_a_good_sample_are_refused(
    members: list[tuple[str, bytes]], bad: str, tmp_path: Path
) -> None:
    write_tar(tmp_path / "train" / "t.tar", members)
    write_tar(tmp_path / "val" / "v.tar", samples("v"))
    with pytest.raises(InputError, match=rf"data.shards=.*: no good sample; {bad}"):
        from_shards(tmp_path, "data.max_bad_fraction=1")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(shards, run directory), trained by relative paths from another folder."""
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "ProcessPoolExecutor", ThisProcess)
        write_as_shards(write_colour_table(folder / "colours"), folder / "shards")
        patch.chdir(folder)
        run = train(
            compose(
                "train",
                *overrides(Path("shards"), folder / "run"),
                "data.test_shards=shards/test",
                "data.caption_field=captions",
                "data.index_dir=indexes",
            )
        )
    return folder / "shards", run


def test_a_run_on_shards_evaluates_from_another_folder_with_its_gallery(
    trained: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, run = trained
    monkeypatch.chdir(tmp_path)
    scores = evaluate(compose("eval", f"run={run}", "metrics=[CIDEr]"))
    assert (scores["split"], scores["images"]) == ("test", 4)
    rows = json.loads((run / "eval/test/captions.json").read_text())
    assert [row["image_id"] for row in rows] == [f"test_{n}.jpg" for n in range(4)]
    assert (run / "eval/test/report.html").read_text().count('<script type="text/plain" id="picture') == 4
    assert (run / "eval/test/sheet.png").is_file()
    assert len(list((run / "samples").glob("*.html"))) == 3
    assert len(list((run.parent / "indexes").iterdir())) == 7
    assert not list((run.parent / "shards").rglob("*.arrow"))


def test_an_evaluation_of_a_shard_that_changes_meanwhile_lacks_its_pictures_alone(
    trained: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, run = trained
    write = commands.evaluate._write_captions
    tars = [(tar, tar.read_bytes(), tar.stat()) for tar in (shards / "test").glob("*.tar")]

    def write_and_change(*arguments: Any) -> None:
        write(*arguments)
        for tar, content, _ in tars:
            tar.write_bytes(bytes(len(content)))

    monkeypatch.setattr("efficap.commands.evaluate._write_captions", write_and_change)
    monkeypatch.setattr("efficap.commands.evaluate.contact_sheet", contact_sheet)
    try:
        assert evaluate(compose("eval", f"run={run}", "metrics=[CIDEr]"))["images"] == 4
    finally:
        for tar, content, times in tars:
            tar.write_bytes(content)
            os.utime(tar, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert (run / "eval/test/report.html").read_text().count("changed tar: ") == 4
    with Image.open(run / "eval/test/sheet.png") as sheet:
        assert sheet.width > 300


@pytest.mark.parametrize("split", ["train", "val"])
def test_any_split_of_a_run_on_shards_can_be_evaluated(split: str, trained: tuple[Path, Path]) -> None:
    _, run = trained
    scores = evaluate(compose("eval", f"run={run}", f"split={split}", "metrics=[CIDEr]"))
    assert scores["images"] == {"train": 8, "val": 4}[split]
    if split == "val":
        best = json.loads((run / "metrics.json").read_text())["best"]
        assert scores["CIDEr"] == pytest.approx(best["val/CIDEr"], abs=1e-5)


def test_a_split_that_shards_do_not_have_is_named(trained: tuple[Path, Path]) -> None:
    _, run = trained
    with pytest.raises(InputError, match=r"split=dev: shards know no such split; there is train, val, test"):
        evaluate(compose("eval", f"run={run}", "split=dev"))


def test_other_shards_can_be_named_for_an_evaluation(trained: tuple[Path, Path], tmp_path: Path) -> None:
    _, run = trained
    write_tar(tmp_path / "more.tar", samples("x", "y"))
    more = f"+data.test_shards={tmp_path}/more.tar"
    scores = evaluate(compose("eval", f"run={run}", more, "+data.caption_field=null", "metrics=[CIDEr]"))
    assert scores["images"] == 2


def test_an_evaluation_needs_the_shards_of_its_split_alone(trained: tuple[Path, Path]) -> None:
    shards, run = trained
    moved = (shards / "train").rename(shards / "elsewhere")
    try:
        assert evaluate(compose("eval", f"run={run}", "metrics=[CIDEr]"))["images"] == 4
    finally:
        moved.rename(shards / "train")


def test_the_number_of_open_files_stays_bounded(tmp_path: Path) -> None:
    """Of tars, threads and decoders, however often the data are gone through."""
    count = OPEN + 20
    picture = encoded(Image.new("RGB", (8, 8)), "PNG")
    for n in range(count):
        write_tar(tmp_path / "train" / f"{n:03}.tar", [("a.png", picture), ("a.txt", b"x")])
    write_tar(tmp_path / "val" / "v.tar", samples("v"))
    data = from_shards(tmp_path, "data.batch_size=10", "data.num_workers=2")
    loader = data.train_dataloader()
    open_files = []
    for epoch in range(6):
        assert len(ids(loader.of_epoch(epoch))) == count
        next(loader.of_epoch(epoch))  # and breaks off
        open_files.append(len(os.listdir("/proc/self/fd")))
    assert max(open_files[2:]) <= open_files[1] + 8
    assert len(data.reader("train")._open) == OPEN


def test_processes_that_see_different_shards_are_told_before_they_wait_for_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for split in ("train", "val"):
        write_tar(tmp_path / split / "a.tar", samples("a", "b"))
    monkeypatch.setattr("efficap.data.webdataset.gathered", lambda own: [own, [*own, "another.tar"]])
    with pytest.raises(InputError, match=r"data.shards=\S+: processes see different shards; .*start again"):
        from_shards(tmp_path)
