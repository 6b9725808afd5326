"""Comparing runs, on run directories that the tests write themselves; figures are recomputed by plain numpy."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import wandb
import yaml
from PIL import Image
from pycocoevalcap.bleu.bleu import Bleu
from wandb_files import finished_run

from efficap.evaluation.bootstrap import interval, p_value, resample
from efficap.evaluation.compare import plots
from efficap.evaluation.compare.__main__ import main
from efficap.evaluation.compare.comparison import compare_runs
from efficap.evaluation.compare.differing import differing_pictures
from efficap.evaluation.compare.groups import group_runs, without_data
from efficap.evaluation.compare.jobs import read_jobs
from efficap.evaluation.compare.plots import spent_at
from efficap.evaluation.compare.runs import find_runs, read_run
from efficap.evaluation.compare.table import NOTHING, scores_cells
from efficap.evaluation.pictures import PictureRecord, read_pictures, write_pictures
from efficap.evaluation.results import write_predictions, write_scores
from efficap.evaluation.scores import PictureScores, picture_scores, score_split
from efficap.evaluation.sums import bleu

WORDS = ["a", "dog", "cat", "runs", "sits", "on", "the", "red", "green", "grass", "with", "ball"]
N = 40  # pictures of a split


def some_scores(n: int, seed: int, mean: float = 1.0) -> list[PictureScores]:
    """What pictures of a captioner with this mean CIDEr might have."""
    rng = np.random.default_rng(seed)
    scores = []
    for cider in rng.gamma(2.0, mean / 2, n):
        words = int(rng.integers(5, 12))
        guesses = [words - k for k in range(4)]
        matches = [int(rng.integers(0, guess)) for guess in guesses]
        scores.append(PictureScores(float(cider), (words, int(rng.integers(5, 12)), *guesses, *matches)))
    return scores


def plain_bleu(scores: list[PictureScores]) -> float:
    total = np.sum([s.bleu for s in scores], axis=0, dtype=float)
    return min(1.0, math.exp(1 - total[1] / total[0])) * float(np.prod(total[6:] / total[2:6]) ** 0.25)


def write_evaluation(
    run: Path, split: str, scores: list[PictureScores], *, prefix: str = "p", image: Path | None = None
) -> None:
    """The files of eval.py; the same references for all runs."""
    rng = np.random.default_rng(len(str(run)))
    ids = [f"{prefix}{number:03}" for number in range(len(scores))]
    captions = {i: " ".join(rng.choice(WORDS, 5)) for i in ids}
    write_predictions(run / "eval" / split / "captions.json", captions)
    write_scores(
        run / "eval" / split / "scores.json",
        {
            "split": split,
            "images": len(ids),
            "decoding": "greedy: max_tokens=12",
            "BLEU-4": plain_bleu(scores),
            "METEOR": 0.25,
            "CIDEr": float(np.mean([s.cider for s in scores])),
        },
    )
    records = [
        PictureRecord(i, captions[i], [f"first of {i}", "<b>&second"], image, part)
        for i, part in zip(ids, scores, strict=True)
    ]
    write_pictures(run / "eval" / split / "pictures.parquet", records)


def write_run(
    run: Path, *, name: str = "small-csv", seed: int = 1, parameters: int = 1_000, **model: Any
) -> Path:
    """Configuration and logs of a run of 40 steps, 10 pairs each, at 5 pairs a second."""
    run.mkdir(parents=True)
    config = {
        "name": name,
        "seed": seed,
        "output_dir": str(run),
        "model": {"decoder": {"n_embd": 32}, **model},
        "data": {"_target_": "efficap.data.csv.CSVDataModule", "table": "/data/birds/all.csv", "seed": seed},
    }
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    metrics = {
        "steps": 40,
        "pairs": 400,
        "pairs_per_second": 5.0,
        "training_seconds": 80.0,
        "parameters": parameters,
    }
    (run / "metrics.json").write_text(json.dumps(metrics))
    rows: list[dict[str, float]] = []
    for step in (10, 20, 30, 40):
        rows.append(
            {"step": step, "train/pairs_per_second": 5.0, "train/pairs": 10 * step, "train/loss": 9 / step}
        )
        rows.append({"step": step, "val/CIDEr": step / 100 + seed / 50, "val/loss": 5 / step})
    pd.DataFrame(rows).to_csv(run / "metrics.csv", index=False)
    return run


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two models, two seeds each, on two splits; a third without scores."""
    picture = tmp_path / "picture.png"
    Image.new("RGB", (60, 40), "red").save(picture)
    folder = tmp_path / "sweep"
    for job, (n_embd, seed) in enumerate([(32, 1), (32, 2), (64, 1), (64, 2)]):
        run = write_run(
            folder / f"{job}_small", seed=seed, decoder={"n_embd": n_embd}, parameters=n_embd * 1000
        )
        for split in ("test", "irregular"):
            write_evaluation(run, split, some_scores(N, 7 * job, 0.5 + n_embd / 64), image=picture)
    write_run(folder / "4_small", seed=3, decoder={"n_embd": 64}, parameters=64_000)
    (folder / "0_small" / ".hydra").mkdir()
    (folder / "0_small" / ".hydra" / "config.yaml").write_text("name: hydra's own\n")
    return folder


def run_main(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


# --- statistics ---


def test_resampling_equals_a_plain_loop_over_the_same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("efficap.evaluation.bootstrap._AT_ONCE", 7 * 30)  # in several parts
    runs = [some_scores(30, seed) for seed in (1, 2, 3)]
    drawn = resample(runs, resamples=50, seed=5)
    draws = np.random.default_rng(5).integers(0, 30, (50, 30))
    for resampled, picked in enumerate(draws):
        for number, run in enumerate(runs):
            pictures = [run[picture] for picture in picked]
            assert drawn.cider[resampled, number] == pytest.approx(np.mean([p.cider for p in pictures]))
            assert drawn.bleu4[resampled, number] == pytest.approx(plain_bleu(pictures), abs=1e-7)
    assert drawn.cider_of_all == pytest.approx([np.mean([p.cider for p in run]) for run in runs])
    assert drawn.bleu4_of_all == pytest.approx([plain_bleu(run) for run in runs])


def test_intervals_and_p_values_of_means_are_those_of_the_normal_distribution() -> None:
    n = 2000
    first, second = some_scores(n, 1, 1.0), some_scores(n, 2, 1.05)
    drawn = resample([first, second], resamples=20_000, seed=0)
    cider = np.array([[p.cider for p in first], [p.cider for p in second]])

    error = cider[0].std() / math.sqrt(n)
    low, high = interval(drawn.cider[:, 0])
    assert (low, high) == pytest.approx(
        (cider[0].mean() - 1.96 * error, cider[0].mean() + 1.96 * error), abs=0.1 * error
    )

    gain = cider[1] - cider[0]
    z = gain.mean() / (gain.std() / math.sqrt(n))
    assert 0.5 < abs(z) < 3.5, "neither certain nor chance"
    expected = math.erfc(abs(z) / math.sqrt(2))  # two-sided
    assert p_value(drawn.cider[:, 1] - drawn.cider[:, 0]) == pytest.approx(expected, rel=0.15, abs=2e-3)


def test_p_values_of_a_pair_that_is_paired_see_a_small_but_constant_gain() -> None:
    first = some_scores(500, 1)
    second = [PictureScores(score.cider + 0.01, score.bleu) for score in first]
    drawn = resample([first, second], resamples=1000, seed=0)
    assert p_value(drawn.cider[:, 1] - drawn.cider[:, 0]) == pytest.approx(2 / 1001)
    assert p_value(drawn.bleu4[:, 1] - drawn.bleu4[:, 0]) == 1.0, "the same captions"


def test_under_the_null_hypothesis_p_values_are_uniform() -> None:
    values = []
    for trial in range(200):
        runs = [some_scores(100, 2 * trial), some_scores(100, 2 * trial + 1)]
        drawn = resample(runs, resamples=300, seed=trial)
        values.append(p_value(drawn.cider[:, 1] - drawn.cider[:, 0]))
    assert 0.01 <= np.mean(np.array(values) < 0.05) <= 0.11
    assert np.mean(values) == pytest.approx(0.5, abs=0.08)


def test_bleu_of_resampled_pictures_equals_pycocoevalcap_on_their_captions() -> None:
    rng = np.random.default_rng(0)
    captions = {f"{i}": " ".join(rng.choice(WORDS, rng.integers(1, 9))) for i in range(30)} | {"30": ""}
    references = {i: [" ".join(rng.choice(WORDS, rng.integers(3, 9))) for _ in range(3)] for i in captions}
    _, parts = score_split(captions, references, metrics=["BLEU", "CIDEr"])
    scores = list(picture_scores(list(captions), parts).values())
    for _ in range(5):
        picked = rng.integers(0, len(scores), len(scores))
        expected, _ = Bleu(4).compute_score(
            {number: references[f"{i}"] for number, i in enumerate(picked)},
            {number: [captions[f"{i}"]] for number, i in enumerate(picked)},
            verbose=0,
        )
        counts = np.sum([scores[i].bleu for i in picked], axis=0, dtype=float)
        assert bleu(counts) == pytest.approx(expected, rel=1e-6)


# --- runs and groups ---


def test_scores_are_averaged_over_seeds(sweep: Path) -> None:
    comparison = compare_runs([sweep], resamples=200, seed=0)
    assert [split.split for split in comparison.standings] == ["test", "irregular"]
    assert [group.name for group in comparison.groups] == [
        "small-csv decoder.n_embd=32",
        "small-csv decoder.n_embd=64",
    ]
    standings = comparison.standings[0]
    for group, jobs in zip(comparison.groups, ([0, 1], [2, 3]), strict=True):
        expected = [
            some_scores(N, 7 * job, 0.5 + group.runs[0].config["model"]["decoder"]["n_embd"] / 64)
            for job in jobs
        ]
        cider = [np.mean([p.cider for p in run]) for run in expected]
        score = standings.scores[group.name]["CIDEr"]
        assert (score.mean, score.sd) == pytest.approx((np.mean(cider), np.std(cider, ddof=1)))
        assert score.bounds is not None
        assert score.bounds[0] < score.mean < score.bounds[1]
        bleu = [plain_bleu(run) for run in expected]
        assert standings.scores[group.name]["BLEU-4"].mean == pytest.approx(np.mean(bleu))
        assert standings.scores[group.name]["METEOR"].bounds is None
        assert "ROUGE-L" not in standings.scores[group.name]
    [pair] = standings.pairs
    one, other = (standings.scores[group.name]["CIDEr"].mean for group in comparison.groups)
    assert pair.differences["CIDEr"].mean == pytest.approx(other - one)


def test_a_resample_averages_the_seeds_on_the_same_pictures(sweep: Path) -> None:
    comparison = compare_runs([sweep], resamples=300, seed=4)
    parts = [some_scores(N, 7 * job, 1.0 if job < 2 else 1.5) for job in range(4)]
    cider = np.array([[p.cider for p in run] for run in parts])
    draws = np.random.default_rng(4).integers(0, N, (300, N))
    gain = np.array([cider[2:, picked].mean() - cider[:2, picked].mean() for picked in draws])
    difference = comparison.standings[0].pairs[0].differences["CIDEr"]
    assert difference.bounds == pytest.approx(np.quantile(gain, [0.025, 0.975]))
    assert difference.p == pytest.approx(2 * (1 + (gain <= 0).sum()) / 301)


def test_a_run_without_scores_is_listed_and_not_averaged(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = run_main(capsys, sweep, "--resamples", 100)
    assert status == 0
    assert f"python eval.py run={sweep / '4_small'}" in out
    rows = [
        line
        for line in (sweep / "comparison/comparison.md").read_text().splitlines()
        if "n\\_embd=64 |" in line
    ]
    assert rows[0].split(" | ")[2] == "2", "seeds"


@pytest.mark.parametrize(
    ("name", "data", "model"),
    [
        ("small-csv", {"_target_": "efficap.data.csv.CSVDataModule", "table": "captions.csv"}, "small"),
        (
            "small-coco",
            {"_target_": "efficap.data.csv.CSVDataModule", "table": "/a/coco/captions.parquet"},
            "small",
        ),
        ("small-cc12m", {"_target_": "efficap.data.webdataset.W", "shards": "data/cc12m/train"}, "small"),
        (
            "coco-csv",
            {"_target_": "efficap.data.csv.CSVDataModule", "table": "data/coco/captions.csv"},
            "coco",
        ),
        ("mine", {"_target_": "my.Data"}, "mine"),
    ],
)
def test_a_models_name_is_its_runs_without_its_data(name: str, data: dict[str, Any], model: str) -> None:
    assert without_data(name, data) == model


def test_runs_are_one_model_whatever_seed_and_folder_and_named_by_what_differs(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / "a", name="tiny-csv", seed=1),
        write_run(tmp_path / "b", name="tiny-csv", seed=2),
        write_run(tmp_path / "c", name="medium-csv", seed=1, depth=3),
        write_run(tmp_path / "d", name="medium-csv", seed=1, depth=4, bridge={"n_blocks": 2}),
        write_run(tmp_path / "e", name="mine"),
    ]
    groups = {group.name: group for group in group_runs([read_run(folder) for folder in folders])}
    assert list(groups) == [
        "tiny-csv",
        "medium-csv model.depth=3",
        "medium-csv bridge.n_blocks=2 model.depth=4",
        "mine",
    ]
    assert [run.seed for run in groups["tiny-csv"].runs] == [1, 2]
    assert groups["tiny-csv"].model == "tiny"
    assert groups["medium-csv model.depth=3"].model == "medium model.depth=3"
    assert groups["mine"].model == "mine"
    assert groups["mine"].data == "birds/all.csv"


def test_what_may_change_on_the_way_makes_no_other_model(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"{seed}", seed=seed) for seed in (1, 2)]
    file = runs[1] / "config.yaml"
    config = yaml.safe_load(file.read_text())
    config["data"] |= {"read_timeout": 5, "max_bad_fraction": 0.1, "num_workers": 3}
    more = {"gradient_checkpointing": True, "compile": True, "training": {"max_bad_steps": 9}}
    file.write_text(yaml.safe_dump({**config, **more, "trainer": {"devices": [1]}}))
    [group] = group_runs([read_run(run) for run in runs])
    assert [run.seed for run in group.runs] == [1, 2]


def test_runs_that_start_from_runs_of_one_model_are_one_model_wherever_the_data_lie(tmp_path: Path) -> None:
    def change(run: Path, **settings: Any) -> Path:
        file = run / "config.yaml"
        config = yaml.safe_load(file.read_text())
        config["data"]["image_dir"] = f"/disk{config['seed']}/images"
        file.write_text(yaml.safe_dump({**config, **settings}))
        return run

    origins = [change(write_run(tmp_path / f"words{seed}", name="words", seed=seed)) for seed in (1, 2)]
    runs = [
        change(write_run(tmp_path / f"reward{seed}", name="reward", seed=seed), init_from=str(origin))
        for seed, origin in enumerate(origins, start=1)
    ]
    assert [len(group.runs) for group in group_runs([read_run(run) for run in runs])] == [2]
    change(origins[1], model={"other": 1})
    assert [len(group.runs) for group in group_runs([read_run(run) for run in runs])] == [1, 1]


def test_a_run_that_has_not_come_to_its_end_is_said_to_have_not(sweep: Path) -> None:
    file = sweep / "3_small/metrics.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"finished": False}))
    notes = compare_runs([sweep], resamples=100, seed=0).standings[0].notes
    assert [note for note in notes if "has not come to its end" in note and "3_small" in note]


def test_a_published_run_which_has_scores_alone_does_not_keep_the_others_from_being_compared(
    sweep: Path,
) -> None:
    for file in (sweep / "3_small/eval").glob("*/captions.json"):
        file.unlink()
    standings = compare_runs([sweep], resamples=100, seed=0).standings
    assert all(
        "3_small" not in str(run.path) for s in standings for g in s.groups for run in g.evaluated(s.split)
    )


def test_runs_are_found_below_a_sweep_once_and_hydras_own_files_are_none(sweep: Path) -> None:
    found = find_runs([sweep / "1_small", sweep])
    assert [path.name for path in found] == ["1_small", "0_small", "2_small", "3_small", "4_small"]


def test_a_run_without_scores_of_each_picture_is_compared_without_an_interval(sweep: Path) -> None:
    (sweep / "0_small/eval/test/pictures.parquet").unlink()
    standings = compare_runs([sweep], resamples=100, seed=0).standings[0]
    first = standings.groups[0].name
    assert standings.scores[first]["CIDEr"].bounds is None
    assert standings.pairs == []
    assert any("run eval.py again" in note for note in standings.notes)


def test_a_split_that_was_captioned_without_scores_is_left_out(sweep: Path) -> None:
    for folder in sweep.glob("*/eval/irregular"):
        (folder / "scores.json").write_text('{"split": "irregular", "images": 40, "METEOR": null}')
    assert [split.split for split in compare_runs([sweep], resamples=100, seed=0).standings] == ["test"]


def test_a_metric_that_failed_in_one_run_is_no_mean_of_the_others_and_is_named(sweep: Path) -> None:
    file = sweep / "0_small/eval/test/scores.json"
    scores = json.loads(file.read_text()) | {"METEOR": None, "METEOR_error": "no memory"}
    file.write_text(json.dumps(scores))
    standings = compare_runs([sweep], resamples=100, seed=0).standings[0]
    first, second = (standings.scores[group.name] for group in standings.groups)
    assert ("METEOR" in first, "METEOR" in second) == (False, True)
    assert any("METEOR failed in" in note and "0_small" in note for note in standings.notes)


def test_runs_that_decoded_differently_are_said_to_have(sweep: Path) -> None:
    file = sweep / "3_small/eval/test/scores.json"
    file.write_text(file.read_text().replace("greedy", "beam"))
    notes = compare_runs([sweep], resamples=100, seed=0).standings[0].notes
    assert any("not written in the same way" in note and "beam: max_tokens=12" in note for note in notes)


def test_a_seed_that_is_repeated_counts_once_and_is_named(sweep: Path) -> None:
    file = sweep / "1_small/config.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {"seed": 1}))
    standings = compare_runs([sweep], resamples=100, seed=0).standings[0]
    cells = scores_cells(standings)
    assert [row[cells.header.index("seeds")] for row in cells.rows] == ["1", "2"]
    assert standings.notes == [
        "small-csv decoder.n_embd=32: 2 runs of seed 1; its mean and ± are not over seeds alone",
        "small-csv decoder.n_embd=64: 1 of 3 runs were not evaluated on test",
    ]


# --- what cannot be compared ---


def test_runs_evaluated_on_different_pictures_are_refused(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_evaluation(sweep / "3_small", "irregular", some_scores(N - 1, 1), prefix="other")
    status, _, err = run_main(capsys, sweep)
    assert status == 1
    assert re.fullmatch(
        r"error: irregular: .*0_small has 40 pictures, 40 of its own \('p000', 'p001', 'p002', …\) and .*3_small has "
        r"39 pictures, 39 of its own \('other000', .*\); only runs evaluated on the same pictures can be compared\n",
        err,
    )


def test_runs_scored_against_different_references_are_refused(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = sweep / "2_small/eval/test/pictures.parquet"
    changed = [
        dataclasses.replace(record, references=["another"]) if record.image_id == "p007" else record
        for record in read_pictures(file)
    ]
    write_pictures(file, changed)
    status, _, err = run_main(capsys, sweep)
    assert status == 1
    assert "the references of 'p007' differ" in err


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.yaml", "{", "config.yaml is no YAML"),
        ("config.yaml", "name: x", "is no run's configuration"),
        ("metrics.json", "[", "metrics.json: not JSON"),
        ("metrics.csv", "a,b\n1,2\n", "no column 'step'"),
        ("eval/test/scores.json", "[]", "an object of scores is needed"),
        ("eval/test/captions.json", "", "captions.json: not JSON"),
        ("eval/test/pictures.parquet", "PAR1 no more", "pictures.parquet is damaged"),
        (
            "eval/test/captions.json",
            '[{"image_id": "p000", "caption": "new"}]',
            "are of different evaluations",
        ),
        ("eval/test/scores.json", '{"CIDEr": 0.5}', "are of different evaluations"),
    ],
)
def test_a_damaged_file_is_named_in_one_line(
    sweep: Path, capsys: pytest.CaptureFixture[str], file: str, content: str, message: str
) -> None:
    (sweep / "1_small" / file).write_text(content)
    status, _, err = run_main(capsys, sweep, "--resamples", 100)
    assert status == 1
    assert err.count("\n") == 1
    assert message in err
    assert "1_small" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "nothing is no folder"),
        (["empty"], "empty holds no run"),
        (["sweep/4_small"], "none of the runs found, 1, has scores; python eval.py run="),
        (
            ["sweep", "--between", "small", "medium"],
            "--between: 'small' is no model here; there are 'small-csv decoder",
        ),
        (["sweep", "--pictures", "-1"], "--pictures -1 must be at least 0"),
        (["sweep", "--resamples", "1"], "--resamples 1 must be at least 100"),
        (["empty", "--status"], "empty holds no job"),
    ],
)
def test_what_cannot_be_compared_is_said_in_one_line(
    sweep: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(sweep.parent)
    Path("empty").mkdir()
    status, _, err = run_main(capsys, *arguments)
    assert status == 1
    assert err.count("\n") == 1
    assert message in err


def test_a_folder_of_a_training_that_was_refused_is_passed_over_and_named(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (sweep / "refused/.hydra").mkdir(parents=True)
    status, _, err = run_main(capsys, *sweep.iterdir(), "--resamples", 100, "--out", sweep.parent / "out")
    assert status == 0
    assert f"{sweep / 'refused'} holds no run, and is left out\n" in err


# --- what is written ---


def test_the_table_tells_the_figures_of_the_runs(sweep: Path) -> None:
    standings = compare_runs([sweep], resamples=100, seed=0).standings[0]
    cells = scores_cells(standings)
    row = dict(zip(cells.header, cells.rows[0], strict=True))
    assert (row["model"], row["data"]) == ("small decoder.n_embd=32", "birds/all.csv")
    assert (row["seeds"], row["parameters"], row["pairs/s"]) == ("2", "32 k", "5")
    score = standings.scores[standings.groups[0].name]["CIDEr"]
    assert row["CIDEr"].startswith(f"{100 * score.mean:.1f} ± {100 * (score.sd or 0):.1f} [")
    assert (row["METEOR"], row["ROUGE-L"]) == ("25.0 ± 0.0", NOTHING)
    best = max((0, 1), key=lambda i: standings.scores[standings.groups[i].name]["CIDEr"].mean)
    assert (best, cells.header.index("CIDEr")) in cells.best


def test_all_figures_of_the_tables_agree_with_plain_pandas_on_the_files_of_the_runs(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(capsys, sweep, "--resamples", 200, "--seed", 3)[0] == 0
    written = re.findall(
        r"^## (\S+): (?:40 pictures|differences.*)\n\n((?:\|.*\n)+)",
        (sweep / "comparison/comparison.md").read_text().replace("\\[", "["),
        re.MULTILINE,
    )
    assert [split for split, _ in written] == ["test", "irregular"] * 2

    def bleu(counts: np.ndarray[Any, Any]) -> Any:  # (…, 10)
        words, closest = counts[..., 0], counts[..., 1]
        shares = counts[..., 6:] / counts[..., 2:6]
        return np.minimum(1, np.exp(1 - closest / words)) * shares.prod(-1) ** 0.25

    def within(values: Any) -> str:
        low, high = 100 * np.percentile(values, [2.5, 97.5])
        return f"[{low:.1f}, {high:.1f}]"

    def seeds_of(jobs: list[int], split: str, column: str) -> np.ndarray[Any, Any]:
        files = [sweep / f"{job}_small/eval/{split}/pictures.parquet" for job in jobs]
        return np.array([pd.read_parquet(file)[column].to_list() for file in files], float)

    for (split, scores), (_, differences) in zip(written[:2], written[2:], strict=True):
        draws = np.random.default_rng(3).integers(0, N, (200, N))
        expected, drawn, whole = [], [], []
        for jobs, size in (([0, 1], "32 k"), ([2, 3], "64 k")):
            cider = seeds_of(jobs, split, "CIDEr")  # (seeds, N)
            counts = seeds_of(jobs, split, "BLEU")  # (seeds, N, 10)
            each = {"CIDEr": pd.Series(cider.mean(1)), "BLEU-4": pd.Series(bleu(counts.sum(1)))}
            resampled = {
                "CIDEr": cider[:, draws].mean(2).mean(0),
                "BLEU-4": bleu(counts[:, draws].sum(2)).mean(0),
            }
            cells = [
                f"{100 * each[metric].mean():.1f} ± {100 * each[metric].std():.1f} {within(resampled[metric])}"
                for metric in each
            ]
            expected.append(["2", size, "5", *cells, "25.0 ± 0.0", NOTHING])
            drawn.append(resampled)
            whole.append({metric: values.mean() for metric, values in each.items()})
        rows = [line.replace("*", "").strip("| ").split(" | ") for line in scores.splitlines()[2:]]
        assert [row[2:] for row in rows] == expected
        [row] = [line.strip("| ").split(" | ")[2:] for line in differences.splitlines()[2:]]
        for metric, cell, p in zip(("CIDEr", "BLEU-4"), row[::2], row[1::2], strict=True):
            gains = drawn[1][metric] - drawn[0][metric]
            assert cell == f"{100 * (whole[1][metric] - whole[0][metric]):+.1f} {within(gains)}"
            rarer = min((gains <= 0).sum(), (gains >= 0).sum())
            assert float(p) == pytest.approx(min(1, 2 * (rarer + 1) / 201), abs=5e-4)


def test_the_page_needs_nothing_but_itself(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run_main(capsys, sweep, "--resamples", 100, "--pictures", 6)
    assert status == 0
    assert "sweep/comparison/index.html" in out.replace("\n", "")
    assert sorted(file.name for file in (sweep / "comparison").iterdir()) == [
        "comparison.md",
        "cost.png",
        "index.html",
        "learning.png",
    ]
    page = (sweep / "comparison/index.html").read_text()
    sources = re.findall(r'src="([^"]{1,30})', page)
    assert len(sources) == 2 + 2 * 6
    assert all(re.match(r"data:image/(png|jpeg);base64,", source) for source in sources)
    assert not re.search(r"https?:|<script|<link|url\(", page)
    assert "&lt;b&gt;&amp;second" in page, "references are text"
    assert "<b>&second" not in page


def test_the_pictures_shown_are_those_that_differ_most(sweep: Path) -> None:
    standings = compare_runs([sweep], resamples=100, seed=0).standings[0]
    gallery = differing_pictures(standings, None, 10)
    assert gallery is not None
    one, other = (
        np.array([p.cider for p in some_scores(N, 7 * job, mean)]) for job, mean in ((0, 1.0), (2, 1.5))
    )
    gains = pd.Series(other - one, index=[f"p{n:03}" for n in range(N)])
    expected = {*gains.nsmallest(5).index, *gains.nlargest(5).index}
    assert {first.image_id for first, _ in gallery.pictures} == expected
    shown = [abs(gains[first.image_id]) for first, _ in gallery.pictures]
    assert shown == sorted(shown, reverse=True)
    turned = differing_pictures(standings, [gallery.second.name, gallery.first.name], 3)
    assert turned is not None
    assert turned.first is gallery.second


def test_a_model_has_its_colour_in_both_plots_though_another_has_no_scores(
    sweep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for job in (0, 1):
        shutil.rmtree(sweep / f"{job}_small/eval")
    comparison = compare_runs([sweep], resamples=100, seed=0)
    drawn: list[dict[str, str]] = []

    def keep(_: object, axes: list[list[Any]], __: object) -> None:
        labelled = [panel.get_legend_handles_labels() for panel in itertools.chain.from_iterable(axes)]
        pairs = [pair for handles, labels in labelled for pair in zip(labels, handles, strict=True)]
        drawn.append({name: getattr(handle, "lines", [handle])[0].get_color() for name, handle in pairs})

    monkeypatch.setattr(plots, "_finish", keep)
    plots.plot_learning(comparison.groups, sweep / "a.png")
    plots.plot_costs(comparison.groups, comparison.standings, sweep / "b.png")
    learning, costs = drawn
    assert len(set(learning.values())) == 2
    [name] = costs
    assert costs[name] == learning[name]


def test_learning_curves_go_over_pairs_and_time_as_they_were_logged(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run"))
    table = pd.read_csv(run.path / "metrics.csv")
    table.loc[table["step"] == 20, ["train/pairs", "train/pairs_per_second"]] *= [1.5, 0.75]  # long batches
    pairs, minutes = spent_at(table, run, np.array([5.0, 10, 20, 25, 40]))
    assert pairs == pytest.approx([50, 100, 300, 300, 400])
    assert minutes * 60 == pytest.approx([10, 20, 80, 70, 80])
    older = table.drop(columns="train/pairs")  # pairs are then as many at each step
    assert spent_at(older, run, np.array([10.0, 20]))[0] == pytest.approx([100, 200])


def test_a_run_from_elsewhere_cannot_write_markup_on_the_page(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in sweep.glob("*_small"):
        file = folder / "config.yaml"
        file.write_text(file.read_text().replace("small-csv", "'<script>|$x$'"))
    assert run_main(capsys, sweep, "--resamples", 100)[0] == 0
    assert "<script" not in (sweep / "comparison/index.html").read_text()
    markdown = (sweep / "comparison/comparison.md").read_text().splitlines()
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in markdown[2:7] if line.startswith("|")}) == 1


def test_the_command_runs_as_a_module(sweep: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "efficap.evaluation.compare", sweep, "--status"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "0_small" in done.stdout


def test_a_comparison_is_a_run_of_wandb_without_a_login(
    sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    status, out, _ = run_main(capsys, sweep, "--resamples", 100, "--pictures", 2, "--wandb", "captions")
    assert status == 0
    assert "wandb sync" in out
    wandb.teardown()  # W&B's own process writes the record, on a busy machine after the command has returned
    [kept] = (sweep / "comparison/wandb").glob("offline-run-*/*.wandb")
    record = finished_run(kept).contents
    names = [
        f"{split}/CIDEr/small-csv decoder.n_embd={n}" for split in ("test", "irregular") for n in (32, 64)
    ]
    assert all(name.encode() in record for name in names)
    media = [file.suffix for file in kept.parent.rglob("media/**/*") if file.is_file()]
    assert sorted(media) == [".html", ".json", ".json", ".json", ".json", ".png", ".png"]
    (kept.parent / "files/config.yaml").touch()  # W&B's, of an online run
    assert len(find_runs([sweep])) == 5


# --- jobs of a sweep ---


def write_job(folder: Path, **record: Any) -> None:
    folder.mkdir(parents=True)
    whole = {"overrides": [], "error": None, "started": "2026-11-24T10:00:00", "ended": None}
    (folder / "job.json").write_text(
        json.dumps({**whole, "host": socket.gethostname(), "pid": os.getpid(), **record})
    )


def test_the_status_tells_how_far_each_job_has_come(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    write_job(tmp_path / "0_a", state="done", overrides=["seed=0"], ended="2026-11-24T12:00:00+01:00")
    write_job(tmp_path / "1_a", state="failed", overrides=["seed=1"], error="out of memory")
    now = pd.Timestamp.now("UTC").isoformat()
    write_job(tmp_path / "2_a", state="running", overrides=["seed=2"], started=now)
    long_ago = "2001-01-01T00:00:00"  # not this process, then, though it has the number
    write_job(tmp_path / "3_a", state="running", overrides=["seed=3"], started=long_ago)
    write_job(tmp_path / "10_a", state="running", overrides=["seed=10"], pid=gone.pid)
    write_job(tmp_path / "11_a", state="running", overrides=["seed=11"], pid=gone.pid, host="elsewhere")
    (tmp_path / "12_a" / ".hydra").mkdir(parents=True)
    (tmp_path / "12_a" / ".hydra" / "overrides.yaml").write_text("- seed=12\n")
    (tmp_path / "12_a" / "model.safetensors").touch()
    write_run(tmp_path / "13_a")
    hydra = {"overrides": {"task": ["seed=0,1,2,3,10,11,12"]}, "sweeper": {"params": None}}
    (tmp_path / "multirun.yaml").write_text(yaml.safe_dump({"hydra": hydra}))
    jobs = [(job.folder.name if job.folder else "", job.state, job.overrides) for job in read_jobs(tmp_path)]
    assert jobs == [
        ("0_a", "done", ("seed=0",)),
        ("1_a", "failed", ("seed=1",)),
        ("2_a", "running", ("seed=2",)),
        ("3_a", "interrupted", ("seed=3",)),
        ("10_a", "interrupted", ("seed=10",)),
        ("11_a", "running", ("seed=11",)),
        ("12_a", "unknown", ("seed=12",)),
        ("13_a", "not started", ()),
    ]
    hydra["sweeper"]["params"] = {"seed": "0,1,2,3,10,11,12,14"}  # of an experiment's file
    hydra["overrides"]["task"] = []
    (tmp_path / "multirun.yaml").write_text(yaml.safe_dump({"hydra": hydra}))
    last = read_jobs(tmp_path)[-1]
    assert (last.folder, last.state, last.overrides) == (None, "not started", ("seed=14",))
    ended = pd.Timestamp("2026-11-24T11:00:00").tz_localize("UTC").timestamp()
    assert pd.Timestamp(read_jobs(tmp_path)[0].ended).to_pydatetime().timestamp() == ended
    status, out, _ = run_main(capsys, tmp_path, "--status")
    assert status == 0
    assert "1 done, 1 failed, 2 running, 2 interrupted, 1 unknown, 2 not started" in " ".join(out.split())


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"state": "lost"}', '{"state": "running"}', '{"state": "done", "ended": "?"}']
)
def test_a_damaged_record_of_a_job_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    (tmp_path / "0_a").mkdir()
    (tmp_path / "0_a" / "job.json").write_text(content)
    status, _, err = run_main(capsys, tmp_path, "--status")
    assert status == 1
    assert re.fullmatch(r"error: .*job.json is damaged .*\n", err)
