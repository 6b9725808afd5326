"""Tiny models, tables and runs that the tests make themselves; one thread, no network, no W&B."""

from __future__ import annotations

import gc
import gzip
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis
import numpy as np
import omegaconf._utils
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image
from started import draw_nothing

from efficap.commands.entry import compose as compose
from efficap.evaluation import java

# As the commands have it: imports, and many a test, make objects by the hundred thousand.
gc.set_threshold(50_000)
os.environ["WANDB_MODE"] = "disabled"
# Settings are composed many hundred times; in C their files are read in a third of the time.
omegaconf._utils.yaml = SimpleNamespace(**{**vars(yaml), "SafeLoader": yaml.CSafeLoader})  # type: ignore[assignment]
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")
os.environ["HF_HUB_OFFLINE"] = "1"  # a name on the hub fails at once

WORDS = ["red", "green", "blue", "grey"]
SHARED = Path(os.environ.get("EFFICAP_SHARED", Path(__file__).parents[2] / "shared"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: at the end a process would run the last of them while the others wait."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session", autouse=True)
def _temporary_files_go_with_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Also those of processes that are killed."""
    folder = str(tmp_path_factory.mktemp("tmp"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", folder)
        patch.setattr(tempfile, "tempdir", folder)
        yield


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed() -> None:
    torch.set_num_threads(1)  # the suite runs in several processes
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_tracebacks_elsewhere() -> Iterator[None]:
    """An entry point called in this process sets what the processes of later tests would take for the user's wish."""
    yield
    os.environ.pop("HYDRA_FULL_ERROR", None)


_tokens: dict[str, str] = {}


@pytest.fixture(scope="module", autouse=True)
def _what_was_tokenized_is_known(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whole trainings of many tests say the same, and at each validation Java takes 0.4 s of a CPU to begin."""
    tokenize = java.tokenize

    def once(sentences: Sequence[str]) -> list[str]:
        if missing := [sentence for sentence in dict.fromkeys(sentences) if sentence not in _tokens]:
            _tokens.update(zip(missing, tokenize(missing), strict=True))
        return [_tokens[sentence] for sentence in sentences]

    with pytest.MonkeyPatch.context() as patch:
        if request.path.parent.name == "integration":
            patch.setattr(java, "tokenize", once)
        yield


@pytest.fixture(autouse=True)
def _nothing_is_drawn_for_nobody(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings of fixtures have both, as those of a module's fixture begin before this."""
    if request.path.parent.name == "integration":
        draw_nothing(monkeypatch)


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """A folder of real data beside the project, at $EFFICAP_SHARED; the test skips where it is absent."""

    def folder(name: str) -> Path:
        if not (SHARED / name).is_dir():
            pytest.skip(f"{SHARED / name} is absent; EFFICAP_SHARED gives its place")
        return SHARED / name

    return folder


def tiny_model(**changes: Any) -> dict[str, Any]:
    """A resolved model configuration of the smallest size: 64 pixels, 4 positions, width 32."""
    model: dict[str, Any] = {
        "image_size": 64,
        "pretrained": False,
        "encoder": {
            "name": "test_efficientnet",
            "pretrained": False,
            "weights_file": None,
            "frozen": False,
            "drop_path_rate": 0.0,
            "output_stride": 32,
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "interpolation": "bicubic",
            "crop_pct": 1.0,
        },
        "arithmetic": "gpt2",
        "bridge": {"n_blocks": 1, "n_heads": 4, "dropout": 0.0},
        "decoder": {
            "name": None,
            "pretrained": False,
            "n_layer": 2,
            "n_head": 4,
            "n_embd": 32,
            "n_positions": 24,
            "dropout": 0.0,
        },
        "tokenizer": {"name": None, "vocab_size": 300},
        "lr": {"encoder": 1e-3, "bridge": 1e-3, "decoder": 1e-3},
    }
    for path, value in changes.items():
        target = model
        *parents, last = path.split("__")
        for parent in parents:
            target = target[parent]
        target[last] = value
    return model


def write_colour_table(folder: Path, *, train: int = 8, val: int = 4, test: int = 4) -> Path:
    """Write `captions.csv` and `images/`: so many plain colours in each split, two captions each."""
    rng = np.random.default_rng(0)
    colours = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200), "grey": (128, 128, 128)}
    (folder / "images").mkdir(parents=True)
    rows = []
    for split, count in (("train", train), ("val", val), ("test", test)):
        for number in range(count):
            word = WORDS[number % len(WORDS)]
            noise = rng.integers(-20, 20, (72, 80, 3))
            pixels = np.clip(np.array(colours[word]) + noise, 0, 255).astype(np.uint8)
            name = f"{split}_{number}.jpg"
            Image.fromarray(pixels).save(folder / "images" / name)
            rows += [(name, f"a {word} picture", split), (name, f"all of it is {word}", split)]
    pd.DataFrame(rows, columns=["file_name", "caption", "split"]).to_csv(folder / "captions.csv", index=False)
    return folder


@pytest.fixture
def colour_table(tmp_path: Path) -> Path:
    return write_colour_table(tmp_path / "colours")


def tiny_overrides(table_dir: Path, output_dir: Path) -> list[str]:
    """Overrides for train.py: the smallest model on `colour_table`, three epochs on the CPU, no W&B."""
    return [
        "model=tiny",
        "data=csv",
        f"data.table={table_dir}/captions.csv",
        f"data.image_dir={table_dir}/images",
        "name=test",
        f"output_dir={output_dir}",
        "logger=csv",
        "trainer=cpu",
        "trainer.max_epochs=3",
        "trainer.enable_progress_bar=false",
        "trainer.log_every_n_steps=1",
        "optimizer.warmup_steps=2",
        "data.num_workers=0",
        "data.batch_size=4",
        "data.captions_per_image=2",
        "data.max_tokens=12",
        "decoding.max_tokens=12",
        "model.image_size=64",
        "model.encoder.name=test_efficientnet",
        "model.bridge.n_blocks=1",
        "model.decoder.n_layer=2",
        "model.decoder.n_embd=32",
        "model.tokenizer.vocab_size=300",
    ]


def going_on(run: Path | str, *changes: str) -> dict[str, Any]:
    """Settings that go on with a run, beside which nothing may be said but what it is to do otherwise."""
    return compose("train", "name=x", "output_dir=x", f"resume={run}", *changes)


def write_random_run(run: Path, *overrides: str, **changes: Any) -> Path:
    """A run as training leaves it, with random weights that say different things, and end, for different pictures."""
    from efficap.commands.run_dir import write_run
    from efficap.commands.settings import resolved_settings
    from efficap.models.build import build_model
    from efficap.models.weights import save_weights
    from efficap.tokenizer import CaptionTokenizer

    captions = ["a red picture", "all of it is green", "blue and grey"]
    tokenizer = CaptionTokenizer.learn(captions, vocab_size=300)
    tiny = tiny_overrides(run.parent / "colours", run)
    config, _, _ = resolved_settings(compose("train", *tiny, *overrides))
    config["model"] |= changes
    write_run(run, config, tokenizer)
    torch.manual_seed(1)
    captioner = build_model(config["model"], tokenizer.vocab_size)
    for parameter in (*captioner.bridge.parameters(), *captioner.decoder.parameters()):
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.4)
    eos = captioner.decoder.wte.weight.data[tokenizer.eos_id]
    captioner.decoder.ln_f.bias.data = 5 * eos / eos.dot(eos)
    save_weights(captioner.state_dict(), run)
    return run


@pytest.fixture
def small_meteor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """METEOR with a paraphrase table of two entries, for reading its own takes it most of its time; its folder."""
    from pycocoevalcap.meteor import meteor as package

    folder = tmp_path / "meteor"
    (folder / "data").mkdir(parents=True)
    [jar] = Path(package.__file__).parent.glob("*.jar")
    shutil.copy(jar, folder)
    with gzip.open(folder / "data" / "paraphrase-en.gz", "wt") as table:
        table.write("0.5\na puppy\na dog\n0.5\na dog\na puppy\n")  # probability, phrase, paraphrase
    monkeypatch.setattr(package, "__file__", str(folder / "meteor.py"))
    return folder
