"""The order in which a GAN sees its pictures: endless, the same for the same seed, resumable at any step."""

import hashlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datasets.images import ImageBatch, ImageCollection
from gan3d.cameras import Camera, mirror


def _generator(seed: int, *key: int | str) -> torch.Generator:
    """A random generator of its own for every (seed, key): none depends on how far another was used."""
    digest = hashlib.sha256(repr((seed, *key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


class Draw(NamedTuple):
    """Which pictures of the collection make a batch, and which of them are mirrored."""

    indices: Int[Tensor, " b"]
    flipped: Bool[Tensor, " b"]


class Order:
    """An endless sequence of draws: one permutation of the `size` pictures after another, flips by a fair coin."""

    def __init__(self, size: int, seed: int, flip: bool):
        self.size, self.seed, self.flip = size, seed, flip
        self._epochs: dict[int, Draw] = {}

    def _epoch(self, epoch: int) -> Draw:
        if epoch not in self._epochs:
            order = torch.randperm(self.size, generator=_generator(self.seed, epoch, "order"))
            coin = torch.rand(self.size, generator=_generator(self.seed, epoch, "flip")) < 0.5
            self._epochs = {past: draw for past, draw in self._epochs.items() if past == epoch - 1}
            self._epochs[epoch] = Draw(order, coin if self.flip else torch.zeros_like(coin))
        return self._epochs[epoch]

    def draw(self, start: int, stop: int) -> Draw:
        """Positions start ≤ p < stop of the sequence; may span any number of epochs."""
        parts = []
        while start < stop:
            epoch, offset = divmod(start, self.size)
            end = min(stop, (epoch + 1) * self.size) - epoch * self.size
            parts.append(Draw(*(values[offset:end] for values in self._epoch(epoch))))
            start = epoch * self.size + end
        return Draw(torch.cat([part.indices for part in parts]), torch.cat([part.flipped for part in parts]))


class _Pictures(Dataset):
    """What a worker does: indices and flips to (which pictures are shown, stand-ins included; the pictures)."""

    def __init__(self, collection: ImageCollection):
        self.collection = collection

    def __getitem__(self, key: tuple[list[int], list[bool]]) -> tuple[Tensor, Tensor]:
        indices, flipped = key
        shown, pictures = zip(*(self.collection.load(index) for index in indices), strict=True)
        turned = [image.flip(-1) if turn else image for image, turn in zip(pictures, flipped, strict=True)]
        return torch.tensor(shown), torch.stack(turned)


def _load(collection: ImageCollection, draws: Callable[[], Iterator[Draw]], workers: int) -> Iterator[ImageBatch]:
    """Batches for the draws, in order; decoded in `workers` processes, or here if 0."""
    pictures = _Pictures(collection)
    keys = ((draw.indices.tolist(), draw.flipped.tolist()) for draw in draws())
    loaded: Iterator[tuple[Tensor, Tensor]] = map(pictures.__getitem__, keys)
    if workers:
        # a generator of its own: the loader draws a seed for its workers, which must not come out of the global state
        loaded = iter(DataLoader(pictures, batch_size=None, sampler=keys, num_workers=workers,
                                 generator=torch.Generator(), pin_memory=torch.cuda.is_available()))
    for (shown, images), draw in zip(loaded, draws(), strict=True):
        camera = collection.camera(shown)
        yield ImageBatch(images, None if camera is None else mirrored(camera, draw.flipped))


def mirrored(camera: Camera, flipped: Bool[Tensor, " b"]) -> Camera:
    """The cameras, mirrored where the picture is."""
    pairs = zip(mirror(camera), camera, strict=True)
    return Camera(*(torch.where(flipped[:, None, None], other, same) for other, same in pairs))


class ImageStream:
    """Batches for steps start_step, start_step + 1, …, for ever.

    The order is a pure function of the seed and of the position in the sequence of pictures, so a run that resumes
    (by `start_step` or by `load_state_dict`) goes on with exactly the batches it would have seen. Global random
    state is neither read nor changed.

    Args:
        batch_size: step → batch over all ranks together; it may change with the step. Each rank gets an equal,
            contiguous share.
        flip: mirror half of the pictures, and their cameras with them.
        workers: processes that decode; the batches are the same for any number.
    Raises: ValueError while iterating, if a batch cannot be shared equally among the ranks.
    """

    def __init__(
        self,
        collection: ImageCollection,
        *,
        batch_size: Callable[[int], int],
        seed: int,
        flip: bool,
        start_step: int = 0,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in [0, world_size), got {rank} of {world_size}")
        self.collection, self.batch_size, self.workers = collection, batch_size, workers
        self.rank, self.world_size = rank, world_size
        self.order = Order(len(collection), seed, flip)
        self.start_step = self.step = start_step

    def __len__(self) -> int:
        return 2**31

    def __iter__(self) -> Iterator[ImageBatch]:
        """Batches from `start_step` on. `state_dict` then speaks of this iterator."""
        start = self.step = self.start_step
        for step, batch in enumerate(_load(self.collection, lambda: self._draws(start), self.workers), start):
            self.step = step + 1
            yield batch

    def position(self, step: int) -> int:
        """Pictures seen, by all ranks, before `step`."""
        return sum(map(self.batch_size, range(step)))

    def _draws(self, step: int) -> Iterator[Draw]:
        position = self.position(step)
        while True:
            batch = self.batch_size(step)
            share, rest = divmod(batch, self.world_size)
            if rest or not share:
                raise ValueError(f"step {step}: a batch of {batch} does not divide among {self.world_size} ranks")
            yield self.order.draw(position + self.rank * share, position + (self.rank + 1) * share)
            position, step = position + batch, step + 1

    def state_dict(self) -> dict[str, int]:
        """The step of the next batch."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start_step = self.step = state["step"]


def sequence(collection: ImageCollection, batch: int, *, workers: int = 0) -> Iterator[ImageBatch]:
    """Every picture once, in order, unflipped, in batches; the last may be smaller. For evaluation."""

    def draws() -> Iterator[Draw]:
        for start in range(0, len(collection), batch):
            indices = torch.arange(start, min(start + batch, len(collection)))
            yield Draw(indices, torch.zeros(len(indices), dtype=torch.bool))

    return _load(collection, draws, workers)
