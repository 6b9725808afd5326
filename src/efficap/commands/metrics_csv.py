"""metrics.csv: every logged value, whole whenever it is read, and whatever room the disk has."""

from __future__ import annotations

import csv
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from efficap.files import unfinished


class MetricsLogger(CSVLogger):
    """Lightning's logger with a file that neither a kill nor a full disk cuts short.

    Args:
        run_dir: the run directory.
        log: rows that the file begins with; None: none.
    """

    def __init__(self, run_dir: Path, log: pd.DataFrame | None) -> None:
        super().__init__(run_dir, name="", version="", flush_logs_every_n_steps=1)
        self._experiment = _MetricsFile(run_dir, log)


class _MetricsFile(ExperimentWriter):
    """Rows that the disk has no room for are kept, and written with the next ones that it has."""

    def __init__(self, run_dir: Path, log: pd.DataFrame | None) -> None:
        super().__init__(str(run_dir))
        self.file, self._header = Path(self.metrics_file_path), list[str]()  # what the file has
        self._is_full = False
        if log is None:
            self.file.unlink(missing_ok=True)
            return
        self.metrics_keys, self._header = list(log.columns), list(log.columns)
        with unfinished(self.file) as temporary:
            log.to_csv(temporary, index=False)

    def _check_log_dir_exists(self) -> None:
        """Lightning's takes away the file of a run that is gone on with, before another one is there."""

    def save(self) -> None:
        if not self.metrics:
            return
        self._record_new_keys()
        try:
            if self._header == self.metrics_keys:
                self._append()
            else:
                self._write_anew()
        except OSError as error:
            if not self._is_full:
                warnings.warn(f"{self.file} cannot be written, training goes on: {error}", stacklevel=1)
            self._is_full = True
            return
        self.metrics, self._is_full = [], False

    def _append(self) -> None:
        size = self.file.stat().st_size
        try:
            with self.file.open("a", newline="") as file:
                csv.DictWriter(file, self.metrics_keys).writerows(self.metrics)
        except OSError:
            os.truncate(self.file, size)
            raise

    def _write_anew(self) -> None:
        """With columns that the file did not have."""
        rows: list[dict[str, Any]] = []
        if self._header:
            with self.file.open(newline="") as file:
                rows = list(csv.DictReader(file))
        with unfinished(self.file) as temporary, temporary.open("w", newline="") as file:
            self._write(file, [*rows, *self.metrics])
        self._header = list(self.metrics_keys)

    def _write(self, file: Any, rows: Iterable[dict[str, Any]]) -> None:
        writer = csv.DictWriter(file, self.metrics_keys)
        writer.writeheader()
        writer.writerows(rows)
