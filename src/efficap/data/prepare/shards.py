"""Runs img2dataset, which downloads pictures into shards for webdataset, and reads what it reports about them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

from efficap.errors import InputError

SHARD_ROWS = 10_000  # rows of a shard, of which some cannot be had
MIN_SIDE = 64  # pixels; what is smaller is an icon, or a stand-in for a picture that is gone
NAMED = 8  # reasons that a report names

# Of img2dataset 1.47: pandas<3, and a module that Python 3.13 no longer has.
_INSTALL = (
    "pip install 'efficap[img2dataset]', or, as it wants an older pandas and Python 3.12 at most, put it into an "
    "environment of its own (python3.11 -m venv i2d; i2d/bin/pip install img2dataset) and add --img2dataset i2d"
)


def find_img2dataset(path: Path | None) -> str:
    """The program, by its path or its environment's; without one, beside Python or on PATH.

    Raises:
        InputError: it is not there; says how to install it.
    """
    if path is not None:
        candidates = (
            [path / "bin" / "img2dataset", path / "Scripts" / "img2dataset.exe"] if path.is_dir() else [path]
        )
    else:
        found = shutil.which("img2dataset")
        candidates = [Path(sys.executable).with_name("img2dataset"), *([Path(found)] if found else [])]
    for candidate in candidates:
        if candidate.is_file() and os.access(candidate, os.X_OK):
            return str(candidate.absolute())
    if path is not None:
        raise InputError(
            f"--img2dataset {path} is neither a program nor an environment with one; install it: {_INSTALL}"
        )
    raise InputError(f"img2dataset is not installed: {_INSTALL}")


def download_shards(
    program: str, rows_file: Path, folder: Path, rows: int, image_size: int, processes: int, threads: int
) -> None:
    """Download the pictures of ``rows_file`` (Parquet: ``url``, ``caption``), but for shards complete already.

    Raises:
        InputError: img2dataset failed, or was interrupted.
    """
    wanted = -(-rows // SHARD_ROWS)
    if len(_reports(folder)) < wanted:
        settings = _settings(image_size, processes, threads) | {
            "url_list": rows_file,
            "output_folder": folder,
        }
        command = [program, *(f"--{name}={value}" for name, value in settings.items())]
        # Its messages go to stderr; without the variable it asks the network for a newer albumentations.
        status = subprocess.run(
            command, stdout=2, env=os.environ | {"NO_ALBUMENTATIONS_UPDATE": "1"}, check=False
        )
        done = len(_reports(folder))
        # It ends with status 0 when interrupted, and when shards fail.
        if status.returncode or done < wanted:
            raise InputError(
                f"{folder}: img2dataset ended with status {status.returncode} after {done:,} of {wanted:,} shards, see "
                "above; run the same command again to go on"
            )


def _settings(image_size: int, processes: int, threads: int) -> dict[str, object]:
    return {
        "input_format": "parquet",
        "url_col": "url",
        "caption_col": "caption",
        "output_format": "webdataset",
        "number_sample_per_shard": SHARD_ROWS,
        # The shorter side becomes image_size and nothing is padded: borders would be learned as part of pictures.
        "resize_mode": "keep_ratio",
        "resize_only_if_bigger": True,
        "image_size": image_size,
        "min_image_size": MIN_SIDE,
        "encode_format": "jpg",
        "encode_quality": 92,
        "extract_exif": False,
        "processes_count": processes,
        "thread_count": threads,
        "timeout": 20,
        "retries": 1,
        "incremental_mode": "incremental",
        "enable_wandb": False,
    }


def _reports(folder: Path) -> list[Path]:
    """Reports of complete shards: a shard's is written after its tar."""
    return sorted(filter(_is_complete, folder.glob("*_stats.json")))


def _is_complete(report: Path) -> bool:
    """Whether there is a shard that was written to its end; a report that was not is removed, and made anew."""
    try:
        json.loads(report.read_text(encoding="utf-8"))
    except ValueError:
        report.unlink()
        return False
    return _shard(report).is_file()


def _shard(report: Path) -> Path:
    return report.with_name(report.name.replace("_stats.json", ".tar"))


def print_yield(part: str, folder: Path) -> None:
    """Print how many pictures there are, and why others are not.

    Raises:
        InputError: there is none.
    """
    rows = pictures = 0
    reasons: Counter[str] = Counter()
    reports = _reports(folder)
    for file in reports:
        report = json.loads(file.read_text(encoding="utf-8"))
        rows += report["count"]
        pictures += report["successes"]
        reasons.update(
            {reason: count for reason, count in report["status_dict"].items() if reason != "success"}
        )
    named = [f"{count:>12,}  {' '.join(reason.split())[:90]}" for reason, count in reasons.most_common(NAMED)]
    rest = sum(count for _, count in reasons.most_common()[NAMED:])
    if rest:
        named.append(f"{rest:>12,}  for {len(reasons) - NAMED:,} other reasons")
    if not pictures:
        why = reasons.most_common(1)[0][0] if reasons else "no shard is complete"
        raise InputError(
            f"{folder}: none of {rows:,} pictures could be downloaded, mostly: {why}; delete that folder to try again"
        )
    shards = f"{len(reports):,} {'shard' if len(reports) == 1 else 'shards'}"
    print(f"{part}: {pictures:,} of {rows:,} pictures ({pictures / rows:.1%}) in {shards}", *named, sep="\n")


def complete_shards(folder: Path) -> list[Path]:
    """The tars that are whole, sorted."""
    return [_shard(report) for report in _reports(folder)]


def shard_pattern(folder: Path) -> str:
    """All complete shards of a folder in one expression: ``DIR/{00000..00331}.tar``."""
    names = [tar.stem for tar in complete_shards(folder)]
    span = names[0] if len(names) == 1 else f"{{{names[0]}..{names[-1]}}}"
    return f"{folder}/{span}.tar"
