"""``prepare cc3m`` and ``prepare cc12m``: lists of pictures on the web, downloaded by img2dataset into shards."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path

from efficap.data.command_line import training_command
from efficap.data.prepare.download import Remote, check_space, fetch
from efficap.data.prepare.shards import (
    complete_shards,
    download_shards,
    find_img2dataset,
    print_yield,
    shard_pattern,
)
from efficap.data.prepare.transfer import DownloadError
from efficap.errors import InputError
from efficap.files import replacing, unfinished

# Sizes in bytes and SHA-256: Hugging Face datasets, dataset_infos.json of conceptual_captions (there "unlabeled")
# and of conceptual_12m.
REMOTES = {
    "cc3m": {
        "train": Remote(
            "https://storage.googleapis.com/gcc-data/Train/GCC-training.tsv",
            "Train_GCC-training.tsv",
            size=564_607_502,
            sha256="eab84e5ebc713a41a6b1f6ae6fa3d6617821a13b03fe24e16004cc4aac189635",
        ),
        "val": Remote(
            "https://storage.googleapis.com/gcc-data/Validation/GCC-1.1.0-Validation.tsv",
            "Validation_GCC-1.1.0-Validation.tsv",
            size=2_603_670,
            sha256="528a0c939ec2ad8d1740bd3f459a51e9fe67643050e29f68fabb6da3f8ac985d",
        ),
    },
    "cc12m": {
        "train": Remote(
            "https://storage.googleapis.com/conceptual_12m/cc12m.tsv",
            "cc12m.tsv",
            size=2_707_204_412,
            sha256="892b549d493c7e75ade10d46c88c9ddabb097790d912b74cfc0ea4ff035ec2c3",
        )
    },
}

# Where the addresses above no longer answer: Google's own page asks for a click.
PAGES = {
    "cc3m": "https://ai.google.com/research/ConceptualCaptions/download",
    "cc12m": "https://github.com/google-research-datasets/conceptual-12m",
}

PARTS = ("train", "val")
VAL_ROWS = 10_000  # held out of a list without a validation part; a twentieth of a shorter list
_BATCH = 100_000  # rows written at a time

Pair = tuple[str, str]  # address, caption


def prepare_conceptual(
    folder: Path,
    name: str,
    *,
    tsv: Path | None = None,
    val_tsv: Path | None = None,
    img2dataset: Path | None = None,
    image_size: int = 448,
    processes: int = 1,
    threads: int = 64,
    limit: int | None = None,
    remotes: Mapping[str, Mapping[str, Remote]] = REMOTES,
) -> None:
    """Have a set of pictures on the web in a folder: ``train/*.tar`` and ``val/*.tar``. Prints the yield of either.

    Run again after a break, it goes on with the shards that are not complete.

    Args:
        name: ``cc3m`` or ``cc12m``.
        tsv: lines of an address and a caption, in either order; None: downloaded.
        val_tsv: the same for validation; without it, a list that has no published one gives up its last rows.
        img2dataset: the program, or the environment it is installed in; None: looked for.
        image_size: pixels of the shorter side; larger pictures are reduced.
        processes, threads: downloads at a time are their product.
        limit: rows of the list to take; None: all. Validation is then at most a twentieth of it.

    Raises:
        InputError: no img2dataset, no list, not enough space, shards of other settings, or shards left incomplete.
    """
    for setting, value in (("image-size", image_size), ("processes", processes), ("threads", threads)):
        if value < 1:
            raise InputError(f"--{setting} {value} must be at least 1")
    if limit is not None and limit < 2:
        raise InputError(f"--limit {limit} must be at least 2, a row for training and one for validation")
    program = find_img2dataset(img2dataset)
    lists = _lists(folder, name, tsv, val_tsv, remotes[name])
    record = {"lists": {part: file.stat().st_size for part, file in lists.items()}}
    _keep_record(folder, record | {"limit": limit, "image_size": image_size})
    rows = _write_lists(folder, lists, limit)
    # the small one first: it shows soon what is wrong, and how much space is needed
    for part in ("val", "train"):
        if part == "train":
            _check_space_for_rest(folder, rows)
        download_shards(
            program, folder / f"{part}.parquet", folder / part, rows[part], image_size, processes, threads
        )
        print_yield(part, folder / part)
    _print_command(folder)


def _lists(
    folder: Path, name: str, tsv: Path | None, val_tsv: Path | None, remotes: Mapping[str, Remote]
) -> dict[str, Path]:
    given = {part: file for part, file in (("train", tsv), ("val", val_tsv)) if file is not None}
    for part, file in given.items():
        if not file.is_file():
            raise InputError(f"--{'tsv' if part == 'train' else 'val-tsv'} {file} does not exist")
    # With a list of one's own, the published validation part may overlap it: then its own last rows serve.
    published = {} if tsv is not None else {part: remotes[part] for part in remotes if part not in given}
    try:
        files = fetch(list(published.values()), folder)
    except DownloadError as error:
        raise InputError(f"{error}; {PAGES[name]} may have it: name it with --tsv FILE") from error
    return given | dict(zip(published, files, strict=True))


def _keep_record(folder: Path, record: Mapping[str, object]) -> None:
    """Write down the settings, for complete shards are kept by later calls; before there is one, they can change.

    Raises:
        InputError: the folder holds shards of other settings, or tables that are not this command's.
    """
    file = folder / "prepared.json"  # not beside the shards, where img2dataset takes any JSON for its own
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    if found == record:
        return
    if found is not None and any(complete_shards(folder / part) for part in PARTS):
        raise InputError(
            f"{folder} holds shards of {json.dumps(found)}, and {json.dumps(record)} is asked for now; "
            "name another folder with --dir, or delete this one"
        )
    for list_file in _list_files(folder).values():  # first: they may be of the other settings
        if found is None and list_file.is_file():
            raise InputError(f"{list_file} is not of this command; name another folder with --dir")
        list_file.unlink(missing_ok=True)
    with replacing(file) as record_file:
        record_file.write(f"{json.dumps(record)}\n".encode())


def _list_files(folder: Path) -> dict[str, Path]:
    return {part: folder / f"{part}.parquet" for part in PARTS}


def _write_lists(folder: Path, lists: Mapping[str, Path], limit: int | None) -> dict[str, int]:
    """Write ``train.parquet`` and ``val.parquet`` for img2dataset, which would take quotes in a TSV for its syntax.

    Returns:
        The rows of either.
    """
    from pyarrow import parquet

    files = _list_files(folder)
    if not all(file.is_file() for file in files.values()):
        total = sum(1 for _ in islice(_pairs(lists["train"]), limit))
        val = min(VAL_ROWS, total // 20 or 1)
        if total < 2:
            raise InputError(
                f"{lists['train']} has {total} lines of an address and a caption; at least 2 are needed"
            )
        if "val" in lists:
            val_pairs = islice(_pairs(lists["val"]), None if limit is None else val)
            train_pairs = islice(_pairs(lists["train"]), total)
        else:
            val_pairs = islice(_pairs(lists["train"]), total - val, total)
            train_pairs = islice(_pairs(lists["train"]), total - val)
        _write_pairs(val_pairs, files["val"])
        _write_pairs(train_pairs, files["train"])
    return {part: parquet.read_metadata(file).num_rows for part, file in files.items()}


def _pairs(tsv: Path) -> Iterator[Pair]:
    """Address and caption of each line that has both, whichever comes first; a header line has no address."""
    with tsv.open(encoding="utf-8", errors="replace", newline="\n") as lines:
        for line in lines:
            fields = line.strip().split("\t")
            if fields[0].startswith(("http://", "https://")):
                url, words = fields[0], fields[1:]
            else:
                url, words = fields[-1], fields[:-1]
            caption = " ".join(" ".join(words).split())
            if caption and url.startswith(("http://", "https://")):
                yield url, caption


def _write_pairs(pairs: Iterator[Pair], file: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    schema = pa.schema([("url", pa.string()), ("caption", pa.string())])
    with unfinished(file) as temporary, parquet.ParquetWriter(temporary, schema) as writer:
        while batch := list(islice(pairs, _BATCH)):
            urls, captions = zip(*batch, strict=True)
            writer.write_table(pa.table({"url": urls, "caption": captions}, schema))


def _check_space_for_rest(folder: Path, rows: Mapping[str, int]) -> None:
    held = {part: sum(tar.stat().st_size for tar in (folder / part).glob("*.tar")) for part in rows}
    expected = held["val"] / max(rows["val"], 1) * rows["train"]
    check_space(
        folder, max(int(expected) - held["train"], 0), "for train, if its pictures are as large as val's"
    )


def _print_command(folder: Path) -> None:
    patterns = {"shards": shard_pattern(folder / "train"), "val_shards": shard_pattern(folder / "val")}
    print(f"Train with:\n{training_command('webdataset', **patterns)}")
