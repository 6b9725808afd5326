"""What Weights & Biases is told, and what it is not; and the sweeps that it leads."""

from __future__ import annotations

import shlex
import socket
import subprocess
from pathlib import Path
from typing import Any

import hydra
import pytest
import yaml
from conftest import compose
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.loggers import WandbLogger
from wandb_files import OfflineRun, finished_run

from efficap.commands.entry import CONF
from efficap.commands.loggers import build_loggers, finish_wandb
from efficap.commands.provenance import provenance, without_secrets
from efficap.errors import InputError

SECRET = "sesame-opens-1234567"


@pytest.fixture
def wandb_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B without a login, a network and the settings of other tests."""
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))


def offline_run(run_dir: Path) -> OfflineRun:
    [file] = (run_dir / "wandb").glob("offline-run-*/run-*.wandb")
    return finished_run(file)


def log_run(run_dir: Path, *overrides: str) -> OfflineRun:
    """Begin and end a run that logs one figure; returns what W&B keeps of it."""
    run_dir.mkdir()
    cfg = compose("train", f"output_dir={run_dir}", "name=job", *overrides)
    loggers = build_loggers(cfg, run_dir, None)
    loggers[1].log_metrics({"train/loss": 2.5}, step=3)
    finish_wandb(exit_code=0)
    return offline_run(run_dir)


@pytest.mark.usefixtures("wandb_free")
def test_secret_environment_variables_do_not_reach_wandb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HUB_API_TOKEN", SECRET)
    secret = "'hub/${oc.env:HUB_API_TOKEN}'"
    told = [f"init_from={secret}", f"+logger.notes={secret}", "optimizer.eps=1e-7"]
    run = log_run(tmp_path / "run", *told)
    kept = [file for file in (tmp_path / "run" / "wandb").rglob("*") if file.is_file()]
    assert not [file for file in kept if SECRET.encode() in file.read_bytes()]
    assert SECRET.encode() not in run.contents
    assert run.config["init_from"] == "hub/***"
    assert run.config["optimizer"]["eps"] == 1e-7, "the rest is told whole"
    assert run.history[0]["train/loss"] == 2.5
    assert run.exit_codes == [0]


def test_short_and_harmless_variables_are_not_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "tiny")
    monkeypatch.setenv("SOME_PLACE", "somewhere else")
    monkeypatch.setenv("MY_PASSWORD", "correct horse")
    told = {"model": "tiny", "places": ["somewhere else", {"url": "http://me:correct horse@host"}], "n": 1}
    masked = {**told, "places": ["somewhere else", {"url": "http://me:***@host"}]}
    assert without_secrets(told) == masked


def test_a_run_tells_commit_versions_and_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def git(*arguments: str) -> str:
        identity = [
            "-c",
            "user.name=nobody",
            "-c",
            "user.email=nobody@example.org",
            "-c",
            "commit.gpgsign=false",
        ]
        return subprocess.check_output(["git", *identity, *arguments], cwd=tmp_path, text=True).strip()

    git("init", "--quiet")
    (tmp_path / "code.py").touch()
    git("add", "code.py")
    git("commit", "--quiet", "-m", "code")
    monkeypatch.setattr("efficap.commands.provenance.FOLDER", tmp_path)
    told = provenance()
    assert (told["git_commit"], told["git_dirty"]) == (git("rev-parse", "HEAD"), False)
    (tmp_path / "code.py").write_text("pass")
    assert provenance()["git_dirty"] is True
    assert told["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert told["devices"] >= 1
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr("efficap.commands.provenance.FOLDER", tmp_path / "elsewhere")
    assert (provenance()["git_commit"], provenance()["git_dirty"]) == (None, None)


@pytest.mark.usefixtures("wandb_free")
@pytest.mark.parametrize("key", ["", 40 * "0"])
def test_online_without_key_or_network_goes_on_offline_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    with socket.socket() as taken:  # nothing answers there
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{taken.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", key)
        run = log_run(tmp_path / "run", "logger.mode=online")
    assert "W&B cannot be used online, going on offline: " in capsys.readouterr().err
    assert run.exit_codes == [0]


@pytest.mark.usefixtures("wandb_free")
def test_a_key_that_is_none_is_told_and_the_run_goes_on_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "changeme")
    assert log_run(tmp_path / "run").exit_codes == [0]
    assert "W&B cannot be used online, going on offline: " in capsys.readouterr().err


@pytest.mark.usefixtures("wandb_free")
@pytest.mark.parametrize("place", ["loggers", "loggers.wandb"])
def test_lightnings_wandb_logger_needs_none_of_our_settings(tmp_path: Path, place: str) -> None:
    run = log_run(tmp_path / "run", "logger=csv", f"+logger._target_=lightning.pytorch.{place}.WandbLogger")
    assert run.history[0]["train/loss"] == 2.5


class MyWandbLogger(WandbLogger):
    """A user's own."""


@pytest.mark.usefixtures("wandb_free")
@pytest.mark.parametrize("chosen", ["wandb", "csv"])
def test_a_wandb_logger_of_the_users_own_is_the_one_that_is_built(tmp_path: Path, chosen: str) -> None:
    changes = [f"logger={chosen}", f"++logger._target_={__name__}.MyWandbLogger"]
    cfg = compose("train", f"output_dir={tmp_path}", "name=job", *changes)
    _, logger = build_loggers(cfg, tmp_path, None)
    assert type(logger) is MyWandbLogger
    finish_wandb(exit_code=0)
    assert offline_run(tmp_path).exit_codes == [0], "offline where nobody is logged in, as Lightning's"


@pytest.mark.usefixtures("wandb_free")
def test_a_setting_that_wandb_does_not_have_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^logger has settings that .* not take: .*'no_setting'"):
        log_run(tmp_path / "run", "+logger.no_setting=1")


@pytest.mark.usefixtures("wandb_free")
@pytest.mark.parametrize(
    "setting", ["logger.mode=ofline", "+logger.settings.typo=1", "logger.project=me/captions"]
)
def test_a_value_that_wandb_refuses_is_told_in_its_words(tmp_path: Path, setting: str) -> None:
    with pytest.raises(InputError, match=r"^logger.*(ofline|typo|me/captions)"):
        log_run(tmp_path / "run", setting)


@pytest.mark.usefixtures("wandb_free")
@pytest.mark.parametrize(
    ("told", "tags", "group"),
    [([], ["tiny", "demo"], "sizes"), (["+logger.tags=[mine]", "+logger.group=g"], ["mine"], "g")],
)
def test_a_sweeps_run_has_the_tags_and_the_group_that_the_user_gave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: list[str], tags: list[str], group: str
) -> None:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        job = hydra.compose("train", ["name=job", "hydra.sweep.dir=sizes"], return_hydra_config=True)
    job.hydra.mode = RunMode.MULTIRUN
    monkeypatch.setattr(HydraConfig.instance(), "cfg", job)
    run = log_run(tmp_path / "run", *told).run
    assert (sorted(run.tags), run.run_group) == (sorted(tags), group)


@pytest.mark.usefixtures("wandb_free")
def test_what_wandbs_agent_sets_does_not_hide_the_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    (tmp_path / "parameters.yaml").write_text("wandb_version: 1\nmodel: {value: tiny}\nseed: {value: 3}\n")
    wandb.teardown()  # W&B reads its variables once in a process
    monkeypatch.setenv("WANDB_SWEEP_ID", "abcdefgh")
    monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", str(tmp_path / "parameters.yaml"))
    run = log_run(tmp_path / "run", "model=tiny", "seed=3")
    wandb.teardown()
    assert (run.config["model"], run.config["seed"]) == ("tiny", 3)
    assert run.config["model_settings"]["image_size"] == 128


@pytest.mark.parametrize("file", sorted(CONF.glob("sweep/*.wandb.yml")), ids=lambda file: file.name)
def test_wandbs_sweeps_name_settings_that_there_are(file: Path) -> None:
    sweep = yaml.safe_load(file.read_text())
    assert sweep["program"] == "train.py"
    assert sweep["command"][:3] == ["${env}", "python", "${program}"]
    assert sweep["command"][-1] == "${args_no_hyphens}"
    shared = sweep["command"][3:-1]
    for key, range_ in sweep["parameters"].items():
        for value in range_.get("values") or [range_["min"], range_["max"]]:
            [changed] = shlex.split(f"{key}={value}")
            cfg = compose(
                "train", "name=x", "output_dir=x", *shared, "data.table=x", "data.image_dir=x", changed
            )
            found: Any = cfg
            for part in key.split("."):
                found = found[part]
            assert found == value or key == "model"


def test_hydras_and_wandbs_search_are_the_same() -> None:
    ours = yaml.safe_load((CONF / "sweep/learning_rate.yaml").read_text())["hydra"]["sweeper"]
    theirs = yaml.safe_load((CONF / "sweep/learning_rate.wandb.yml").read_text())
    assert ours["direction"] == theirs["metric"]["goal"]
    spoken = {
        key: f"tag(log, interval({range_['min']:g}, {range_['max']:g}))"
        for key, range_ in theirs["parameters"].items()
    }
    assert {
        key: value.replace("e-6", "e-06").replace("e-5", "e-05") for key, value in ours["params"].items()
    } == {key: value.replace("0.003", "3e-3") for key, value in spoken.items()}
