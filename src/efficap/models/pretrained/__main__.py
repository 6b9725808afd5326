"""``python -m efficap.models.pretrained``: weights of other programs in, a run's weights out."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from efficap.errors import InputError
from efficap.files import path_argument


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        options.function(options)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing is written", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m efficap.models.pretrained",
        description="Weights of other programs in, a run's weights out.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_export, _add_import_original):
        add(commands)
    return parser


def _add_export(commands: Any) -> None:
    parser = commands.add_parser(
        "export",
        help="a run for onnxruntime or transformers",
        description="Writes a run's weights for other programs. The result is tried on 16 pictures first; where it "
        "does not say what the run says, nothing is written.",
    )
    parser.add_argument(
        "--run",
        type=path_argument,
        required=True,
        metavar="RUN",
        help="a run directory, such as outputs/latest",
    )
    parser.add_argument(
        "--format",
        required=True,
        choices=["onnx", "transformers"],
        help="onnx: the whole captioner, in a directory that caption.py and eval.py take as a run; transformers: the "
        "decoder as a GPT2LMHeadModel",
    )
    parser.add_argument(
        "--out", required=True, type=path_argument, metavar="DIR", help="a new or an empty directory"
    )
    parser.add_argument(
        "--int8",
        action="store_true",
        help="onnx: matrix products in 8-bit integers; says how many captions stay the same instead of demanding all",
    )
    parser.add_argument(
        "--images", metavar="PATH", help="pictures to try it on (default: blots of colour from a seed)"
    )
    parser.set_defaults(function=_export)


def _add_import_original(commands: Any) -> None:
    parser = commands.add_parser(
        "import-original",
        help="a model of the original TensorFlow project, as a run",
        description="Writes a run directory that caption.py, eval.py and init_from take, from the weights that the "
        "original TensorFlow project saved.",
    )
    files = "Keras's HDF5 file, or the prefix of a TensorFlow checkpoint (DIR/NAME of DIR/NAME.index)"
    parser.add_argument(
        "--encoder", required=True, type=path_argument, metavar="FILE", help=f"with its EfficientNet: {files}"
    )
    parser.add_argument(
        "--decoder", required=True, type=path_argument, metavar="FILE", help="the same of the decoder"
    )
    parser.add_argument(
        "--config",
        required=True,
        type=path_argument,
        metavar="JSON",
        help="its sizes: hparams (n_vocab, n_ctx, n_embd, n_head, n_layer), n_spe, encoder_head, image_size",
    )
    parser.add_argument(
        "--tokenizer",
        default="openai-community/gpt2",
        metavar="NAME",
        help="the decoder's, on the hub or a directory (default: %(default)s)",
    )
    parser.add_argument(
        "--no-past",
        action="store_true",
        help="without the empty place before the first token, which the decoder was trained with",
    )
    parser.add_argument(
        "--out", required=True, type=path_argument, metavar="DIR", help="a new or an empty directory"
    )
    parser.set_defaults(function=_import_original)


def _import_original(options: argparse.Namespace) -> None:
    from efficap.commands.import_original import import_original

    import_original(
        options.encoder,
        options.decoder,
        options.out,
        config=options.config,
        tokenizer=options.tokenizer,
        past=not options.no_past,
    )


def _export(options: argparse.Namespace) -> None:
    # Imported here, for torch takes longer than --help should.
    from efficap.commands.export import export

    export(options.run, options.out, format=options.format, int8=options.int8, images=options.images)


if __name__ == "__main__":
    sys.exit(main())
