"""What a table says of its pictures, and pictures without captions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from efficap.data.attributes import coco_ids, read_attribute
from efficap.data.dataset import collate_captions
from efficap.data.table import read_table
from efficap.errors import InputError

COLUMNS = {"image_column": "file_name", "caption_column": "caption", "split_column": "split"}


def write_json(file: Path, content: object) -> Path:
    file.write_text(json.dumps(content))
    return file


IMAGES = [
    {"id": 42, "file_name": "COCO_test2014_000000000042.jpg", "domain": "in-domain"},
    {"id": 7, "file_name": "COCO_test2014_000000000007.jpg", "domain": "out-domain"},
]


def test_a_list_of_pictures_is_read_for_captioning_alone(tmp_path: Path) -> None:
    (tmp_path / "test2014").mkdir()
    for image in IMAGES:
        (tmp_path / "test2014" / str(image["file_name"])).touch()
    file = write_json(tmp_path / "image_info_test2014.json", {"images": IMAGES, "licenses": []})
    tables, empties = read_table(file, tmp_path, **COLUMNS, require_captions=False)
    assert not empties
    assert tables["test"].image_ids == [f"test2014/{image['file_name']}" for image in IMAGES]
    assert tables["test"].references == [[], []]
    assert coco_ids(file, tmp_path) == dict(zip(tables["test"].image_ids, [42, 7], strict=True))
    with pytest.raises(InputError, match=r"has 2 pictures and not one caption; .*metrics=\[\]"):
        read_table(file, tmp_path, **COLUMNS)


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet"])
def test_a_table_without_a_column_of_captions_is_read(suffix: str, tmp_path: Path) -> None:
    rows = pd.DataFrame({"split": ["test", "test"], "file_name": ["b.jpg", "a.jpg"], "place": ["x", None]})
    file = tmp_path / f"pictures.{suffix}"
    if suffix == "parquet":
        rows.to_parquet(file)
    else:
        rows.to_csv(file, index=False, sep="\t" if suffix == "tsv" else ",")
    columns = {**COLUMNS, "caption_column": None}
    tables, _ = read_table(file, tmp_path, **columns, require_captions=False)
    assert tables["test"].image_ids == ["b.jpg", "a.jpg"]
    assert read_attribute(file, tmp_path, "place", "file_name") == {"b.jpg": "x", "a.jpg": ""}
    with pytest.raises(InputError, match="has no column 'domain', only 'split', 'file_name', 'place'"):
        read_attribute(file, tmp_path, "domain", "file_name")


def test_a_key_of_the_pictures_is_an_attribute(tmp_path: Path) -> None:
    annotations = [{"id": 1, "image_id": 42, "caption": "a"}, {"id": 2, "image_id": 7, "caption": "b"}]
    file = write_json(tmp_path / "nocaps_val.json", {"images": IMAGES, "annotations": annotations})
    found = read_attribute({"val": file}, tmp_path, "domain", "file_name")
    assert list(found.values()) == ["in-domain", "out-domain"]
    with pytest.raises(InputError, match="no picture has a key 'area'; there are domain, file_name, id"):
        read_attribute(file, tmp_path, "area", "file_name")


def test_karpathys_json_has_cocos_numbers_and_flickrs_has_none(tmp_path: Path) -> None:
    entry = {"filename": "a.jpg", "split": "test", "sentences": [{"raw": "a"}], "imgid": 3}
    assert coco_ids(write_json(tmp_path / "flickr.json", {"images": [entry]}), tmp_path) == {}
    entry["cocoid"] = 391895
    assert coco_ids(write_json(tmp_path / "coco.json", {"images": [entry]}), tmp_path) == {"a.jpg": 391895}


def test_a_picture_with_two_values_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "captions.csv"
    file.write_text("file_name,caption,split,domain\na.jpg,one,val,in\na.jpg,two,val,out\n")
    with pytest.raises(InputError, match=r"a.jpg has two values of domain, 'in' and 'out'"):
        read_attribute(file, tmp_path, "domain", "file_name")


def test_a_list_is_no_value(tmp_path: Path) -> None:
    rows = pd.DataFrame(
        {"file_name": ["a.jpg"], "caption": ["x"], "split": ["val"], "tags": [["dog", "cat"]]}
    )
    rows.to_parquet(tmp_path / "captions.parquet")
    write_json(tmp_path / "val.json", [{"image": "a.jpg", "caption": "x", "tags": ["dog", "cat"]}])
    for name in ("captions.parquet", "val.json"):
        with pytest.raises(
            InputError, match=r"tags of a.jpg is a list or an object; by= takes what has one value"
        ):
            read_attribute(tmp_path / name, tmp_path, "tags", "file_name")


def test_pictures_without_captions_make_a_batch() -> None:
    tokens, lengths = collate_captions([[], []], 9)
    assert tokens.shape == (2, 1, 1)
    assert torch.equal(lengths, torch.zeros(2, 1, dtype=torch.int64))
    tokens, lengths = collate_captions([[], [np.array([1, 2])]], 9)
    assert tokens.tolist() == [[[9, 9]], [[1, 2]]]
