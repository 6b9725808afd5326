"""A trained captioner in a program of one's own: pictures in, strings out; published and read again."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
import yaml
from conftest import compose, write_colour_table, write_random_run
from huggingface_hub import HfApi
from PIL import Image
from safetensors.torch import load_file
from torchvision.transforms.v2.functional import pil_to_tensor
from transformers import AutoTokenizer

from efficap import Captioner
from efficap.commands.caption import caption
from efficap.commands.decoding_settings import decoding_settings
from efficap.commands.entry import CONF
from efficap.commands.evaluate import evaluate
from efficap.data.pictures import PictureError
from efficap.errors import InputError

README = Path(__file__).parents[2] / "README.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_colour_table(tmp_path_factory.mktemp("captioner") / "colours")


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """With an evaluation's scores and pictures, as eval.py leaves them."""
    run = write_random_run(folder.parent / "run")
    for split, cider in (("irregular", 0.25), ("test", 0.875)):
        (run / "eval" / split).mkdir(parents=True)
        (run / "eval" / split / "scores.json").write_text(
            json.dumps({"images": 8, "CIDEr": cider, "BLEU-4": 0.5})
        )
        Image.new("RGB", (60, 40), "white").save(run / "eval" / split / "sheet.png")
    return run


@pytest.fixture(scope="module")
def captioner(run: Path) -> Captioner:
    return Captioner.from_pretrained(run)


@pytest.fixture(scope="module")
def pictures(folder: Path) -> list[Path]:
    """Of several sizes, one turned by its EXIF."""
    made = []
    for place, size in enumerate([(64, 64), (90, 70), (40, 100), (200, 150)]):
        torch.manual_seed(place)
        pixels = torch.rand(1, 3, 4, 4)
        image = torch.nn.functional.interpolate(pixels, size=size[::-1], mode="bicubic").clamp(0, 1)[0]
        picture = Image.fromarray((image * 255).byte().permute(1, 2, 0).numpy())
        exif = Image.Exif()
        exif[0x0112] = 6 if place == 3 else 1
        picture.save(folder.parent / f"picture_{place}.png", exif=exif)
        made.append(folder.parent / f"picture_{place}.png")
    return made


def test_the_readmes_program_runs(
    run: Path, pictures: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    (program,) = [block for block in blocks if "Captioner.from_pretrained" in block]
    assert len(program.strip().splitlines()) <= 5
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "latest").symlink_to(run)
    (tmp_path / "holiday").mkdir()
    for name, picture in zip(("dog.jpg", "boat.jpg"), pictures, strict=False):
        Image.open(picture).save(tmp_path / "holiday" / name)
    exec(compile(program, "README.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    expected = Captioner.from_pretrained(run).caption(
        ["holiday/dog.jpg", "holiday/boat.jpg"], decoding="beam"
    )
    assert printed == expected


def test_files_pictures_and_tensors_give_what_caption_py_gives(
    run: Path, captioner: Captioner, pictures: list[Path], tmp_path: Path
) -> None:
    overrides = [
        f"run={run}",
        f"images={pictures[0].parent}/picture_*.png",
        f"out={tmp_path}",
        "num_workers=0",
    ]
    expected = [result.captions[0].text for result in caption(compose("caption", *overrides))]
    assert len(set(expected)) > 1
    assert captioner.caption(pictures) == expected
    assert captioner.caption([str(picture) for picture in pictures]) == expected
    assert captioner.caption([Image.open(picture) for picture in pictures]) == expected
    upright = [pil_to_tensor(Image.open(picture)) for picture in pictures[:3]]
    assert captioner.caption(upright) == expected[:3]
    assert captioner.caption(pictures[1]) == [expected[1]]
    assert captioner.caption([]) == []
    assert captioner.caption(pictures, batch_size=3) == expected


def test_decoding_is_chosen_and_changed(captioner: Captioner, pictures: list[Path]) -> None:
    greedy = captioner.caption(pictures)
    short = captioner.caption(pictures, max_tokens=4)
    assert short != greedy
    beams = captioner.caption(pictures, decoding="beam", num_beams=4, max_tokens=12)
    samples = captioner.caption(pictures, decoding="nucleus", top_p=1.0, temperature=3.0, max_tokens=12)
    assert len({tuple(captions) for captions in (greedy, short, beams, samples)}) > 2
    with pytest.raises(InputError, match=r"decoding=best must be one of beam, constrained"):
        captioner.caption(pictures, decoding="best")
    with pytest.raises(InputError, match=r"num_beans"):
        captioner.caption(pictures, num_beans=4)


def test_what_is_no_picture_is_refused(captioner: Captioner, tmp_path: Path) -> None:
    with pytest.raises(PictureError, match="missing"):
        captioner.caption([tmp_path / "none.jpg"])
    for narrow in (Image.new("RGB", (1, 4000)), torch.zeros(3, 4000, 1, dtype=torch.uint8)):
        with pytest.raises(PictureError, match="too narrow: 1 x 4000 pixels"):
            captioner.caption(narrow)
    with pytest.raises(InputError, match=r"shape \(4, 9, 9\) and torch.uint8 must be \(3, height, width\)"):
        captioner.caption(torch.zeros(4, 9, 9, dtype=torch.uint8))
    with pytest.raises(InputError, match=r"torch.float32 must be"):
        captioner.caption(torch.zeros(3, 9, 9))
    with pytest.raises(InputError, match=r"holds no config.yaml"):
        Captioner.from_pretrained(tmp_path)


@pytest.fixture(scope="module")
def published(captioner: Captioner, folder: Path) -> Path:
    captioner.save_pretrained(folder.parent / "published")
    return folder.parent / "published"


def test_what_was_published_says_the_same_and_no_path_of_the_machine(
    captioner: Captioner, published: Path, pictures: list[Path], folder: Path
) -> None:
    again = Captioner.from_pretrained(published)
    assert again.caption(pictures) == captioner.caption(pictures)
    texts = [file.read_text() for file in published.rglob("*") if file.suffix in {".json", ".yaml", ".md"}]
    assert len(texts) >= 6
    assert not any(str(folder.parent) in text for text in texts)
    again.save_pretrained(published)  # and onto itself
    assert Captioner.from_pretrained(published).caption(pictures) == captioner.caption(pictures)
    tokenizer = AutoTokenizer.from_pretrained(published / "tokenizer")
    assert (
        tokenizer("a red picture").input_ids == captioner.tokenizer.encode(["a red picture"], 12)[0][0][1:-1]
    )


def test_nothing_that_training_alone_needs_is_published(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    config = yaml.safe_load((copy / "config.yaml").read_text())
    config["callbacks"] = {"mine": {"_target_": "my.Ping", "token": "sesame-opens-1234567"}}
    config["model"]["encoder"]["weights_file"] = "below/model.safetensors"
    config["data"]["mine"] = "sesame-opens-7654321"
    (copy / "config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setenv("HUB_API_TOKEN", "sesame-opens-7654321")
    Captioner.from_pretrained(copy).save_pretrained(tmp_path / "published")
    text = (tmp_path / "published/config.yaml").read_text()
    assert "sesame" not in text
    assert "below" not in text + (tmp_path / "published/config.json").read_text()
    assert yaml.safe_load(text).keys() <= {"name", "seed", "model", "data", "decoding"}


def test_what_is_saved_again_has_no_scores_of_before_and_what_is_refused_changes_nothing(
    captioner: Captioner, run: Path, tmp_path: Path
) -> None:
    (tmp_path / "eval/older").mkdir(parents=True)
    (tmp_path / "eval/older/scores.json").write_text("{}")
    captioner.save_pretrained(tmp_path)
    assert not (tmp_path / "eval/older/scores.json").exists()
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(InputError, match=r"packed=True is for captions alone"):
        Captioner.from_pretrained(run, packed=True, accelerator="cpu").save_pretrained(tmp_path)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_a_directory_takes_the_hubs_options_too(run: Path, pictures: list[Path]) -> None:
    options = {"token": "x", "revision": "main", "local_files_only": True}
    assert Captioner.from_pretrained(run, **options).caption(pictures[:1])


def test_weights_that_were_rounded_for_the_device_are_published_as_the_run_has_them(
    run: Path, tmp_path: Path
) -> None:
    rounded = Captioner.from_pretrained(run, accelerator="cpu", precision="bfloat16")
    rounded.save_pretrained(tmp_path)
    own, theirs = load_file(run / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert {name: weight.dtype for name, weight in theirs.items()} == {
        name: weight.dtype for name, weight in own.items()
    }
    assert all(torch.equal(theirs[name], weight) for name, weight in own.items())


def test_a_run_is_not_published_onto_itself(run: Path, captioner: Captioner) -> None:
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    with pytest.raises(InputError, match=rf"^{run} is the run itself, .*; save to another folder$"):
        captioner.save_pretrained(run)
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before


PLACES = {
    "a table for each split": (
        {
            "_target_": "efficap.data.csv.CSVDataModule",
            "table": {"train": "/a/train.csv", "test": "/a/test.csv"},
        },
        r"data\.table is not known here; add \+data\.table=PATH",
    ),
    "the built-in pictures": (
        {
            "_target_": "efficap.data.demo.module.DemoDataModule",
            "root": "/a/demo",
            "table": "/a/demo/captions.csv",
        },
        r"data\.table is not known here; add \+data\.table=PATH",
    ),
    "several folders of shards": (
        {
            "_target_": "efficap.data.webdataset.WebDatasetDataModule",
            "shards": ["/a/one", "/a/two"],
            "val_shards": ["/a/val"],
        },
        r"data\.shards is not known here; add \+data\.shards=PATH",
    ),
    "a mixture": (
        {
            "_target_": "efficap.data.mix.MixedDataModule",
            "sources": {"mine": {"_target_": "efficap.data.csv.CSVDataModule", "table": "/a/b.csv"}},
        },
        r"data\.sources\.mine\.table is not known here; add \+data\.sources\.mine\.table=PATH",
    ),
}


@pytest.mark.parametrize("places", PLACES)
def test_of_a_published_captioner_the_places_of_its_data_have_to_be_named(
    places: str, tmp_path: Path
) -> None:
    data, told = PLACES[places]
    run = write_random_run(tmp_path / "run")
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**config, "data": data}))
    Captioner.from_pretrained(run).save_pretrained(tmp_path / "published")
    assert Captioner.from_pretrained(tmp_path / "published").caption([]) == []
    with pytest.raises(InputError, match=told):
        evaluate(compose("eval", f"run={tmp_path / 'published'}", "split=test", "metrics=[]"))


def test_the_card_shows_how_to_use_it_its_scores_and_its_pictures(
    captioner: Captioner, published: Path
) -> None:
    card = (published / "README.md").read_text()
    assert "library_name: efficap" in card
    assert "pipeline_tag: image-to-text" in card
    assert re.search(
        r"\| split \| CIDEr \| BLEU-4 \|\n\|---\|---\|---\|\n\| irregular \| 0.250 \| 0.500 \|\n"
        r"\| test \| 0.875 \| 0.500 \|\n",
        card,
    )
    assert "](eval/test/sheet.png)" in card
    assert (published / "eval" / "test" / "sheet.png").is_file()
    assert "0.875" not in str(captioner.generate_model_card(scores={}))


def test_a_push_uploads_the_same(
    captioner: Captioner, published: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def create_repo(self: HfApi, repo_id: str, **options: Any) -> Any:
        return type("Repo", (), {"repo_id": repo_id})

    def upload_folder(self: HfApi, *, repo_id: str, folder_path: Path, **options: Any) -> str:
        shutil.copytree(folder_path, tmp_path / "uploaded")
        return repo_id

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    assert captioner.push_to_hub("somebody/colours") == "somebody/colours"
    files = {file.relative_to(tmp_path / "uploaded") for file in (tmp_path / "uploaded").rglob("*")}
    assert files == {file.relative_to(published) for file in published.rglob("*")}


def test_a_name_on_the_hub_is_read_from_its_cache(
    captioner: Captioner, published: Path, pictures: list[Path], tmp_path: Path
) -> None:
    cached = tmp_path / "models--somebody--colours"
    shutil.copytree(published, cached / "snapshots" / ("0" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    again = Captioner.from_pretrained("somebody/colours", cache_dir=tmp_path)
    assert again.caption(pictures) == captioner.caption(pictures)


def test_all_that_is_known_of_captions_comes_with_them(captioner: Captioner, pictures: list[Path]) -> None:
    written = captioner.write(pictures, "beam", num_beams=3, num_return_sequences=2, attention=True)
    assert [of_picture[0].text for of_picture in written] == captioner.caption(pictures, "beam", num_beams=3)
    down, across = captioner.grid
    for one in (one for of_picture in written for one in of_picture):
        steps = len(one.tokens) - 1
        assert one.score == pytest.approx(sum(one.token_log_probs) / steps, abs=1e-5)
        assert one.attention.shape == (steps, down * across)
        torch.testing.assert_close(one.attention.sum(dim=1), torch.ones(steps))


def test_a_packed_one_says_the_same_and_is_not_published(
    run: Path, captioner: Captioner, pictures: list[Path], tmp_path: Path
) -> None:
    packed = Captioner.from_pretrained(run, packed=True)
    assert packed.caption(pictures, "beam") == captioner.caption(pictures, "beam")
    with pytest.raises(InputError, match="packed=True"):
        packed.save_pretrained(tmp_path / "out")


def test_within_a_program_of_hydras_a_decoding_is_found_and_the_program_goes_on(
    captioner: Captioner, pictures: list[Path]
) -> None:
    expected = captioner.caption(pictures, "greedy")
    decoding_settings.cache_clear()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        assert captioner.caption(pictures, "greedy") == expected
        assert hydra.compose("caption", ["run=a", "images=b"]).run == "a"


def test_a_published_captioner_is_evaluated_on_data_that_is_named(published: Path, folder: Path) -> None:
    settings = [f"run={published}", "split=val", "metrics=[BLEU]", "gallery=0", "accelerator=cpu"]
    with pytest.raises(InputError, match=r"data.table is not known here; add \+data.table=PATH"):
        evaluate(compose("eval", *settings))
    data = [f"+data.table={folder}/captions.csv", f"+data.image_dir={folder}/images"]
    assert evaluate(compose("eval", *settings, *data))["images"] > 0
