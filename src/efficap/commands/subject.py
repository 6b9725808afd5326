"""What is evaluated, and on what: a run or an ensemble of runs, with the split's data as its models see them.

B images, P bytes of a picture in all the sizes that an ensemble's models take.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from efficap.commands.entry import CONF
from efficap.commands.run_dir import RunDirectory
from efficap.commands.saved_parts import DATA_MODULES
from efficap.data.caption_data import CaptionData
from efficap.data.csv import CSVDataModule
from efficap.data.pool import tracked
from efficap.decoding import build_decoding
from efficap.errors import InputError
from efficap.models.build import preprocessing
from efficap.tokenizer import CaptionTokenizer
from efficap.training.ensemble import Ensemble, Member
from efficap.training.writer import CaptionWriter


@dataclass(frozen=True, slots=True)
class Subject:
    """A run or an ensemble, with its data.

    Attributes:
        name: for titles.
        out: folder of its evaluations.
        runs: of an ensemble, as they were given; empty for a single run.
        precision: of the weights.
        writer: of captions, its batch size found.
        device: where it computes.
        run: the single run; None of an ensemble.
        forms: the data, once for each way in which a model cuts and resizes pictures; the first tells all else of them.
    """

    name: str
    out: Path
    runs: list[str]
    precision: str
    writer: CaptionWriter
    device: torch.device
    run: RunDirectory | None
    forms: list[CaptionData]

    @property
    def data(self) -> CaptionData:
        return self.forms[0]

    def batches(self, split: str) -> Iterator[tuple[Tensor, list[str], list[list[str]]]]:
        """Pictures as the writer takes them, (B, 3, H, W) or packed (B, P); their ids; their references."""
        loaders = [data.evaluation_dataloader(split) for data in self.forms]
        for batches in tracked(zip(*loaders, strict=True), f"Captioning {split}", len(loaders[0])):
            first = batches[0]
            assert all(batch.image_ids == first.image_ids for batch in batches)
            assert first.references is not None
            forms = [batch.images.to(self.device) for batch in batches]
            yield Ensemble.pack(forms) if self.runs else forms[0], first.image_ids, first.references
        for data in self.forms:
            data.end()


def open_run(cfg: dict[str, Any]) -> Subject:
    """The run that conf/eval.yaml's values name, loaded, and its data.

    Raises:
        InputError: no such run or split, a GPU that is not there.
    """
    run = RunDirectory(cfg["run"])
    device, precision = run.placement(cfg["accelerator"], cfg["precision"])
    decoding = build_decoding(run.decoding(cfg["decoding"]))
    tokenizer = run.tokenizer()
    captioner = run.captioner(tokenizer, device, precision, compile=cfg["compile"], packed=True)
    writer = CaptionWriter(captioner, tokenizer, decoding)
    side = run.config["model"]["image_size"]
    batch_size = writer.find_batch_size(torch.zeros(1, 3, side, side, dtype=torch.uint8, device=device))
    data = _prepared_data(run, preprocessing(run.config["model"]), cfg, tokenizer, batch_size)
    out = run.path / "eval"
    return Subject(run.config["name"], out, [], _name(precision), writer, device, run, [data])


def open_ensemble(cfg: dict[str, Any]) -> Subject:
    """All runs that conf/eval.yaml's values name as one captioner; decoding and data are the first run's.

    Raises:
        InputError: fewer than two runs, or of different tokenizers; or as `open_run`.
    """
    if not isinstance(cfg["run"], list) or len(cfg["run"]) < 2:
        raise InputError(f"ensemble=true needs several runs, not run={cfg['run']}: run=[outputs/a,outputs/b]")
    runs = [RunDirectory(path) for path in cfg["run"]]
    placements = [run.placement(cfg["accelerator"], cfg["precision"]) for run in runs]
    # An ONNX export stays on the CPU, and takes what the others compute with.
    device = next((device for device, _ in placements if device.type != "cpu"), placements[0][0])
    decoding = build_decoding(runs[0].decoding(cfg["decoding"]))
    tokenizer = _shared_tokenizer(runs)

    ways: list[dict[str, Any]] = []
    members = []
    for run, (own_device, precision) in zip(runs, placements, strict=True):
        way = preprocessing(run.config["model"])
        if way not in ways:
            ways.append(way)
        captioner = run.captioner(tokenizer, own_device, precision, compile=cfg["compile"], packed=True)
        members.append(Member(captioner, ways.index(way)))
    ensemble = Ensemble(members, [way["image_size"] for way in ways])
    writer = CaptionWriter(ensemble, tokenizer, decoding)
    blank = [torch.zeros(1, 3, side, side, dtype=torch.uint8, device=device) for side in ensemble.sides]
    batch_size = writer.find_batch_size(Ensemble.pack(blank))
    forms = [_prepared_data(runs[0], way, cfg, tokenizer, batch_size) for way in ways]
    precisions = ", ".join(dict.fromkeys(_name(precision) for _, precision in placements))
    given = [str(path) for path in cfg["run"]]
    out = Path(cfg["ensemble_dir"]).expanduser().resolve()
    return Subject(f"ensemble of {len(runs)} runs", out, given, precisions, writer, device, None, forms)


def _shared_tokenizer(runs: list[RunDirectory]) -> CaptionTokenizer:
    first, *others = [run.tokenizer() for run in runs]
    own = first.ids_in(first)
    for run, other in zip(runs[1:], others, strict=True):
        about = f"run={run.path} has another tokenizer than run={runs[0].path}"
        if other.vocab_size != first.vocab_size:
            raise InputError(
                f"{about}: {other.vocab_size} ids in place of {first.vocab_size}; an ensemble shares one"
            )
        differing = [id_ for id_, theirs in enumerate(first.ids_in(other)) if theirs != own[id_]]
        if differing:
            raise InputError(
                f"{about}: {len(differing)} of {first.vocab_size} ids mean other tokens, the first is id "
                f"{differing[0]}; an ensemble shares one"
            )
    return first


def _prepared_data(
    run: RunDirectory,
    way: dict[str, Any],
    cfg: dict[str, Any],
    tokenizer: CaptionTokenizer,
    batch_size: int,
) -> CaptionData:
    """The split's data, in batches as the writer takes them where the command line does not size them itself."""
    settings = _settings(run.config, cfg["data"])
    changes = _sized(settings, cfg["data"], batch_size)
    if not cfg["metrics"] and "caption_column" in settings:
        changes = {"require_captions": False, **changes}
    data = run.data(changes, settings)
    data.prepare_data()
    data.prepare(tokenizer, **way, splits=[cfg["split"]])
    return data


def _settings(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The settings that are changed: the run's own, or where another table is given, those of a table.

    A run that was trained on shards, a mixture or the built-in pictures is then evaluated on a table like any other.
    """
    own: dict[str, Any] = config["data"]
    if "table" not in changes or "_target_" in changes:
        return own
    is_table = DATA_MODULES.get(str(own.get("_target_"))) is CSVDataModule
    if is_table or "root" in changes:  # or the built-in pictures, in another folder
        return {**own, "table": None}  # a mapping of splits to files takes its place and does not join it
    if "sources" in own:
        own = own["sources"].get(own.get("evaluate_on"), {})
    settings: dict[str, Any] = {}
    for name in ("base", "csv"):  # which have values alone, but for their defaults lists and the seed
        settings |= yaml.safe_load((CONF / "data" / f"{name}.yaml").read_text(encoding="utf-8"))
    del settings["defaults"]
    if "image_dir" not in changes:
        raise InputError(
            f"data.table={changes['table']} needs the folder of its pictures: +data.image_dir=PATH"
        )
    text, seed = own.get("text", settings["text"]), config.get("seed", 0)
    return {**settings, "text": text, "seed": seed, "table": None}


def _sized(settings: dict[str, Any], changes: dict[str, Any], batch_size: int) -> dict[str, Any]:
    """`changes` of a data set's settings, and in a mixture of those of its sources, with a batch size."""
    if "sources" in settings:
        below = changes.get("sources", {})
        sources = {
            name: _sized(source, below.get(name, {}), batch_size)
            for name, source in settings["sources"].items()
        }
        return {**changes, "sources": sources}
    return {"batch_size": batch_size, **changes} if "batch_size" in settings else changes


def _name(precision: torch.dtype) -> str:
    return str(precision).removeprefix("torch.")
