"""Which process this is, and what the settings of several must be, without starting any."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import compose, tiny_model
from torch import nn

from efficap import ranks
from efficap.commands import entry
from efficap.commands.caption import caption
from efficap.commands.processes import check_processes
from efficap.errors import InputError
from efficap.launch import Launch, launch
from efficap.models.build import build_model

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "x",
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
}
SRUN = {
    "SLURM_JOB_ID": "7",
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_NODES": "2",
}


def trainer(*overrides: str) -> dict[str, Any]:
    settings: dict[str, Any] = compose("train", "name=x", "output_dir=x", *overrides)["trainer"]
    return settings


def started_by(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(("by", "environment"), [("torchrun", TORCHRUN), ("srun", SRUN)])
def test_rank_and_nodes_come_from_whoever_started_the_processes(
    monkeypatch: pytest.MonkeyPatch, by: str, environment: dict[str, str]
) -> None:
    assert launch() == Launch()
    started_by(monkeypatch, environment)
    assert launch() == Launch(by, rank=5, world=8, local_rank=1, nodes=2)
    assert launch().local_world == 4


def test_a_script_of_sbatch_is_a_process_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    started_by(monkeypatch, {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"})
    assert launch() == Launch()


@pytest.mark.parametrize(
    ("environment", "overrides", "message"),
    [
        ({}, ["trainer=ddp"], "trainer.strategy=ddp needs a process for each device: torchrun --standalone"),
        (
            {},
            ["trainer.devices=4"],
            "trainer.devices=4 needs a process .* --nproc-per-node=4 train.py trainer=ddp",
        ),
        *(
            (
                {},
                [f"trainer.devices={several}"],
                r"trainer.devices=\S+( 1\])? must be 1 in one process, or \[N\] for the GPU of that number",
            )
            for several in ("-1", "0", "auto", "'2'", "[0,1]", "[]", "[-1]")
        ),
        ({}, ["trainer.strategy=dp"], "trainer.strategy=dp must be ddp"),
        (
            TORCHRUN,
            [],
            "torchrun started 8 processes, and trainer.strategy=null trains in one: add trainer=ddp",
        ),
        (SRUN, [], "srun started 8 processes"),
        (TORCHRUN, ["trainer=ddp", "trainer.devices=2"], "torchrun gave each process its own"),
        (TORCHRUN, ["trainer=ddp", "+trainer.sync_batchnorm=true"], "would take timm's activations away"),
        (
            SRUN,
            ["trainer=ddp", "trainer.val_check_interval='00:01:00:00'"],
            "clocks of several processes differ",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], overrides: list[str], message: str
) -> None:
    started_by(monkeypatch, environment)
    with pytest.raises(InputError, match=message):
        check_processes(trainer(*overrides))


@pytest.mark.parametrize(
    ("environment", "overrides"),
    [({}, []), ({}, ["trainer.devices=[1]"]), (TORCHRUN, ["trainer=ddp"]), (SRUN, ["trainer=ddp"])],
)
def test_what_goes_together_is_let_through(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], overrides: list[str]
) -> None:
    started_by(monkeypatch, environment)
    check_processes(trainer(*overrides))


def test_more_processes_than_gpus_are_refused_in_all_of_them_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for local_rank in ("0", "3"):
        started_by(monkeypatch, {**SRUN, "SLURM_LOCALID": local_rank})
        with pytest.raises(
            InputError, match=r"srun started 4 processes .* sees 2 GPUs; .*no --gpus-per-task=1"
        ):
            ranks.take_gpu()


def test_a_process_that_works_apart_tells_its_own_mistakes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started_by(monkeypatch, TORCHRUN)
    monkeypatch.setattr(sys, "argv", ["caption.py", "run=x", "images=x"])

    def fail(_: object) -> None:
        raise InputError("out of luck")

    for apart, said in ((False, ""), (True, "error of rank 5: out of luck\n")):
        monkeypatch.setattr(ranks, "_is_apart", apart)
        monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
        with pytest.raises(SystemExit):
            entry.run("caption", fail)
        assert capsys.readouterr().err == said


def test_a_sweep_is_not_led_by_several(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started_by(monkeypatch, {**TORCHRUN, "RANK": "0"})
    monkeypatch.setattr(sys, "argv", ["train.py", "-m", "seed=1,2"])
    with pytest.raises(SystemExit) as ended:
        entry.run("train", lambda cfg: pytest.fail("it began"))
    assert ended.value.code == 1
    assert "torchrun started 8 processes for one training; -m is for many" in capsys.readouterr().err


def test_a_folder_of_pictures_is_not_captioned_by_several(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    started_by(monkeypatch, TORCHRUN)
    with pytest.raises(
        InputError, match=r"8 processes can share shards .* and not a folder of pictures; start one"
    ):
        caption(compose("caption", f"run={tmp_path}", f"images={tmp_path}"))


def test_shared_batchnorm_computes_what_timms_own_does_and_torchs_converter_would_not() -> None:
    encoder = build_model(tiny_model(), 300).encoder.eval()
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    before, names = encoder(images), list(encoder.state_dict())
    encoder.share_statistics()
    assert any(isinstance(module, nn.SyncBatchNorm) for module in encoder.modules())
    assert torch.equal(encoder(images), before)
    assert list(encoder.state_dict()) == names
    other = build_model(tiny_model(), 300).encoder.eval()
    other.load_state_dict(encoder.state_dict())
    other.backbone = nn.SyncBatchNorm.convert_sync_batchnorm(other.backbone)
    assert not torch.allclose(other(images), before), (
        "else the hazard is gone, and the check of sync_batchnorm may go"
    )
