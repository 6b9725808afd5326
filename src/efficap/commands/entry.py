"""What the entry points share: compose the configuration, run, and turn a user's mistake into one line."""

from __future__ import annotations

import contextlib
import ctypes
import difflib
import gc
import hashlib
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import hydra
from hydra.errors import (
    HydraException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from efficap.commands.command_help import options_of, settings_and_choices
from efficap.commands.faults import FOR_RUNS, FOR_SWEEPS, cannot_be_written, dead_loader, of_disk
from efficap.commands.said import with_said
from efficap.commands.sweep import end_sweep, is_recorded_job
from efficap.errors import InputError
from efficap.launch import LostProcessError, launch

Result = TypeVar("Result")

_MISTAKES = (InputError, LostProcessError, HydraException, OmegaConfBaseException)

CONF = Path(__file__).parents[3] / "conf"
NO_CONF = f"{CONF} is not there: efficap works from its folder, in which it is installed by pip install -e ."


def _model_name(choice: str, init_from: str | None) -> str:
    from efficap.commands.init_from import model_name  # slow to import: --help need not wait for it

    return choice if init_from is None else model_name(choice, init_from)


# As this is imported, for a sweep's jobs in other processes call nothing else here.
OmegaConf.register_new_resolver("model_name", _model_name, replace=True)


def run(config_name: str, function: Callable[[dict[str, Any]], Result]) -> None:
    """Compose conf/`config_name`.yaml with the command line and call `function` with plain values.

    A mistake of the user's is printed as one line and ends with status 1; HYDRA_FULL_ERROR=1 shows its traceback.
    """
    if not CONF.is_dir():
        sys.exit(f"error: {NO_CONF}")
    tune_process()
    _let_first_speak()
    wants_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then hands errors on instead of printing them its own way

    # Kept with the configuration: a sweep's jobs in other processes have another command line.
    OmegaConf.register_new_resolver("command", _command, replace=True, use_cache=True)
    # Hydra asks for the help of each of its copies of a configuration, also where nobody is to see it.
    helps = any(re.match(r"--he|-\w*h", word) for word in sys.argv[1:])  # argparse takes --hel and -mh, too
    OmegaConf.register_new_resolver(
        "settings_and_choices",
        lambda name: settings_and_choices(CONF / f"{name}.yaml") if helps else "",
        replace=True,
    )
    failed, begun, first = False, False, os.getpid()

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)
    def main(cfg: DictConfig) -> Result | None:
        nonlocal failed, begun
        begun = True
        if os.getpid() != first:  # a launcher's
            tune_process()
        try:
            return function(plain(cfg))
        except Exception as error:
            is_told = isinstance(error, _MISTAKES)  # by who knew more of it, such as how a training goes on
            if not is_told and (
                reason := dead_loader(error) or (isinstance(error, OSError) and of_disk(error))
            ):
                error, is_told = InputError(reason), True
            is_mistake = is_told and not wants_traceback
            if is_mistake:
                _tell(_one_line(error, config_name))
            elif is_recorded_job():
                traceback.print_exc()
            if is_recorded_job() or (is_mistake and os.getpid() == first):
                failed = True  # and the other jobs of a sweep go on
                return None
            raise

    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:  # in composing, or in a launcher
        if type(error).__module__.startswith(("joblib.", "submitit.")):
            print(f"error: a job's process is gone: {_one_line(error, config_name)}", file=sys.stderr)
        elif "No trials are completed" in str(error):
            pass  # a search of which every trial failed, and has told why
        elif wants_traceback or (begun and not isinstance(error, _MISTAKES)):
            raise
        elif isinstance(error, _MISTAKES):
            _tell(_one_line(error, config_name))
        elif isinstance(error, BrokenPipeError):  # as of --help | head, whose reader has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still to be flushed
        elif isinstance(error, OSError):  # Hydra could not make the run's folder
            way_out = FOR_SWEEPS if {"-m", "--multirun"} & set(sys.argv) else FOR_RUNS
            print(f"error: {cannot_be_written(error.filename, error, way_out)}", file=sys.stderr)
        else:  # a number of 5,000 digits
            said = _one_line(error, config_name)
            print(f"error: the settings cannot be put together: {said}", file=sys.stderr)
        failed = True
    if not end_sweep() or failed:
        sys.exit(1)


def _let_first_speak() -> None:
    """Of several processes the first prints, and has the folder that Hydra makes; none of them leads a sweep."""
    own = launch()
    if own.world > 1 and {"-m", "--multirun"} & set(sys.argv):
        if own.rank == 0:
            print(
                f"error: {own.by} started {own.world} processes for one training; -m is for many",
                file=sys.stderr,
            )
        sys.exit(1)
    if own.rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        sys.argv += ["hydra.run.dir=.", "hydra.output_subdir=null"]


def _tell(mistake: str) -> None:
    if launch().world == 1:
        print(f"error: {mistake}", file=sys.stderr)
        return
    from efficap.ranks import is_first_to_say

    if is_first_to_say(mistake):
        print(f"error of rank {launch().rank}: {mistake}", file=sys.stderr)


def _command() -> str:
    """What the command line changes, as a folder's name: of a sweep, which the same command then finds again."""
    words = sorted(word for word in sys.argv[1:] if not word.startswith(("-", "hydra.", "hydra/")))
    # Hydra takes no path with "=" or "," as it is, such as run=outputs/sweeps/….
    name = re.sub(r"[^\w.+-]+", "_", " ".join(words).replace("=", "-").replace(",", "+")) or "sweep"
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return name if len(name) <= 100 else f"{name[:90]}_{digest}"


def compose(config_name: str, *overrides: str) -> dict[str, Any]:
    """The plain values of conf/`config_name`.yaml and `overrides`, in a program or a notebook.

    They are what `train`, `evaluate` and `caption` take. For ``train``, ``name=`` and ``output_dir=`` must be given: on
    a command line Hydra fills them in (of ``resume=RUN`` both are the run's own). Its values hold the overrides, too:
    beside ``init_from=`` and ``resume=`` they are what is asked for, and all else is the run's.

    Raises:
        InputError: a value is still to be given.
        HydraException: an override that does not fit.
    """
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return with_said(plain(hydra.compose(config_name, list(overrides))), overrides)


def tune_process() -> None:
    """Settings of the process that computing on a CPU gains by; before torch is loaded, which reads them."""
    # An OpenMP thread that spins while it waits holds up the one it waits for wherever cores are shared, with loader
    # processes or other virtual machines: a step was seen to take seven times as long. One that sleeps at once has to
    # be woken for each small operation, a sixth of a step. So it spins for some microseconds (docs/benchmarks.md).
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # for other libraries than GNU's
    # glibc hands large tensors back to the system and asks for them anew at each step: a fifth of a training step's
    # core time was seen to go into clearing those pages. M_MMAP_MAX = 0, M_TRIM_THRESHOLD = as much as there is.
    with contextlib.suppress(OSError, AttributeError):  # another C library
        glibc = ctypes.CDLL("libc.so.6")
        glibc.mallopt(-4, 0)
        glibc.mallopt(-1, 2**31 - 1)
    # Imports make objects by the hundred thousand; a search for cycles at each 700th took an eighth of their time.
    gc.set_threshold(50_000)


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The configuration as plain, resolved dicts and lists.

    Raises:
        InputError: a value is still to be given.
    """
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise InputError(f"{missing[0]} is not given: add {missing[0]}=VALUE")
    values = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _one_line(error: BaseException, config_name: str) -> str:
    """What an error says; of what a file brought in, such as a terminal's commands, every character can be seen."""
    line = _message(error, config_name)
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in line)


def _message(error: BaseException, config_name: str) -> str:
    if isinstance(error, InstantiationException) and isinstance(error.__cause__, InputError):
        error = error.__cause__
    if plugin := re.search(
        r"'(hydra/(?:launcher|sweeper))/(joblib|submitit_local|submitit_slurm|optuna)'", str(error)
    ):
        return f"{plugin[1]}={plugin[2]} is a plugin of Hydra's that is not installed: pip install 'efficap[sweep]'"
    if isinstance(error, MissingConfigException) and error.options is not None:
        return _unknown_option(str(error.missing_cfg_file), error.options)
    if isinstance(error, OverrideParseException):
        return f"{error.override} cannot be read; put a value with special characters in inner quotes: KEY=\"'VALUE'\""
    if unknown := re.match(r"Could not override '([^']+)'", str(error)):
        return _unknown_setting(unknown[1], config_name)
    return " ".join(str(error).split())


def _unknown_setting(key: str, config_name: str) -> str:
    group, _, rest = key.partition(".")
    made = [arg for arg in sys.argv[1:] if rest and arg.startswith(f"{group}=")]
    # Not those of a sweep, of which there are several, nor values, which may not fit.
    choices = [arg for arg in made if os.path.isfile(f"{CONF}/{arg.replace('=', '/', 1)}.yaml")]
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = hydra.compose(config_name, choices, return_hydra_config=True)
    choice = cfg.hydra.runtime.choices.get(group, "none to make")
    known = _keys(OmegaConf.masked_copy(cfg, [str(name) for name in cfg if name != "hydra"]))
    if rest and choice is None:
        options = ", ".join(sorted(file.stem for file in (CONF / group).glob("*.yaml")))
        return (
            f"{key} belongs to a choice that is not made: add {group}=OPTION, one of {options}, or put + before "
            f"it to change the run's own: +{key}=VALUE"
        )
    if group == "data" and group not in cfg.hydra.runtime.choices:
        if group in known and rest:  # of eval.py, open to what the run's own have
            return f"{key} is to change the run's own data, so put + before it: +{key}=VALUE"
        if group in known:
            return (
                "data=OPTION is for training; here the run's own data are used, which +data.table=FILE and "
                "+data.image_dir=DIR change"
            )
        if "images" in known:
            return f"{key} is for training and evaluation; what is captioned is images=PATH"
    near = difflib.get_close_matches(key, [name for name in known if name != key], n=3, cutoff=0.6)
    nearest = f"; nearest: {', '.join(near)}" if near else ""
    script = f"{config_name}.py"
    program = script if (CONF.parent / script).is_file() else f"-m efficap.{config_name}"
    return f"{key} is no setting here{nearest}; all of them: python {program} --cfg job"


def _keys(cfg: DictConfig) -> list[str]:
    keys: list[str] = []
    for name in cfg:
        key = str(name)
        keys.append(key)
        node = cfg._get_node(key)
        if isinstance(node, DictConfig) and not node._is_interpolation() and not node._is_none():
            keys += [f"{key}.{below}" for below in _keys(node)]
    return keys


def _unknown_option(asked: str, options: object) -> str:
    group, _, option = asked.rpartition("/")
    known = options_of([str(known) for known in options]) if isinstance(options, (list, tuple)) else []
    near = difflib.get_close_matches(option, known, n=3, cutoff=0.3)
    nearest = f"; nearest: {', '.join(near)}" if near else ""
    return f"{group}={option} is not known{nearest}; there are {', '.join(known)}"
