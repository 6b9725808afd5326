"""Public data sets, from archives of the tests' own making to the table and the shards to train with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from faulty_server import Server, full_disk, serving, zipped

from efficap.data.command_line import training_command
from efficap.data.formats import read_rows
from efficap.data.prepare import conceptual, shards
from efficap.data.prepare.__main__ import main
from efficap.data.prepare.coco import REMOTES as COCO
from efficap.data.prepare.coco import prepare_coco
from efficap.data.prepare.conceptual import REMOTES as CONCEPTUAL
from efficap.data.prepare.conceptual import prepare_conceptual
from efficap.data.prepare.download import Remote
from efficap.data.prepare.flickr import REMOTES as FLICKR
from efficap.data.prepare.flickr import prepare_flickr8k, prepare_flickr30k
from efficap.errors import InputError


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


def served(server: Server, name: str, members: Mapping[str, bytes | str]) -> Remote:
    return server.remote(name, zipped(members))


def karpathy_image(name: str, split: str, folder: str | None = None) -> dict[str, Any]:
    sentences = [{"raw": text} for text in (f"A {name}.", f"The\n {name} ", " ", "&nbsp;")]
    return {"filename": f"{name}.jpg", "split": split, "sentences": sentences} | (
        {"filepath": folder} if folder else {}
    )


@pytest.fixture
def coco(server: Server) -> dict[str, Remote]:
    images = [
        karpathy_image("a", "train", "train2014"),
        karpathy_image("b", "restval", "val2014"),
        karpathy_image("c", "val", "val2014"),
        karpathy_image("d", "test", "val2014"),
    ]

    def annotations(*names: str) -> str:
        pictures = [{"id": n, "file_name": f"{name}.jpg"} for n, name in enumerate(names)]
        captions = [{"image_id": n, "caption": f"A {name}."} for n, name in enumerate(names)]
        return json.dumps({"images": pictures, "annotations": captions})

    return {
        "karpathy": served(
            server, "caption_datasets.zip", {"dataset_coco.json": json.dumps({"images": images})}
        ),
        "train2014": served(server, "train2014.zip", {"train2014/": "", "train2014/a.jpg": "a"}),
        "val2014": served(server, "val2014.zip", {f"val2014/{name}.jpg": name for name in "bcde"}),
        "train2017": served(server, "train2017.zip", {"train2017/a.jpg": "a"}),
        "val2017": served(server, "val2017.zip", {"val2017/b.jpg": "b"}),
        "annotations2017": served(
            server,
            "annotations_trainval2017.zip",
            {
                "annotations/captions_train2017.json": annotations("a"),
                "annotations/captions_val2017.json": annotations("b"),
                "annotations/instances_val2017.json": "{}",
            },
        ),
    }


def rows(table: Path) -> list[tuple[str, ...]]:
    content = pd.read_parquet(table)
    assert list(content.columns) == ["file_name", "caption", "split"]
    return list(content.itertuples(index=False, name=None))


COCO_ROWS = [
    (f"{folder}/{name}.jpg", caption.format(name), split)
    for name, folder, split in (
        ("a", "train2014", "train"),
        ("b", "val2014", "train"),
        ("c", "val2014", "val"),
        ("d", "val2014", "test"),
    )
    for caption in ("A {}.", "The {}")
]


def test_coco_in_karpathys_split(
    coco: dict[str, Remote], server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        table = prepare_coco(tmp_path / "coco", remotes=coco)
        assert rows(table) == COCO_ROWS
        assert {str(path.relative_to(tmp_path / "coco/images")) for path in tmp_path.rglob("*.jpg")} == {
            "train2014/a.jpg",
            *(f"val2014/{name}.jpg" for name in "bcde"),
        }
        said = capsys.readouterr().out
        assert "train         2 pictures          4 captions" in said
        assert "2 / 1 / 1 pictures" in said
        assert (
            f"data=csv data.table={tmp_path}/coco/captions.parquet data.image_dir={tmp_path}/coco/images"
            in said
        )
    assert all(len(server.gets(coco[name].name)) == 1 for name in ("karpathy", "train2014", "val2014"))


def test_a_prepared_table_is_one_to_train_with(coco: dict[str, Remote], tmp_path: Path) -> None:
    columns = {"image_column": "file_name", "caption_column": "caption", "split_column": "split"}
    table = prepare_coco(tmp_path, remotes=coco)
    read = read_rows(table, image_dir=tmp_path / "images", **columns)
    assert list(read.itertuples(index=False, name=None)) == COCO_ROWS


def test_coco_takes_what_is_there_already(coco: dict[str, Remote], server: Server, tmp_path: Path) -> None:
    for name in ("caption_datasets.zip", "val2014.zip"):
        (tmp_path / name).write_bytes(server.files[f"/{name}"].body)
    (tmp_path / "images" / "train2014").mkdir(parents=True)
    (tmp_path / "images" / "train2014" / "a.jpg").touch()
    server.files.clear()
    assert rows(prepare_coco(tmp_path, remotes=coco)) == COCO_ROWS
    for name in ("caption_datasets.zip", "val2014.zip", "captions.parquet"):
        (tmp_path / name).unlink()
    assert rows(prepare_coco(tmp_path, remotes=coco)) == COCO_ROWS


def test_coco_takes_folders_beside_the_annotations(
    coco: dict[str, Remote], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("train2014/a", "val2014/b", "val2014/c", "val2014/d"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.jpg").touch()
    assert rows(prepare_coco(tmp_path, remotes=coco)) == COCO_ROWS
    assert f"data.image_dir={tmp_path}\n" in capsys.readouterr().out
    assert not (tmp_path / "images").exists()


def test_coco_takes_one_folder_beside_the_annotations_and_has_the_other_there(
    coco: dict[str, Remote], server: Server, tmp_path: Path
) -> None:
    for name in ("train2014", "images/train2014", "images/val2014"):  # empty ones: of a call that failed
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "train2014/a.jpg").touch()
    assert rows(prepare_coco(tmp_path, remotes=coco)) == COCO_ROWS
    assert not server.gets(coco["train2014"].name)
    assert (tmp_path / "val2014/b.jpg").is_file()


def test_cocos_own_split(coco: dict[str, Remote], tmp_path: Path) -> None:
    expected = [("train2017/a.jpg", "A a.", "train"), ("val2017/b.jpg", "A b.", "val")]
    assert rows(prepare_coco(tmp_path, split="2017", remotes=coco)) == expected
    assert not list(tmp_path.rglob("instances*"))
    with pytest.raises(InputError, match=r"captions.parquet is there with other captions; rename it"):
        prepare_coco(tmp_path, split="karpathy", remotes=coco)
    assert rows(tmp_path / "captions.parquet") == expected


def test_flickr8k(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = {
        "Flickr8k.token.txt": "a.jpg#0\tA dog .\na.jpg#1\tThe dog .\nb.jpg#0\tA cat .\nc.jpg#0\tA bird .\nd.jpg#0\tX\n",
        "Flickr_8k.trainImages.txt": "a.jpg\n",
        "Flickr_8k.devImages.txt": "b.jpg\n",
        "Flickr_8k.testImages.txt": "c.jpg\n",
    }
    pictures = {f"Flicker8k_Dataset/{name}.jpg": name for name in "abcd"}
    remotes = {
        "text": served(server, "Flickr8k_text.zip", text | {"__MACOSX/Flickr8k.token.txt": "x"}),
        "images": served(
            server, "Flickr8k_Dataset.zip", pictures | {"__MACOSX/Flicker8k_Dataset/._a.jpg": "x"}
        ),
    }
    for _ in range(2):
        assert rows(prepare_flickr8k(tmp_path, remotes=remotes)) == [
            ("a.jpg", "A dog .", "train"),
            ("a.jpg", "The dog .", "train"),
            ("b.jpg", "A cat .", "val"),
            ("c.jpg", "A bird .", "test"),
        ]
        assert sorted(path.name for path in tmp_path.rglob("*.jpg")) == ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]
        assert "python train.py model=small data=csv" in capsys.readouterr().out
    assert len(server.gets("Flickr8k_Dataset.zip")) == 1


def test_flickr30k_needs_pictures_of_ones_own(server: Server, tmp_path: Path) -> None:
    images = [karpathy_image("1", "train"), karpathy_image("2", "val")]
    members = {"dataset_flickr30k.json": json.dumps({"images": images})}
    remotes = {"karpathy": served(server, "caption_datasets.zip", members)}
    with pytest.raises(
        InputError, match="images holds no pictures: those of Flickr30k are given on request, at https://"
    ):
        prepare_flickr30k(tmp_path, remotes=remotes)
    (tmp_path / "flickr30k-images").mkdir()
    (tmp_path / "flickr30k-images" / "1.jpg").touch()
    with pytest.raises(InputError, match=r"1 of 2 pictures are not there, the first is 2.jpg"):
        prepare_flickr30k(tmp_path, remotes=remotes)
    (tmp_path / "flickr30k-images" / "2.jpg").touch()
    assert [row[::2] for row in rows(prepare_flickr30k(tmp_path, remotes=remotes))] == [
        ("1.jpg", "train"),
        ("1.jpg", "train"),
        ("2.jpg", "val"),
        ("2.jpg", "val"),
    ]


FAKE = """#!{python}
# As img2dataset: a tar and a report for each shard, those that are there left alone. Every third picture is dead.
import json, pathlib, sys
import pyarrow.parquet
settings = dict(argument.removeprefix("--").split("=", 1) for argument in sys.argv[1:])
folder = pathlib.Path(settings["output_folder"])
folder.mkdir(exist_ok=True)
with open(folder.parent / "calls.jsonl", "a") as calls:
    calls.write(json.dumps(settings) + "\\n")
captions = pyarrow.parquet.read_table(settings["url_list"])["caption"].to_pylist()
size = int(settings["number_sample_per_shard"])
for shard, start in enumerate(range(0, len(captions), size)):
    if (folder / f"{{shard:05}}_stats.json").exists():
        continue
    if (folder.parent / "broken").exists() and shard:
        sys.exit(0)
    count = len(captions[start : start + size])
    (folder / f"{{shard:05}}.tar").write_text("\\n".join(captions[start : start + size]))
    reasons = {{"success": count - count // 3, "HTTP Error 404: Not Found": count // 3}}
    report = {{"count": count, "successes": reasons["success"], "status_dict": reasons}}
    (folder / f"{{shard:05}}_stats.json").write_text(json.dumps(report))
"""


@pytest.fixture
def img2dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(shards, "SHARD_ROWS", 100)
    program = tmp_path / "i2d" / "bin" / "img2dataset"
    program.parent.mkdir(parents=True)
    program.write_text(FAKE.format(python=sys.executable))
    program.chmod(0o755)
    return tmp_path / "i2d"


def lines(first: int, last: int, *, caption_first: bool = True) -> str:
    pairs = [(f'say "{n}', f"http://x/{n}.jpg") for n in range(first, last)]
    return "".join("\t".join(pair if caption_first else pair[::-1]) + "\n" for pair in pairs)


def calls(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "calls.jsonl").read_text().splitlines()]


def test_cc3m_downloads_both_parts_and_tells_the_yield(
    server: Server, img2dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    remotes = {
        "cc3m": {
            "train": server.remote("train.tsv", ("caption\turl\n" + lines(0, 201)).encode()),
            "val": server.remote("val.tsv", lines(900, 906).encode()),
        }
    }
    folder = tmp_path / "cc"
    prepare_conceptual(folder, "cc3m", img2dataset=img2dataset, processes=3, threads=5, remotes=remotes)
    said = capsys.readouterr().out
    assert "train: 135 of 201 pictures (67.2%) in 3 shards\n          66  HTTP Error 404: Not Found\n" in said
    assert "val: 4 of 6 pictures (66.7%) in 1 shard\n" in said
    assert f"data=webdataset 'data.shards='\"'\"'{folder}/train/{{00000..00002}}.tar'\"'\"''" in said
    assert f"data.val_shards={folder}/val/00000.tar" in said
    assert (folder / "train" / "00000.tar").read_text().startswith('say "0\nsay "1\n')
    assert (folder / "val" / "00000.tar").read_text().endswith('say "905')
    [first, second] = calls(folder)
    assert (first["output_folder"], second["output_folder"]) == (f"{folder}/val", f"{folder}/train")
    settings = {"resize_mode": "keep_ratio", "resize_only_if_bigger": "True", "image_size": "448"} | {
        "processes_count": "3",
        "thread_count": "5",
        "enable_wandb": "False",
        "incremental_mode": "incremental",
        "caption_col": "caption",
        "url_col": "url",
        "output_format": "webdataset",
    }
    assert {name: second[name] for name in settings} == settings
    prepare_conceptual(folder, "cc3m", img2dataset=img2dataset, remotes=remotes)
    assert len(calls(folder)) == 2, "all shards are there"


def test_cc12m_holds_out_its_last_rows(server: Server, img2dataset: Path, tmp_path: Path) -> None:
    remotes = {"cc12m": {"train": server.remote("cc12m.tsv", lines(0, 100, caption_first=False).encode())}}
    folder = tmp_path / "cc"
    prepare_conceptual(folder, "cc12m", img2dataset=img2dataset, limit=40, remotes=remotes)
    assert pd.read_parquet(folder / "train.parquet")["caption"].tolist() == [f'say "{n}' for n in range(38)]
    assert pd.read_parquet(folder / "val.parquet")["url"].tolist() == ["http://x/38.jpg", "http://x/39.jpg"]
    with pytest.raises(
        InputError, match=r"holds shards of .*\"limit\": 40.* asked for now; name another folder"
    ):
        prepare_conceptual(folder, "cc12m", img2dataset=img2dataset, limit=50, remotes=remotes)


def test_shards_that_img2dataset_left_out_are_told_and_made_by_the_next_call(
    img2dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "cc"
    (tmp_path / "list.tsv").write_text(lines(0, 300))
    folder.mkdir()
    (folder / "broken").touch()
    arguments = ["--dir", str(folder), "--tsv", str(tmp_path / "list.tsv"), "--img2dataset", str(img2dataset)]
    assert main(["cc3m", *arguments]) == 1
    assert "status 0 after 1 of 3 shards" in capsys.readouterr().err
    (folder / "broken").unlink()
    assert main(["cc3m", *arguments, "--image-size", "400"]) == 1, "other settings"
    assert main(["cc3m", *arguments]) == 0
    assert len(calls(folder)) == 3, "val once, train twice"


def test_settings_can_be_mended_until_there_is_a_shard(
    img2dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tsv, folder = tmp_path / "list.tsv", tmp_path / "cc"
    tsv.write_text(lines(0, 1))
    with pytest.raises(InputError, match="at least 2 are needed"):
        prepare_conceptual(folder, "cc12m", tsv=tsv, img2dataset=img2dataset)
    tsv.write_text(lines(0, 60))
    with monkeypatch.context() as stopped:
        stopped.setattr(conceptual, "download_shards", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare_conceptual(folder, "cc12m", tsv=tsv, img2dataset=img2dataset)
    assert len(pd.read_parquet(folder / "train.parquet")) == 57
    prepare_conceptual(folder, "cc12m", tsv=tsv, img2dataset=img2dataset, limit=40)
    assert len(pd.read_parquet(folder / "train.parquet")) == 38, "not the list of the call that was stopped"
    with pytest.raises(InputError, match=r"holds shards of .*\"limit\": 40.* asked for now; name another"):
        prepare_conceptual(folder, "cc12m", tsv=tsv, img2dataset=img2dataset)


def test_tables_of_ones_own_are_not_taken_for_lists(img2dataset: Path, tmp_path: Path) -> None:
    tsv, own = tmp_path / "list.tsv", tmp_path / "cc" / "val.parquet"
    tsv.write_text(lines(0, 60))
    own.parent.mkdir()
    own.write_bytes(b"mine")
    with pytest.raises(InputError, match=rf"{own} is not of this command; name another folder with --dir"):
        prepare_conceptual(own.parent, "cc12m", tsv=tsv, img2dataset=img2dataset)
    assert own.read_bytes() == b"mine"


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_the_space_for_train_is_told_from_val(
    img2dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "list.tsv").write_text(lines(0, 1000))
    full_disk(monkeypatch, 5_000)
    with pytest.raises(InputError, match=r"8.5 kB are needed \(for train"):
        prepare_conceptual(tmp_path / "cc", "cc3m", tsv=tmp_path / "list.tsv", img2dataset=img2dataset)
    assert len(calls(tmp_path / "cc")) == 1


def test_without_img2dataset_the_way_to_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    for given in (None, tmp_path):
        with pytest.raises(
            InputError, match=r"pip install 'efficap\[img2dataset\]'.*environment.*--img2dataset i2d"
        ):
            prepare_conceptual(tmp_path / "cc", "cc3m", tsv=tmp_path / "list.tsv", img2dataset=given)
    assert list(tmp_path.iterdir()) == []


def test_a_list_that_cannot_be_had_is_told_with_its_page(
    server: Server, img2dataset: Path, tmp_path: Path
) -> None:
    remotes = {"cc3m": {"train": Remote(f"{server.url}/none.tsv", "none.tsv")}}
    with pytest.raises(InputError, match=r"404.*https://ai.google.com/.*--tsv FILE"):
        prepare_conceptual(tmp_path / "cc", "cc3m", img2dataset=img2dataset, remotes=remotes)
    with pytest.raises(InputError, match=r"--val-tsv .*no.tsv does not exist"):
        prepare_conceptual(tmp_path / "cc", "cc3m", val_tsv=tmp_path / "no.tsv", img2dataset=img2dataset)


@pytest.mark.parametrize("path", ["data/a-b_1.parquet", "my data/~x, (y)=z's/{00000..00009}.tar"])
def test_the_command_survives_the_shell_and_hydra(path: str) -> None:
    import shlex

    from hydra.core.override_parser.overrides_parser import OverridesParser

    words = shlex.split(training_command("csv", table=Path(path)))
    assert words[:4] == ["python", "train.py", "model=small", "data=csv"]
    override = OverridesParser.create().parse_override(words[4])
    assert (override.key_or_group, override.value()) == ("data.table", path)


def test_every_published_file_is_verified_and_named_as_on_its_server() -> None:
    for remotes in (COCO, FLICKR, *CONCEPTUAL.values()):
        for remote in remotes.values():
            assert remote.url.startswith(("https://", "http://images.cocodataset.org/"))
            assert len(remote.sha256 or "") == 64 or len(remote.md5 or "") == 32
            assert remote.url.endswith(remote.name.removeprefix("Train_").removeprefix("Validation_"))


def test_help_comes_without_loading_torch_or_pandas() -> None:
    code = (
        "import sys; from efficap.data.prepare.__main__ import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: print(sorted({'torch', 'pandas', 'pyarrow'} & set(sys.modules)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ.copy()
    )
    assert run.stdout.endswith("[]\n")
    assert "flickr30k" in run.stdout


def test_a_mistake_is_one_line_and_status_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["flickr30k", "--dir", str(tmp_path)]) == 1
    assert capsys.readouterr().err.count("\n") == 1
