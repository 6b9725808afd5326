"""When checkpoints are written and put in their place, and what signals come to.

What decides the next step is in a checkpoint or follows from the seed and the step: weights, their average, optimiser,
schedule, counts and scores are in it; the order of the pictures and all chance in a step follow from seed and place.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, Timer
from lightning.pytorch.loops.evaluation_loop import RestartStage

from efficap.errors import InputError
from efficap.ranks import largest
from efficap.training.checkpoints import LAST, PREVIOUS, damage
from efficap.training.stage import Stage

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_SLURMS = signal.SIGUSR1  # what sbatch --signal=USR1@SECONDS has it send before the time is over


class Stopped(BaseException):
    """A signal asked training to end, and it has.

    Attributes:
        exit_status: as a shell has it for a process that the signal ended.
        by_slurm: whether it was the warning that a job's time is nearly over.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_status = 128 + number
        self.by_slurm = number == _SLURMS


class ResumePoint(Callback):
    """Writes ``checkpoints/last.ckpt`` now and then, before each validation, and when a signal asks training to end.

    SIGTERM and Ctrl-C are heard between two steps, or two batches of a validation; a second one ends at once. A
    validation amid the batches whose gradients one step adds up has no checkpoint of its own. Where one
    of several processes hears it, all end after the same step. In a job of SLURM's SIGUSR1 is heard, too.

    Args:
        run_dir: the run directory.
        stage: of the training.
        seed: with epoch and batch, all chance in a step.
        every_minutes, every_steps: how often; None: not by this.

    Raises:
        InputError: an interval that is not positive.
    """

    def __init__(
        self, run_dir: Path, stage: Stage, *, seed: int, every_minutes: float | None, every_steps: int | None
    ) -> None:
        for name, value in (("every_minutes", every_minutes), ("every_steps", every_steps)):
            if value is not None and not value > 0:
                raise InputError(f"checkpoint.{name}={value} must be above 0; null: not by this")
        self.folder, self.stage, self.seed = run_dir / "checkpoints", stage, seed
        self.every_minutes, self.every_steps = every_minutes, every_steps
        self._signal: int | None = None  # that this process has heard
        self._agreed: int | None = None  # that one of all has heard
        self._failure: Exception | None = None  # what else ends the training, of all processes
        self._handlers: dict[int, Any] = {}
        self._saved_at, self._saved_step = 0.0, 0
        self._is_written = False  # and not yet in its place
        self._last_is_whole = False  # known to be, as this process wrote it
        self._validation_due = False  # the checkpoint was written before a validation, which is still to come
        self._may_stop = True  # in a validation: what was done until then is in the checkpoint
        self._is_over = False  # training is, but for a validation: Lightning's interval is put aside
        self._interval: float | None = None  # that one

    def state_dict(self) -> dict[str, Any]:
        return {"validation_due": self._validation_due}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._validation_due = bool(state_dict["validation_due"])

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if not self._validation_due:
            return
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            remaining = callback.time_remaining() if isinstance(callback, Timer) else None
            if remaining is not None and remaining <= 0:
                # Lightning would do nothing with it. So it has a moment left: for the validation, and one step more.
                checkpoint["callbacks"]["Timer"]["time_elapsed"]["train"] += remaining - 1e-3

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        due = checkpoint["callbacks"][type(self).__name__]["validation_due"]
        if due and checkpoint["global_step"] == trainer.max_steps:
            self._is_over = True
            trainer.fit_loop.epoch_loop.max_steps += 1  # Lightning would do nothing at all

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._saved_at, self._saved_step = time.monotonic(), trainer.global_step
        self._listen()
        # while loaders were being made, when Lightning listens, and would end with 0
        if trainer.received_sigterm:
            self._signal = signal.SIGTERM
            trainer._signal_connector.received_sigterm = False
        if self._validation_due:  # Lightning would take it for done
            validation = trainer.fit_loop.epoch_loop.val_loop
            validation._restart_stage = RestartStage.RESTARTED_MID_EVALUATION
            validation.restarting = False
            self._validation_due = False
            clock: Any = trainer
            if clock._val_check_time_interval is not None:  # its time has come, whenever that was
                clock._last_val_time = -math.inf
        if self._is_over:  # Lightning validates before the next step where it is time to, and it is
            clock = trainer
            self._interval, clock._val_check_time_interval = clock._val_check_time_interval, 0.0
            clock._last_val_time = -math.inf

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._publish()  # only now, when the step of the checkpoint has been logged
        # In an epoch of a single step there is never a place to go on from, but for its validation.
        single = trainer.num_training_batches <= trainer.accumulate_grad_batches
        if single or trainer.global_step == self._saved_step:
            self._stop_if_asked()
        epoch = self.stage.epochs + trainer.current_epoch
        name = f"{self.seed} {trainer.global_rank} {epoch} {batch_idx}"
        torch.manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little"))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loop = trainer.fit_loop.epoch_loop
        assert trainer.fit_loop._data_fetcher is not None
        is_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        # At an epoch's end Lightning cannot go on, and a validation that is about to begin has its own checkpoint.
        possible = is_step and not trainer.is_last_batch
        is_due = self._is_due(trainer)
        if possible and is_due and not loop._should_check_val_fx(trainer.fit_loop._data_fetcher):
            self._write(trainer)

    def end_with(self, error: Exception) -> None:
        """Let training end as on a signal, with a checkpoint, and then raise `error`; all processes ask for it."""
        self._failure = self._failure or error

    def raise_failure(self) -> None:
        """Raise the error that training is to end with, if there is one."""
        if self._failure is not None:
            raise self._failure

    def _is_due(self, trainer: pl.Trainer) -> bool:
        minutes = (time.monotonic() - self._saved_at) / 60
        by_clock = self.every_minutes is not None and minutes >= self.every_minutes
        by_steps = self.every_steps is not None and trainer.global_step - self._saved_step >= self.every_steps
        return self._agree(by_clock or by_steps) or self._agreed is not None or self._failure is not None

    def _agree(self, due: bool = False) -> bool:
        """Learn whether a process has heard a signal; whether a checkpoint is due by the clock of one."""
        heard, is_due = largest(self._signal or 0, int(due))
        self._agreed = heard or None
        return bool(is_due)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            if self._is_over:
                clock: Any = trainer
                clock._val_check_time_interval = self._interval
                trainer.fit_loop.epoch_loop.max_steps -= 1
                self._is_over = False
            # No checkpoint has the gradients of a step of which batches are still to come.
            amid = trainer.fit_loop._should_accumulate()
            self._may_stop = not amid or trainer.global_step == self._saved_step
            if not amid:
                self._validation_due = True
                self._write(trainer)
                self._validation_due = False
                self._publish()

    def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
        self._agree()
        if self._may_stop:
            self._stop_if_asked()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.stage.is_last:
            self._agree()
            self._stop_if_asked()

    def _write(self, trainer: pl.Trainer) -> None:
        temporary = self.folder / f"{LAST}.tmp"
        try:
            with others_let_go(trainer):
                trainer.save_checkpoint(temporary)
            if trainer.is_global_zero:
                _sync(temporary)
                if reason := damage(temporary):
                    raise OSError(f"what was written is {reason}")
                self._is_written = True
        except (OSError, RuntimeError) as error:  # a full disk is the one or the other, by who meets it
            warnings.warn(
                f"no checkpoint at step {trainer.global_step}, training goes on: {error}", stacklevel=1
            )
            temporary.unlink(missing_ok=True)
        self._saved_at, self._saved_step = time.monotonic(), trainer.global_step

    def _publish(self) -> None:
        """Let last.ckpt be the new one; the one before stays as previous.ckpt, unless it was passed over as damaged."""
        if self._is_written:
            if self._last_is_whole or not damage(self.folder / LAST):
                os.replace(self.folder / LAST, self.folder / PREVIOUS)
            os.replace(self.folder / f"{LAST}.tmp", self.folder / LAST)
            _sync(self.folder)
            self._is_written, self._last_is_whole = False, True

    def _listen(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # Python lets no other hear signals
        for number in (*_SIGNALS, *([_SLURMS] if "SLURM_JOB_ID" in os.environ else [])):
            self._handlers[number] = signal.signal(number, self._hear)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None and number != _SLURMS:
            os._exit(128 + number)
        self._signal = number

    def _stop_if_asked(self) -> None:
        if self._agreed is not None:
            raise Stopped(self._agreed)
        self.raise_failure()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}


@contextlib.contextmanager
def others_let_go(trainer: pl.Trainer) -> Iterator[None]:
    """Where the first process cannot write a checkpoint, let the others not wait for it at Lightning's barrier."""
    try:
        yield
    except (OSError, RuntimeError):
        if trainer.is_global_zero:
            trainer.strategy.barrier()
        raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
