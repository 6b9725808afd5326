"""Steps whose loss or gradients are not finite: left out, counted, and, where they do not end, the end of training.

B images, K captions of each, T tokens.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from efficap.batch import CaptionBatch
from efficap.errors import InputError
from efficap.ranks import world_size
from efficap.tokenizer import CaptionTokenizer
from efficap.training.module import CaptionModule, gradient_norm, whole
from efficap.training.resume_point import ResumePoint
from efficap.training.run_metrics import RunMetrics
from efficap.training.trainer_data import TrainerData

FOLDER = "bad_batch"  # in a run directory


class TooManyBadStepsError(InputError):
    """Training has come to nothing but losses or gradients that are not finite."""


class BadSteps(Callback):
    """Lets a step whose loss or gradients are not finite change nothing: weights, optimiser, BatchNorm's statistics.

    The step still counts as one: the schedule and the order of the data go on. That a step is bad is decided on the
    device, and nobody waits for it: the counts are looked at every `log_every_n_steps`. Where `max_bad_steps` came one
    after the other, training ends as on a signal, with a checkpoint, and the last of their batches is written to
    ``bad_batch/``.

    Args:
        run_dir: the run directory.
        metrics: counts the bad steps of all stages.
        resume_point: keeps a place to go on from, and ends the training.
        max_bad_steps: in a row; None: training goes on whatever comes.

    Raises:
        InputError: a limit below 1.
    """

    def __init__(
        self, run_dir: Path, metrics: RunMetrics, resume_point: ResumePoint, *, max_bad_steps: int | None
    ) -> None:
        check_limit(max_bad_steps)
        self.folder, self.metrics, self.resume_point = run_dir / FOLDER, metrics, resume_point
        self.max_bad_steps = max_bad_steps
        self._in_a_row, self._most_in_a_row, self._last = (
            torch.zeros((), dtype=torch.int64) for _ in range(3)
        )
        self._loss_is_bad: Tensor | None = None
        self._statistics: BatchNormStatistics | None = None
        self._is_begun = False  # a step, which with accumulated gradients has several batches
        self._seen: dict[int, list[_Place]] = {}  # the batches of each step since the counts were looked at
        self._offending: list[_Place] = []
        self._told = 0  # how many bad steps there were when a warning last said so

    def state_dict(self) -> dict[str, Any]:
        return {"in_a_row": int(self._in_a_row)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._in_a_row = torch.tensor(state_dict["in_a_row"])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._told = int(self.metrics.bad_steps)
        self._statistics = BatchNormStatistics(pl_module)
        device = pl_module.device
        self.metrics.bad_steps = self.metrics.bad_steps.to(device)
        self._in_a_row, self._most_in_a_row, self._last = (
            count.to(device) for count in (self._in_a_row, self._most_in_a_row, self._last)
        )

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: CaptionBatch, batch_idx: int
    ) -> None:
        assert self._statistics is not None
        if not self._is_begun:
            self._statistics.keep()
            self._is_begun = True
        epoch = self.metrics.stage.epochs + trainer.current_epoch
        place = (epoch, batch_idx, tuple(batch.image_ids))
        self._seen.setdefault(trainer.global_step, []).append(place)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        bad = ~loss.detach().isfinite()
        self._loss_is_bad = bad if self._loss_is_bad is None else self._loss_is_bad | bad

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        assert isinstance(pl_module, CaptionModule)
        norm = pl_module.gradient_norm = gradient_norm(pl_module)  # which clipping needs, too
        bad = ~whole(norm).isfinite().to(pl_module.device)
        if self._loss_is_bad is not None:
            bad = bad | self._loss_is_bad
        # A rank whose own batch is good must leave the step out with the others.
        bad = bad.float()
        if world_size() > 1:
            dist.all_reduce(bad, dist.ReduceOp.MAX)  # without a barrier, as Lightning's strategy has it

        if optimizer.defaults["fused"]:
            optimizer.found_inf = bad  # type: ignore[attr-defined]  # where it is 1 a step does nothing
        elif bool(bad):  # loss scaling waits for the device at each step anyway
            pl_module.zero_grad()
        assert self._statistics is not None
        self._statistics.put_back_where(bad > 0)
        self._loss_is_bad, self._is_begun = None, False

        count = bad.long()
        self.metrics.count_bad_steps(count)
        self._in_a_row = (self._in_a_row + 1) * count
        self._most_in_a_row = torch.maximum(self._most_in_a_row, self._in_a_row)
        self._last = torch.where(bad > 0, trainer.global_step, self._last)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: CaptionBatch,
        batch_idx: int,
    ) -> None:
        due = trainer.is_last_batch or trainer.global_step % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        if due and not self._is_begun:  # not in the middle of a step
            self._look()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._look()
        self.resume_point.raise_failure()

    def _look(self) -> None:
        """Read the counts, which waits for the device, and tell what they say."""
        most, last, total = torch.stack([self._most_in_a_row, self._last, self.metrics.bad_steps]).tolist()
        if total > self._told:
            warnings.warn(
                f"steps without a finite loss or gradients, left out so far: {total}, the last of them step "
                f"{self.metrics.stage.steps + last}",
                stacklevel=1,
            )
            self._told = total
        if self.max_bad_steps is not None and most >= self.max_bad_steps and not self._offending:
            self._offending = self._seen.get(last, [])
            self.resume_point.end_with(TooManyBadStepsError(self._explanation(most, last)))
        self._seen = {}

    def _explanation(self, most: int, last: int) -> str:
        run_dir = self.folder.parent
        return (
            f"{most} steps in a row, the last of them step {self.metrics.stage.steps + last}, had no finite loss or "
            f"gradients, and training.max_bad_steps={self.max_bad_steps}; its batch is in {self.folder}. Where the "
            f"data are to blame, mend them and go on with resume={run_dir}; otherwise start anew with a smaller "
            "optimizer.lr, or with trainer.precision=32-true or bf16-mixed"
        )

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        if not isinstance(exception, TooManyBadStepsError):
            return
        its_data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(its_data, TrainerData)
        assert isinstance(pl_module, CaptionModule)
        first = trainer.global_rank * len(self._offending)
        try:
            for number, (epoch, place, image_ids) in enumerate(self._offending, start=first):
                batch = its_data.data.training_batch(epoch, place, list(image_ids)).to("cpu")
                write_batch(batch, self.folder, number, pl_module.writer.tokenizer)
        except (OSError, RuntimeError, InputError) as error:
            warnings.warn(f"the bad batch could not be written: {error}", stacklevel=1)


_Place = tuple[int, int, tuple[str, ...]]  # epoch, batch of it, its pictures


class BatchNormStatistics:
    """The running statistics of all BatchNorm layers of a module, to go back to: a forward pass changes them.

    They are kept as one tensor of each dtype, as there may be hundreds.
    """

    def __init__(self, module: nn.Module) -> None:
        self._buffers: dict[torch.dtype, list[Tensor]] = {}
        for layer in module.modules():
            for buffer in layer.buffers(recurse=False) if isinstance(layer, _BatchNorm) else ():
                self._buffers.setdefault(buffer.dtype, []).append(buffer)
        self.keep()

    def keep(self) -> None:
        """Let what they are now be what they go back to."""
        self._kept = {dtype: _joined(buffers) for dtype, buffers in self._buffers.items()}

    def put_back_where(self, condition: Tensor) -> None:
        """Let them be as they were where `condition`, a single boolean on their device, is true."""
        for dtype, buffers in self._buffers.items():
            chosen = torch.where(condition, self._kept[dtype], _joined(buffers))
            parts = chosen.split([buffer.numel() for buffer in buffers])
            torch._foreach_copy_(buffers, [p.view_as(b) for p, b in zip(parts, buffers, strict=True)])


def _joined(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def check_limit(max_bad_steps: int | None) -> None:
    """Raises InputError where `max_bad_steps` is no count of steps."""
    if max_bad_steps is not None and (not isinstance(max_bad_steps, int) or max_bad_steps < 1):
        raise InputError(f"training.max_bad_steps={max_bad_steps} must be at least 1; null: no limit")


def write_batch(batch: CaptionBatch, folder: Path, number: int, tokenizer: CaptionTokenizer) -> None:
    """Write what the model was given: its pictures as PNG, or their feature maps, and names and captions as JSON.

    Args:
        batch: (B, K, T) captions.
        folder: made where it is not there.
        number: of the batch in the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    as_pixels = batch.images.dtype == torch.uint8
    samples = []
    for place, image_id in enumerate(batch.image_ids):
        picture = f"batch_{number}_{place:03d}.png" if as_pixels else None
        if picture:
            pixels = batch.images[place].permute(1, 2, 0).contiguous().numpy()  # (H, W, 3)
            Image.fromarray(pixels).save(folder / picture)
        tokens = [
            ids[:length]
            for ids, length in zip(batch.tokens[place].tolist(), batch.lengths[place].tolist(), strict=True)
            if length
        ]
        captions = [tokenizer.decode(ids) for ids in tokens]
        samples.append({"image_id": image_id, "picture": picture, "captions": captions, "tokens": tokens})
    if not as_pixels:
        save_file(
            {"features": batch.images.contiguous()}, folder / f"batch_{number}.safetensors"
        )  # (B, C, h, w)
    text = json.dumps(samples, indent=1, ensure_ascii=False)
    (folder / f"batch_{number}.json").write_text(text + "\n", encoding="utf-8")
