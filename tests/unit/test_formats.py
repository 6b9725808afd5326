"""Captions in every format, against rows written down independently; and what is said of files that are not right."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import parquet

from efficap.data.coco import karpathy_variant
from efficap.data.formats import read_rows
from efficap.errors import InputError

ROWS = [
    ("a.jpg", "A dog, running.", "train"),
    ("a.jpg", 'A "happy" dog', "train"),
    ("b.jpg", " Zwei Männer — 二人 ", "val"),
    ("ü c.jpg", "NA", "test"),
]
COLUMNS = ["file_name", "caption", "split"]


def read(
    table: Path | Mapping[str, Path], image_dir: Path | None = None, **names: str
) -> list[tuple[str, ...]]:
    columns = {"image_column": "file_name", "caption_column": "caption", "split_column": "split"} | names
    rows = read_rows(table, image_dir=image_dir or Path("nowhere"), **columns)
    assert list(rows.columns) == ["image", "caption", "split"]
    assert list(rows.index) == list(range(len(rows)))
    assert all(isinstance(cell, str) for cell in rows.to_numpy().ravel())
    return list(rows.itertuples(index=False, name=None))


def refusal(table: Path | Mapping[str, Path], **names: str) -> str:
    with pytest.raises(InputError) as caught:
        read(table, **names)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def text(file: Path, content: str, encoding: str = "utf-8") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content.encode(encoding))
    return file


def dump(file: Path, content: Any) -> Path:
    return text(file, json.dumps(content))


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet", "CSV"])
def test_a_table_gives_its_rows_as_they_stand(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"captions.{suffix}"
    table = pd.DataFrame(ROWS, columns=COLUMNS).assign(other=1)
    if suffix == "parquet":
        table.to_parquet(file)
    else:
        table.to_csv(file, sep="\t" if suffix == "tsv" else ",", index=False)
    assert read(file) == ROWS


def test_columns_may_have_other_names(tmp_path: Path) -> None:
    file = tmp_path / "captions.parquet"
    pd.DataFrame(ROWS, columns=["picture", "text", "part"]).to_parquet(file)
    assert read(file, image_column="picture", caption_column="text", split_column="part") == ROWS


def test_a_file_for_each_split_needs_no_split_column_and_overrules_one(tmp_path: Path) -> None:
    one = text(tmp_path / "one.csv", "file_name,caption\na.jpg,a dog\n")
    other = text(tmp_path / "other.tsv", "file_name\tcaption\tsplit\nb.jpg\ta cat\ttrain\n")
    assert read({"train": one, "val": other}) == [("a.jpg", "a dog", "train"), ("b.jpg", "a cat", "val")]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_text_may_be_stored_in_any_way(kind: pa.DataType, tmp_path: Path) -> None:
    columns = {
        name: pa.array(cells).cast(kind) for name, cells in zip(COLUMNS, zip(*ROWS, strict=True), strict=True)
    }
    parquet.write_table(pa.table(columns), tmp_path / "captions.parquet")
    assert read(tmp_path / "captions.parquet") == ROWS


def test_a_list_in_parquet_is_several_captions_and_an_empty_one_keeps_its_row(tmp_path: Path) -> None:
    table = {
        "file_name": ["a", "b", "c"],
        "caption": [["one", "two"], [], None],
        "split": ["train", "val", "val"],
    }
    parquet.write_table(pa.table(table), tmp_path / "captions.parquet")
    expected = [("a", "one", "train"), ("a", "two", "train"), ("b", "", "val"), ("c", "", "val")]
    assert read(tmp_path / "captions.parquet") == expected


@pytest.mark.parametrize("write", [json.dumps, str], ids=["JSON", "Python"])
def test_a_list_in_a_csv_cell_is_several_captions(write: Any, tmp_path: Path) -> None:
    captions = ["it's a dog", 'a "dog"\\', "ein Hündchen"]
    rows = [("a.jpg", write(captions), "train"), ("b.jpg", "[a sign] in the sun", "val")]
    pd.DataFrame(rows, columns=COLUMNS).to_csv(tmp_path / "c.csv", index=False)
    expected = [("a.jpg", caption, "train") for caption in captions] + [rows[1]]
    assert read(tmp_path / "c.csv") == expected


@pytest.mark.parametrize("cell", ["[]", " [ ] "])
def test_an_empty_list_in_a_csv_cell_is_no_caption(cell: str, tmp_path: Path) -> None:
    rows = [("a.jpg", "['a dog', 'a cat']", "train"), ("b.jpg", cell, "train"), ("c.jpg", "[", "val")]
    pd.DataFrame(rows, columns=COLUMNS).to_csv(tmp_path / "c.csv", index=False)
    captions = [("a.jpg", "a dog"), ("a.jpg", "a cat"), ("b.jpg", ""), ("c.jpg", "[")]
    assert [row[:2] for row in read(tmp_path / "c.csv")] == captions


def test_a_list_as_numpy_prints_it_is_refused_rather_than_joined(tmp_path: Path) -> None:
    rows = [("a.jpg", "fine", "train"), ("b.jpg", "['a dog' 'a cat']", "train")]
    pd.DataFrame(rows, columns=COLUMNS).to_csv(tmp_path / "c.csv", index=False)
    assert "row 3: the caption \"['a dog' 'a cat']\" looks like a list" in refusal(tmp_path / "c.csv")


def coco(pictures: dict[int, str], captions: list[tuple[int, str]]) -> dict[str, Any]:
    return {
        "info": {},
        "images": [{"id": number, "file_name": name, "height": 1} for number, name in pictures.items()],
        "annotations": [
            {"id": n, "image_id": number, "caption": caption} for n, (number, caption) in enumerate(captions)
        ],
    }


def test_coco_annotations_take_split_and_folder_from_their_name(tmp_path: Path) -> None:
    captions = [(7, "a dog\n"), (5, "a cat"), (7, "the dog")]
    file = dump(
        tmp_path / "captions_val2017.json", coco({5: "005.jpg", 7: "007.jpg", 9: "009.jpg"}, captions)
    )
    bare = [("007.jpg", "a dog\n", "val"), ("005.jpg", "a cat", "val"), ("007.jpg", "the dog", "val")]
    bare += [("009.jpg", "", "val")]
    assert read(file, tmp_path) == bare
    text(tmp_path / "val2017" / "007.jpg", "")
    text(tmp_path / "005.jpg", "")
    in_folder = [(name if name == "005.jpg" else f"val2017/{name}", *rest) for name, *rest in bare]
    assert read(file, tmp_path) == in_folder
    assert read({"test": file}, tmp_path) == [(name, caption, "test") for name, caption, _ in in_folder]


def test_the_split_of_coco_annotations_must_be_told(tmp_path: Path) -> None:
    content = coco({1: "a.jpg"}, [(1, "a dog")])
    assert "data.table={train: minival.json, val: FILE}" in refusal(dump(tmp_path / "minival.json", content))
    assert read({"val": tmp_path / "minival.json"}) == [("a.jpg", "a dog", "val")]


def karpathy(**pictures: tuple[str, str, list[str]]) -> dict[str, Any]:
    images = []
    for name, (folder, split, captions) in pictures.items():
        image: dict[str, Any] = {"filename": f"{name}.jpg", "split": split, "imgid": len(images)}
        image["sentences"] = [{"raw": caption, "tokens": caption.split()} for caption in captions]
        images.append(image | ({"filepath": folder} if folder else {}))
    return {"images": images, "dataset": "some"}


def test_karpathys_coco_has_folders_and_puts_restval_into_train(tmp_path: Path) -> None:
    content = karpathy(
        a=("val2014", "test", ["a dog", "a cat"]),
        b=("train2014", "train", ["c"]),
        c=("val2014", "restval", ["d"]),
    )
    file = dump(tmp_path / "dataset_coco.json", content)
    assert read(file) == [
        ("val2014/a.jpg", "a dog", "test"),
        ("val2014/a.jpg", "a cat", "test"),
        ("train2014/b.jpg", "c", "train"),
        ("val2014/c.jpg", "d", "train"),
    ]
    assert "splits of its own (test, train); give the file alone" in refusal({"train": file})
    for name in "abc":  # all in one folder
        text(tmp_path / "flat" / f"{name}.jpg", "")
    assert [name for name, *_ in read(file, tmp_path / "flat")] == ["a.jpg", "a.jpg", "b.jpg", "c.jpg"]


@pytest.mark.parametrize("name", ["dataset_flickr8k", "dataset_flickr30k"])
def test_karpathys_flickr_has_no_folders(name: str, tmp_path: Path) -> None:
    file = dump(tmp_path / f"{name}.json", karpathy(a=("", "val", ["a dog"]), b=("", "train", ["b"])))
    assert read(file) == [("a.jpg", "a dog", "val"), ("b.jpg", "b", "train")]


def test_the_list_form_of_karpathys_split(tmp_path: Path) -> None:
    train = [
        {"image": "val2014/a.jpg", "caption": "one", "image_id": "1"},
        {"image": "val2014/a.jpg", "caption": "two"},
    ]
    files = {
        "train": dump(tmp_path / "coco_karpathy_train.json", train),
        "val": dump(tmp_path / "other.json", [{"image": "b.jpg", "caption": ["three", "four"]}]),
    }
    one = [("val2014/a.jpg", "one", "train"), ("val2014/a.jpg", "two", "train")]
    assert read(files["train"]) == one
    assert read(files) == [*one, ("b.jpg", "three", "val"), ("b.jpg", "four", "val")]


def test_a_picture_that_json_has_no_captions_of_keeps_a_row(tmp_path: Path) -> None:
    listed = [{"image": "a.jpg", "caption": "a dog"}, {"image": "b.jpg", "caption": []}]
    for file in (
        dump(tmp_path / "captions_val.json", coco({2: "b.jpg", 1: "a.jpg"}, [(1, "a dog")])),
        dump(tmp_path / "dataset.json", karpathy(a=("", "val", ["a dog"]), b=("", "val", []))),
        dump(tmp_path / "val.json", listed),
    ):
        assert read(file) == [("a.jpg", "a dog", "val"), ("b.jpg", "", "val")]


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({"train": 113_287, "val": 5_000, "test": 5_000}, "113,287 / 5,000 / 5,000 .*: .* with restval"),
        ({"train": 82_783, "val": 5_000, "test": 5_000}, "82,783 / .*without restval"),
        ({"train": 10, "val": 5_000}, "10 / 5,000 / 0 .*neither 113,287 .* nor 82,783 .*no variant"),
    ],
)
def test_the_variant_of_karpathys_split_is_told_by_its_counts(counts: dict[str, int], expected: str) -> None:
    line = karpathy_variant(counts)
    assert "\n" not in line
    assert re.search(expected, line)


TOKENS = "a.jpg#0\tA dog .\r\na.jpg#1\tThe\u2028dog\r\nb.jpg#0\tA\tcat\n\nc.jpg#0\tno list\nd.jpg#0\tA bird\n"


def test_flickr8k_takes_splits_from_the_lists_beside_it(tmp_path: Path) -> None:
    file = text(tmp_path / "Flickr8k.token.txt", TOKENS)
    for split, names in (("train", "a.jpg\n"), ("dev", "b.jpg"), ("test", "d.jpg\r\n")):
        text(tmp_path / f"Flickr_8k.{split}Images.txt", names)
    assert read(file) == [
        ("a.jpg", "A dog .", "train"),
        ("a.jpg", "The\u2028dog", "train"),
        ("b.jpg", "A\tcat", "val"),
        ("d.jpg", "A bird", "test"),
    ]


def test_flickr30k_lists_names_without_suffix(tmp_path: Path) -> None:
    file = text(tmp_path / "results_20130124.token", TOKENS)
    text(tmp_path / "train.txt", "a\n")
    text(tmp_path / "val.txt", "b\nd\n")
    assert [row[::2] for row in read(file)] == [
        ("a.jpg", "train"),
        ("a.jpg", "train"),
        ("b.jpg", "val"),
        ("d.jpg", "val"),
    ]
    assert {split for *_, split in read({"all": file})} == {"all"}
    assert len(read({"all": file})) == 5


def test_token_files_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    file = text(tmp_path / "some.token", TOKENS)
    assert "Flickr_8k.trainImages.txt" in refusal(file)
    text(tmp_path / "train.txt", "z.jpg")
    assert "none of its 4 pictures" in refusal(file)
    text(tmp_path / "val.txt", "z.jpg")
    assert "z.jpg is in the lists of train and val" in refusal(file)
    assert "line 2: 'b.jpg a cat' is not" in refusal(
        {"x": text(tmp_path / "b.token", "a.jpg#0\ta dog\nb.jpg a cat")}
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.csv",
            "file_name,text,split\na,b,c\n",
            "has no column 'caption', only 'file_name', 'text', 'split'; name it",
        ),
        (
            "a.tsv",
            "file_name\tcaption\na\tb\n",
            "data.split_column=NAME, or give a file for each split: data.table={",
        ),
        ("a.csv", "file_name,caption,split\n", "has a header but no rows"),
        ("a.csv", "", "cannot be read as a CSV in UTF-8"),
        ("a.csv", "file_name,caption,split\na,b,c\na,b, and c,d\n", "cannot be read as a CSV in UTF-8"),
        (
            "a.csv",
            "file_name,caption,split\na,b, and c,d\n",
            "more fields than the header; put captions with a ','",
        ),
        ("a.tsv", 'file_name\tcaption\tsplit\na\t"b\tc\n', "cannot be read as a TSV in UTF-8"),
        (
            "a.tsv",
            'file_name\tcaption\tsplit\na\tb\tc\nd\t"Hi" there\te\nf\t"Oh\tg\nh\ti "well" j\tk\n',
            "a quote at the start of a cell in row 3 takes the rows after it into that cell, 'Oh",
        ),
        ("a.parquet", "not that", "cannot be read as Parquet"),
        ("a.xlsx", "x", "is of no known format; known are .csv, .tsv"),
        ("train.json", "{", "cannot be read as JSON"),
        ("train.json", '{"a": 1}', "JSON of no known kind; known are"),
        ("train.json", '"text"', "JSON of no known kind; known are"),
        ("train.json", "[]", "holds no captions"),
        ("train.json", '[{"image": "a.jpg", "caption": 3}]', "3 is no text"),
        ("train.json", '[{"file": "a.jpg", "caption": "b"}]', "KeyError('image')"),
        ("train.json", '[{"image": "a.jpg", "caption": "\\ud800"}]', "text that is no Unicode"),
        ("train.json", '{"images": [], "annotations": []}', "holds no captions"),
        (
            "train.json",
            '{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 2}]}',
            "KeyError",
        ),
        ("train.json", '{"images": [{"filename": "a", "split": "val"}]}', "KeyError"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_in_one_line(
    name: str, content: str, message: str, tmp_path: Path
) -> None:
    said = refusal(text(tmp_path / name, content))
    assert said.startswith(f"data.table={tmp_path / name}")
    assert message in said


@pytest.mark.parametrize("name", ["a.csv", "train.json", "a.token"])
def test_other_encodings_than_utf8_are_refused(name: str, tmp_path: Path) -> None:
    assert "UTF-8" in refusal({"x": text(tmp_path / name, "file_name,caption\na#0,\tMänner\n", "latin-1")})


def test_parquet_columns_of_another_kind_and_empty_tables_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    table = pa.table({"file_name": [b"bytes"], "caption": ["a"], "split": ["train"]})
    parquet.write_table(table, file)
    assert "'file_name' holds binary, not text; name another with data.image_column=NAME" in refusal(file)
    parquet.write_table(table.slice(0, 0), file)
    assert "has columns but no rows" in refusal(file)


def test_a_missing_file_of_a_split_is_named_with_its_setting(tmp_path: Path) -> None:
    file = text(tmp_path / "one.csv", "file_name,caption\na.jpg,a dog\n")
    assert (
        refusal({"train": file, "val": tmp_path / "no.csv"})
        == f"data.table.val={tmp_path}/no.csv does not exist"
    )
    assert refusal(tmp_path / "no.csv") == f"data.table={tmp_path}/no.csv does not exist"
    assert "names no file" in refusal({})


def test_coco_annotations_with_an_id_for_two_pictures_are_refused(tmp_path: Path) -> None:
    both = coco({1: "a.jpg"}, [(1, "a dog")])
    both["images"] += coco({1: "b.jpg"}, [])["images"]
    said = refusal(dump(tmp_path / "captions_train.json", both))
    assert "a.jpg and b.jpg have the same id, 1" in said


def test_a_list_may_tell_the_split_of_each_picture(tmp_path: Path) -> None:
    file = dump(
        tmp_path / "my_train.json",
        [{"image": "a.jpg", "caption": "x"}, {"image": "b.jpg", "caption": "y", "split": "val"}],
    )
    assert read(file) == [("a.jpg", "x", "train"), ("b.jpg", "y", "val")]


@pytest.mark.parametrize("rows", ["a.jpg,\"Stop sign,train\nb.jpg,a dog,train\nc.jpg,Go\" sign,train\n",
                                  "a.jpg,\"Stop sign,train\nb.JPEG,a \"dog,train\n"])  # fmt: skip
def test_a_stray_quote_that_swallows_rows_is_refused(rows: str, tmp_path: Path) -> None:
    said = refusal(text(tmp_path / "t.csv", f"file_name,caption,split\n{rows}"))
    assert "a quote at the start of a cell in row 1 takes the rows after it into that cell" in said


def test_a_caption_of_several_lines_with_commas_is_one(tmp_path: Path) -> None:
    file = text(
        tmp_path / "t.csv", 'file_name,caption,split\na.jpg,"a dog, running,\nand a cat, asleep",train\n'
    )
    assert read(file) == [("a.jpg", "a dog, running,\nand a cat, asleep", "train")]
