"""Train a captioner: python train.py model=small data=csv data.table=captions.csv data.image_dir=images."""

from typing import Any

from efficap.commands.entry import run


def main(cfg: dict[str, Any]) -> Any:
    from efficap.commands.train import train  # heavy imports wait until the configuration is composed

    return train(cfg)


if __name__ == "__main__":
    run("train", main)
