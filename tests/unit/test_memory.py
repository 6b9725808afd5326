"""How many pictures are decoded at a time: what is given, what free memory holds, and that it changes no caption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary
from toys import BEAM, GREEDY, NUCLEUS

from efficap.decoding import build_decoding
from efficap.models.build import build_model
from efficap.models.captioner import CaptionModel
from efficap.tokenizer import CaptionTokenizer
from efficap.training import memory
from efficap.training.memory import bytes_per_picture, free_host_bytes
from efficap.training.writer import CaptionWriter

TOKENIZER = CaptionTokenizer.learn(["a red picture", "all of it is blue", "green, or grey"] * 5, 300)


@pytest.fixture
def captioner() -> CaptionModel:
    return build_model(tiny_model(), TOKENIZER.vocab_size).eval()


def pictures(count: int, size: int = 64) -> Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)


def writer(captioner: CaptionModel, **changes: Any) -> CaptionWriter:
    return CaptionWriter(captioner, TOKENIZER, build_decoding(BEAM | changes))


def sizes_of(written_by: CaptionWriter, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the batches in which pictures are decoded."""
    sizes, start = [], written_by.captioner.start

    def counted(part: Tensor, *rest: Any) -> Any:
        sizes.append(len(part))
        return start(part, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(written_by.captioner, "start", counted)
        written_by.write(images, [str(number) for number in range(len(images))])
    return sizes


def test_captions_do_not_depend_on_the_batch_size(captioner: CaptionModel) -> None:
    images, names = pictures(7), [str(number) for number in range(7)]
    captions = [
        [
            [caption.tokens for caption in of_image]
            for of_image in writer(captioner, **change).write(images, names)
        ]
        for change in ({"batch_size": 1}, {"batch_size": 3}, {"batch_size": None}, {})
    ]
    assert captions[0] == captions[1] == captions[2] == captions[3]


def test_less_free_memory_means_fewer_pictures(
    captioner: CaptionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = pictures(7)
    need = bytes_per_picture(captioner, build_decoding(BEAM), images[:1])
    for free, expected in ((5.5 * need, [3, 3, 1]), (1.9 * need, [1] * 7), (0, [1] * 7), (1e15, [7])):
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: free)
        assert sizes_of(writer(captioner), images, monkeypatch) == expected, free
    assert writer(captioner).find_batch_size(images[:1]) == 32, "the most, whatever is free"


def test_the_batch_size_that_is_given_wins(captioner: CaptionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 0)
    assert sizes_of(writer(captioner, batch_size=4), pictures(7), monkeypatch) == [4, 3]


def test_memory_that_runs_out_halves_the_batch(
    captioner: CaptionModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start = captioner.start

    def with_room_for_two(part: Tensor, *rest: Any) -> Any:
        if len(part) > 2:
            raise torch.OutOfMemoryError
        return start(part, *rest)

    monkeypatch.setattr(captioner, "start", with_room_for_two)
    names = [str(number) for number in range(5)]
    assert len(writer(captioner, batch_size=5).write(pictures(5), names)) == 5
    assert capsys.readouterr().err == "out of memory with 5 pictures at a time; going on with 2\n"


def test_memory_that_runs_out_halves_the_batch_that_compiled_decoding_fills_up(
    captioner: CaptionModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    encode, images, names = captioner.encode, pictures(9), [str(number) for number in range(9)]
    monkeypatch.setattr(captioner, "_compiled_step", captioner.decoder.step)

    def with_room_for(most: int) -> list[list[str]]:
        def encode_some(part: Tensor) -> Tensor:
            if len(part) > most:
                raise torch.OutOfMemoryError
            return encode(part)

        monkeypatch.setattr(captioner, "encode", encode_some)
        return [
            [caption.text for caption in of_image]
            for of_image in writer(captioner, batch_size=8).write(images, names)
        ]

    whole = with_room_for(8)
    assert with_room_for(3) == whole
    err = capsys.readouterr().err
    assert err.splitlines() == [
        "out of memory with 8 pictures at a time; going on with 4",
        "out of memory with 4 pictures at a time; going on with 2",
    ]


def test_the_estimate_grows_with_what_is_held(captioner: CaptionModel) -> None:
    one = pictures(1)

    def need(settings: dict[str, Any], image: Tensor = one) -> int:
        return bytes_per_picture(captioner, build_decoding(settings), image)

    many = {"num_return_sequences": 40}
    assert need(NUCLEUS) < need(NUCLEUS | many) < need(NUCLEUS | many | {"max_tokens": 24})
    assert need(GREEDY, pictures(1, size=128)) == 4 * need(GREEDY), "the encoder's first layers"
    features = captioner.encoder(one).bfloat16()
    assert need(GREEDY, features) < need(GREEDY), "no encoder"
    full = need(GREEDY)
    captioner.bfloat16()
    assert 0.5 * full <= need(GREEDY) < 0.6 * full, "the picture itself stays uint8"


@pytest.mark.parametrize(
    "settings", [GREEDY, NUCLEUS | {"num_return_sequences": 30}, BEAM | {"num_beams": 30}]
)
def test_the_estimate_covers_what_decoding_holds_and_not_much_more(
    captioner: CaptionModel, settings: dict[str, Any]
) -> None:
    """Against every tensor that is alive at the same time."""
    decoding = build_decoding(settings | {"max_tokens": 24, "batch_size": 8})
    written_by = CaptionWriter(captioner, TOKENIZER, decoding)
    with Alive(captioner) as alive:
        written_by.write(pictures(8), [str(number) for number in range(8)])
    estimate = 8 * bytes_per_picture(captioner, decoding, pictures(1))
    assert alive.most < estimate < 4 * alive.most


class Alive(TorchDispatchMode):
    """Keeps the most bytes that tensors made under it have held at a time; views of the weights hold none."""

    def __init__(self, captioner: CaptionModel) -> None:
        super().__init__()
        self.weights = {weight.untyped_storage()._cdata for weight in captioner.parameters()}
        self.tensors: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.tensors[tensor] = None
        storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in self.tensors}
        taken = sum(storage.nbytes() for key, storage in storages.items() if key not in self.weights)
        self.most = max(self.most, taken)
        return result


GIB = 2**30


def write_all(root: Path, files: dict[str, str]) -> Path:
    for name, text in {
        "proc/meminfo": f"MemTotal: 1 kB\nMemAvailable:   {8 * GIB // 1024} kB\n",
        **files,
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def group(folder: str, limit: str, taken: int, version: int) -> dict[str, str]:
    names = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
             2: ("memory.max", "memory.current", "inactive_file")}[version]  # fmt: skip
    stat = f"anon 5\n{names[2]} {GIB}\n"
    return {
        f"{folder}/{names[0]}": f"{limit}\n",
        f"{folder}/{names[1]}": f"{taken}\n",
        f"{folder}/memory.stat": stat,
    }


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8 * GIB),
        ({"proc/self/cgroup": "0::/\n"} | group("sys/fs/cgroup", "max", 0, 2), 8 * GIB),
        ({"proc/self/cgroup": "0::/\n"} | group("sys/fs/cgroup", str(4 * GIB), 3 * GIB, 2), 2 * GIB),
        (
            {"proc/self/cgroup": "0::/job/step\n"}
            | group("sys/fs/cgroup/job", str(6 * GIB), 2 * GIB, 2)
            | group("sys/fs/cgroup/job/step", "max", GIB, 2),
            5 * GIB,
        ),
        (
            {"proc/self/cgroup": "3:cpu:/x\n4:memory:/docker/not-seen-from-inside\n0::/\n"}
            | group("sys/fs/cgroup/memory", str(3 * GIB), 2 * GIB, 1),
            2 * GIB,
        ),
        ({"proc/self/cgroup": "0::/\n"} | group("sys/fs/cgroup", str(GIB), 4 * GIB, 2), 0),
    ],
)
def test_free_memory_is_the_machines_or_the_cgroups(
    files: dict[str, str], expected: int, tmp_path: Path
) -> None:
    assert free_host_bytes(write_all(tmp_path, files)) == expected


def test_this_machine_has_free_memory() -> None:
    assert 2**20 < free_host_bytes() < 2**50
