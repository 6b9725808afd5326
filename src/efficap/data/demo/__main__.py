"""``python -m efficap.data.demo OUT_DIR``: write the built-in data set."""

from __future__ import annotations

import argparse
import sys

from efficap.data.demo import SPLIT_SIZES, write_demo
from efficap.errors import InputError
from efficap.files import path_argument


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    splits = ", ".join(f"{split} {size:,}" for split, size in SPLIT_SIZES.items())
    parser = argparse.ArgumentParser(
        prog="python -m efficap.data.demo",
        description="Draw the built-in captioning data set: simple scenes with five captions each.",
        epilog=f"Writes OUT_DIR/images/*.jpg and OUT_DIR/captions.csv (columns file_name, caption, split), and in "
        f"OUT_DIR/boxes.csv where each object lies, as fractions of the side. "
        f"Pictures: {splits}; those of 'irregular' combine colours, shapes and textures as no other split does. "
        "A data set that is already there, drawn with the same options, is left as it is.",
    )
    parser.add_argument(
        "out_dir", metavar="OUT_DIR", type=path_argument, help="the folder to write; new or empty"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="which data set to draw (default: 0)"
    )
    parser.add_argument(
        "--image-size",
        type=int,
        default=128,
        metavar="PIXELS",
        help="the side of each picture (default: 128)",
    )
    options = parser.parse_args(arguments)
    try:
        table = write_demo(options.out_dir, seed=options.seed, image_size=options.image_size)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
