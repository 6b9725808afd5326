"""Train a captioner: python train.py model=small data=csv data.table=captions.csv data.image_dir=images."""

from typing import Any

from efficap.commands.entry import run


def main(cfg: dict[str, Any]) -> Any:
    # heavy imports wait until the configuration is composed
    from efficap.commands.train import best_score, train

    return best_score(train(cfg))  # what a sweep that searches aims at


if __name__ == "__main__":
    run("train", main)
