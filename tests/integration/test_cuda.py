"""What a GPU changes and what it must not: figures, pictures and captions are the CPU's, and no step waits."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import compose, tiny_model, tiny_overrides
from PIL import Image
from tars import encoded, scenery
from toys import BEAM, GREEDY, NUCLEUS

from efficap.batch import CaptionBatch
from efficap.commands.captioner import Captioner
from efficap.commands.evaluate import evaluate
from efficap.commands.train import train
from efficap.data.pictures import Picture
from efficap.data.shards.dali import DaliDecoder
from efficap.data.transforms import EvaluationTransform, TrainingTransform
from efficap.decoding import build_decoding
from efficap.errors import InputError
from efficap.models.build import build_model
from efficap.models.captioner import CaptionModel
from efficap.picture_files import MAX_PIXELS
from efficap.training.losses import batch_loss
from efficap.training.optim import build_optimizer

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]
LR = {"encoder": 1e-3, "bridge": 1e-3, "decoder": 1e-3}


@pytest.fixture(autouse=True)
def _exact_products() -> Iterator[None]:
    """Without TF32, which training turns on."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


def captioner() -> CaptionModel:
    """With cross-attention that looks: it starts from nothing, so that no gradient would reach the encoder."""
    torch.manual_seed(0)
    model = build_model(tiny_model(), 300)
    for block in model.decoder.h:
        torch.nn.init.normal_(block.get_parameter("crossattention.c_proj.weight"), std=0.2)
    return model


def random_batch() -> CaptionBatch:
    torch.manual_seed(1)
    images = torch.randint(0, 256, (6, 3, 64, 64), dtype=torch.uint8)
    tokens = torch.randint(4, 300, (6, 5, 12))
    return CaptionBatch(images, tokens, torch.randint(3, 13, (6, 5)), [str(n) for n in range(6)])


def test_loss_and_gradients_are_the_cpus() -> None:
    """In evaluation mode: a batch's own statistics of 2 x 2 positions would enlarge every rounding."""
    on_cpu = captioner().eval()
    on_gpu, batch = copy.deepcopy(on_cpu).cuda(), random_batch()
    losses = [batch_loss(on_cpu, batch, label_smoothing=0.1)]
    losses.append(batch_loss(on_gpu, batch.to("cuda"), label_smoothing=0.1))
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[1].detach().cpu(), losses[0].detach(), rtol=1e-5, atol=0)
    for (name, one), other in zip(on_cpu.named_parameters(), on_gpu.parameters(), strict=True):
        assert one.grad is not None, name
        assert other.grad is not None, name
        apart = (other.grad.cpu() - one.grad).norm() / one.grad.norm().clamp(min=1e-8)
        assert apart < 1e-3, f"{name}: {apart:.1e}"


@pytest.mark.parametrize("matrix_lr", [None, 2.0], ids=["adamw", "muon"])
def test_no_training_step_waits_for_the_gpu(matrix_lr: float | None) -> None:
    model, batch = captioner().cuda().train(), random_batch().to("cuda")
    optimizer, schedule = build_optimizer(
        model,
        lambda _: 0.0,
        lr=LR,
        betas=(0.9, 0.98),
        eps=1e-8,
        weight_decay=0.05,
        layer_decay=1.0,
        warmup_steps=1,
        final_lr=0.01,
        fused=True,
        matrix_lr=matrix_lr,
        momentum=None if matrix_lr is None else 0.95,
    )

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16):
            loss = batch_loss(model, batch, label_smoothing=0.1, token_dropout=0.1, hidden_captions=0.5)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()

    step()  # kernels are loaded, and the optimiser makes its state
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "settings", [GREEDY, BEAM, {**NUCLEUS, "num_return_sequences": 3}], ids=["greedy", "beam", "nucleus"]
)
@pytest.mark.parametrize("is_compiled", [False, True], ids=["", "compiled"])
def test_captions_are_the_cpus(settings: dict[str, object], is_compiled: bool) -> None:
    on_cpu = captioner().eval()
    on_gpu, batch = copy.deepcopy(on_cpu).cuda(), random_batch()
    if is_compiled:
        on_gpu.compile_decoding()
    decoding = build_decoding(settings)
    found = []
    with torch.inference_mode():
        for model, images in ((on_cpu, batch.images), (on_gpu, batch.images.cuda())):
            state = model.start(images, decoding.max_tokens, decoding.rows)
            found.append(decoding.decode(state, batch.image_ids, bos_id=0, eos_id=1, device=images.device))
    assert torch.equal(found[1].tokens.cpu(), found[0].tokens)
    torch.testing.assert_close(found[1].scores.cpu(), found[0].scores, rtol=1e-3, atol=1e-3)


def pictures() -> list[bytes]:
    return [
        encoded(Image.fromarray(scenery(width, height, n)), "JPEG")
        for n, (width, height) in enumerate([(200, 150), (90, 310), (128, 128)])
    ]


def test_dali_cuts_validation_pictures_as_the_cpu_does() -> None:
    transform = EvaluationTransform(image_size=96, interpolation="bicubic", crop_pct=0.9)
    opened = [Picture(data, MAX_PIXELS) for data in pictures()]
    cuts = [transform.cut(picture.width, picture.height) for picture in opened]
    decoder = DaliDecoder(
        iter([(pictures(), cuts)]), transform, batch_size=3, num_threads=1, device=torch.device("cuda")
    )
    squares = next(decoder).cpu().int()  # (B, 3, S, S)
    for square, picture in zip(squares, opened, strict=True):
        apart = (square - transform(picture).int()).abs().float()
        assert apart.mean() < 1.5
        assert apart.quantile(0.999) < 12


def test_dali_cuts_and_mirrors_training_pictures_as_the_cpu_does() -> None:
    transform = TrainingTransform(
        image_size=64,
        interpolation="bilinear",
        crop_scale=(0.3, 0.8),
        crop_ratio=(0.8, 1.25),
        flip=True,
        scaled_decoding=False,
    )
    opened = [Picture(data, MAX_PIXELS) for data in 4 * pictures()]
    rng = np.random.default_rng(0)
    cuts = [transform.cut(picture.width, picture.height, rng) for picture in opened]
    assert len({cut.flip for cut in cuts}) == 2
    decoder = DaliDecoder(
        iter([(4 * pictures(), cuts)]), transform, batch_size=12, num_threads=1, device=torch.device("cuda")
    )
    for square, picture, cut in zip(next(decoder).cpu().int(), opened, cuts, strict=True):
        pixels = picture.pixels()[:, cut.top : cut.top + cut.height, cut.left : cut.left + cut.width]
        apart = (square - transform.square(pixels, cut).int()).abs().float()
        assert apart.mean() < 2


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["compile=true"],
        ["optimizer=muon", "training.hidden_captions=0.5"],
        ["trainer.precision=16-mixed"],
    ],
    ids=["default", "compiled", "muon", "float16"],
)
def test_a_gpu_trains_evaluates_and_captions(
    overrides: list[str], colour_table: Path, tmp_path: Path
) -> None:
    given = [o for o in tiny_overrides(colour_table, tmp_path / "run") if not o.startswith("trainer=")]
    run = train(
        compose("train", *given, "trainer.max_epochs=30", "trainer.check_val_every_n_epoch=15", *overrides)
    )
    losses = pd.read_csv(run / "metrics.csv")["val/loss"].dropna()
    assert losses.iloc[-1] < 3.0, "it starts at 5.6"
    scores = evaluate(compose("eval", f"run={run}", "split=val", "metrics=[CIDEr]"))
    assert scores["precision"] == "bfloat16"
    captions = [
        Captioner.from_pretrained(run, accelerator=accelerator, precision="float32").caption(
            colour_table / "images" / "val_0.jpg"
        )
        for accelerator in ("gpu", "cpu")
    ]
    assert captions[0] == captions[1]


def test_a_gpu_that_is_full_is_told_in_a_line(
    colour_table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def take_all(*_: object) -> None:
        torch.empty(2**50, dtype=torch.uint8, device="cuda")

    monkeypatch.setattr(pl.LightningModule, "on_train_batch_end", take_all)
    given = [o for o in tiny_overrides(colour_table, tmp_path / "run") if not o.startswith("trainer=")]
    with pytest.raises(InputError, match=r"data\.batch_size"):
        train(compose("train", *given))
