"""Score a trained captioner: python eval.py run=RUN_DIR [split=val]."""

from typing import Any

from efficap.commands.entry import run


def main(cfg: dict[str, Any]) -> Any:
    # heavy imports wait until the configuration is composed
    from efficap.commands.evaluate_runs import evaluate_runs

    return evaluate_runs(cfg)


if __name__ == "__main__":
    run("eval", main)
