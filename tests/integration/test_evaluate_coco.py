"""eval.py on tables in COCO's format: scores, numbers, domains, pictures without captions; several runs, ensembles."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import compose, write_colour_table, write_random_run
from PIL import Image
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
from pycocotools.coco import COCO

from efficap.commands.evaluate import evaluate
from efficap.commands.evaluate_runs import evaluate_runs
from efficap.data.pictures import Picture
from efficap.data.transforms import EvaluationTransform
from efficap.decoding import build_decoding
from efficap.decoding.ensemble import AveragedStep
from efficap.errors import InputError
from efficap.evaluation import java
from efficap.models.build import preprocessing

COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200), "grey": (128, 128, 128)}
DOMAINS = ["in-domain", "in-domain", "near-domain", "near-domain", "out-domain"]


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Annotations as COCO's, with the domains of nocaps, and the same pictures as a list without captions."""
    root = tmp_path_factory.mktemp("coco")
    images, annotations = [], []
    (root / "images/val2014").mkdir(parents=True)
    for number, domain in enumerate(DOMAINS):
        word, colour = list(COLOURS.items())[number % 4]
        name = f"COCO_val2014_{391895 + number:012d}.jpg"
        Image.new("RGB", (80 + number, 70), colour).save(root / "images/val2014" / name)
        images.append({"id": 391895 + number, "file_name": name, "domain": domain})
        for text in (f"A {word} picture.", f"All of it, is {word}!", f"there's {word}  and nothing\nelse"):
            annotations.append({"id": len(annotations), "image_id": 391895 + number, "caption": text})
    content = {"images": images, "annotations": annotations, "info": {}, "licenses": []}
    (root / "captions_val2014.json").write_text(json.dumps(content))
    del content["annotations"]
    (root / "image_info_test2014.json").write_text(json.dumps(content))
    return root


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs of one tokenizer whose models differ in weights, depth and the size of pictures."""
    folder = tmp_path_factory.mktemp("outputs")
    write_colour_table(folder / "colours")
    return [
        write_random_run(folder / "a"),
        write_random_run(folder / "b", "model.decoder.n_layer=1", "model.image_size=96", "seed=2"),
    ]


def on(coco: Path, table: str = "{val2014: captions_val2014.json}", *overrides: str) -> list[str]:
    named = table.replace(": ", f": {coco}/")
    quiet = ["gallery=0", "accelerator=cpu", "+data.num_workers=0"]
    return [f"+data.table={named}", f"+data.image_dir={coco}/images", *quiet, *overrides]


@pytest.mark.slow
def test_scores_equal_those_of_cocos_own_evaluation(
    coco: Path, runs: list[Path], small_meteor: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saying = "+decoding.prefix='a red picture'"  # random weights say nothing that could score
    scores = evaluate(compose("eval", f"run={runs[0]}", "split=val2014", saying, *on(coco)))
    out = runs[0] / "eval/val2014"
    monkeypatch.setenv("PATH", f"{Path(java.find_java()).parent}{os.pathsep}{os.environ['PATH']}")
    truth = COCO(str(coco / "captions_val2014.json"))
    found = truth.loadRes(str(out / "results.json"))  # refuses ids that are not COCO's
    ids = truth.getImgIds()
    tokenizer = PTBTokenizer()
    # As COCOEvalCap.evaluate does, without SPICE; it reads a line for a caption, and COCO's have none within.
    expected = tokenizer.tokenize({i: truth.imgToAnns[i] for i in ids})
    predicted = tokenizer.tokenize({i: found.imgToAnns[i] for i in ids})
    bleu, _ = Bleu(4).compute_score(expected, predicted)
    theirs = {f"BLEU-{n}": score for n, score in enumerate(bleu, start=1)}
    for name, scorer in (("METEOR", Meteor()), ("ROUGE-L", Rouge()), ("CIDEr", Cider())):
        theirs[name] = scorer.compute_score(expected, predicted)[0]
    assert {name: scores[name] for name in theirs} == pytest.approx(theirs, abs=1e-6)
    assert min(theirs.values()) > 0


def test_results_have_cocos_numbers_and_scores_those_of_domains(coco: Path, runs: list[Path]) -> None:
    overrides = on(coco, "{val2014: captions_val2014.json}", "metrics=[CIDEr]", "by=domain")
    scores = evaluate(compose("eval", f"run={runs[0]}", "split=val2014", *overrides))
    out = runs[0] / "eval/val2014"
    rows = json.loads((out / "results.json").read_text())
    assert [row["image_id"] for row in rows] == [391895 + n for n in range(5)]
    named = json.loads((out / "captions.json").read_text())
    assert [row["caption"] for row in rows] == [row["caption"] for row in named]
    assert json.loads((out / "scores.json").read_text()) == scores
    assert [scores[f"{domain}/images"] for domain in dict.fromkeys(DOMAINS)] == [2, 2, 1]
    assert isinstance(scores["near-domain/CIDEr"], float)
    assert scores["out-domain/CIDEr"] is None
    overrides[-1] = "by=area"
    with pytest.raises(InputError, match="no picture has a key 'area'"):
        evaluate(compose("eval", f"run={runs[0]}", "split=val2014", *overrides))


@pytest.mark.parametrize(("split", "count"), [("test", 3), ("val", 2)])
def test_karpathys_splits_are_read_with_cocos_numbers(
    split: str, count: int, coco: Path, runs: list[Path]
) -> None:
    content = json.loads((coco / "captions_val2014.json").read_text())
    images = [
        {
            "filename": image["file_name"],
            "filepath": "val2014",
            "cocoid": image["id"],
            "imgid": number,
            "split": "test" if number < 3 else "val",
            "sentences": [
                {"raw": a["caption"]} for a in content["annotations"] if a["image_id"] == image["id"]
            ],
        }
        for number, image in enumerate(content["images"])
    ]
    (coco / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    overrides = [*on(coco), "metrics=[CIDEr]", f"+data.table={coco}/dataset_coco.json"][1:]
    scores = evaluate(compose("eval", f"run={runs[1]}", f"split={split}", *overrides))
    rows = json.loads((runs[1] / "eval" / split / "results.json").read_text())
    assert [row["image_id"] for row in rows] == [i["cocoid"] for i in images if i["split"] == split]
    assert scores["images"] == len(rows) == count


def test_pictures_without_captions_are_captioned_and_not_scored(coco: Path, runs: list[Path]) -> None:
    table = "{test2014: image_info_test2014.json}"
    (coco / "images/test2014").unlink(missing_ok=True)
    (coco / "images/test2014").symlink_to("val2014")
    scores = evaluate(compose("eval", f"run={runs[0]}", "split=test2014", *on(coco, table), "metrics=[]"))
    assert scores["images"] == 5
    assert "CIDEr" not in scores
    rows = json.loads((runs[0] / "eval/test2014/results.json").read_text())
    assert [row["image_id"] for row in rows] == [391895 + n for n in range(5)]
    with pytest.raises(InputError, match=r"has 5 pictures and not one caption; .* metrics=\[\]"):
        evaluate(compose("eval", f"run={runs[0]}", "split=test2014", *on(coco, table)))


@pytest.mark.parametrize("data", ["webdataset", "demo", "mix"])
def test_a_run_trained_on_anything_evaluates_on_a_table(data: str, coco: Path, runs: list[Path]) -> None:
    import yaml

    config = yaml.safe_load((runs[0] / "config.yaml").read_text())
    settings: dict[str, Any] = {
        "webdataset": {"_target_": "efficap.data.webdataset.WebDatasetDataModule", "shards": "nowhere"},
        "demo": {"_target_": "efficap.data.demo.module.DemoDataModule", "root": "nowhere", "table": "t"},
        "mix": {"_target_": "efficap.data.mix.MixedDataModule", "sources": {"a": {"text": {}}}},
    }[data]
    other = runs[0].with_name(data)
    other.mkdir()
    for file in runs[0].iterdir():
        (other / file.name).symlink_to(file)
    (other / "config.yaml").unlink()
    (other / "config.yaml").write_text(yaml.safe_dump({**config, "data": settings}))
    overrides = on(coco, "{val2014: captions_val2014.json}", "metrics=[CIDEr]")
    if data == "mix":
        overrides.append("+data.text={lowercase: false, final_stop: keep, min_words: null, max_words: null, "
                         "exclude: null}")  # fmt: skip
    assert evaluate(compose("eval", f"run={other}", "split=val2014", *overrides))["images"] == 5
    assert not Path("nowhere").exists()


def test_of_several_runs_one_that_fails_leaves_the_others(
    runs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    quiet = ["gallery=0", "accelerator=cpu", "metrics=[CIDEr]"]
    for run in runs:
        (run / "eval/test/scores.json").unlink(missing_ok=True)  # of another test
    names = f"[{runs[0]},{runs[0].with_name('missing')},{runs[1]}]"
    with pytest.raises(InputError, match=r"1 of 3 runs failed: .*/missing; the reasons stand above"):
        evaluate_runs(compose("eval", f"run={names}", *quiet))
    assert all((run / "eval/test/scores.json").is_file() for run in runs)
    assert "missing does not exist; give a run directory" in " ".join(capsys.readouterr().err.split())
    both = evaluate_runs(compose("eval", f"run=[{runs[0]},{runs[1]}]", *quiet))
    assert both == [json.loads((run / "eval/test/scores.json").read_text()) for run in runs]


@pytest.mark.parametrize("decoding", ["greedy", "beam", "nucleus"])
def test_an_ensemble_captions_as_its_models_averaged_on_one_picture(
    decoding: str, runs: list[Path], tmp_path: Path
) -> None:
    """Each model with its own squares, cut anew here from the files, one picture at a time."""
    from efficap.commands.run_dir import RunDirectory

    settings = [f"decoding={decoding}", "decoding.max_tokens=10", "accelerator=cpu", "metrics=[CIDEr]"]
    out = tmp_path / "both"
    cfg = compose("eval", f"run=[{runs[0]},{runs[1]}]", "ensemble=true", f"ensemble_dir={out}", *settings)
    (scores,) = evaluate_runs(cfg)
    assert scores["ensemble"] == f"{runs[0]}, {runs[1]}"
    assert (out / "test/report.html").is_file()
    written = {
        row["image_id"]: row["caption"] for row in json.loads((out / "test/captions.json").read_text())
    }

    opened = [RunDirectory(run) for run in runs]
    tokenizer = opened[0].tokenizer()
    models = [run.captioner(tokenizer, torch.device("cpu")) for run in opened]
    cuts = [EvaluationTransform(**preprocessing(run.config["model"])) for run in opened]
    assert [cut(Picture(runs[0].parent / "colours/images/test_0.jpg")).shape[-1] for cut in cuts] == [64, 96]
    search = build_decoding(opened[0].decoding(cfg["decoding"]))
    for name, caption in written.items():
        picture = Picture(runs[0].parent / "colours/images" / name)
        with torch.inference_mode():
            steps = [model.start(cut(picture)[None], 10) for model, cut in zip(models, cuts, strict=True)]
            decoded = search.decode(
                AveragedStep(steps), [name], bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id,
                device="cpu", vocabulary=tokenizer,
            )  # fmt: skip
        length = int(decoded.lengths[0, 0])
        assert tokenizer.decode(decoded.tokens[0, 0, :length].tolist()) == caption


def test_an_ensemble_of_unlike_tokenizers_or_of_one_run_is_refused(runs: list[Path], tmp_path: Path) -> None:
    from efficap.tokenizer import CaptionTokenizer

    other = runs[0].with_name("unlike")
    other.mkdir()
    for file in runs[0].iterdir():
        if file.name != "tokenizer":
            (other / file.name).symlink_to(file)
    common = ["ensemble=true", f"ensemble_dir={tmp_path}", "accelerator=cpu", "metrics=[CIDEr]"]
    size = CaptionTokenizer.load(runs[0] / "tokenizer").vocab_size
    words = ["zzz zzz yyy yyy xxx xxx " * 9, "www www vvv vvv uuu uuu ttt" * 9]
    CaptionTokenizer.learn(words, vocab_size=size).save(other / "tokenizer")
    learned = CaptionTokenizer.load(other / "tokenizer").vocab_size
    reason = (
        "ids mean other tokens, the first is id" if learned == size else f"{learned} ids in place of {size}"
    )
    with pytest.raises(InputError, match=f"has another tokenizer than run=.*{reason}"):
        evaluate(compose("eval", f"run=[{runs[0]},{other}]", *common))
    with pytest.raises(InputError, match="ensemble=true needs several runs"):
        evaluate(compose("eval", f"run={runs[0]}", *common))
