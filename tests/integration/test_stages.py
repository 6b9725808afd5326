"""Several trainings in turn as one: each with its own data and learning rates, stopped and gone on with in each."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from conftest import compose, going_on, tiny_overrides, write_colour_table
from safetensors.torch import load_file
from test_resume import CHANCE, KilledError, assert_equal_runs, die_at, kill, log_of, terminate

from efficap.batch import CaptionBatch
from efficap.commands.caption import caption
from efficap.commands.evaluate import evaluate
from efficap.commands.resume import with_settings_of
from efficap.commands.run_dir import RunDirectory
from efficap.commands.train import train
from efficap.errors import InputError
from efficap.evaluation.compare.groups import group_runs
from efficap.evaluation.compare.runs import read_run
from efficap.training.checkpoints import LAST, Checkpoint
from efficap.training.module import CaptionModule

pytestmark = pytest.mark.slow
UNLIMITED = [o for o in CHANCE if not o.startswith("trainer.max_epochs")]
LR = {"first": 2e-3, "second": 5e-4}
STEPS = {"first": 8, "second": 5}  # two epochs of four steps; five steps, in the second epoch of three


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two tables; of the second one's training pictures two are missing, and its captions are others."""
    folder = tmp_path_factory.mktemp("tables")
    folders = {name: write_colour_table(folder / name) for name in LR}
    table = pd.read_csv(folders["second"] / "captions.csv")
    table = table[~table["file_name"].isin(["train_0.jpg", "train_1.jpg"])]
    table["caption"] = table["caption"].str.replace("picture", "surface")
    table.to_csv(folders["second"] / "captions.csv", index=False)
    return folders


def overrides(folders: dict[str, Path], run: Path, *more: str) -> list[str]:
    stages = [
        "+stages.first.trainer={max_epochs: 2}",
        f"+stages.first.optimizer.lr={{encoder: 0.001, bridge: {LR['first']}, decoder: {LR['first']}}}",
        "+stages.second.trainer={max_steps: 5}",
        f"+stages.second.optimizer.lr={{encoder: 0.0, bridge: {LR['second']}, decoder: {LR['second']}}}",
        f"+stages.second.data={{table: {folders['second']}/captions.csv, image_dir: {folders['second']}/images}}",
        "+stages.second.model.encoder.frozen=true",
    ]
    return [*unlimited(folders["first"], run), *UNLIMITED, *stages, *more]


def unlimited(folder: Path, run: Path) -> list[str]:
    """Overrides without a limit, which each stage has of its own."""
    return [o for o in tiny_overrides(folder, run) if not o.startswith("trainer.max_epochs")]


@pytest.fixture(scope="module")
def whole(folders: dict[str, Path]) -> Path:
    return train(compose("train", *overrides(folders, folders["first"].parent / "whole")))


def test_the_log_goes_on_and_each_stage_has_its_own_rates_and_data(
    folders: dict[str, Path], whole: Path
) -> None:
    log = log_of(whole)
    total = sum(STEPS.values())
    assert list(log.index) == list(range(total))
    rates = log["lr-AdamW/decoder"]
    assert rates[: STEPS["first"]].max() == pytest.approx(LR["first"], rel=0.05)
    assert rates[STEPS["first"] :].max() == pytest.approx(LR["second"], rel=0.2)
    assert rates.iloc[-1] < LR["second"] / 2, "each cosine comes to its end"
    assert log["val/CIDEr"].dropna().index.tolist() == [3, 7, 10, 12]
    metrics = json.loads((whole / "metrics.json").read_text())
    pairs = 2 * 8 * 2 + (6 + 4) * 2
    assert {key: metrics[key] for key in ("finished", "stage", "steps", "pairs")} == {
        "finished": True,
        "stage": "second",
        "steps": total,
        "pairs": pairs,
    }
    assert metrics["best"]["step"] > STEPS["first"], "of the last stage"
    pages = sorted(page.name for page in (whole / "samples").glob("*.html"))
    assert pages == [f"step_{step:07d}.html" for step in (4, 8, 11, 13)]
    samples = (whole / "samples" / pages[-1]).read_text()
    assert "surface" in samples
    assert "surface" not in (whole / "samples" / pages[0]).read_text()


def test_a_stage_starts_from_the_weights_that_the_one_before_ended_with(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """A second stage that learns nothing leaves the weights of a training that is the first stage alone."""
    same = [*unlimited(folders["first"], tmp_path / "plain"), *UNLIMITED, "trainer.limit_val_batches=0"]
    plain = train(compose("train", *same, "trainer.max_epochs=2"))
    rates = "{encoder: 0.0, bridge: 0.0, decoder: 0.0}"
    still = f"{{trainer: {{max_steps: 1}}, model: {{encoder: {{frozen: true}}}}, optimizer: {{lr: {rates}}}}}"
    stages = f"stages={{first: {{trainer: {{max_epochs: 2}}}}, still: {still}}}"
    both = train(compose("train", *same, stages, f"output_dir={tmp_path / 'both'}"))
    ours, theirs = load_file(both / "model.safetensors"), load_file(plain / "model.safetensors")
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize(
    ("where", "after", "status", "stage"),
    [
        ("training_step", 5, None, "first"),
        ("training_step", 8, None, "first"),  # the first step of the second stage: no checkpoint of it yet
        ("training_step", 9, 143, "second"),
        ("training_step", 11, None, "second"),
        ("validation_step", 3, 143, "first"),  # the last validation of the first stage
        ("on_validation_epoch_end", 2, None, "second"),
    ],
)
def test_a_training_stopped_in_any_stage_ends_as_one_that_was_not(
    folders: dict[str, Path],
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    after: int,
    status: int | None,
    stage: str,
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        die_at(patch, where, after, terminate if status else kill)
        with pytest.raises(SystemExit if status else KilledError):
            train(compose("train", *overrides(folders, run)))
    assert Checkpoint.read(run / "checkpoints" / LAST).stage.name == stage
    again = train(going_on(run))
    assert again == run
    assert_equal_runs(run, whole)


def test_the_order_goes_on_where_stages_share_their_data(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[list[str], list[int]]] = []
    step = CaptionModule.training_step

    def watched(self: CaptionModule, batch: CaptionBatch, number: int) -> torch.Tensor:
        seen.append((batch.image_ids, batch.tokens.flatten().tolist()))
        return step(self, batch, number)

    monkeypatch.setattr(CaptionModule, "training_step", watched)
    tiny = [*unlimited(folders["first"], tmp_path / "run"), "data.captions_per_image=1"]
    train(compose("train", *tiny, "trainer.max_epochs=2"))
    one, seen = seen, []
    train(
        compose(
            "train",
            *tiny,
            f"output_dir={tmp_path}/stages",
            "stages={a: {trainer: {max_epochs: 1}}, b: {trainer: {max_epochs: 1}}}",
        )
    )
    assert seen == one
    assert one[:2] != one[2:]


def test_a_stage_may_train_for_another_objective(folders: dict[str, Path], tmp_path: Path) -> None:
    """Options of a group are chosen as in a list of defaults, in which the order of the stages then lies, too."""
    chosen = [
        "+training@stages.first.training=cross_entropy",
        "+training@stages.tuned.training=scst",
        "+training@stages.again.training=cross_entropy",
    ]
    limits = [f"+stages.{name}.trainer={{max_epochs: 1}}" for name in ("again", "tuned", "first")]
    run = train(compose("train", *unlimited(folders["first"], tmp_path / "run"), *chosen, *limits))
    log = log_of(run)
    assert log["train/reward"].dropna().index.tolist() == [2, 3]
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert list(config["stages"]) == ["first", "tuned", "again"]
    assert config["training"]["objective"] == "cross_entropy"


def test_the_run_is_evaluated_captioned_and_compared_as_any_other(
    folders: dict[str, Path], whole: Path
) -> None:
    config = yaml.safe_load((whole / "config.yaml").read_text())
    assert config["data"]["table"] == str(folders["second"] / "captions.csv"), "the last stage's"
    assert config["model"]["encoder"]["frozen"] is True
    assert list(config["stages"]) == ["first", "second"]
    scores = evaluate(compose("eval", f"run={whole}", "split=val", "metrics=[CIDEr]"))
    best = json.loads((whole / "metrics.json").read_text())["best"]
    assert scores["CIDEr"] == pytest.approx(best["val/CIDEr"], abs=1e-5)
    images = folders["first"] / "images"
    assert len(caption(compose("caption", f"run={whole}", f"images={images}", "num_workers=0"))) == 16
    (group,) = group_runs([read_run(whole)])
    assert group.name == "test"
    assert group.data == "second/captions.csv"


def test_wandb_has_one_run(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        die_at(patch, "training_step", 11, kill)
        with pytest.raises(KilledError):
            train(compose("train", *overrides(folders, run, "logger=wandb")))
    files = set((run / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 1, "both stages write into one file"
    train(going_on(run))
    files = set((run / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len({file.name for file in files}) == 1, "two processes, one run"
    assert len(files) == 2


MISTAKES = {
    "stages={}": r"stages={} must give names to changes, as {first: {trainer: {max_epochs: 1}}}",
    "stages=[first]": r"stages=\['first'\] must give names to changes",
    "stages={a: 3}": r"stages.a=3 must be settings, as stages.a.data",
    "stages={a: {trainer: null}}": r"stages.a.trainer=None must be settings, as stages.a.trainer.max_epochs",
    "stages={a: {data: {tabel: x}, trainer: {max_epochs: 1}}}": (
        r"stages.a.data.tabel=x is no setting of a stage; nearest: table"
    ),
    "stages={a: {trainer: {devices: 2, max_epochs: 1}}}": (
        r"stages.a.trainer.devices=2 is no setting of a stage; it has its own data, optimizer, training, "
        r"trainer.max_epochs, .*model.encoder.frozen"
    ),
    "stages={a: {trainer: {max_epochs: 1}}, b: {optimizer: {warmup_steps: 1}}}": (
        r"stages.b has no limit: add stages.b.trainer.max_epochs=N, max_steps=N or max_time=DD:HH:MM:SS"
    ),
    "stages={a: {trainer: {max_epochs: 0}}}": r"stages.a has no limit: add stages.a.trainer.max_epochs=N",
    "stages={a: {trainer: {max_epochs: 1}}, b: {trainer: {max_time: 5m}}}": (
        r"stages.b: trainer.max_time=5m must be DD:HH:MM:SS, as 00:08:00:00"
    ),
    "stages={a: {trainer: {max_epochs: 1}}, b: {data: {batch_size: 0}, trainer: {max_epochs: 1}}}": (
        r"stages.b: data.batch_size=0 must be at least 1"
    ),
    "stages={a: {trainer: {max_epochs: 1}}, b: {data: {table: none.csv}, trainer: {max_epochs: 1}}}": (
        r"stages.b: data.table=\S+none.csv does not exist"
    ),
    "stages={a: {trainer: {max_epochs: 1}}, b: {data: {max_tokens: 65}, trainer: {max_epochs: 1}}}": (
        r"stages.b: data.max_tokens=65 must be at most the decoder's model.decoder.n_positions=64"
    ),
    "stages={a: {trainer: {max_epochs: 1}}, b: {optimizer: {lr: {bridge: -1}}, trainer: {max_epochs: 1}}}": (
        r"stages.b: optimizer.lr.bridge=-1 must be at least 0"
    ),
    "stages={a: {trainer: {max_epochs: 1}}, b: {training: {ema_decay: 2}, trainer: {max_epochs: 1}}}": (
        r"stages.b: training.ema_decay=2 must be at least 0 and below 1"
    ),
    "stages={a: {trainer: {max_epochs: 1}, model: {encoder: {frozen: true}}, training: {unfreeze_encoder_at: 0.5}}}": (
        r"stages.a: training.unfreeze_encoder_at=0.5 must not come with model.encoder.frozen=true"
    ),
    "stages={a: {trainer: {max_epochs: 1}, data: {feature_cache: true}}}": (
        r"stages.a: data.feature_cache=true must come with model.encoder.frozen=true"
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_any_stage_is_told_before_work_starts(
    folders: dict[str, Path], tmp_path: Path, mistake: str
) -> None:
    with pytest.raises(InputError, match=MISTAKES[mistake]) as told:
        train(compose("train", *unlimited(folders["first"], tmp_path / "run"), mistake))
    assert "\n" not in str(told.value)
    assert not (tmp_path / "run").exists()


def test_a_limit_for_all_stages_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"trainer.max_epochs is each stage's own: stages.first.trainer.max_epochs"
    ):
        train(compose("train", *overrides(folders, tmp_path / "run", "trainer.max_epochs=3")))


def test_a_run_goes_on_with_its_own_stages(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "first"
    with monkeypatch.context() as patch:
        die_at(patch, "training_step", 11, kill)
        with pytest.raises(KilledError):
            train(compose("train", *overrides(folders, run, "resume=auto")))
    for change in ("+stages.third.trainer={max_epochs: 1}", "trainer.max_epochs=5", "data.num_workers=1"):
        with pytest.raises(
            InputError, match=rf"{re.escape(change)}: resume=\S+ goes on with that run's own settings"
        ):
            train(going_on(run, change))
    with pytest.raises(
        InputError, match=r"here it is \+\+stages.first.trainer.max_epochs=5, \+\+stages.second"
    ):
        train(going_on(run, "trainer.max_epochs=5"))
    for group, name in (("data", "num_workers"), ("training", "max_bad_steps"), ("trainer", "max_epochs")):
        change = f"++stages.second.{group}.{name}=7"
        cfg = going_on(run, change)
        changed = with_settings_of(RunDirectory(run), cfg)
        settings, own = changed["stages"], RunDirectory(run).config["stages"]
        assert settings["first"] == own["first"]
        assert settings["second"] == {**own["second"], group: {**own["second"][group], name: 7}}
        assert changed[group][name] == 7, "the last one's are the run's own"
    turned = overrides(folders, tmp_path / "turned", "resume=auto")
    turned = [o for o in turned if "stages.first" not in o] + [o for o in turned if "stages.first" in o]
    assert train(compose("train", *turned)) == tmp_path / "turned", "another order is another training"
    assert train(compose("train", *overrides(folders, tmp_path / "again", "resume=auto"))) == run
    assert json.loads((run / "metrics.json").read_text())["finished"] is True
    train(going_on(run, "++stages.second.trainer.max_steps=7"))
    assert json.loads((run / "metrics.json").read_text())["steps"] == STEPS["first"] + 7
