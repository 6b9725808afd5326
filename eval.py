"""Score a trained captioner: python eval.py run=RUN_DIR [split=val]."""

from typing import Any

from efficap.commands.entry import run


def main(cfg: dict[str, Any]) -> Any:
    from efficap.commands.evaluate import evaluate  # heavy imports wait until the configuration is composed

    return evaluate(cfg)


if __name__ == "__main__":
    run("eval", main)
