"""Every sample of every shard, decoded once; their indexes are written on the way."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pyarrow as pa

from efficap.data.doctor.captions import CaptionLimit, CaptionTally
from efficap.data.doctor.examination import Examination, Part
from efficap.data.doctor.findings import LISTED, Findings
from efficap.data.doctor.fingerprint import LOOK, Looks, look_at
from efficap.data.doctor.yields import Downloads, read_downloads
from efficap.data.pictures import Picture, PictureError
from efficap.data.pool import fewer_workers, in_processes, tracked
from efficap.data.shards.examine import BadSample, IndexHeader, examine
from efficap.data.shards.index import read_samples, write_index

_Job = tuple[Path, Path | None, CaptionLimit, int]  # tar, index_dir, limit, max_pixels
_Seen = tuple[IndexHeader, Looks, CaptionTally, list[BadSample]]

_PROBLEMS = {"cut tar": "training uses the samples before the cut; download or copy it again"}


class ShardPlace:
    """The pictures of shards whose indexes are written."""

    def __init__(self, tars: list[Path], index_dir: Path | None) -> None:
        self._tars = tars
        self._samples = functools.lru_cache(maxsize=64)(lambda part: read_samples(tars[part], index_dir))

    def name(self, part: int, row: int) -> str:
        samples: pa.Table = self._samples(part)
        return f"{self._tars[part].name}: {samples['key'][row].as_py()}"

    def caption(self, part: int, row: int) -> str:
        return self._member(part, row, "text").decode("utf-8", "replace")

    def picture(self, part: int, row: int) -> Picture:
        try:
            return Picture(self._member(part, row, "image"))
        except PictureError:
            raise
        except OSError as error:
            raise PictureError("no access", error.strerror or str(error)) from error

    def _member(self, part: int, row: int, member: str) -> bytes:
        samples: pa.Table = self._samples(part)
        offset, size = (samples[f"{member}_{end}"][row].as_py() for end in ("offset", "size"))
        if offset < 0:
            return b""
        with self._tars[part].open("rb") as file:
            file.seek(offset)
            return file.read(size)


def examine_shards(
    tars: list[Path], *, index_dir: Path | None, limit: CaptionLimit, max_pixels: int, workers: int
) -> Examination:
    """Decode all pictures of all shards, count their captions, write an index of each.

    Args:
        index_dir: where the indexes go; None: beside the tars.
        max_pixels: larger pictures are left out.

    Raises:
        InputError: an index cannot be written.
    """
    seen = Examination("shards", ShardPlace(tars, index_dir), [], CaptionTally(limit), Findings())
    looks, rows = [], []
    downloads = Downloads()
    jobs = [(tar, index_dir, limit, max_pixels) for tar in tars]
    results = in_processes(_look_at_shard, jobs, workers=workers, way_out=fewer_workers(workers))
    done = tracked(results, "Looking at shards", len(jobs))
    for tar, (header, chunk, captions, bad) in zip(tars, done, strict=True):
        looks.append(chunk)
        rows.append(np.arange(len(chunk), dtype=np.int32))
        seen.captions.merge(captions)
        number_bad = sum(header.bad.values())
        seen.parts.append(Part(tar.name, header.good, captions.captions, number_bad))
        if header.problem is not None:
            _add_problem(seen.findings, tar, header)
        _add_bad(seen.findings, tar, header, bad)
        read_downloads(tar, header.good + number_bad, downloads)
    seen.gather(looks, list(range(len(tars))), rows)
    if downloads.shards:
        seen.downloads = downloads
        for finding in downloads.findings:
            if finding.count:
                seen.findings.of(finding.title, finding.advice).merge(finding)
    return seen


def _look_at_shard(job: _Job) -> _Seen:
    tar, index_dir, limit, max_pixels = job
    looks: list[tuple[object, ...]] = []
    captions = CaptionTally(limit)

    def on_sample(image_id: str, data: bytes, texts: list[str]) -> None:
        looks.append(look_at(Picture(data, max_pixels)))  # anew: that of the index was decoded at 1/8
        captions.add(f"{tar.name}: {image_id.removeprefix(tar.stem + '/')}", texts)

    examined = examine(tar, max_pixels=max_pixels, on_sample=on_sample)
    write_index(examined, tar, index_dir)
    return examined.header, np.array(looks, LOOK), captions, examined.bad[:LISTED]


def _add_problem(findings: Findings, tar: Path, header: IndexHeader) -> None:
    problem = str(header.problem)
    kind = problem.split(" (")[0]
    advice = _PROBLEMS.get(kind, "training cannot use it; download or copy it again")
    found = header.good + sum(header.bad.values())
    findings.of(f"shards: {kind}", advice).add(f"{tar.name}: {problem}, {found:,} samples found")


def _add_bad(findings: Findings, tar: Path, header: IndexHeader, bad: list[BadSample]) -> None:
    for reason, count in header.bad.items():
        finding = findings.of(f"samples that cannot be used ({reason})", "training leaves them out")
        named = [sample for sample in bad if sample.reason == reason]
        for sample in named:
            finding.add(f"{tar.name}: {sample.key}" + (f" ({sample.detail})" if sample.detail else ""))
        finding.count += count - len(named)
