"""What FID and KID need to know about a set of pictures, and its file on disk."""

import os
import tempfile
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

KEPT_FEATURES = 10_000  # for the kernel distance and the n×n Fréchet form: 80 MB of 2048 floats, enough for any subset


class FeatureStatistics:
    """n, Σ x and Σ x xᵀ in float64, which add up over batches and processes; and the first `keep` features themselves.

    Args:
        num_features: d.
        keep: how many features to remember, for `kernel_distance` and for the fast form of `frechet_distance`.
    """

    def __init__(self, num_features: int, keep: int = KEPT_FEATURES):
        self.n, self.keep = 0, keep
        self.sum = torch.zeros(num_features, dtype=torch.float64)
        self.outer = torch.zeros(num_features, num_features, dtype=torch.float64)
        self._kept: list[Tensor] = []

    @classmethod
    def from_moments(cls, n: int, mean: Float[Tensor, " d"], covariance: Float[Tensor, "d d"],
                     features: Float[Tensor, "k d"] | None = None) -> "FeatureStatistics":
        """The statistics whose mean and (N−1) covariance these are."""
        statistics = cls(len(mean))
        mean, covariance = mean.double(), covariance.double()
        statistics.n, statistics.sum = n, mean * n
        statistics.outer = covariance * (n - 1) + n * torch.outer(mean, mean)
        statistics._kept = [] if features is None else [features]
        return statistics

    def update(self, features: Float[Tensor, "n d"]) -> None:
        exact = features.detach().cpu().double()
        room = self.keep - len(self.features)
        self.n += len(exact)
        self.sum += exact.sum(0)
        self.outer.addmm_(exact.T, exact)
        if room > 0:
            self._kept.append(features[:room].detach().cpu().float())

    def merge(self, other: "FeatureStatistics") -> None:
        """Become the statistics of both sets together."""
        self.n += other.n
        self.sum += other.sum
        self.outer += other.outer
        self._kept = [torch.cat([self.features, other.features])[: self.keep]]

    def all_reduce(self) -> None:
        """On every process: become the statistics of what all processes saw. Alone: nothing to do."""
        if not (dist.is_available() and dist.is_initialized()):
            return
        everyone: list[FeatureStatistics | None] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, self)
        total = FeatureStatistics(len(self.sum), self.keep)
        for statistics in everyone:
            total.merge(statistics)  # type: ignore[arg-type]
        self.n, self.sum, self.outer, self._kept = total.n, total.sum, total.outer, total._kept

    @property
    def features(self) -> Float[Tensor, "k d"]:
        """The kept ones, float32."""
        if len(self._kept) != 1:
            self._kept = [torch.cat(self._kept) if self._kept else torch.zeros(0, len(self.sum))]
        return self._kept[0]

    @property
    def mean(self) -> Float[Tensor, " d"]:
        return self.sum / self.n

    @property
    def covariance(self) -> Float[Tensor, "d d"]:
        """With N−1, as pytorch-fid, clean-fid and torch-fidelity have it (StyleGAN's code divides by N)."""
        return (self.outer - self.n * torch.outer(self.mean, self.mean)) / (self.n - 1)

    @property
    def few(self) -> bool:
        """Fewer pictures than features, and all of them remembered: the covariance has a short factor."""
        return self.n < len(self.sum) and len(self.features) == self.n

    def factor(self) -> Float[Tensor, "k d"]:
        """F with Fᵀ F = covariance: the centred features if they are few, otherwise the symmetric root."""
        if self.few:
            return (self.features.double() - self.mean) / (self.n - 1) ** 0.5
        values, vectors = torch.linalg.eigh(self.covariance)
        return values.clamp(min=0).sqrt()[:, None] * vectors.T


def save_statistics(path: Path, statistics: FeatureStatistics, fingerprint: str) -> None:
    """Write mu, sigma, n and the kept features; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, mu=statistics.mean.numpy(), sigma=statistics.covariance.numpy(), n=np.int64(statistics.n),
                     features=statistics.features.numpy(), fingerprint=np.array(fingerprint))
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load_statistics(path: Path, fingerprint: str) -> FeatureStatistics | None:
    """The statistics in a file if it is whole and of this fingerprint; otherwise None, and a warning says why."""
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            found = str(file["fingerprint"])
            if found != fingerprint:
                warnings.warn(f"{path} was made from other pictures or another network (fingerprint {found[:12]}, not "
                              f"{fingerprint[:12]}); it is made again", stacklevel=2)
                return None
            mu, sigma, features = (torch.from_numpy(file[key]) for key in ("mu", "sigma", "features"))
            statistics = FeatureStatistics.from_moments(int(file["n"]), mu, sigma, features)
        if not all(t.isfinite().all() for t in (mu, sigma, features)):
            raise ValueError("it holds numbers that are not finite")
        return statistics
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        warnings.warn(f"{path} is damaged ({type(error).__name__}: {error}); it is made again", stacklevel=2)
        return None
