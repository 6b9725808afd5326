"""A run exported to ONNX: the same captions from onnxruntime as from PyTorch, in every kind of decoding."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import compose, write_colour_table, write_random_run
from toys import BEAM, CONSTRAINED, DIVERSE, GREEDY, NUCLEUS

from efficap.commands.caption import caption
from efficap.commands.evaluate import evaluate
from efficap.commands.export_check import check_pictures
from efficap.commands.run_dir import RunDirectory
from efficap.decoding import build_decoding
from efficap.errors import InputError
from efficap.models.captioner import CaptionModel
from efficap.models.pretrained import onnx_graphs, onnx_runtime
from efficap.models.pretrained.__main__ import main
from efficap.models.pretrained.onnx_graphs import DECODER_FILE, ENCODER_FILE
from efficap.models.pretrained.onnx_runtime import OnnxCaptioner
from efficap.tokenizer import CaptionTokenizer
from efficap.training.writer import CaptionWriter

pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.slow
TOKENIZER = CaptionTokenizer.learn(["a red picture", "all of it is green", "blue and grey"], vocab_size=300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_colour_table(tmp_path_factory.mktemp("onnx") / "colours")


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    return write_random_run(folder.parent / "run")


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    assert main(["export", f"--run={run}", "--format=onnx", f"--out={run.parent / 'exported'}"]) == 0
    return run.parent / "exported"


@pytest.fixture(scope="module")
def pictures(run: Path) -> torch.Tensor:
    return check_pictures(RunDirectory(run), None)[:7]


Models = tuple[CaptionModel, OnnxCaptioner]


@pytest.fixture(scope="module")
def models(run: Path, exported: Path) -> Models:
    theirs = RunDirectory(exported).captioner(TOKENIZER, torch.device("cpu"))
    ours = RunDirectory(run).captioner(TOKENIZER, torch.device("cpu"))
    assert isinstance(ours, CaptionModel)
    assert isinstance(theirs, OnnxCaptioner)
    return ours, theirs


def write(model: Any, settings: dict[str, Any], pictures: torch.Tensor) -> list[Any]:
    writer = CaptionWriter(model, TOKENIZER, build_decoding(settings))
    return writer.write(pictures, [f"image-{i}" for i in range(len(pictures))])


@pytest.mark.parametrize(
    "settings",
    [
        GREEDY,
        GREEDY | {"prefix": "all of"},
        BEAM | {"num_return_sequences": 3},
        DIVERSE,
        NUCLEUS | {"num_return_sequences": 4},
        CONSTRAINED | {"required": ["a"]},
    ],
    ids=["greedy", "prefix", "beam", "diverse", "nucleus", "constrained"],
)
def test_both_runtimes_write_the_same_captions(
    models: Models, pictures: torch.Tensor, settings: dict[str, Any]
) -> None:
    settings = settings | {"max_tokens": 14, "min_tokens": 4, "batch_size": 5}
    ours, theirs = (write(model, settings, pictures) for model in models)
    assert [[one.tokens for one in of] for of in ours] == [[one.tokens for one in of] for of in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        for one, two in zip(mine, other, strict=True):
            assert one.score == pytest.approx(two.score, abs=1e-3)
            assert one.token_log_probs == pytest.approx(two.token_log_probs, abs=1e-3)
    assert len({best.text for best, *_ in ours}) > 3, "the pictures have captions of their own"
    if settings["method"] != "constrained":
        assert len({len(best.tokens) for best, *_ in ours}) > 1, "and leave the batch at different times"


def test_a_pictures_logits_do_not_depend_on_its_batch(models: Models, pictures: torch.Tensor) -> None:
    newest = torch.full((len(pictures),), TOKENIZER.bos_id)
    with torch.no_grad():
        together, of_ours = (
            model.start(pictures, 12)(newest, None, None) for model in (models[1], models[0])
        )
    torch.testing.assert_close(together, of_ours, atol=2e-5, rtol=1e-4)
    for place in (0, 4):
        alone = models[1].start(pictures[place : place + 1], 12)(newest[:1], None, None)
        torch.testing.assert_close(alone, together[place : place + 1], atol=2e-5, rtol=1e-4)


def test_steps_with_parents_and_leaving_pictures_equal_pytorchs(
    models: Models, pictures: torch.Tensor
) -> None:
    calls: list[tuple[int, list[int] | None, list[int] | None]] = [
        (3, None, None),
        (6, [0, 0, 1, 1, 2, 2], None),
        (6, [1, 0, 2, 2, 5, 4], None),
        (4, [1, 1, 4, 5], [0, 2]),
        (4, None, None),
        (2, [3, 2], [1]),
    ]
    steps = [model.start(pictures[:3], 12) for model in models]
    for rows, parents, images in calls:
        ids = torch.randint(TOKENIZER.vocab_size, (rows,))
        moves = [None if places is None else torch.tensor(places) for places in (parents, images)]
        with torch.no_grad():
            ours, theirs = (step(ids, *moves) for step in steps)
        torch.testing.assert_close(theirs, ours, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("decoding", ["greedy", "beam"])
def test_a_folder_is_captioned_by_the_export_as_by_the_run(
    run: Path, exported: Path, folder: Path, tmp_path: Path, decoding: str
) -> None:
    rows = []
    for directory, out in ((run, tmp_path / "run"), (exported, tmp_path / "export")):
        overrides = [f"run={directory}", f"images={folder}/images", f"out={out}", "num_workers=0"]
        caption(compose("caption", *overrides, f"decoding={decoding}", "accelerator=auto"))
        rows.append([json.loads(line) for line in (out / "captions.jsonl").read_text().splitlines()])
    assert len(rows[0]) == 16
    assert [row["caption"] for row in rows[0]] == [row["caption"] for row in rows[1]]


def test_an_evaluation_of_the_export_gives_the_runs_scores(run: Path, exported: Path) -> None:
    scores = [
        evaluate(compose("eval", f"run={directory}", "metrics=[CIDEr]", "gallery=0", "decoding=beam"))
        for directory in (run, exported)
    ]
    checks = [of_one.pop("checks") for of_one in scores]
    assert scores[0] == scores[1]
    assert checks[0].keys() - checks[1].keys() == {"loss", "loss_shuffled", "loss_gap"}


def test_what_an_export_cannot_do_is_refused(
    exported: Path, models: Models, pictures: torch.Tensor, folder: Path
) -> None:
    for change, message in (
        ("precision=bfloat16", "precision=bfloat16: .* is an ONNX export in float32; leave it out"),
        ("compile=true", "compile=true: .* is an ONNX export, compiled already; leave it out"),
        ("accelerator=gpu", "accelerator=gpu"),
    ):
        with pytest.raises(InputError, match=message):
            caption(compose("caption", f"run={exported}", f"images={folder}/images", change))
    with pytest.raises(InputError, match="does not tell where it looks"):
        CaptionWriter(models[1], TOKENIZER, build_decoding(GREEDY)).write(pictures, ["a"] * 7, attention=True)
    with pytest.raises(InputError, match=r"decoding.max_tokens=\d+ is more than .*n_positions"):
        models[1].start(pictures, max_tokens=10_000)


@pytest.fixture
def refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs an export that must fail and leave nothing; returns the line that it prints."""

    def export(*options: str, run: Path = run) -> str:
        before = sorted(tmp_path.iterdir())
        assert main(["export", f"--run={run}", f"--out={tmp_path / 'out'}", *options]) == 1
        assert sorted(tmp_path.iterdir()) == before, "nothing is left behind"
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith("error: ")
        assert printed.err.count("\n") == 1
        return printed.err

    return export


@pytest.fixture
def no_tracing(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports take the graphs that were traced before, for that takes seconds."""

    def copied(captioner: CaptionModel, image_size: int, directory: Path) -> None:
        for name in (ENCODER_FILE, DECODER_FILE):
            (directory / name).write_bytes((exported / name).read_bytes())

    monkeypatch.setattr(onnx_graphs, "export_graphs", copied)


@pytest.mark.usefixtures("no_tracing")
def test_an_export_that_says_something_else_is_not_kept(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    take = OnnxCaptioner.start
    monkeypatch.setattr(OnnxCaptioner, "start", lambda self, images, *rest: take(self, images.flip(0), *rest))
    error = refused("--format=onnx")
    assert "does not reproduce the run: captions equal to the run's, greedy: " in error
    assert error.endswith("; nothing is written\n")


def test_a_missing_package_is_named(
    refused: Callable[..., str], exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(onnx_runtime.importlib, "import_module", missing)
    assert "pip install 'efficap[onnx]'" in refused("--format=onnx")
    with pytest.raises(InputError, match=r"onnxruntime, .*pip install 'efficap\[onnx\]'"):
        RunDirectory(exported).captioner(TOKENIZER, torch.device("cpu"))


def test_a_damaged_export_is_named(exported: Path, tmp_path: Path) -> None:
    for file in ("encoder.onnx", "decoder.onnx", "config.yaml"):
        (tmp_path / file).write_bytes((exported / file).read_bytes())
    (tmp_path / "encoder.onnx").write_bytes(b"no graph")
    with pytest.raises(InputError, match=r"encoder.onnx cannot be loaded \(.*export it again"):
        RunDirectory(tmp_path).captioner(TOKENIZER, torch.device("cpu"))
    (tmp_path / "encoder.onnx").unlink()
    with pytest.raises(InputError, match=r"encoder.onnx does not exist; export the run again"):
        RunDirectory(tmp_path).captioner(TOKENIZER, torch.device("cpu"))


@pytest.mark.usefixtures("no_tracing")
def test_an_int8_export_is_smaller_and_tells_how_many_captions_stay(
    run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "int8"
    images = f"--images={folder}/images"
    assert main(["export", f"--run={run}", "--format=onnx", "--int8", f"--out={out}", images]) == 0
    printed = capsys.readouterr().out
    assert "captions equal to the run's, greedy: " in printed
    assert "decoder.onnx: " in printed
    exported = RunDirectory(out)
    assert exported.placement("auto", None)[1] == torch.int8
    with pytest.raises(InputError, match=r"precision=float32: .* in int8; leave it out"):
        exported.placement("cpu", "float32")
    caption(compose("caption", f"run={out}", f"images={folder}/images", f"out={tmp_path}/c", "num_workers=0"))
    assert json.loads((tmp_path / "c/captioning.json").read_text())["precision"] == "int8"
