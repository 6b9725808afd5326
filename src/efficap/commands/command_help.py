"""What ``--help`` shows of a command besides its examples: its settings, as conf/ explains them, and its choices."""

from __future__ import annotations

import re
from pathlib import Path

import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType

_BASE = "base"  # what the options of a group build on, and none of them
_NOT_SHOWN = ("defaults", "hydra")


def settings_and_choices(file: Path) -> str:
    """The settings of a command's file in conf/, to the letter, and a line for each group that it has a choice of.

    Dollars are doubled, for Hydra takes the help for a `string.Template`.
    """
    text = file.read_text(encoding="utf-8")
    parts = [
        "Settings, as KEY=VALUE, or KEY.BELOW=VALUE of one below another; ??? has to be given:",
        _own(text),
    ]
    defaults = yaml.safe_load(text)["defaults"]
    groups = [group for entry in defaults if isinstance(entry, dict) for group in entry if " " not in group]
    if groups:
        parts += [
            "Choices, as GROUP=OPTION; conf/GROUP/OPTION.yaml has the settings of each:",
            _choices(groups),
        ]
    return "\n\n".join(parts).replace("$", "$$")


def options_of(known: list[str]) -> list[str]:
    """Those of a group's files that can be chosen."""
    return sorted(option for option in known if option != _BASE)


def _own(text: str) -> str:
    shown, lines = False, []
    for line in text.splitlines():
        if key := re.match(r"\w+(?=:)", line):
            shown = key[0] not in _NOT_SHOWN
        if shown and line:
            lines.append(line)
    return "\n".join(lines)


def _choices(groups: list[str]) -> str:
    loader = GlobalHydra.instance().config_loader()  # which also knows those of --config-dir
    known = {group: loader.get_group_options(group, ObjectType.CONFIG) for group in groups}
    return "\n".join(f"{group}: {', '.join(options_of(options))}" for group, options in known.items())
