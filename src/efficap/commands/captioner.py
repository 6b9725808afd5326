"""A trained captioner in a program of one's own, and on the hub."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import ModelCard, ModelHubMixin, snapshot_download
from PIL import Image
from torch import Tensor

from efficap.commands.decoding_settings import decoding_settings
from efficap.commands.model_card import TEMPLATE, card_values
from efficap.commands.published_settings import published_settings
from efficap.commands.run_dir import CONFIG_FILE, TOKENIZER_DIR, RunDirectory
from efficap.data.pictures import Picture, pixels_of
from efficap.data.transforms import EvaluationTransform, Resized
from efficap.decoding import build_decoding
from efficap.errors import InputError
from efficap.models.build import preprocessing
from efficap.models.captioner import CaptionModel
from efficap.models.weights import WEIGHTS_FILE, read_weights, save_weights
from efficap.training.writer import CaptionWriter, WrittenCaption

_SHOWN = ("eval/*/scores.json", "eval/*/sheet.png")
_PUBLISHED = [CONFIG_FILE, WEIGHTS_FILE, f"{TOKENIZER_DIR}/*", *_SHOWN]
_CONFIG_JSON = "config.json"  # by which the hub counts downloads
_HUBS = ("revision", "token", "cache_dir", "force_download", "local_files_only")

Source = str | Path | Image.Image | Tensor


class Captioner(
    ModelHubMixin,
    library_name="efficap",
    pipeline_tag="image-to-text",
    tags=["image-captioning"],
    model_card_template=TEMPLATE,
):
    """A trained model with its tokenizer, preprocessing and decoding; `from_pretrained` makes one.

    ``save_pretrained(directory)`` and ``push_to_hub(name)`` write what `from_pretrained`, ``eval.py run=`` and
    ``caption.py run=`` read: weights (safetensors), configuration, tokenizer, scores, and a model card. No path of the
    machine that it was trained on is among it. Weights that were rounded to bfloat16 are written as the run has them.

    Args:
        run: the run directory, or the download of a published one.
        accelerator: ``auto``, ``cpu`` or ``gpu``.
        precision: of the weights, ``float32`` or ``bfloat16``; None: bfloat16 on a GPU that has it.
        packed: whether captions come faster, as in ``caption.py``, by weights with BatchNorm in them and, on a CPU, in
            an order of its own; `model` can then be neither trained nor saved.

    Attributes:
        model: the network, in evaluation mode.
        tokenizer: its tokenizer.
        device: where it computes.

    Raises:
        InputError: the directory holds no captioner, or the device is not there.
    """

    def __init__(
        self,
        run: RunDirectory,
        *,
        accelerator: str = "auto",
        precision: str | None = None,
        packed: bool = False,
    ) -> None:
        self.run, self.packed = run, packed
        self._latest: tuple[dict[str, Any], CaptionWriter] | None = None  # settings, and who writes by them
        self.device, dtype = run.placement(accelerator, precision)
        self.tokenizer = run.tokenizer()
        self.model = run.captioner(self.tokenizer, self.device, dtype, packed=packed)
        self._transform = EvaluationTransform(**preprocessing(run.config["model"]))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Captioner:
        """The captioner of a run directory, or of a name on the Hugging Face hub.

        Args:
            pretrained_model_name_or_path: such as ``outputs/latest`` or ``somebody/captioner``.
            options: `Captioner`'s own, and the hub's, which a directory has no use for: revision, token, cache_dir,
                force_download, local_files_only.

        Raises:
            InputError: a directory that holds no captioner, or the device is not there.
        """
        name = Path(pretrained_model_name_or_path).expanduser()
        if name.is_dir():  # a run directory has no config.json, which the mixin would miss
            own = {option: value for option, value in options.items() if option not in _HUBS}
            return cls(RunDirectory(name), **own)
        return super().from_pretrained(str(pretrained_model_name_or_path), **options)

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        **options: Any,
    ) -> Captioner:
        directory = snapshot_download(
            model_id,
            revision=revision,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            token=token,
            allow_patterns=_PUBLISHED,
        )
        return cls(RunDirectory(directory), **options)

    def caption(
        self, images: Source | Sequence[Source], decoding: str | None = None, **changes: Any
    ) -> list[str]:
        """The best caption of each picture, in order.

        Args:
            images: files, PIL images or uint8 tensors (3, H, W) of any sizes; a single one counts as a list of one.
            decoding: ``greedy``, ``beam``, ``diverse``, ``nucleus`` or ``constrained``; None: as the run validated.
            changes: settings of it, such as ``num_beams=5``.

        Raises:
            InputError: an unknown method or a setting that it does not have.
            PictureError: a file that is no picture, or a picture with one side more than 64 times the other.
        """
        return [of_image[0].text for of_image in self.write(images, decoding, **changes)]

    def write(
        self,
        images: Source | Sequence[Source],
        decoding: str | None = None,
        *,
        attention: bool = False,
        **changes: Any,
    ) -> list[list[WrittenCaption]]:
        """All captions of each picture, with their scores and the log-probabilities of their tokens.

        The best comes first; those that are drawn stay in their order.

        Args:
            images, decoding, changes: as `caption` takes them.
            attention: also where each token looked in the square that `square` cuts out.

        Raises:
            InputError, PictureError: as `caption`; InputError of an ONNX export that is asked for its attention.
        """
        sources = [images] if isinstance(images, Source) else list(images)
        settings = self.settings(decoding) | changes
        latest = self._latest
        if latest is None or latest[0] != settings:
            latest = self._latest = settings, self.writer(settings)
        writer = latest[1]
        size = writer.batch_size
        assert size is not None
        captions: list[list[WrittenCaption]] = []
        for start in range(0, len(sources), size):
            part = sources[start : start + size]
            squares = torch.stack([self.square(source) for source in part]).to(self.device)  # (B, 3, S, S)
            names = [
                str(source) if isinstance(source, str | Path) else str(start + place)
                for place, source in enumerate(part)
            ]
            captions += writer.write(squares, names, attention=attention)
        return captions

    def settings(self, decoding: str | None = None) -> dict[str, Any]:
        """All settings of a decoding: those of conf/decoding/, or for None those that the run validated with.

        Raises:
            InputError: an unknown method.
        """
        return dict(decoding_settings(decoding) if decoding else self.run.config["decoding"])

    def writer(self, settings: dict[str, Any]) -> CaptionWriter:
        """What writes captions of squares with these settings of a decoding, its batch size found.

        Raises:
            InputError: the settings are no decoding's.
        """
        writer = CaptionWriter(self.model, self.tokenizer, build_decoding(settings))
        writer.find_batch_size(self._blank())
        return writer

    @property
    def grid(self) -> tuple[int, int] | None:
        """The latent positions that attention is told of, down and across; None of an ONNX export, which tells none."""
        return self.model.encoder.grid if isinstance(self.model, CaptionModel) else None

    def cut(self, width: int, height: int) -> Resized:
        """Where the square lies that the model sees of a picture of this size in pixels; PictureError if too narrow."""
        return self._transform.cut(width, height)

    def _blank(self) -> Tensor:
        side = self._transform.image_size
        return torch.zeros(1, 3, side, side, dtype=torch.uint8, device=self.device)

    def square(self, source: Source) -> Tensor:
        """What the model sees of a picture: (3, S, S) uint8, on the CPU.

        Raises:
            InputError: a tensor of another shape or dtype.
            PictureError: a file that is no picture, or a picture with one side more than 64 times the other.
        """
        if isinstance(source, str | Path):
            return self._transform(Picture(Path(source).expanduser()))
        pixels = pixels_of(source) if isinstance(source, Image.Image) else source
        if pixels.dtype != torch.uint8 or pixels.ndim != 3 or pixels.shape[0] != 3:
            raise InputError(
                f"a picture of shape {tuple(pixels.shape)} and {pixels.dtype} must be (3, height, width) and uint8; "
                "a PIL image or a file name will do too"
            )
        return self._transform.square(pixels, self._transform.cut(pixels.shape[2], pixels.shape[1]))

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> str | None:
        """What others need of the run, into a directory; a README.md that is there already stays as it is.

        Args:
            save_directory: made where it is not there.
            options: the hub's: repo_id, push_to_hub, model_card_kwargs and those of push_to_hub.

        Raises:
            InputError: it cannot be published, or not there; nothing is written then.
        """
        if not isinstance(self.model, CaptionModel):
            raise InputError(f"{self.run.path} is an export; publish the run that it was made from")
        if self.packed:
            raise InputError(
                "packed=True is for captions alone; publish the captioner that is made without it"
            )
        if (
            Path(save_directory).resolve() == self.run.path
            and published_settings(self.run.config) != self.run.config
        ):
            raise InputError(
                f"{save_directory} is the run itself, which needs what its {CONFIG_FILE} has; save to another folder"
            )
        saved: str | None = super().save_pretrained(save_directory, **options)
        return saved

    def _save_pretrained(self, save_directory: Path) -> None:
        assert isinstance(self.model, CaptionModel)
        config = published_settings(self.run.config)
        text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
        (save_directory / CONFIG_FILE).write_text(text, encoding="utf-8")
        is_rounded = next(self.model.parameters()).dtype != torch.float32
        weights = read_weights(self.run.path / WEIGHTS_FILE) if is_rounded else self.model.state_dict()
        save_weights(weights, save_directory)
        self.tokenizer.save(save_directory / TOKENIZER_DIR)
        shown = {
            file.relative_to(self.run.path): file for kind in _SHOWN for file in self.run.path.glob(kind)
        }
        for kind in _SHOWN:
            for earlier in save_directory.glob(kind):  # of another captioner, or another evaluation
                if earlier.relative_to(save_directory) not in shown:
                    earlier.unlink()
        for file in shown.values():
            copy = save_directory / file.relative_to(self.run.path)
            copy.parent.mkdir(parents=True, exist_ok=True)
            if not (copy.exists() and copy.samefile(file)):
                shutil.copyfile(file, copy)
        about = {"model_type": "efficap", "model": config["model"]}
        (save_directory / _CONFIG_JSON).write_text(json.dumps(about, indent=2) + "\n")

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The hub's page: how to use it, what it is, its scores and its pictures with captions."""
        return super().generate_model_card(*args, **{**card_values(self.run), **kwargs})
