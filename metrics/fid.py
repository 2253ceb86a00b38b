"""Distances between the distribution of generated pictures and that of photographs: Fréchet (FID) and kernel (KID).

FID: Heusel et al., NeurIPS 2017, eq. 6. KID: Bińkowski et al., ICLR 2018, sec. 4. Both depend on the network, its
resize filter, the number of pictures and the cameras, so a value travels with the protocol string that names them all.
They are called `fid` and `kid` only for the TensorFlow Inception of 2015; otherwise `fd_<network>`, `kd_<network>`.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from metrics.feature_statistics import FeatureStatistics, load_statistics, save_statistics
from metrics.features import FeatureExtractor
from metrics.results import Measurement

REALS_SEED = 0  # of the order in which photographs are taken: the same subset in every run


@runtime_checkable
class ImageCollection(Protocol):
    """The photographs: uint8 `[3 h w]` each, square of side `resolution`; `fingerprint` changes when they do."""

    name: str
    fingerprint: str
    resolution: int

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Tensor: ...


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """|μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁ Σ₂)^½): FID, eq. 6.

    tr (Σ₁ Σ₂)^½ is the nuclear norm of F₁ F₂ᵀ for any factors Σ = Fᵀ F. With fewer pictures than features F is short
    and this is fast and exact; otherwise its square's eigenvalues are taken, which spares the second factor. Both are
    symmetric problems and need no matrix square root, so no imaginary parts and no offset on the diagonal.

    Raises: ValueError if the sets have different features, or fewer than two pictures.
    """
    if len(a.sum) != len(b.sum):
        raise ValueError(f"the features differ: {len(a.sum)} and {len(b.sum)} dimensions")
    if min(a.n, b.n) < 2:
        raise ValueError(f"a distance between distributions needs at least two pictures a side, got {a.n} and {b.n}")
    small, large = (a, b) if a.few and (not b.few or a.n <= b.n) else (b, a)
    factor = small.factor()
    if large.few:
        root = torch.linalg.svdvals(factor @ large.factor().T).sum()
    else:
        root = torch.linalg.eigvalsh(factor @ large.covariance @ factor.T).clamp(min=0).sqrt().sum()
    variance = a.covariance.trace() + b.covariance.trace()
    return float((a.mean - b.mean).square().sum() + variance - 2 * root)


def kernel_distance(
    a: Float[Tensor, "n d"], b: Float[Tensor, "m d"], subsets: int, subset_size: int, seed: int
) -> float:
    """Unbiased squared MMD with the kernel (x·y/d + 1)³, averaged over random subsets: KID, sec. 4. May be negative.

    Args:
        subset_size: per side; fewer if a side has fewer features.
    Raises: ValueError with fewer than two features a side.
    """
    size = min(len(a), len(b), subset_size)
    if size < 2:
        raise ValueError(f"a kernel distance needs at least two pictures a side, got {len(a)} and {len(b)}")
    rng = torch.Generator().manual_seed(seed)
    total = 0.0
    for _ in _progress(range(subsets), "kernel distance", subsets):
        x = a[torch.randperm(len(a), generator=rng)[:size]].double()
        y = b[torch.randperm(len(b), generator=rng)[:size]].double()
        within = sum(k.sum() - k.diagonal().sum() for k in (_cubic(x, x), _cubic(y, y)))
        total += float(within / (size * (size - 1)) - 2 * _cubic(x, y).mean())
    return total / subsets


def _cubic(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    return (x @ y.T / x.shape[1] + 1) ** 3


def metric_names(extractor: FeatureExtractor) -> tuple[str, str]:
    """("fid", "kid") for the TensorFlow Inception, whichever port; ("fd_<network>", "kd_<network>") for any other."""
    if extractor.name.startswith("inception-2015-12-05"):
        return "fid", "kid"
    return f"fd_{extractor.name}", f"kd_{extractor.name}"


def protocol(metric: str, extractor: FeatureExtractor, *, fakes: int, reals: int, resolution: int, poses: str) -> str:
    """What a value must agree in to be compared: "fid 2k/4.089k inception-2015-12-05/tf1 64² mem <cameras>".

    "mem": the pictures went to the network as 8-bit tensors, never through JPEG or PNG files.
    """
    count = [f"{n / 1000:g}k" if n >= 1000 else str(n) for n in (fakes, reals)]
    return (f"{metric} {count[0]}/{count[1]} {extractor.name}/{extractor.resize} {resolution}² mem {poses}").strip()


class DistributionMetric:
    """FID and KID of a generator against a data set; under torch.distributed every process does its share.

    The statistics of the photographs are kept in `cache`; a file made from other pictures, another network or a damaged
    one is noticed and made again. All randomness comes from the seed given to the call, never from the global state.

    Args:
        extractor: the network; see metrics/features.py.
        fakes, reals: how many pictures a side; reals = None takes all. Compare only equal numbers.
        batch_size: pictures at a time.
        kid_subsets, kid_subset_size: of `kernel_distance`, drawn from at most 10,000 features a side.
        cache: a folder; None keeps nothing.
        workers: processes that decode photographs.
    """

    def __init__(self, *, extractor: FeatureExtractor, fakes: int, reals: int | None, batch_size: int, kid_subsets: int,
                 kid_subset_size: int, cache: str | None, workers: int = 0):
        if fakes < 2 or (reals is not None and reals < 2):
            raise ValueError(f"fakes and reals must be at least 2, got {fakes} and {reals}")
        self.extractor, self.fakes, self.reals, self.batch_size = extractor, fakes, reals, batch_size
        self.kid_subsets, self.kid_subset_size = kid_subsets, kid_subset_size
        self.cache, self.workers = None if cache is None else Path(cache), workers

    def __call__(self, generate: Callable[[int, torch.Generator], Tensor], data: ImageCollection, pose_prior: str,
                 seed: int) -> list[Measurement]:
        """Measure.

        Args:
            generate: (n, rng) → uint8 `[n 3 h w]` at the data's resolution, drawn with `rng` (on the CPU) alone.
            pose_prior: the cameras of the fakes, in words, for the protocol.
        Returns: the Fréchet and the kernel distance (as it is, not times 100 or 1000); the same on every process.
        """
        reals = self.real_statistics(data)
        fakes = self.fake_statistics(generate, data.resolution, seed)
        names = dict(fakes=fakes.n, reals=reals.n, resolution=data.resolution, poses=pose_prior)
        frechet, kernel = metric_names(self.extractor)
        values = [0.0, 0.0]
        if _rank() == 0:
            values = [frechet_distance(fakes, reals),
                      kernel_distance(fakes.features, reals.features, self.kid_subsets, self.kid_subset_size, seed)]
        if _world_size() > 1:
            dist.broadcast_object_list(values, src=0)
        subsets = f"{kernel.split('_')[0]} {self.kid_subsets}×{min(self.kid_subset_size, fakes.n, reals.n)}"
        return [Measurement(frechet, values[0], protocol(frechet.split("_")[0], self.extractor, **names)),
                Measurement(kernel, values[1], protocol(subsets, self.extractor, **names))]

    def fake_statistics(self, generate: Callable[[int, torch.Generator], Tensor], resolution: int,
                        seed: int) -> FeatureStatistics:
        """Of `self.fakes` pictures, each process's own share from its own seed."""
        rank, world = _rank(), _world_size()
        rng = torch.Generator().manual_seed(seed * 1_000_003 + rank)
        share = self.fakes // world + (rank < self.fakes % world)
        sizes = [min(self.batch_size, share - start) for start in range(0, share, self.batch_size)]
        statistics = FeatureStatistics(self.extractor.num_features)
        for size in _progress(sizes, "generated images", len(sizes)):
            images = generate(size, rng)
            if images.dtype != torch.uint8 or tuple(images.shape) != (size, 3, resolution, resolution):
                raise ValueError(f"generate({size}) must give uint8 [{size} 3 {resolution} {resolution}] like the "
                                 f"data, got {images.dtype} {list(images.shape)}")
            statistics.update(self.extractor(images))
        statistics.all_reduce()
        return statistics

    def real_statistics(self, data: ImageCollection) -> FeatureStatistics:
        """Of the photographs, from the cache if it holds them."""
        count = len(data) if self.reals is None else min(self.reals, len(data))
        fingerprint = self.fingerprint(data, count)
        path = None if self.cache is None else self.cache / _file_name(data, self.extractor, count)
        cached = [load_statistics(path, fingerprint) if path is not None and _rank() == 0 else None]
        if _world_size() > 1:
            dist.broadcast_object_list(cached, src=0)
        if cached[0] is not None:
            return cached[0]
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(REALS_SEED))[:count]
        share: Subset = Subset(data, order[_rank() :: _world_size()].tolist())  # type: ignore[arg-type]
        loader = DataLoader(share, self.batch_size, num_workers=self.workers, generator=torch.Generator())
        statistics = FeatureStatistics(self.extractor.num_features)
        for images in _progress(loader, "photographs", len(loader)):
            statistics.update(self.extractor(images))
        statistics.all_reduce()
        if path is not None and _rank() == 0:
            save_statistics(path, statistics, fingerprint)
        return statistics

    def fingerprint(self, data: ImageCollection, count: int) -> str:
        """Of everything that the statistics of the photographs depend on."""
        facts = {"version": 1, "data": data.fingerprint, "resolution": data.resolution, "images": len(data),
                 "reals": count, "order": REALS_SEED, "network": self.extractor.name, "resize": self.extractor.resize}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _file_name(data: ImageCollection, extractor: FeatureExtractor, count: int) -> str:
    name = f"{data.name}_{data.resolution}_{extractor.name}_{extractor.resize}_{count}"
    return re.sub(r"[^\w.-]+", "-", name) + ".npz"


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _progress(batches, what: str, total: int) -> Iterator:
    """A bar with the time left, on a terminal, for what takes more than a few seconds."""
    return iter(tqdm(batches, what, total, delay=3, leave=False, disable=True if _rank() else None))
