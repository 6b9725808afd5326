"""The zip that COCO's evaluation server takes: python -m efficap.evaluation.server --help.

It holds captions_val2014_NAME_results.json and captions_test2014_NAME_results.json, both whole.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

from efficap.errors import InputError, first_of
from efficap.files import path_argument, replacing

SPLITS = ("val2014", "test2014")


def write_server_zip(
    zip_file: Path, name: str, results: dict[str, Path], image_lists: dict[str, Path]
) -> None:
    """Check the results of val2014 and test2014, and write the zip that is uploaded.

    The format: Chen et al. 2015, https://arxiv.org/abs/1504.00325, and https://cocodataset.org/#format-results.

    Args:
        zip_file: is replaced when all is right.
        name: of the method, part of the files' names.
        results: split -> JSON list of ``{"image_id": int, "caption": str}``, as eval.py writes results.json.
        image_lists: split -> COCO's JSON with exactly its ``images``: captions_val2014.json, image_info_test2014.json.

    Raises:
        InputError: a name that is no part of a file's name, or a file that is not as `check_results` wants it.
    """
    if not re.fullmatch(r"[A-Za-z0-9-]+", name):
        raise InputError(
            f"the name {name!r} must be of letters, digits and hyphens, as it stands between two _"
        )
    checked = {split: check_results(results[split], image_lists[split]) for split in SPLITS}
    with replacing(zip_file) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for split, rows in checked.items():
            archive.writestr(f"captions_{split}_{name}_results.json", json.dumps(rows))


def check_results(results: Path, image_list: Path) -> list[dict[str, Any]]:
    """The rows of a results file that has a caption for exactly the pictures of COCO's list.

    Raises:
        InputError: an id that is no whole number or comes twice, a picture too many or too few, or a caption that is
            no text or is empty.
    """
    rows = _read(results)
    if not isinstance(rows, list):
        raise InputError(
            f"{results} must hold a list of {{image_id, caption}}; eval.py writes it as results.json"
        )
    seen: set[int] = set()
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or not row.keys() >= {"image_id", "caption"}:
            raise InputError(f"{results}: entry {number} is no object with image_id and caption")
        image_id, caption = row["image_id"], row["caption"]
        if not isinstance(image_id, int) or isinstance(image_id, bool):
            raise InputError(
                f"{results}: image_id {image_id!r} of entry {number} is no whole number; use results.json, which "
                "eval.py writes with COCO's numbers"
            )
        if image_id in seen:
            raise InputError(
                f"{results}: image_id {image_id} comes twice, again in entry {number}; give it once"
            )
        if not isinstance(caption, str) or not caption.strip():
            raise InputError(
                f"{results}: the caption {caption!r} of image_id {image_id} must be text and not empty; "
                "decoding.min_tokens=2 asks for a word at least"
            )
        seen.add(image_id)
    _check_complete(results, seen, image_list)
    return [{"image_id": row["image_id"], "caption": row["caption"]} for row in rows]


def _check_complete(results: Path, found: set[int], image_list: Path) -> None:
    content = _read(image_list)
    try:
        expected = {int(image["id"]) for image in content["images"]}
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{image_list} holds no list of 'images' with their 'id', as COCO's files do"
        ) from error
    for ids, what in ((expected - found, "lacks"), (found - expected, "has other pictures than")):
        if ids:
            raise InputError(
                f"{results} {what} those of {image_list}: {len(ids):,} ({first_of(sorted(ids))}) differ of "
                f"{len(expected):,}; the server takes all of a split and no other"
            )


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise InputError(f"{file} is no JSON ({error})") from error


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 1, after one line, where something is not as the server wants it."""
    parser = argparse.ArgumentParser(
        prog="python -m efficap.evaluation.server", description="Write the zip for COCO's evaluation server."
    )
    parser.add_argument("name", help="of the method, in the names of the files")
    parser.add_argument(
        "run", type=path_argument, help="run directory whose eval/val2014 and eval/test2014 are taken"
    )
    parser.add_argument("--val-images", type=path_argument, required=True, help="captions_val2014.json")
    parser.add_argument("--test-images", type=path_argument, required=True, help="image_info_test2014.json")
    parser.add_argument("--val-results", type=path_argument, help="in place of RUN/eval/val2014/results.json")
    parser.add_argument(
        "--test-results", type=path_argument, help="in place of RUN/eval/test2014/results.json"
    )
    parser.add_argument("--out", type=path_argument, help="default: RUN/eval/captions_NAME_results.zip")
    options = parser.parse_args(arguments)
    folder = options.run / "eval"
    results = {
        "val2014": options.val_results or folder / "val2014/results.json",
        "test2014": options.test_results or folder / "test2014/results.json",
    }
    out = options.out or folder / f"captions_{options.name}_results.zip"
    try:
        images = {"val2014": options.val_images, "test2014": options.test_images}
        write_server_zip(out, options.name, results, images)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"ready for the server: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
