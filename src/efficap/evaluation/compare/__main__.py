"""``python -m efficap.evaluation.compare DIR…``: runs or a sweep beside each other."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from efficap.errors import InputError
from efficap.files import path_argument


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        return _status(options.folders) if options.status else _compare(options)
    except (InputError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _compare(options: argparse.Namespace) -> int:
    # pandas, matplotlib and the like: --help and --status can do without
    from efficap.evaluation.compare.comparison import compare_runs, print_comparison, write_comparison

    if options.pictures < 0:
        raise InputError(f"--pictures {options.pictures} must be at least 0; 0 shows none")
    comparison = compare_runs(
        options.folders, resamples=options.resamples, seed=options.seed, between=options.between
    )
    out = (options.out or _default_out(options.folders)).resolve()
    write_comparison(comparison, out, between=options.between, pictures=options.pictures)
    print_comparison(comparison, out)
    if options.wandb:
        from efficap.evaluation.compare.wandb_run import log_comparison

        print(f"W&B: {log_comparison(comparison, out, options.wandb)}")
    return 0


def _status(sweeps: list[Path]) -> int:
    from rich.console import Console

    from efficap.evaluation.compare.jobs import jobs_table, read_jobs

    for sweep in sweeps:
        Console().print(jobs_table(sweep, read_jobs(sweep)))
    return 0


def _default_out(folders: list[Path]) -> Path:
    """In the sweep, where one is compared; else in the current folder."""
    [*others, folder] = folders
    sweep = not others and not (folder / "config.yaml").is_file()
    return (folder if sweep else Path()) / "comparison"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m efficap.evaluation.compare",
        description="Compare trained and evaluated runs: scores with intervals, whether differences are chance, "
        "learning curves, scores against cost, and the pictures on which two models differ most.",
        epilog="Runs that differ only by their seed are one model. Writes comparison.md, PNG plots and index.html. "
        "Exit status: 0; 1 where the runs cannot be compared; 2 for a wrong option.",
    )
    add = parser.add_argument
    add(
        "folders",
        metavar="DIR",
        type=path_argument,
        nargs="+",
        help="a run directory, or a folder with runs below, as a sweep's",
    )
    add(
        "--out",
        type=path_argument,
        metavar="DIR",
        help="for the results (default: comparison/ in the sweep or here)",
    )
    add(
        "--between",
        nargs=2,
        metavar=("M1", "M2"),
        help="the models whose captions are shown, by their names in the table of differences (default: the smallest "
        "and the largest)",
    )
    add("--pictures", type=int, default=24, metavar="N", help="shown of each split (default: 24)")
    add("--resamples", type=int, default=10_000, metavar="N", help="of the bootstrap (default: 10000)")
    add("--seed", type=int, default=0, metavar="N", help="of the bootstrap (default: 0)")
    add(
        "--wandb",
        metavar="PROJECT",
        help="log the comparison as a run of its own in this project of Weights & Biases, offline where you are not "
        "logged in",
    )
    add(
        "--status",
        action="store_true",
        help="list the jobs of sweep folders and how far each has come, and no more",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
