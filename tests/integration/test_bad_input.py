"""What a user can get wrong, through the real entry points: one line, a non-zero exit, and no training."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import tiny_overrides
from started import Started

from efficap.commands.entry import CONF

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Runs an entry point as `python SCRIPT OVERRIDES` does, in this process; returns (exit status, stderr)."""

    def run(script: str, *overrides: str) -> tuple[int, str]:
        monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [script, *overrides])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        return int(end.value.code), capsys.readouterr().err

    return run


MISTAKES = {
    "model=smal": r"error: model=smal is not known; nearest: small.*; there are large, medium, mini, small, tiny, xl",
    "model.encoder.name=efficientnet_bo": r"error: model.encoder.name=efficientnet_bo .* nearest: efficientnet_b",
    "model.pretrained=true model.decoder.name=openai-community/gpt2": (
        r"error: model.decoder.name=openai-community/gpt2 .*cannot be had from the hub .*"
        r"model.decoder.name=DIR .*model.pretrained=false model.tokenizer.name=null"
    ),
    "model.encoder.pretrained=true model.encoder.name=efficientnet_b0.ra_in1k": (
        r"error: model.encoder.name=efficientnet_b0.ra_in1k: cannot load its pretrained weights .*"
        r"model.encoder.weights_file=FILE .*model.pretrained=false"
    ),
    "data=demo data.root=/dev/null/demo": (
        r"error: data.root=/dev/null/demo cannot be written: .*; data.root=DIR names another"
    ),
    "data=cvs": r"error: data=cvs is not known; nearest: csv; there are coco, csv, demo, mix, webdataset$",
    "data.table=none.csv": r"error: data.table=.*none.csv does not exist",
    "data.caption_column=text": r"error: data.table=.* has no column 'text', only 'file_name', 'caption', 'split'",
    "data.val_split=dev": r"error: data.val_split=dev: .* has no picture in that split; it has train \(8 pictures\)",
    "data.captions_per_image=0": r"error: data.captions_per_image=0 must be at least 1",
    "model.image_size=31": r"error: model.image_size=31 must be at least 32 pixels",
    "model.bridge.n_heads=5": r"error: model.bridge.n_heads=5 must divide .*model.decoder.n_embd=32",
    "trainer=gpu": r"error: trainer.accelerator=gpu, but torch .* sees no GPU here; use trainer.accelerator=cpu",
    "decoding.max_tokens=99": r"error: decoding.max_tokens=99 must be at most .*model.decoder.n_positions=64",
    "decoding.batch_size=0": r"error: decoding.batch_size=0 must be a whole number of at least 1; use null",
    "decoding.batch_size=x": r"error: decoding.batch_size=x must be a whole number of at least 1; use null",
    "decoding=beam decoding.num_beams=0": r"error: decoding.num_beams=0 must be at least 1; use decoding=greedy",
    "trainer.max_epoch=2": r"error: trainer.max_epoch is no setting here; nearest: trainer.max_epochs",
    "trainer.max_epochs=many": r"error: trainer.max_epochs=many must be a whole number",
    "trainer.max_epochs=0": r"error: trainer.max_epochs=0 must be a whole number of at least 1, or -1 for no limit",
    "trainer.max_steps=0": r"error: trainer.max_steps=0 must be a whole number of at least 1, or -1 for no limit",
    "trainer.max_time='00:00:00:00'": r"error: trainer.max_time=00:00:00:00 must be above 0; null: no limit",
    "trainer.log_every_n_steps=0": r"error: trainer.log_every_n_steps=0 must be a whole number of at least 1",
    "trainer.val_check_interval=0": r"error: trainer.val_check_interval=0 must be above 0; null: the end of each epoch",
    "trainer.val_check_interval=1.5": r"error: trainer.val_check_interval=1.5 must be a whole number of batches, or a",
    "trainer.val_check_interval=0.5 trainer.check_val_every_n_epoch=null": (
        r"error: trainer.val_check_interval=0.5 is a share of an epoch, and trainer.check_val_every_n_epoch=null"
    ),
    "training.start_size=64": r"error: training.start_size=64 must be below model.image_size=64",
    "trainer.limit_train_batches=0.0": r"error: trainer.limit_train_batches=0.0 must be above 0; null: all",
    "trainer.precision=bf16-true": r"error: trainer.precision=bf16-true must be 32-true, bf16-mixed, 16-mixed, or null",
    "+trainer.gradient_clip=1": (
        r"error: trainer.gradient_clip=1 is no setting of Lightning's Trainer here; nearest: gradient_clip_val"
    ),
    "+trainer.gradient_clip_algorithm=value": r"error: trainer.gradient_clip_algorithm=value: .*optimizer.clip_value",
    "+optimizer.amsgrad=true": r"error: optimizer.amsgrad is no setting; there are lr, betas",
    "+optimizer.momentum=0.9": r"error: optimizer.momentum=0.9 is Muon's, .*choose optimizer=muon",
    "+model.bridge.relative=true": r"error: model.bridge.relative is no setting; there are n_blocks, n_heads, dropout",
    "model.encoder.weights_file=w.pth": (
        r"error: model.encoder.weights_file=w.pth is not read with model.encoder.pretrained=false; add"
    ),
    "data._target_=[1]": r"error: data._target_=\[1\] must be text",
    "data.image_dir=a[b]c": r"error: data.image_dir=a\[b\]c cannot be read; put a value .* in inner quotes",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_in_one_line_before_training(
    mistake: str, colour_table: Path, tmp_path: Path, run: Callable[..., tuple[int, str]]
) -> None:
    if mistake == "trainer=gpu" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    overrides = [
        o
        for o in tiny_overrides(colour_table, tmp_path / "run")
        if o != "trainer=cpu" or "gpu" not in mistake
    ]
    status, stderr = run("train.py", *overrides, *re.split(r" (?=[+\w.]+=)", mistake))
    assert status == 1
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, stderr
    assert re.search(MISTAKES[mistake], errors[0]), errors[0]
    assert "Traceback" not in stderr
    assert not (tmp_path / "run").exists(), "nothing was begun"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "trainer.val_check_interval=500",
            (
                r"error: trainer.val_check_interval=500 must be at most 2, the batches of an epoch; .*"
                r"trainer.check_val_every_n_epoch=null"
            ),
        ),
        (
            "trainer.limit_train_batches=0.1",
            r"error: trainer.limit_train_batches=0.1 of 2 batches is none; give",
        ),
        ("trainer.limit_val_batches=0.1", r"error: trainer.limit_val_batches=0.1 of 1 batches is none; give"),
        (
            "stages={a: {trainer: {max_epochs: 1}}, b: {trainer: {max_epochs: 1, val_check_interval: 1.5}}}",
            r"error: stages.b: trainer.val_check_interval=1.5 must be a whole number of batches",
        ),
        (
            "+stages.a.trainer={max_epochs: 1, val_check_interval: 500}",
            r"error: stages.a: trainer.val_check_interval=500 must be at most 2",
        ),
    ],
)
def test_a_number_that_does_not_fit_the_batches_is_told_in_one_line(
    setting: str, message: str, colour_table: Path, tmp_path: Path, run: Callable[..., tuple[int, str]]
) -> None:
    overrides = [o for o in tiny_overrides(colour_table, tmp_path / "run") if "max_epochs" not in o]
    status, stderr = run("train.py", *overrides, setting)
    assert status == 1
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, stderr
    assert re.search(message, errors[0]), errors[0]
    assert "Traceback" not in stderr
    assert not (tmp_path / "run" / "metrics.csv").exists(), "no step was taken"


def test_missing_pictures_are_named_before_training(
    colour_table: Path, tmp_path: Path, run: Callable[..., tuple[int, str]]
) -> None:
    (colour_table / "images" / "train_3.jpg").unlink()
    status, stderr = run("train.py", *tiny_overrides(colour_table, tmp_path / "run"))
    assert status == 1
    assert re.search(
        r"error: 1 \(missing 1\) of 12 samples cannot be used, .*train_3.jpg \(missing\)", stderr
    )


@pytest.mark.parametrize(
    ("script", "overrides", "message"),
    [
        ("eval.py", [], "error: run is not given: add run=VALUE"),
        (
            "eval.py",
            ["run=none"],
            "error: run=none does not exist; give a run directory, such as outputs/latest",
        ),
        ("eval.py", ["run=."], "error: run=. holds no config.yaml; give a run directory"),
        (
            "eval.py",
            ["run=.", "decoding.num_beams=5"],
            (
                "error: decoding.num_beams belongs to a choice that is not made: add decoding=OPTION, one of beam, "
                "constrained, diverse, greedy, nucleus, or put + before it to change the run's own: "
                "+decoding.num_beams=VALUE"
            ),
        ),
        (
            "eval.py",
            ["run=.", "decoding=beam", "decoding.num_beam=5"],
            "error: decoding.num_beam is no setting here; nearest: decoding.num_beams",
        ),
        (
            "eval.py",
            ["run=.", "batch_size=8"],
            "error: batch_size is no setting here; nearest: decoding.batch_size",
        ),
        (
            "caption.py",
            ["run=.", "images=.", "batch_size=8"],
            "error: batch_size is no setting here; nearest: decoding.batch_size",
        ),
        (
            "eval.py",
            ["run=.", "data=csv"],
            (
                "error: data=OPTION is for training; here the run's own data are used, which +data.table=FILE and "
                "+data.image_dir=DIR change"
            ),
        ),
        (
            "eval.py",
            ["run=.", "data.batch_size=8"],
            "error: data.batch_size is to change the run's own data, so put + before it: +data.batch_size=VALUE",
        ),
        (
            "caption.py",
            ["run=.", "images=.", "data=csv"],
            "error: data is for training and evaluation; what is captioned is images=PATH",
        ),
        ("caption.py", ["run=."], "error: images is not given: add images=VALUE"),
        ("caption.py", ["run=.", "images=.", "~attention"], "error: attention is missing; it must be true,"),
        ("eval.py", ["run=.", "~run"], "error: run is missing; it must be a path"),
        (
            "eval.py",
            ["run=.", "checks.y=1", "checks=[]"],
            "error: checks.y is no setting here; nearest: checks",
        ),
    ],
)
def test_a_run_that_cannot_be_read_is_told_in_one_line(
    script: str, overrides: list[str], message: str, run: Callable[..., tuple[int, str]]
) -> None:
    status, stderr = run(script, *overrides)
    assert status == 1
    assert stderr.strip().splitlines()[-1].startswith(message)


def test_one_jobs_mistake_leaves_the_sweep_going_and_its_exit_code_tells(
    colour_table: Path, tmp_path: Path
) -> None:
    overrides = [o for o in tiny_overrides(colour_table, tmp_path) if not o.startswith("output_dir=")]
    settings = ["-m", *overrides, "trainer.max_epochs=1", "model.bridge.n_heads=5,4"]
    process = Started("train.py", *settings, cwd=tmp_path, HYDRA_FULL_ERROR=None)
    assert process.wait(300) == 1
    assert "error: model.bridge.n_heads=5 must divide" in process.errors
    assert len(list((tmp_path / "outputs").rglob("model.safetensors"))) == 1


@pytest.mark.parametrize(
    ("swept", "message"),
    [
        ("model=tiny,nope", "error: model=nope is not known; there are large, medium, mini, small, tiny, xl"),
        ("modell=tiny,small", "error: modell is no setting here; nearest: model"),
        ("trainer.max_epoch=1,2", "error: trainer.max_epoch is no setting here; nearest: trainer.max_epochs"),
        ("hydra/launcher=paralel", "error: hydra/launcher=paralel is not known; nearest: parallel"),
        ("sweep=nope", "error: sweep=nope is not known; there are learning_rate"),
    ],
)
def test_a_sweep_over_what_is_not_there_is_told_in_one_line(
    swept: str, message: str, run: Callable[..., tuple[int, str]]
) -> None:
    status, stderr = run("train.py", "-m", swept)
    assert status == 1
    assert stderr.startswith(message)
    assert stderr.count("\n") == 1


DECODINGS = "decoding: beam, constrained, diverse, greedy, nucleus"


@pytest.mark.parametrize(
    ("command", "config", "choices"),
    [
        (
            ["train.py"],
            "train",
            [
                "model: large, medium, mini, small, tiny, xl",
                "data: coco, csv, demo, mix, webdataset",
                "training: cross_entropy, scst",
                "optimizer: adamw, muon",
                DECODINGS,
                "trainer: auto, cpu, ddp, fsdp, gpu",
                "logger: csv, wandb",
                "callbacks: default",
                f"experiment: {', '.join(sorted(file.stem for file in (CONF / 'experiment').iterdir()))}",
                "sweep: learning_rate",
            ],
        ),
        (["eval.py"], "eval", [DECODINGS]),
        (["caption.py"], "caption", [DECODINGS]),
        (["-m", "efficap.demo"], "demo", []),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_help_has_a_commands_own_settings_with_their_comments_and_its_own_choices(
    command: list[str], config: str, choices: list[str], tmp_path: Path
) -> None:
    script = [str(ROOT / part) if part.endswith(".py") else part for part in command]
    result = subprocess.run(
        [sys.executable, "-X", "importtime", *script, "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0
    lines = result.stdout.splitlines()
    written = (CONF / f"{config}.yaml").read_text().splitlines()
    start = next(place for place, line in enumerate(written) if re.match("(name|run):", line))
    own = [line for line in written[start : written.index("hydra:")] if line]
    assert lines[lines.index(own[0]) :][: len(own)] == own
    after = lines[lines.index(own[-1]) + 1 :]
    assert [line for line in after if re.match(r"\w+: \w+(, \w+)*$", line)] == choices
    assert f"  python {' '.join(command)} " in result.stdout
    assert ("shards" in lines[0]) == (config == "caption")
    assert not re.search(r"\| +torch$", result.stderr, re.MULTILINE), "torch takes seconds to load"
    assert not list(tmp_path.iterdir()), "help leaves nothing behind"


@pytest.mark.parametrize("asked", [["--help"], ["--cfg", "job"]], ids=" ".join)
def test_a_reader_who_has_seen_enough_is_told_nothing(asked: list[str], tmp_path: Path) -> None:
    """As of `eval.py --help | head -3`."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        command = [sys.executable, str(ROOT / "eval.py"), "run=x", *asked]
        result = subprocess.run(command, cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE, timeout=120)
    finally:
        os.close(writer)
    assert (result.returncode, result.stderr) == (1, b"")


def test_help_lists_the_options_of_a_folder_of_the_users_own(tmp_path: Path) -> None:
    (tmp_path / "decoding").mkdir()
    (tmp_path / "decoding" / "mine.yaml").write_text("method: greedy\n")
    process = Started("eval.py", f"--config-dir={tmp_path}", "--help", cwd=tmp_path)
    assert process.wait(120) == 0
    assert "decoding: beam, constrained, diverse, greedy, mine, nucleus" in process.printed
