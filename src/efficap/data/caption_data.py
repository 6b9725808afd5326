"""What training, evaluation and captioning ask of data, wherever it comes from."""

from __future__ import annotations

import itertools
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from efficap.batch import CaptionBatch
from efficap.data.loader import CheckedLoader, Place, Placed
from efficap.errors import InputError
from efficap.ranks import is_first, world_size
from efficap.tokenizer import CaptionTokenizer

_NEXT = 8  # batches among which one is looked for


class CaptionData(ABC):
    """What training, evaluation and captioning ask of data.

    Attributes:
        captions_per_image: K.
        max_tokens: longest caption in tokens, BOS and EOS counted.
        batch_size: B of one process.
        device: that batches are computed on, so that they can be made ready for it.
        first_epoch: of the training's, that its trainer counts as 0: the order goes on from the stages before.
        begun_by: processes that the training was begun with, whose batches together are a step's; None: those of now.
    """

    captions_per_image: int
    max_tokens: int
    batch_size: int
    device: torch.device = torch.device("cpu")
    first_epoch: int = 0
    begun_by: int | None = None
    _current_epoch: Callable[[], int] | None = None  # the trainer's
    _resumed: Place | None = None  # where the first epoch after resuming goes on
    _training: Placed | None = None  # the loader of the training

    def prepare_data(self) -> None:  # noqa: B027  # most find them there
        """Write the files that are to be read, where they are not there yet; by one process at a time."""

    def begin(self, device: torch.device, current_epoch: Callable[[], int]) -> None:
        """A training begins, before any loader is asked for.

        Args:
            current_epoch: tells which of its epochs its trainer is in, 0 ….
        """
        self.device, self._current_epoch = device, current_epoch

    def end(self) -> None:
        """It has ended, and processes that load for it end."""
        self._training = self._current_epoch = self._resumed = None

    def state_dict(self) -> dict[str, Any]:
        """Where training is in the data, for its checkpoints."""
        # A validation may come before the first batch of a training that goes on: its place is still what was loaded.
        place = self._resumed or (self._training.place if self._training is not None else (0, 0))
        return {
            "place": list(place),
            "processes": self.begun_by or world_size(),
            "pictures": self.training_size,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there; before a training begins."""
        epoch, batch = state_dict["place"]
        self._resumed, self.begun_by = (epoch, batch), state_dict.get("processes")
        once, now = state_dict.get("pictures"), self.training_size
        if batch and once not in (None, now) and is_first():
            warnings.warn(
                f"the training split has {now:,} pictures and had {once:,} when this training was stopped: the rest "
                "of the epoch comes in another order, with some pictures twice and some not at all",
                stacklevel=1,
            )

    def _next_place(self) -> Place:
        """The epoch and the batch that the next iteration of the training begins with."""
        place, self._resumed = self._resumed, None
        epoch = self.first_epoch + (self._current_epoch() if self._current_epoch else 0)
        return place if place is not None and place[0] == epoch else (epoch, 0)

    def training_batch(self, epoch: int, first: int, image_ids: list[str]) -> CaptionBatch:
        """A batch of the training once more: of `epoch`, its batch `first` or the next one of these pictures.

        What the training itself reads at the time is broken off.

        Raises:
            InputError: these pictures do not come, since one of them is read no more.
        """
        assert self._training is not None
        for batch in itertools.islice(self._training.of_epoch(epoch, first), _NEXT):
            if batch.image_ids == image_ids:
                return batch
        raise InputError(f"batch {first} of epoch {epoch} is not what it was: its pictures are read no more")

    @abstractmethod
    def training_captions(self) -> Iterable[str]:
        """Captions to learn a tokenizer from."""

    @property
    @abstractmethod
    def training_size(self) -> int:
        """Pictures of the training split."""

    @abstractmethod
    def prepare(
        self,
        tokenizer: CaptionTokenizer,
        *,
        image_size: int,
        interpolation: str,
        crop_pct: float,
        splits: list[str],
    ) -> None:
        """Check the pictures of `splits` and get their captions ready, once, before any loader is asked for.

        Raises:
            InputError: a split that is not there, or more bad samples than are allowed.
        """

    @abstractmethod
    def train_dataloader(self) -> Placed:
        """An epoch of the prepared training split at each iteration."""

    @abstractmethod
    def evaluation_dataloader(self, split: str) -> CheckedLoader:
        """Every picture of a prepared split once, in turn, as evaluation sees it, with all its references."""

    @abstractmethod
    def picture(self, split: str, image_id: str) -> Path | Image.Image:
        """A picture to show: its file, or itself.

        Raises:
            OSError: it lies in a shard that has changed, or cannot be read.
        """

    def attribute(self, split: str, name: str) -> dict[str, str]:
        """The value of a column of the table for each picture of a split, by image id; "" where there is none.

        Raises:
            InputError: there is no such column, or no table.
        """
        raise InputError(f"by={name} needs a table with such a column: add +data.table=… +data.image_dir=…")

    def coco_ids(self) -> dict[str, int]:
        """The numbers of the pictures, by image id, where the table is COCO's; else nothing."""
        return {}

    @abstractmethod
    def notes(self) -> list[str]:
        """What a person should know of the prepared data, a line each."""

    @abstractmethod
    def left_out(self) -> dict[str, int]:
        """Bad samples so far, by reason."""

    def val_dataloader(self) -> CheckedLoader:
        return self.evaluation_dataloader("val")
