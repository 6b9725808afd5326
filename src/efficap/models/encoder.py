"""The image encoder: any timm EfficientNet, from uint8 pictures to its last feature map.

B images, H x W pixels, C channels of the last feature map, h x w its positions.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers.norm_act import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from efficap.errors import InputError
from efficap.hub import hub_files
from efficap.models.activation import copy_no_inputs
from efficap.models.depthwise import use_fast_gradients
from efficap.models.squeeze_excite import keep_layout

MIN_IMAGE_SIZE = 32  # one position of a stride-32 feature map
OUTPUT_STRIDES = (32, 16, 8)
_WAY_OUT = "model.encoder.weights_file=FILE takes a local copy, model.pretrained=false starts from nothing"


def own_preprocessing(name: str) -> dict[str, Any]:
    """How the pictures were made that timm's weights of an EfficientNet were trained on, as conf/model has it.

    Args:
        name: timm's, with the tag of its weights where there is one.

    Returns:
        ``mean`` and ``std`` per channel, of pictures scaled to 0 … 1; ``interpolation``, by which pictures are resized;
        and ``crop_pct``, the share of a resized picture's side that the central crop keeps.

    Raises:
        InputError: timm has no EfficientNet of that name or no weights of that tag; the nearest are named.
    """
    _check_name(name)
    pretrained_cfg = timm.get_pretrained_cfg(name)
    assert pretrained_cfg is not None, name
    return {
        "mean": list(pretrained_cfg.mean),
        "std": list(pretrained_cfg.std),
        "interpolation": pretrained_cfg.interpolation,
        "crop_pct": pretrained_cfg.test_crop_pct or pretrained_cfg.crop_pct,
    }


def _check_name(name: str) -> None:
    architecture, _, tag = name.partition(".")
    known = timm.list_models(module="efficientnet")
    if architecture not in known:
        near = difflib.get_close_matches(architecture, known, n=3, cutoff=0.4)
        raise InputError(
            f"model.encoder.name={name} is no EfficientNet that timm knows; "
            f"nearest: {', '.join(near) or 'none'}; all: timm.list_models(module='efficientnet')"
        )
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise InputError(
            f"model.encoder.name={name}: {architecture} has no weights tagged {tag!r}; "
            f"its tags: {', '.join(tags) or 'none'}"
        )


class ImageEncoder(nn.Module):
    """A timm EfficientNet without its classifier; normalises its own input.

    Args:
        name: timm's name, tag included, as ``tf_efficientnetv2_s.in21k_ft_in1k``.
        image_size: pixels of the square pictures that it will be given, at least 32.
        mean, std: per channel, of pictures scaled to 0 … 1.
        frozen: no gradients, and BatchNorm keeps the statistics of its weights.
        drop_path_rate: stochastic depth (Huang et al., 2016), 0 … 1.
        output_stride: pixels of a side that a latent position stands for: 32, or 16 or 8 for a finer map, whose last
            convolutions are then dilated (Yu and Koltun, 2016) so that the same weights fit.

    Raises:
        InputError: an unknown name, a picture size below 32, or another stride.
    """

    backbone: Any  # timm has no types
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        *,
        name: str,
        image_size: int,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        frozen: bool,
        drop_path_rate: float,
        output_stride: int,
    ) -> None:
        super().__init__()
        if image_size < MIN_IMAGE_SIZE:
            raise InputError(
                f"model.image_size={image_size} must be at least {MIN_IMAGE_SIZE} pixels, one latent position"
            )
        if output_stride not in OUTPUT_STRIDES:
            raise InputError(f"model.encoder.output_stride={output_stride} pixels must be one of 32, 16, 8")
        _check_name(name)
        self.backbone = timm.create_model(
            name,
            num_classes=0,
            global_pool="",
            drop_path_rate=drop_path_rate,
            output_stride=output_stride,
        )
        use_fast_gradients(self.backbone)
        keep_layout(self.backbone)
        copy_no_inputs(self.backbone)
        self.backbone.to(memory_format=torch.channels_last)
        self.frozen = False
        self.freeze(frozen)
        self._momentum: float | None = None  # of BatchNorm, where layers are computed twice
        # Not in the weights file: they belong to the preprocessing, which the run's configuration holds.
        self.register_buffer("mean", 255 * torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.channels: int = self.backbone.num_features
        self.reduction: int = self.backbone.feature_info[-1]["reduction"]
        side = -(-image_size // self.reduction)
        self.grid = (side, side)

    def load_pretrained(self, name: str, file: str | None) -> None:
        """Load ImageNet weights: timm's own for `name` from the hub, or `file` (.safetensors or .pth).

        Raises:
            InputError: no such weights, no such file, no network, or weights of another model.
        """
        weights, where = _pretrained_weights(name, file)
        try:
            self.backbone.load_state_dict(weights)
        except RuntimeError as error:
            reason = " ".join(str(error).split()[:40])
            raise InputError(
                f"{where}: its weights are not those of {name.partition('.')[0]}, or have other names ({reason} …); "
                f"{_WAY_OUT}"
            ) from error

    def silence_residuals(self) -> None:
        """Let each residual block add nothing at first, by its last normalisation's scale: from nothing, a shallow
        network learns sooner (Goyal et al., 2017, https://arxiv.org/abs/1706.02677)."""
        for block in self.backbone.modules():
            norms = [layer for layer in block.children() if isinstance(layer, _BatchNorm | nn.GroupNorm)]
            if getattr(block, "has_skip", False) and norms:
                nn.init.zeros_(norms[-1].weight)

    def freeze(self, frozen: bool) -> None:
        """Keep weights and BatchNorm's statistics as they are, or, with False, let them learn."""
        if frozen != self.frozen:
            self.frozen = frozen
            self.backbone.requires_grad_(not frozen)
            self.train(not frozen)

    def train(self, mode: bool = True) -> ImageEncoder:
        """Like any module's, but a frozen encoder stays in evaluation mode."""
        super().train(mode and not self.frozen)
        return self

    def checkpoint_gradients(self) -> None:
        """From now on keep only each block's input in training, and compute the block again for its gradients."""
        self.backbone.set_grad_checkpointing(True)
        # all have the same; some have none
        self._momentum = next((norm.momentum for norm in self._norms()), None)

    def _norms(self) -> list[_BatchNorm]:
        return [layer for layer in self.backbone.modules() if isinstance(layer, _BatchNorm)]

    @contextlib.contextmanager
    def _counted_once(self) -> Iterator[None]:
        """Let BatchNorm's statistics take the pictures of a forward pass, and not once more as it is computed again."""
        norms = self._norms() if self._momentum is not None else []
        for norm in norms:
            norm.momentum = self._momentum
        yield
        for norm in norms:
            norm.momentum = 0.0

    def share_statistics(self) -> None:
        """From now on let BatchNorm take its statistics from the pictures of all processes, each of which has a GPU.

        By timm's converter: torch's would leave out the activation that timm's BatchNorm has in it.
        """
        self.backbone = convert_sync_batchnorm(self.backbone)

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, 3, H, W) uint8 pictures to their (B, C, h, w) feature maps."""
        x = (images.to(self.mean.dtype) - self.mean) / self.std  # (B, 3, H, W)
        x = x.contiguous(memory_format=torch.channels_last)
        learns = torch.is_grad_enabled() and not self.frozen
        with torch.set_grad_enabled(learns), self._counted_once():
            return self.backbone.forward_features(x)  # (B, C, h, w)


def _pretrained_weights(name: str, file: str | None) -> tuple[dict[str, Tensor], str]:
    """Weights without the classifier's, and where they come from."""
    file = None if file is None else str(Path(file).expanduser())
    if file is not None and not Path(file).is_file():
        raise InputError(f"model.encoder.weights_file={file} does not exist")
    if file is None and not timm.is_model_pretrained(name):
        raise InputError(f"model.encoder.name={name}: timm publishes no weights for it; {_WAY_OUT}")
    where = f"model.encoder.weights_file={file}" if file else f"model.encoder.name={name}"
    try:
        # It reads pickles with weights_only, so that none of them runs.
        weights = timm.models.load_state_dict(file or _from_hub(name))
        return {key: value for key, value in weights.items() if not key.startswith("classifier.")}, where
    except InputError:
        raise
    except Exception as error:  # torch, safetensors and timm raise their own
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if "weights_only" in reason:
            reason = "it holds more than weights and is not trusted"
        raise InputError(f"{where}: cannot load pretrained weights ({reason}); {_WAY_OUT}") from error


def _from_hub(name: str) -> str:
    """timm's weights for `name` from the hub or its cache; timm itself would retry for 46 seconds without network."""
    pretrained_cfg = timm.get_pretrained_cfg(name)
    assert pretrained_cfg is not None, name
    assert pretrained_cfg.hf_hub_id is not None, name  # timm has all its EfficientNets there
    repository = pretrained_cfg.hf_hub_id
    files = ("model.safetensors", "pytorch_model.bin")

    def choose(names: Sequence[str]) -> list[str]:
        found = [file for file in files if file in names]
        if not found:
            raise InputError(
                f"model.encoder.name={name}: {repository} has none of {', '.join(files)}; {_WAY_OUT}"
            )
        return found[:1]

    subject = f"model.encoder.name={name}: cannot load its pretrained weights since {repository}"
    directory = hub_files(subject, repository, choose, files[:1], _WAY_OUT)
    return str(directory / choose([file.name for file in directory.iterdir()])[0])
