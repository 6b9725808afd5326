"""The built-in data set as a data module: a `CSVDataModule` that draws its own table first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from efficap.data.csv import CSVDataModule
from efficap.data.demo.writing import write_demo
from efficap.errors import InputError


class DemoDataModule(CSVDataModule):
    """Draws the demo data set where it is not there yet, then reads it as any other CSV.

    Args:
        root: the data set's folder.
        demo_seed: of the drawing.
        csv: the arguments of `CSVDataModule`.
    """

    def __init__(self, *, root: str, demo_seed: int, **csv: Any) -> None:
        super().__init__(**csv)
        self.root, self.demo_seed = Path(root).expanduser(), demo_seed

    def prepare_data(self) -> None:
        try:
            write_demo(self.root, seed=self.demo_seed)
        except OSError as error:
            raise InputError(
                f"data.root={self.root} cannot be written: {error.strerror or error}; data.root=DIR names another, in "
                "eval.py +data.root=DIR +data.table=DIR/captions.csv +data.image_dir=DIR/images"
            ) from error
