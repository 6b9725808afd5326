"""Batches out of shards: samples are read and tokenised in threads, pictures decoded by DALI, both ahead of their use.

B pictures, K captions of each, T tokens, S: image_size.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from efficap.batch import CaptionBatch
from efficap.data.dataset import collate_captions
from efficap.data.loader import BadReport
from efficap.data.order import BatchOrder, EvaluationOrder, Key, turn
from efficap.data.pictures import Picture
from efficap.data.shards.dali import Cut, DaliDecoder, decodable
from efficap.data.shards.reader import Sample, ShardReader
from efficap.data.shards.tar import Broken, SampleError
from efficap.data.transforms import EvaluationTransform, TrainingTransform
from efficap.errors import InputError
from efficap.tokenizer import CaptionTokenizer

# A sample's number, how many of its captions were too long, and how many are not learned, by reason.
_Count = tuple[int, int, Counter[str]]


@dataclass(slots=True)
class _Read:
    """A batch as it was read, before its pictures are decoded; one entry a picture."""

    samples: list[Sample]
    encoded: list[bytes]
    cuts: list[Cut]
    captions: list[list[NDArray[np.int32]]]
    bad: list[BadReport]
    counts: list[_Count]
    rescued: bool = False  # decoded by Pillow, after DALI failed on it


class ShardBatches:
    """The batches of an order, with what was bad in them; None in place of a batch of which nothing is left.

    Every iteration starts anew, so one that was broken off loses nothing of the next.

    Args:
        reader, order, transform, tokenizer: samples, their batches, their crops, their captions' ids.
        captions_per_image: K, in training; evaluation takes all.
        max_tokens: longer captions are cut.
        on_cut: told how many captions were cut, of samples that come for the first time.
        max_pixels, seed: as in `CaptionDataModule`.
        batch_size: the largest B.
        num_readers: threads that read.
        num_threads: threads that decode.
        device: where the pictures are wanted.
    """

    def __init__(
        self,
        reader: ShardReader,
        order: BatchOrder | EvaluationOrder,
        transform: TrainingTransform | EvaluationTransform,
        tokenizer: CaptionTokenizer,
        *,
        captions_per_image: int,
        max_tokens: int,
        on_cut: Callable[[int], None],
        max_pixels: int,
        seed: int,
        batch_size: int,
        num_readers: int,
        num_threads: int,
        device: torch.device,
    ) -> None:
        self.reader, self.order, self.transform, self.tokenizer = reader, order, transform, tokenizer
        self.K, self.max_tokens, self.on_cut = captions_per_image, max_tokens, on_cut
        self.max_pixels, self.seed, self.batch_size = max_pixels, seed, batch_size
        self.num_readers, self.num_threads, self.device = num_readers, num_threads, device
        self._through_pillow: set[int] = set()  # samples that DALI was seen to fail on

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[tuple[CaptionBatch | None, list[BadReport]]]:
        pool = ThreadPoolExecutor(self.num_readers)
        try:
            yield from self._decoded(self._read_ahead(pool))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _decoded(self, reads: Iterator[_Read]) -> Iterator[tuple[CaptionBatch | None, list[BadReport]]]:
        begun: deque[_Read] = deque()  # given to the decoder, squares not yet taken
        while True:
            decoder = self._decoder(_begin(reads, begun))
            try:
                for images in decoder:  # (B, 3, S, S)
                    while not begun[0].samples:
                        yield None, self._take(begun).bad
                    read = self._take(begun)
                    yield self._batch(read, images), read.bad
                while begun:
                    yield None, self._take(begun).bad
                return
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                del decoder  # whose memory the next one may need
                failed = next((read for read in begun if read.samples), None)
                if failed is None or failed.rescued:
                    raise InputError(f"DALI cannot go on: {' '.join(str(error).split())}") from error
                again = [self._rescued(read) if read is failed else read for read in begun]
                begun.clear()
                reads = itertools.chain(again, reads)

    def _take(self, begun: deque[_Read]) -> _Read:
        read = begun.popleft()
        for number, cut, left_out in read.counts:
            if not self.reader.counted[number]:
                self.reader.counted[number] = True
                self.on_cut(cut)
                self.reader.text.left_out.update(left_out)
        return read

    def _read_ahead(self, pool: ThreadPoolExecutor) -> Iterator[_Read]:
        """The batches as they are read, `num_readers` + 1 of them begun before they are asked for."""
        begun: deque[Future[_Read]] = deque()
        keys = iter(self.order)
        for batch in itertools.islice(keys, self.num_readers + 1):
            begun.append(pool.submit(self._read, batch))
        while begun:
            yield begun.popleft().result()
            for batch in itertools.islice(keys, 1):
                begun.append(pool.submit(self._read, batch))

    def _read(self, keys: list[Key]) -> _Read:
        read = _Read([], [], [], [], [], [])
        for time, number in keys:
            try:
                sample = self.reader.read(number)
                chosen, left_out = self._choose(sample, time)
                ids, too_long = self.tokenizer.encode(chosen, self.max_tokens)
                read.counts.append((number, too_long, left_out))
                if not chosen:
                    continue
                cut, encoded = self._cut(sample, time), self._encoded(sample)
            except Broken as error:
                read.bad.append((self._name(number), error.reason, error.detail))
                continue
            read.samples.append(sample)
            read.cuts.append(cut)
            read.encoded.append(encoded)
            read.captions.append([np.array(caption, np.int32) for caption in ids])
        return read

    def _name(self, number: int) -> str:
        try:
            return self.reader.name(number)
        except Broken:  # its tar cannot be opened
            return f"sample {number:,} of all"

    def _choose(self, sample: Sample, time: int) -> tuple[list[str], Counter[str]]:
        """The captions of a sample that come with it, and how many the text's filters leave out, by reason."""
        if not isinstance(self.transform, TrainingTransform):
            return sample.captions, Counter()
        learnable, left_out = self.reader.text.learnable(sample.captions)
        chosen = (
            turn(len(learnable), self.K, seed=self.seed, time=time, sample=sample.number) if learnable else []
        )
        return [sample.captions[learnable[n]] for n in chosen], left_out

    def _cut(self, sample: Sample, time: int) -> Cut:
        if isinstance(self.transform, TrainingTransform):
            rng = np.random.default_rng((self.seed, time, sample.number))
            return self.transform.cut(sample.width, sample.height, rng)
        return self.transform.cut(sample.width, sample.height)

    def _encoded(self, sample: Sample) -> bytes:
        if sample.dali and sample.number not in self._through_pillow:
            return sample.image
        return self._by_pillow(sample)

    def _by_pillow(self, sample: Sample) -> bytes:
        picture = Picture(sample.image, self.max_pixels)
        size, expected = (picture.width, picture.height), (sample.width, sample.height)
        if size != expected:
            raise SampleError("changed tar", f"a picture of {size} where its index has one of {expected}")
        return decodable(picture)

    def _decoder(self, batches: Iterator[tuple[list[bytes], list[Cut]]]) -> DaliDecoder:
        return DaliDecoder(
            batches,
            self.transform,
            batch_size=self.batch_size,
            num_threads=self.num_threads,
            device=self.device,
        )

    def _rescued(self, read: _Read) -> _Read:
        """A batch that DALI failed on, decoded by Pillow; what neither can decode is left out and named."""
        rescued = _Read([], [], [], [], list(read.bad), read.counts, rescued=True)
        for sample, cut, captions in zip(read.samples, read.cuts, read.captions, strict=True):
            try:
                rescued.encoded.append(self._by_pillow(sample))
            except Broken as error:
                rescued.bad.append((self.reader.name(sample.number), error.reason, error.detail))
                continue
            self._through_pillow.add(sample.number)
            rescued.samples.append(sample)
            rescued.cuts.append(cut)
            rescued.captions.append(captions)
        return rescued

    def _batch(self, read: _Read, images: Tensor) -> CaptionBatch:
        tokens, lengths = collate_captions(read.captions, self.tokenizer.pad_id)  # (B, K, T), (B, K)
        in_training = isinstance(self.transform, TrainingTransform)
        references: list[list[str]] | None = None if in_training else [s.captions for s in read.samples]
        return CaptionBatch(images, tokens, lengths, [s.image_id for s in read.samples], references)


def _begin(reads: Iterator[_Read], begun: deque[_Read]) -> Iterator[tuple[list[bytes], list[Cut]]]:
    """What the decoder is given, noted as it is taken."""
    for read in reads:
        begun.append(read)
        if read.samples:
            yield read.encoded, read.cuts
