"""``python -m efficap.data.prepare``: download a public data set and lay it out for training."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from efficap.data.pool import cores
from efficap.data.prepare.conceptual import prepare_conceptual
from efficap.errors import InputError
from efficap.files import path_argument

_EPILOG = """\
Downloads are verified, and go on where they ended when the same command is run again. Archives are kept; delete
them when the pictures are unpacked. `python -m efficap.data.prepare NAME --help` tells more.
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = _parser().parse_args(arguments)
    options.dir = options.dir or Path("data") / options.name
    try:
        _prepare(options)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    return 0


def _prepare(options: argparse.Namespace) -> None:
    # Imported here, for pandas takes longer than --help should.
    if options.name == "coco":
        from efficap.data.prepare.coco import prepare_coco

        prepare_coco(options.dir, split=options.split)
    elif options.name == "flickr8k":
        from efficap.data.prepare.flickr import prepare_flickr8k

        prepare_flickr8k(options.dir)
    elif options.name == "flickr30k":
        from efficap.data.prepare.flickr import prepare_flickr30k

        prepare_flickr30k(options.dir)
    else:
        prepare_conceptual(
            options.dir,
            options.name,
            tsv=options.tsv,
            val_tsv=getattr(options, "val_tsv", None),
            img2dataset=options.img2dataset,
            image_size=options.image_size,
            processes=options.processes,
            threads=options.threads,
            limit=options.limit,
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m efficap.data.prepare",
        description="Download a public captioning data set, lay it out, and print the command that trains on it.",
        epilog=_EPILOG,
    )
    sets = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    coco = sets.add_parser(
        "coco",
        help="COCO: 123,287 pictures, five captions each; 20 GB to download, as much again unpacked",
        description="Writes DIR/images/{train,val}2014 (or 2017) and DIR/captions.parquet. Zips, annotations and "
        "folders of pictures that DIR holds already are used, not downloaded.",
        epilog=_EPILOG,
    )
    coco.add_argument(
        "--split",
        choices=["karpathy", "2014", "2017"],
        default="karpathy",
        help="karpathy (default): train with restval, val and test, as in papers; 2014, 2017: COCO's own train and val",
    )
    flickr8k = sets.add_parser(
        "flickr8k",
        help="Flickr8k: 8,000 pictures, five captions each; about 1 GB to download",
        description="Writes DIR/images and DIR/captions.parquet, in the authors' split: 6,000, 1,000, 1,000 pictures.",
        epilog=_EPILOG,
    )
    flickr30k = sets.add_parser(
        "flickr30k",
        help="Flickr30k: 31,014 pictures, five captions each; you have to ask for the pictures",
        description="Writes DIR/captions.parquet in Karpathy's split, for pictures that you put into DIR/images.",
        epilog=_EPILOG,
    )
    cc3m = sets.add_parser(
        "cc3m",
        help="Conceptual Captions: 3.3 million pictures on the web, a caption each",
        description="Downloads pictures with img2dataset into shards: DIR/train/*.tar and DIR/val/*.tar.",
        epilog=_EPILOG,
    )
    cc12m = sets.add_parser(
        "cc12m",
        help="Conceptual 12M: 12.4 million pictures on the web, a caption each",
        description="Downloads pictures with img2dataset into shards: DIR/train/*.tar and DIR/val/*.tar. The set has "
        "no validation part; its last rows (10,000, or a twentieth where --limit leaves fewer than 200,000) become "
        "one. In its captions, names of people read <PERSON>.",
        epilog=_EPILOG,
    )
    cc3m.add_argument("--val-tsv", type=path_argument, metavar="FILE", help="the same of the validation part")
    for one in (cc3m, cc12m):
        _add_conceptual_options(one)
    for one in (coco, flickr8k, flickr30k, cc3m, cc12m):
        one.add_argument(
            "--dir", type=path_argument, metavar="DIR", help="where to put it (default: data/NAME)"
        )
    return parser


def _add_conceptual_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tsv",
        type=path_argument,
        metavar="FILE",
        help="captions and addresses, if you have them; else downloaded",
    )
    parser.add_argument(
        "--img2dataset",
        type=path_argument,
        metavar="PATH",
        help="the program, or the environment it is installed in",
    )
    parser.add_argument(
        "--image-size",
        type=int,
        default=448,
        metavar="PIXELS",
        help="shorter side of the stored pictures; larger ones are reduced, smaller kept (default: 448, for training "
        "crops at 400)",
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=cores(),
        metavar="N",
        help="processes, each with shards of its own (default: %(default)s, one for each core)",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=64,
        metavar="N",
        help="downloads at a time in each process (default: 64)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N rows, to try it out")


if __name__ == "__main__":
    sys.exit(main())
