"""What may be built of a configuration that lies in a run directory: it is data, and may come from anywhere.

On the command line ``_target_`` names any class. In a saved configuration it picks one of those here, with arguments
that are plain values; whatever else a run was trained with is named once more by whoever goes on with it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from efficap.commands.said import is_said
from efficap.data.csv import CSVDataModule
from efficap.data.demo.module import DemoDataModule
from efficap.data.mix import MixedDataModule
from efficap.data.webdataset import WebDatasetDataModule
from efficap.errors import InputError

DATA_MODULES: dict[str, type[Any]] = {
    f"{module.__module__}.{module.__qualname__}": module
    for module in (CSVDataModule, DemoDataModule, WebDatasetDataModule, MixedDataModule)
}
WANDB = "lightning.pytorch.loggers.WandbLogger"
# None that writes where it is told to, or starts anything.
_CALLBACKS = frozenset(
    f"lightning.pytorch.callbacks.{name}"
    for name in (
        "DeviceStatsMonitor",
        "EarlyStopping",
        "GradientAccumulationScheduler",
        "LearningRateMonitor",
        "StochasticWeightAveraging",
        "Timer",
    )
)
# Of W&B's own settings, among which is the address that is sent the key, those that conf/logger/wandb.yaml has.
_WANDB_ARGUMENTS = frozenset(
    (
        *("project", "entity", "name", "notes", "tags", "group", "job_type", "save_dir", "mode", "artifact"),
        *("settings", "finish_timeout", "finish_timeout_raises"),
    )
)


def check_saved_parts(config: dict[str, Any], said: Collection[str], where: str) -> None:
    """Check what a saved configuration would have built: data sets, callbacks and the logger.

    Args:
        config: the configuration, with what the command line changes of it.
        said: settings that the command line names. A ``_target_`` among them, or with its whole part, is the user's.
        where: the configuration's file, for messages.

    Raises:
        InputError: a class that is not known here, or an argument that is no plain value.
    """
    allowed: dict[str, Collection[str]] = {
        "data": DATA_MODULES,
        "stages": DATA_MODULES,
        "callbacks": _CALLBACKS,
        "logger": (WANDB,),
    }
    for group, targets in allowed.items():
        for path, key, value in _entries(config.get(group), group):
            setting = f"{path}.{key}"
            if is_said(setting, said):
                continue
            if isinstance(value, str) and "${" in value:
                raise InputError(
                    f"{where}: {setting}={value} is to be looked up, and a run's settings are plain values; write its "
                    "value there"
                )
            if key == "_target_":
                if value not in targets:
                    raise InputError(
                        f"{where}: {setting}={value} is none of {', '.join(sorted(targets))}; a run's own code is not "
                        f"imported; ++{setting}={value} on the command line is"
                    )
            elif str(key).startswith("_") or (
                group == "logger" and isinstance(key, str) and key not in _WANDB_ARGUMENTS
            ):
                raise InputError(
                    f"{where}: {setting} is not taken from a run; say ++{setting}=VALUE on the command line"
                )


def _entries(value: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    """Path, key and value of all that is below, the keys of a list being its places."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in pairs:
        if isinstance(key, str) and "${" in key:
            yield path, "_target_", key  # which none is
        yield path, key, below
        yield from _entries(below, f"{path}.{key}")
