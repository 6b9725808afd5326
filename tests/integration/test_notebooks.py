"""The notebooks, cell by cell as Jupyter runs them, on few of the built-in pictures."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from efficap.data.demo import module, write_demo
from efficap.evaluation.gallery import Page

pytestmark = pytest.mark.slow
NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
SHORT = ["trainer=cpu", "trainer.enable_progress_bar=false", "data.num_workers=0", "trainer.max_epochs=2",
         "trainer.limit_train_batches=2", "trainer.limit_val_batches=1"]  # fmt: skip
SCORED = 40  # pictures of each split that is evaluated, instead of 300


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the notebooks write: beside a folder `notebooks`. Few of the built-in pictures are drawn there."""
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "notebooks").mkdir()
    few = {"train": 200, "val": 60, "test": SCORED, "irregular": SCORED}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "write_demo", partial(write_demo, sizes=few))
        yield folder


class Notebook:
    """A notebook's code run in one namespace, as a kernel does.

    Attributes:
        names: what its code has defined.
        shown: the values that its cells end with or display.
    """

    def __init__(self, name: str) -> None:
        self.file = NOTEBOOKS / name
        self.cells = json.loads(self.file.read_text(encoding="utf-8"))["cells"]
        self.shown: list[Any] = []
        self.names: dict[str, Any] = {"display": self.shown.append}

    def run(self, **settings: Any) -> None:
        """Run all cells, with `settings` in place of what the first one sets by these names."""
        first, *others = [cell for cell in self.cells if cell["cell_type"] == "code"]
        self._run_cell(first)
        assert settings.keys() <= self.names.keys(), "the first cell sets them"
        self.names |= settings
        for cell in others:
            self._run_cell(cell)

    def _run_cell(self, cell: dict[str, Any]) -> None:
        tree = ast.parse("".join(cell["source"]))
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, str(self.file), "exec"), self.names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), str(self.file), "eval"), self.names)
            if value is not None:
                self.shown.append(value)


@pytest.mark.parametrize("file", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda file: file.stem)
def test_notebooks_are_committed_without_outputs(file: Path) -> None:
    cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)


def test_quickstart(checkout: Path, small_meteor: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkout / "notebooks")
    notebook = Notebook("quickstart.ipynb")
    notebook.run(LIMITS=[*SHORT, "trainer.check_val_every_n_epoch=1", "trainer.val_check_interval=null"])
    scores, captions = (value for value in notebook.shown if isinstance(value, pd.DataFrame))
    assert list(scores.index) == ["test", "irregular"]
    assert scores["images"].tolist() == [SCORED, SCORED]
    assert captions.shape == (3, 4)
    assert captions.map(len).gt(0).all(axis=None)
    pictures = [value for value in notebook.shown if isinstance(value, Image.Image)]
    assert len(pictures) == 3
    assert (checkout / "outputs/notebooks/quickstart/model.safetensors").is_file()


def test_compare_sizes(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkout / "notebooks")
    notebook = Notebook("compare_sizes.ipynb")
    notebook.run(LIMITS=[*SHORT, "trainer.check_val_every_n_epoch=1"])
    [page] = [value for value in notebook.shown if isinstance(value, Page)]
    assert "where tiny-demo and mini-demo differ most" in page.file.read_text()
    by_hand = notebook.shown[-1]
    assert by_hand.shape == (2, 2), "models, seeds"
    for (model, seed), cider in by_hand.stack().items():
        scores = json.loads((notebook.names["SWEEP"] / f"{model}_{seed}/eval/test/scores.json").read_text())
        assert cider == pytest.approx(100 * scores["CIDEr"])
    tables = (notebook.names["SWEEP"] / "comparison/comparison.md").read_text()
    for model in ("tiny", "mini"):
        assert f"{by_hand.loc[model].mean():.1f} ± {by_hand.loc[model].std():.1f}" in tables


def test_your_data(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkout / "notebooks")
    notebook = Notebook("your_data.ipynb")
    notebook.run(LIMITS=SHORT)
    [page] = [value for value in notebook.shown if isinstance(value, Page)]
    assert "train_00002.jpg" in page._repr_html_()
    left_out = next(v for v in notebook.shown if isinstance(v, pd.DataFrame) and "reason" in v)
    assert set(left_out["image"]) == {"train_00001.jpg", "train_00002.jpg", "train_00003.jpg"}
    sheets = [value for value in notebook.shown if isinstance(value, Image.Image)]
    assert len(sheets) == 2
    assert all(np.asarray(sheet.convert("L")).std() > 10 for sheet in sheets), "there are pictures on them"
    report = json.loads((notebook.names["FOLDER"] / "doctor_of_shards/report.json").read_text())
    assert report["pictures"] == 397, "of 400, without those in quarantine"
