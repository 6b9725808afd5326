"""Several data sets in one training: which batches come when, and a run from both kinds of data."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import compose, tiny_overrides, write_colour_table

from efficap.commands.evaluate import evaluate
from efficap.commands.train import train
from efficap.data.csv import CSVDataModule
from efficap.data.mix import MixedDataModule
from efficap.data.shards.writer import ShardSettings, write_shards
from efficap.data.table import read_table
from efficap.errors import InputError
from efficap.tokenizer import CaptionTokenizer

pytestmark = pytest.mark.slow


def source(folder: Path, batch_size: int) -> CSVDataModule:
    settings: dict[str, Any] = compose(
        "train",
        "data=csv",
        "name=test",
        "output_dir=unused",
        f"data.table={folder}/captions.csv",
        f"data.image_dir={folder}/images",
        "data.num_workers=0",
        f"data.batch_size={batch_size}",
        "data.captions_per_image=1",
    )["data"]
    settings.pop("_target_")
    return CSVDataModule(**settings)


def mixed(tmp_path: Path, **settings: Any) -> MixedDataModule:
    """8 pictures in batches of 2 and 8 in batches of 4; the second set's captions are its own."""
    one, other = (write_colour_table(tmp_path / name) for name in ("one", "other"))
    table = (other / "captions.csv").read_text().replace("a ", "the ")
    (other / "captions.csv").write_text(table)
    defaults = {"epochs": None, "weights": None, "steps_per_epoch": None, "evaluate_on": "other"}
    data = MixedDataModule(
        sources={"one": source(one, 2), "other": source(other, 4)}, **{**defaults, **settings}
    )
    tokenizer = CaptionTokenizer.learn(data.training_captions(), 300)
    data.prepare(tokenizer, image_size=64, interpolation="bicubic", crop_pct=1.0, splits=["train", "val"])
    return data


def sizes(loader: Any, epoch: int = 0) -> list[int]:
    return [len(batch) for batch in loader.of_epoch(epoch)]


def test_one_set_comes_after_the_other_for_its_epochs(tmp_path: Path) -> None:
    loader = mixed(tmp_path, epochs={"one": 2, "other": 1}).train_dataloader()
    assert sizes(loader) == [2] * 8 + [4] * 2
    assert len(loader) == 10


def test_captions_go_round_over_the_epochs_of_a_set(tmp_path: Path) -> None:
    data = mixed(tmp_path, epochs={"one": 2, "other": 1})
    seen: Counter[tuple[str, tuple[int, ...]]] = Counter()
    for batch in list(data.train_dataloader().of_epoch(0))[:8]:
        for image_id, tokens in zip(batch.image_ids, batch.tokens[:, 0].tolist(), strict=True):
            seen[image_id, tuple(tokens)] += 1
    assert len(seen) == 16, "both captions of each of 8 pictures"
    assert set(seen.values()) == {1}


def test_weights_share_the_batches(tmp_path: Path) -> None:
    loader = mixed(tmp_path, weights={"one": 3, "other": 1}, steps_per_epoch=8).train_dataloader()
    assert len(loader) == 8
    assert Counter(sizes(loader)) == {2: 6, 4: 2}
    assert max(sizes(loader)[:3]) == 4 or sizes(loader)[3] == 4, "spread, not one after the other"


def test_weighted_sets_go_on_where_they_stopped(tmp_path: Path) -> None:
    """With 6 batches of 2 an epoch, a set of 8 pictures has been seen 3 times after 2 epochs."""
    loader = mixed(tmp_path, weights={"one": 3, "other": 1}, steps_per_epoch=8).train_dataloader()
    seen = Counter(
        image_id
        for epoch in (0, 1)
        for batch in loader.of_epoch(epoch)
        if len(batch) == 2
        for image_id in batch.image_ids
    )
    assert set(seen.values()) == {3}
    assert len(seen) == 8


def test_what_is_left_out_of_a_set_that_is_only_evaluated_on_is_told(tmp_path: Path) -> None:
    data = mixed(tmp_path, epochs={"one": 1})
    (tmp_path / "other" / "images" / "val_2.jpg").write_bytes(b"")
    (tmp_path / "one" / "images" / "train_2.jpg").write_bytes(b"")
    for module in data.evaluated, data.sources["one"]:
        module.bad_samples.max_bad_fraction = 0.5
    assert not data.left_out()
    list(data.train_dataloader())
    list(data.val_dataloader())
    assert data.left_out() == {"one: empty": 1, "other: empty": 1}
    assert data.notes() == [
        f"{name}: left out, as they cannot be used: 1 (empty 1)" for name in ("one", "other")
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"data.epochs=None and data.weights=None: give one of them"),
        ({"epochs": {"one": 1}, "weights": {"one": 1}}, r"give one of them"),
        ({"epochs": {"two": 1}}, r"data.epochs.two=1: data.sources has one, other"),
        ({"epochs": {"one": 0.5}}, r"data.epochs.one=0.5 must be a whole number above 0"),
        ({"weights": {"one": 0}}, r"data.weights.one=0 must be above 0"),
        ({"weights": {}}, r"data.weights is empty"),
        ({"epochs": {"one": 1}, "steps_per_epoch": 3}, r"data.steps_per_epoch=3 .* goes with data.weights"),
        ({"epochs": {"one": 1}, "evaluate_on": "two"}, r"data.evaluate_on=two is none of one, other"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        mixed(tmp_path, **settings)


def test_any_kind_of_data_may_be_in_a_mixture() -> None:
    chosen = ["data=mix", "data@data.sources.first=csv", "data@data.sources.second=webdataset"]
    chosen += ["+data@data.sources.third=csv"]
    values = ["data.sources.second.shards=a", "data.sources.second.val_shards=b"]
    values += [f"data.sources.{s}.{v}" for s in ("first", "third") for v in ("table=c", "image_dir=d")]
    sources = compose("train", "name=x", "output_dir=x", *chosen, *values)["data"]["sources"]
    kinds = {name: source["_target_"].rpartition(".")[2] for name, source in sources.items()}
    assert kinds == {
        "first": "CSVDataModule",
        "second": "WebDatasetDataModule",
        "third": "CSVDataModule",
    }
    assert "table" not in sources["second"]
    assert "val_shards" not in sources["first"]


def test_a_mixture_of_shards_and_a_table_trains_and_evaluates(colour_table: Path, tmp_path: Path) -> None:
    columns = {"image_column": "file_name", "caption_column": "caption", "split_column": "split"}
    tables, _ = read_table(colour_table / "captions.csv", colour_table / "images", **columns)
    write_shards(tables["train"], tmp_path / "shards", ShardSettings(5, None, 10**6), workers=1)
    common = [o for o in tiny_overrides(colour_table, tmp_path / "run") if not o.startswith("data")]
    both = ["batch_size=4", "num_workers=1", "max_tokens=16", "max_bad_fraction=0.5"]
    overrides = [
        *common,
        "data=mix",
        f"data.sources.first.shards={tmp_path / 'shards'}",
        f"data.sources.second.table={colour_table}/captions.csv",
        f"data.sources.second.image_dir={colour_table}/images",
        *(f"data.sources.{name}.{setting}" for name in ("first", "second") for setting in both),
        "trainer.max_epochs=1",
    ]
    run = train(compose("train", *overrides))
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["steps"] == 2 * 2 + 2, "8 pictures in batches of 4: twice from shards, once from the table"
    assert evaluate(compose("eval", f"run={run}", "metrics=[CIDEr]"))["images"] == 4


def test_the_training_split_of_a_set_that_is_only_evaluated_on_is_evaluated(tmp_path: Path) -> None:
    data = mixed(tmp_path, epochs={"one": 1})
    tokenizer = CaptionTokenizer.learn(data.training_captions(), 300)
    data.prepare(tokenizer, image_size=64, interpolation="bicubic", crop_pct=1.0, splits=["train"])
    batches = list(data.evaluation_dataloader("train"))
    assert sum(map(len, batches)) == 8
    captions = [caption for batch in batches for own in batch.references or [] for caption in own]
    assert captions
    assert not [caption for caption in captions if caption.startswith("a ")], "the other set's have none"
