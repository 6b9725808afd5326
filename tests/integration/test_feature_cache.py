"""Training on cached features: the same losses, each picture encoded once, and only what has changed again."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import compose, tiny_overrides, write_colour_table
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from efficap.batch import CaptionBatch
from efficap.commands.evaluate import evaluate
from efficap.commands.train import train
from efficap.data.csv import CSVDataModule
from efficap.errors import InputError
from efficap.models.build import build_model, preprocessing, resolve_model
from efficap.models.captioner import CaptionModel
from efficap.models.encoder import ImageEncoder
from efficap.tokenizer import CaptionTokenizer
from efficap.training.feature_cache import cache_features

pytestmark = pytest.mark.slow

CACHED = ["data.feature_cache=true", "model.encoder.frozen=true"]
WHOLE = ["data.crop_scale=[1,1]", "data.crop_ratio=[1,1]"]


class Encodings:
    """Counts the pictures that reach an encoder; the summary's, without storage, are none."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pictures = 0
        forward = ImageEncoder.forward

        def counted(encoder: ImageEncoder, images: Tensor) -> Tensor:
            self.pictures += 0 if images.is_meta else len(images)
            return forward(encoder, images)

        monkeypatch.setattr(ImageEncoder, "forward", counted)


@pytest.fixture
def encodings(monkeypatch: pytest.MonkeyPatch) -> Encodings:
    return Encodings(monkeypatch)


def prepared(folder: Path, *overrides: str, seed: int = 0) -> tuple[CSVDataModule, CaptionModel]:
    """Data and model as train.py makes them, the features cached where the overrides say so."""
    cfg = compose(
        "train", *tiny_overrides(folder, folder / "unused"), "model.encoder.frozen=true", *overrides
    )
    model = resolve_model(cfg["model"])
    cfg["data"].pop("_target_")
    data = CSVDataModule(**cfg["data"])
    data.prepare(
        CaptionTokenizer.learn(data.training_captions(), 300), **preprocessing(model), splits=["train", "val"]
    )
    torch.manual_seed(seed)
    captioner = build_model(model, data.tokenizer.vocab_size)
    for parameter in (*captioner.bridge.parameters(), *captioner.decoder.parameters()):
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)  # cross-attention starts at zero, and would not look
    cache_features(
        captioner.encoder,
        data,
        name=model["encoder"]["name"],
        preprocessing=preprocessing(model),
        device=torch.device("cpu"),
    )
    return data, captioner.train()


def loss(captioner: CaptionModel, batch: CaptionBatch) -> Tensor:
    logits = captioner(batch.images, batch.tokens[..., :-1])  # (B, K, T - 1, V)
    targets, positions = batch.tokens[..., 1:].clone(), torch.arange(batch.tokens.shape[-1] - 1)
    targets[positions >= batch.lengths[..., None] - 1] = -100
    return F.cross_entropy(logits.flatten(0, 2), targets.flatten())


def images_of(data: CSVDataModule) -> dict[str, Tensor]:
    batches = [*data.train_dataloader(), *data.val_dataloader()]
    return {
        image_id: image
        for batch in batches
        for image_id, image in zip(batch.image_ids, batch.images, strict=True)
    }


def store_folders(folder: Path) -> list[Path]:
    return sorted((folder / ".features").iterdir())


def test_maps_and_losses_are_those_of_the_pictures_up_to_rounding(colour_table: Path) -> None:
    (plain, captioner), (cached, same) = (
        prepared(colour_table, f"data.feature_cache={on}") for on in ("false", "true")
    )
    assert same.encoder.state_dict().keys() == captioner.encoder.state_dict().keys(), (
        "the cache left it whole"
    )
    for ours, theirs in zip(cached.val_dataloader(), plain.val_dataloader(), strict=True):
        assert ours.image_ids == theirs.image_ids
        assert ours.references == theirs.references
        assert torch.equal(ours.tokens, theirs.tokens)
        assert ours.images.dtype == torch.bfloat16
        maps = captioner.encoder(theirs.images)
        torch.testing.assert_close(ours.images.float(), maps, rtol=2**-8, atol=1e-6)
        expected, actual = loss(captioner, theirs), loss(same, ours)
        assert actual.item() == pytest.approx(expected.item(), rel=5e-4)
        turned = loss(same, CaptionBatch(ours.images.flip(0), ours.tokens, ours.lengths, ours.image_ids))
        assert abs(turned - expected) > 5e-3 * expected, "the loss does depend on the picture"


def test_training_batches_have_the_same_pictures_and_captions_in_every_epoch(colour_table: Path) -> None:
    overrides = ["data.captions_per_image=1"]
    plain, cached = (prepared(colour_table, *overrides, *more)[0] for more in ([], CACHED))
    maps = images_of(cached)
    for epoch in (0, 1, 2):
        ours, theirs = (data.train_dataloader().of_epoch(epoch) for data in (cached, plain))
        for a, b in zip(ours, theirs, strict=True):
            assert a.image_ids == b.image_ids
            assert torch.equal(a.tokens, b.tokens)
            assert a.references is None
            assert a.images.is_contiguous(memory_format=torch.channels_last), "as the model reads them"
            for image_id, image in zip(a.image_ids, a.images, strict=True):
                assert torch.equal(image, maps[image_id])


def test_loader_processes_yield_the_same_batches(colour_table: Path) -> None:
    one, other = (
        list(prepared(colour_table, *CACHED, f"data.num_workers={n}")[0].train_dataloader()) for n in (0, 2)
    )
    for a, b in zip(one, other, strict=True):
        assert a.image_ids == b.image_ids
        assert torch.equal(a.images, b.images)
        assert b.images.is_contiguous(memory_format=torch.channels_last)


def test_captions_that_are_not_learned_leave_each_map_with_its_picture(
    colour_table: Path, encodings: Encodings
) -> None:
    filters = ["data.text.exclude=red"]  # of the pictures 0 and 4
    data = prepared(colour_table, *CACHED, *filters)[0]
    assert encodings.pictures == 6 + 4, "to train and to validate on"
    plain = prepared(colour_table, *filters)[0]
    maps, others = images_of(data), images_of(prepared(colour_table, *CACHED)[0])
    assert maps.keys() == {image_id for image_id in others if image_id not in ("train_0.jpg", "train_4.jpg")}
    for image_id, image in maps.items():
        assert torch.equal(image, others[image_id])
    pairs = zip(data.evaluation_dataloader("train"), plain.evaluation_dataloader("train"), strict=True)
    for batch, expected in pairs:
        assert batch.image_ids == expected.image_ids
        assert batch.references == expected.references
        assert torch.equal(batch.images, expected.images), "read, as training has maps of some alone"


def test_a_changed_picture_alone_is_encoded_anew(colour_table: Path, encodings: Encodings) -> None:
    before = images_of(prepared(colour_table, *CACHED)[0])
    assert encodings.pictures == 12, (
        "8 to train on and 4 to validate on; those of the test split are not asked for"
    )
    Image.new("RGB", (70, 70), (250, 250, 0)).save(colour_table / "images" / "train_3.jpg")
    after = images_of(prepared(colour_table, *CACHED)[0])
    assert encodings.pictures == 13
    changed = [image_id for image_id in before if not torch.equal(before[image_id], after[image_id])]
    assert changed == ["train_3.jpg"]
    prepared(colour_table, *CACHED)
    assert encodings.pictures == 13
    assert len(store_folders(colour_table)) == 1


def test_a_picture_written_anew_with_the_same_size_is_seen_by_its_time(
    colour_table: Path, encodings: Encodings
) -> None:
    prepared(colour_table, *CACHED)
    os.utime(colour_table / "images" / "val_0.jpg", ns=(1, 1))
    prepared(colour_table, *CACHED)
    assert encodings.pictures == 13


@pytest.mark.parametrize(
    ("override", "seed"),
    [
        ("seed=0", 1),
        ("model.image_size=96", 0),
        ("model.encoder.output_stride=16", 0),
        ("model.encoder.crop_pct=0.9", 0),
        ("model.encoder.interpolation=bilinear", 0),
        ("model.encoder.mean=[0.4,0.5,0.5]", 0),
    ],
)
def test_other_weights_or_another_preprocessing_have_a_store_of_their_own(
    colour_table: Path, encodings: Encodings, override: str, seed: int
) -> None:
    prepared(colour_table, *CACHED)
    prepared(colour_table, *CACHED, override, seed=seed)
    assert encodings.pictures == 24
    assert len(store_folders(colour_table)) == 2
    prepared(colour_table, *CACHED)
    assert encodings.pictures == 24


@pytest.mark.parametrize("batches", [0, 1, 2])
def test_filling_goes_on_where_it_was_killed(
    colour_table: Path, encodings: Encodings, monkeypatch: pytest.MonkeyPatch, batches: int
) -> None:
    whole = images_of(
        prepared(colour_table, *CACHED, "data.feature_cache_dir=" + str(colour_table / "other"))[0]
    )
    done, forward = 0, ImageEncoder.forward

    def killed(encoder: ImageEncoder, images: Tensor) -> Tensor:
        nonlocal done
        if done == batches:
            raise KeyboardInterrupt
        done += 1
        return forward(encoder, images)

    with monkeypatch.context() as patch:
        patch.setattr(ImageEncoder, "forward", killed)
        with pytest.raises(KeyboardInterrupt):
            prepared(colour_table, *CACHED)
    encodings.pictures = 0
    completed = images_of(prepared(colour_table, *CACHED)[0])
    assert encodings.pictures == 12 - 4 * batches
    assert completed.keys() == whole.keys()
    for image_id, image in whole.items():
        assert torch.equal(completed[image_id], image)


def test_a_picture_that_breaks_is_counted_once_and_left_out(colour_table: Path, encodings: Encodings) -> None:
    (colour_table / "images" / "train_5.jpg").write_bytes(b"no picture")
    data, _ = prepared(colour_table, *CACHED, "data.check_images=false", "data.max_bad_fraction=0.2")
    assert encodings.pictures == 11
    for _ in range(2):
        ids = [image_id for batch in data.train_dataloader() for image_id in batch.image_ids]
        assert sorted(ids) == [f"train_{n}.jpg" for n in (0, 1, 2, 3, 4, 6, 7)]
    assert data.bad_samples.counts == {"no picture": 1}


def test_too_many_bad_pictures_stop_the_filling(colour_table: Path) -> None:
    for picture in (colour_table / "images").glob("train_*"):
        picture.unlink()
    with pytest.raises(InputError, match=r"missing 4\) of 12 samples cannot be used"):
        prepared(colour_table, *CACHED, "data.check_images=false", "data.max_bad_fraction=0.2")


def test_what_will_be_written_is_said_beforehand(
    colour_table: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data, _ = prepared(colour_table, *CACHED)
    (folder,) = store_folders(colour_table)
    assert folder.name.startswith("test_efficientnet-64px-")
    line = f"caching features: 12 of 12 pictures to encode, 0.00 GiB to write to {folder}\n"
    assert capfd.readouterr().err == line
    (note,) = data.notes()
    assert "data.crop_scale, crop_ratio and scaled_decoding are not used" in note
    prepared(colour_table, *CACHED)
    assert capfd.readouterr().err == "", "a full store is only read"


def test_a_disk_without_room_is_found_before_anything_is_encoded(
    colour_table: Path, encodings: Encodings, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(colour_table)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(
        InputError, match=r"data.feature_cache=true needs .* for 12 pictures, and .* has 0.00 GiB free"
    ):
        prepared(colour_table, *CACHED)
    assert encodings.pictures == 0


def test_a_folder_that_cannot_be_written_names_the_setting(colour_table: Path) -> None:
    (colour_table / "file").touch()
    with pytest.raises(
        InputError, match=r"file/.* cannot be written \(.*; name another folder with data.feature_cache_dir"
    ):
        prepared(colour_table, *CACHED, f"data.feature_cache_dir={colour_table / 'file'}")


def test_an_encoder_that_learns_is_refused_before_any_work(
    colour_table: Path, tmp_path: Path, encodings: Encodings
) -> None:
    message = r"must come with model.encoder.frozen=true, as .*; data.feature_cache=false trains it"
    with pytest.raises(InputError, match=message):
        train(compose("train", *tiny_overrides(colour_table, tmp_path / "run"), "data.feature_cache=true"))
    assert encodings.pictures == 0
    assert not (colour_table / ".features").exists()


def test_pictures_that_grow_are_refused_before_any_work(
    colour_table: Path, tmp_path: Path, encodings: Encodings
) -> None:
    command = [*tiny_overrides(colour_table, tmp_path / "run"), *CACHED, "training.start_size=32"]
    with pytest.raises(
        InputError, match=r"training.start_size=32 must not come with data.feature_cache=true"
    ):
        train(compose("train", *command))
    assert encodings.pictures == 0


def test_a_flip_is_refused(colour_table: Path) -> None:
    with pytest.raises(InputError, match=r"data.flip=true must not come with data.feature_cache=true"):
        prepared(colour_table, *CACHED, "data.flip=true")


@pytest.mark.parametrize(
    "overrides",
    [
        ["data=webdataset", "data.shards=none", "data.val_shards=none", "data.feature_cache=true"],
        ["data=mix", "data.sources.first.shards=none", "data.sources.second.table=none.csv",
         "data.sources.second.image_dir=none", "data.sources.second.feature_cache=true"],
        ["data=mix", "data.sources.first.shards=none", "data.sources.second.table=none.csv",
         "data.sources.second.image_dir=none", "data.sources.first.feature_cache=true"],
    ],
)  # fmt: skip
def test_shards_and_mixtures_are_refused(tmp_path: Path, overrides: list[str]) -> None:
    with pytest.raises(InputError, match=r"only tables \(data=csv\) are cached"):
        train(compose("train", "name=test", f"output_dir={tmp_path}", "model=tiny", "trainer=cpu", "logger=csv",
                      "model.encoder.frozen=true", *overrides))  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path], dict[str, int]]:
    """Table folder, run directories, and pictures encoded: without the cache, filling it, and with it filled.

    The pictures are as large as the model's, so that the training crop, too, is the whole of each.
    """
    folder = write_colour_table(tmp_path_factory.mktemp("colours"))
    for file in (folder / "images").iterdir():
        Image.open(file).resize((64, 64)).save(file)
    out = tmp_path_factory.mktemp("outputs")
    settings = {"plain": ["model.encoder.frozen=true", *WHOLE], "filling": CACHED, "filled": CACHED}
    paths, encoded = {}, {}
    for name, overrides in settings.items():
        with pytest.MonkeyPatch.context() as patch:
            counted = Encodings(patch)
            tiny = [*tiny_overrides(folder, out / name), "model.decoder.dropout=0.1"]  # which draws
            paths[name] = train(compose("train", *tiny, *overrides))
        encoded[name] = counted.pictures
    return folder, paths, encoded


def logged(run: Path, column: str) -> Any:
    return pd.read_csv(run / "metrics.csv")[column].dropna().to_numpy()


def test_training_learns_the_same_with_the_cache(runs: Any) -> None:
    _, paths, _ = runs
    for column, count in (("train/loss", 6), ("val/loss", 3)):
        plain, filling, filled = (logged(paths[name], column) for name in ("plain", "filling", "filled"))
        assert len(plain) == count
        assert filling == pytest.approx(plain, rel=5e-3)
        assert (filling == filled).all(), "filling draws nothing that training draws"
        assert plain[-1] < plain[0] - 0.1, "and it does learn"


def test_each_picture_is_encoded_once_in_all_runs(runs: Any) -> None:
    _, _, encoded = runs
    assert encoded["filling"] == 12
    assert encoded["filled"] == 0
    assert encoded["plain"] >= 36, "in each epoch"


def test_a_frozen_encoder_is_the_same_after_training_with_and_without_the_cache(runs: Any) -> None:
    _, paths, _ = runs
    plain, cached = (load_file(paths[name] / "model.safetensors") for name in ("plain", "filling"))
    encoder = {key: value for key, value in cached.items() if key.startswith("encoder.")}
    for key, value in encoder.items():
        assert torch.equal(value, plain[key])
    statistics = [value for key, value in encoder.items() if key.endswith("running_mean")]
    assert statistics
    assert all((value == 0).all() for value in statistics), "as they were before the first step"


def test_evaluation_reads_the_pictures_and_needs_no_cache(runs: Any, encodings: Encodings) -> None:
    folder, paths, _ = runs
    away = (folder / ".features").rename(folder / "away")
    try:
        scores = evaluate(compose("eval", f"run={paths['filled']}", "split=val", "metrics=[CIDEr]"))
        assert scores["images"] == 4
        assert encodings.pictures == 4
        assert not (folder / ".features").exists()
    finally:
        away.rename(folder / ".features")
    samples = paths["filled"] / "samples"
    assert "data:image/jpeg;base64," in next(samples.glob("*.html")).read_text()


def test_a_relative_folder_is_kept_absolute(
    colour_table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = train(
        compose("train", *tiny_overrides(colour_table, tmp_path / "run"), *CACHED, "data.feature_cache_dir=maps",
                "trainer.max_epochs=1")
    )  # fmt: skip
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["feature_cache_dir"] == str(
        tmp_path / "maps"
    )
    assert len(list((tmp_path / "maps").iterdir())) == 1
