"""What a logged run tells besides its settings: the code, the packages and the device; and what it must not tell."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("efficap", "torch", "torchvision", "lightning", "timm", "transformers", "hydra-core", "wandb")
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL|AUTH", re.IGNORECASE)
_SHORTEST = 8  # characters of a secret; what is shorter would be found in innocent words
FOLDER = Path(__file__).parents[3]


def provenance() -> dict[str, Any]:
    """The commit of the code and whether it was changed since, versions, and what computes.

    ``git_commit`` and ``git_dirty`` are None where the code is no git checkout.
    """
    commit = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "git_commit": commit,
        "git_dirty": None if changes is None else bool(changes),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "devices": torch.cuda.device_count() or os.cpu_count(),
    }


def _git(*arguments: str) -> str | None:
    if not (FOLDER / ".git").exists():  # it may lie in a checkout of something else
        return None
    try:
        result = subprocess.run(["git", *arguments], cwd=FOLDER, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def without_secrets(settings: Any) -> Any:
    """The same with ``***`` for the value of each environment variable whose name says that it is secret."""
    secrets = [
        value for name, value in os.environ.items() if _SECRET.search(name) and len(value) >= _SHORTEST
    ]
    return _masked(settings, sorted(secrets, key=len, reverse=True))


def _masked(value: Any, secrets: list[str]) -> Any:
    if isinstance(value, dict):
        return {key: _masked(below, secrets) for key, below in value.items()}
    if isinstance(value, list):
        return [_masked(below, secrets) for below in value]
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, "***")
    return value
