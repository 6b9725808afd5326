"""Run directories from anywhere: loaded as eval.py, caption.py, train.py and the comparison load them."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from conftest import compose
from hypothesis import strategies as st

from efficap import Captioner
from efficap.commands.caption import caption
from efficap.commands.init_from import with_model_of
from efficap.commands.resume import with_settings_of
from efficap.commands.run_dir import RunDirectory
from efficap.commands.subject import open_run
from efficap.evaluation.compare.runs import read_run
from efficap.training import watch
from fuzz.kinds import DAMAGE, JSON, Kind, damaged, replaced, with_places
from fuzz.overrides import write_run
from fuzz.sandbox import Sandbox

FILES = ["config.yaml", "model.safetensors", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"]
VALUES = JSON | st.sampled_from(
    [
        "${oc.env:A_SECRET_KEY}",
        "os.system",
        {"_target_": "os.system", "command": "touch @OUTSIDE@/ran"},
        "@OUTSIDE@",
        "hf-hub:timm/test_efficientnet",
        [],
        {},
        float("nan"),
        10**9,
        65_536,
        1e-300,
        True,
        "test_efficientnet2.x",
    ]
)
PATHS = st.lists(st.integers(0, 30), min_size=1, max_size=4)
CHANGES = st.one_of(
    st.tuples(st.just("config"), PATHS, VALUES),
    st.tuples(st.just("model"), PATHS, VALUES),
    st.tuples(st.just("bytes"), st.sampled_from(FILES), DAMAGE),
    st.tuples(st.just("missing"), st.sampled_from([*FILES, "tokenizer"]), st.none()),
    st.tuples(st.just("swapped"), st.sampled_from(FILES), st.sampled_from(FILES)),
    st.tuples(st.just("folder"), st.sampled_from(FILES), st.none()),
    st.tuples(st.just("tokenizer.json"), PATHS, VALUES),
    st.tuples(st.just("tokenizer_config.json"), PATHS, VALUES),
    st.tuples(
        st.just("yaml"),
        st.sampled_from(
            [
                "a: &a [*a]",
                "!!python/object/apply:os.system ['true']",
                "[" * 3000,
                "&a",
                "name: x\nmodel: {}\ndata: {}\ndecoding: {}",
                "name: x\nmodel: []\ndata: 1\ndecoding: z",
                "\0",
                "- 1",
                "<<: *x",
                "? {a: b}\n: c",
            ]
        ),
        st.none(),
    ),
)
EXAMPLES = st.tuples(
    st.sampled_from(
        ["caption", "caption", "eval", "from_pretrained", "resume", "init_from", "compare", "watch"]
    ),
    st.lists(CHANGES, min_size=1, max_size=2),
)


def _change(run: Path, change: tuple[str, Any, Any], sandbox: Sandbox) -> None:
    how, where, what = change
    config = run / "config.yaml"
    if how in ("config", "model"):
        try:
            value = yaml.safe_load(config.read_text()) if config.is_file() else None
        except (yaml.YAMLError, ValueError, RecursionError):  # another change has been there
            return
        if not isinstance(value, dict) or not isinstance(value.get("model"), dict):
            return
        what = with_places(what, sandbox)
        if how == "config":
            value = replaced(value, where, what)
        else:
            value["model"] = replaced(value["model"], where, what)
        with contextlib.suppress(yaml.YAMLError):
            config.write_text(yaml.safe_dump(value, allow_unicode=True), errors="surrogatepass")
    elif how == "yaml" and config.is_file():
        config.write_text(where)
    elif how == "bytes" and (run / where).is_file():
        (run / where).write_bytes(damaged((run / where).read_bytes(), what))
    elif how in ("missing", "folder") and (run / where).exists():
        shutil.rmtree(run / where) if (run / where).is_dir() else (run / where).unlink()
        if how == "folder":
            (run / where).mkdir()
    elif how == "swapped" and (run / where).is_file() and (run / what).is_file():
        (run / where).write_bytes((run / what).read_bytes())
    elif how.endswith(".json") and (run / "tokenizer" / how).is_file():
        file = run / "tokenizer" / how
        with contextlib.suppress(ValueError):
            value = replaced(json.loads(file.read_bytes()), where, with_places(what, sandbox))
            file.write_text(json.dumps(value), errors="surrogatepass")


def use(example: tuple[str, list[tuple[str, Any, Any]]], sandbox: Sandbox) -> Callable[[], object]:
    how, changes = example
    run = write_run(sandbox)
    config = yaml.safe_load((run / "config.yaml").read_text())
    for change in changes:
        _change(run, change, sandbox)
    picture = sandbox.root / "colours/images/test_0.jpg"

    def load() -> None:
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            if how == "caption":
                overrides = [f"run={run}", f"images={picture}", "num_workers=0", "accelerator=cpu"]
                caption(compose("caption", *overrides, f"out={sandbox.root}/out"))
            elif how == "eval":
                subject = open_run(compose("eval", f"run={run}", "accelerator=cpu", "metrics=[]"))
                for images, image_ids, _ in subject.batches("test"):
                    subject.writer.write(images, image_ids)
            elif how == "from_pretrained":
                Captioner.from_pretrained(run, accelerator="cpu").caption(picture)
            elif how == "resume":
                with_settings_of(RunDirectory(run), {**config, "resume": str(run)})
            elif how == "init_from":
                with_model_of(RunDirectory(run), {**config, "init_from": str(run)})
            elif how == "compare":
                read_run(run)
            else:
                watch.read_run(run)

    return load


RUNS = Kind("run directories", EXAMPLES, use)
