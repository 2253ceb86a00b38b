import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn

from metrics.feature_statistics import FeatureStatistics, load_statistics, save_statistics
from metrics.fid import DistributionMetric, frechet_distance, kernel_distance, metric_names, protocol


class Pooled:
    """A network of means: 4×4 patches of each channel. 48 features of a 16² picture. Counts the pictures it sees."""

    name, resize, num_features = "pooled", "none", 48

    def __init__(self):
        self.seen = 0

    def __call__(self, images):
        self.seen += len(images)
        return torch.nn.functional.avg_pool2d(images.float() / 255, 4).flatten(1)


class Noise:
    """A data set of grey noise."""

    def __init__(self, n=150, seed=0, name="noise"):
        self.images = torch.randint(0, 256, (n, 3, 16, 16), generator=torch.Generator().manual_seed(seed)).byte()
        self.name, self.resolution, self.fingerprint = name, 16, f"noise {n} {seed}"

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index]


def generate(n, rng):
    return (torch.randn(n, 3, 16, 16, generator=rng) * 50 + 100).clamp(0, 255).to(torch.uint8)


def metric(extractor=None, **changes):
    settings = dict(fakes=90, reals=None, batch_size=32, kid_subsets=4, kid_subset_size=50, cache=None)
    return DistributionMetric(extractor=extractor or Pooled(), **(settings | changes))


def gaussian(n, d, seed, shift=0.0, scale=1.0):
    rng = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=rng) / d**0.5
    return shift + scale * torch.randn(n, d, generator=rng) @ mixing


def statistics(features, keep=10_000):
    result = FeatureStatistics(features.shape[1], keep)
    for batch in features.split(37):
        result.update(batch)
    return result


# The Fréchet distance


@pytest.mark.smoke
def test_frechet_distance_of_two_axis_aligned_gaussians_is_the_closed_form():
    mean, spread = torch.linspace(-1, 2, 12).double(), torch.linspace(0.1, 3, 12).double()
    a = FeatureStatistics.from_moments(1000, torch.zeros(12), torch.eye(12))
    b = FeatureStatistics.from_moments(1000, mean, spread.square().diag())
    expected = float(mean.square().sum() + (spread - 1).square().sum())
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)  # float64 throughout
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_of_rotated_gaussians_is_that_of_the_axes():
    rotation = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    spread, other = torch.linspace(0.2, 2, 8).double(), torch.linspace(3, 0.5, 8).double()
    a, b = (FeatureStatistics.from_moments(50, torch.zeros(8), rotation @ s.square().diag() @ rotation.T)
            for s in (spread, other))
    assert frechet_distance(a, b) == pytest.approx(float((spread - other).square().sum()), rel=1e-10)


@pytest.mark.parametrize(("n", "m"), [(40, 30), (40, 300), (300, 40), (300, 500), (64, 65)])
def test_few_images_form_equals_the_full_form(n, m):
    x, y = gaussian(n, 64, seed=1), gaussian(m, 64, seed=2, shift=0.3)
    a, b = statistics(x), statistics(y)
    full = [FeatureStatistics.from_moments(s.n, s.mean, s.covariance) for s in (a, b)]
    assert (a.few, b.few) == (n < 64, m < 64) and not any(s.few for s in full)
    # the full form takes roots of eigenvalues that are zero up to 1e-16 of the largest: 1e-8 each
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(*full), rel=1e-6)


def test_frechet_distance_of_a_set_to_itself_is_zero():
    for n in (40, 200):
        a = statistics(gaussian(n, 64, seed=1))
        assert abs(frechet_distance(a, a)) < 1e-6 * float(a.covariance.trace())


@pytest.mark.parametrize(("n", "m"), [(300, 200), (50, 40)])
def test_frechet_distance_agrees_with_clean_fid(n, m):
    from cleanfid.fid import frechet_distance as theirs

    x, y = gaussian(n, 64, seed=3).double().numpy(), gaussian(m, 64, seed=4, shift=0.2, scale=1.3).double().numpy()
    expected = theirs(x.mean(0), np.cov(x, rowvar=False), y.mean(0), np.cov(y, rowvar=False))
    ours = frechet_distance(statistics(torch.from_numpy(x)), statistics(torch.from_numpy(y)))
    assert ours == pytest.approx(expected, rel=1e-3)  # their square root of a singular product is that exact


class Pixels(nn.Module):
    num_features = 48

    def forward(self, images):
        return Pooled()(images)


def test_frechet_and_kernel_distance_agree_with_torchmetrics():
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    real, fake = Noise(200).images, generate(120, torch.Generator().manual_seed(0))
    fid = FrechetInceptionDistance(feature=Pixels())
    kid = KernelInceptionDistance(feature=Pixels(), subsets=3, subset_size=120)
    for theirs in (fid, kid):
        theirs.update(real[:120], real=True)
        theirs.update(fake, real=False)
    x, y = Pooled()(fake), Pooled()(real[:120])
    assert frechet_distance(statistics(x), statistics(y)) == pytest.approx(float(fid.compute()), rel=1e-3)
    # subsets of everything: no sampling is left in either
    assert kernel_distance(x, y, 1, 120, seed=0) == pytest.approx(float(kid.compute()[0]), rel=1e-3)


def test_frechet_distance_refuses_single_pictures_and_unlike_features():
    one, many, other = (statistics(gaussian(n, d, seed=0)) for n, d in ((1, 8), (9, 8), (9, 7)))
    with pytest.raises(ValueError, match="at least two"):
        frechet_distance(one, many)
    with pytest.raises(ValueError, match="8 and 7"):
        frechet_distance(many, other)


# The kernel distance


def test_kernel_distance_agrees_with_clean_fid():
    from cleanfid.fid import kernel_distance as theirs

    x, y = gaussian(80, 32, seed=5), gaussian(80, 32, seed=6, shift=0.4)
    expected = theirs(x.double().numpy(), y.double().numpy(), num_subsets=1, max_subset_size=80)
    assert kernel_distance(x, y, 1, 80, seed=0) == pytest.approx(expected, rel=1e-9)


def test_kernel_distance_is_unbiased_around_zero_for_one_distribution():
    values = [kernel_distance(gaussian(60, 16, seed=i)[:30], gaussian(60, 16, seed=i)[30:], 1, 30, seed=0)
              for i in range(60)]  # the same mixing matrix, disjoint samples
    assert min(values) < 0 < max(values)
    assert abs(np.mean(values)) < 3 * np.std(values) / math.sqrt(len(values))  # three standard errors


def test_kernel_distance_depends_on_its_seed_alone():
    x, y = gaussian(100, 16, seed=7), gaussian(90, 16, seed=8)
    first = kernel_distance(x, y, 5, 40, seed=1)
    torch.manual_seed(123)
    assert kernel_distance(x, y, 5, 40, seed=1) == first != kernel_distance(x, y, 5, 40, seed=2)


# Sums


def test_statistics_are_the_mean_and_covariance_of_numpy():
    x = gaussian(100, 12, seed=9, shift=5)
    result = statistics(x)
    np.testing.assert_allclose(result.mean, x.double().mean(0), rtol=1e-12)
    np.testing.assert_allclose(result.covariance, np.cov(x.double(), rowvar=False), atol=1e-11)  # 25 − 25 in float64


@pytest.mark.smoke
def test_statistics_merged_are_the_statistics_of_everything():
    x = gaussian(100, 12, seed=10)
    parts, whole = [statistics(p) for p in x.split([1, 60, 39])], statistics(x)
    parts[0].merge(parts[1])
    parts[0].merge(parts[2])
    assert parts[0].n == 100 and torch.equal(parts[0].features, whole.features)
    torch.testing.assert_close(parts[0].mean, whole.mean, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(parts[0].covariance, whole.covariance, rtol=1e-10, atol=1e-12)


def test_statistics_keep_only_so_many_features_and_then_know_they_are_not_few():
    result = statistics(gaussian(50, 64, seed=11), keep=20)
    assert result.features.shape == (20, 64) and result.n == 50 and not result.few
    result.merge(statistics(gaussian(50, 64, seed=12)))
    assert len(result.features) == 20


def _process(rank, world, rendezvous, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    try:
        x = gaussian(101, 12, seed=13)
        part = statistics(x[:30] if rank == 0 else x[30:])
        part.all_reduce()
        extractor = Pooled()
        measured = metric(extractor, cache=f"{folder}/cache", fakes=91)(generate, Noise(), "front", seed=3)
        torch.save({"covariance": part.covariance, "n": part.n, "features": part.features, "seen": extractor.seen,
                    "values": [m.value for m in measured]}, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_processes_reduce_to_what_one_process_computes(tmp_path):
    torch.multiprocessing.spawn(_process, (2, tmp_path / "rendezvous", str(tmp_path)), nprocs=2)
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    whole = statistics(gaussian(101, 12, seed=13))
    for part in (one, two):
        assert part["n"] == 101 and torch.equal(part["features"], whole.features)
        torch.testing.assert_close(part["covariance"], whole.covariance, rtol=1e-10, atol=1e-12)
    assert one["values"] == two["values"]
    assert (one["seen"], two["seen"]) == (75 + 46, 75 + 45)  # 150 photographs and 91 fakes, shared
    fakes = FeatureStatistics(48)
    for rank, share in ((0, 46), (1, 45)):
        rng = torch.Generator().manual_seed(3 * 1_000_003 + rank)
        sizes = [32, share - 32]
        fakes.update(torch.cat([Pooled()(generate(n, rng)) for n in sizes]))
    expected = frechet_distance(fakes, statistics(Pooled()(Noise().images)))
    assert one["values"][0] == pytest.approx(expected, rel=1e-9)
    alone = Pooled()
    metric(alone, cache=str(tmp_path / "cache"))(generate, Noise(), "front", seed=3)
    assert alone.seen == 90  # the photographs' statistics that the two wrote serve one process too


# The metric


def test_metric_measures_both_distances_and_says_how():
    frechet, kernel = metric()(generate, Noise(), "azimuth uniform(0, 360)", seed=0)
    assert frechet.metric == "fd_pooled" and kernel.metric == "kd_pooled"
    assert frechet.protocol == "fd 90/150 pooled/none 16² mem azimuth uniform(0, 360)"
    assert kernel.protocol == "kd 4×50 90/150 pooled/none 16² mem azimuth uniform(0, 360)"
    rng = torch.Generator().manual_seed(0)
    fakes = Pooled()(torch.cat([generate(n, rng) for n in (32, 32, 26)]))
    assert frechet.value == pytest.approx(frechet_distance(statistics(fakes), statistics(Pooled()(Noise().images))))


def test_metric_is_repeatable_and_leaves_the_global_random_states_alone():
    before, numpys = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    first = metric()(generate, Noise(), "", seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.random.get_state()[1].tolist() == numpys  # noqa: NPY002
    torch.manual_seed(99)
    assert metric()(generate, Noise(), "", seed=1) == first
    assert metric()(generate, Noise(), "", seed=2)[0].value != first[0].value


def test_metric_takes_the_same_part_of_the_photographs_every_time():
    some = metric(reals=40)
    a, b = some.real_statistics(Noise()), metric(reals=40).real_statistics(Noise())
    assert a.n == 40 and torch.equal(a.features, b.features)
    everything = Pooled()(Noise().images)
    assert ((a.features[:, None] == everything).all(2).sum(1) == 1).all()
    assert metric(reals=1000).real_statistics(Noise()).n == 150


def test_metric_refuses_pictures_unlike_the_data():
    with pytest.raises(ValueError, match="must give uint8"):
        metric()(lambda n, rng: torch.rand(n, 3, 16, 16), Noise(), "", seed=0)
    with pytest.raises(ValueError, match=r"\[32 3 16 16\] like the data"):
        metric()(lambda n, rng: torch.zeros(n, 3, 8, 8, dtype=torch.uint8), Noise(), "", seed=0)


def test_only_the_tensorflow_inception_is_called_fid():
    class Named(Pooled):
        def __init__(self, name):
            super().__init__()
            self.name = name

    assert metric_names(Named("inception-2015-12-05")) == ("fid", "kid")
    assert metric_names(Named("inception-2015-12-05-6726825d")) == ("fid", "kid")
    assert metric_names(Named("inception_v3")) == ("fd_inception_v3", "kd_inception_v3")
    assert metric_names(Named("efficientnet_lite0")) == ("fd_efficientnet_lite0", "kd_efficientnet_lite0")


def test_protocols_of_unlike_measurements_are_unlike():
    base = dict(fakes=2000, reals=4089, resolution=64, poses="front")
    text = protocol("fid", Pooled(), **base)
    assert text == "fid 2k/4.089k pooled/none 64² mem front"
    for change in (dict(fakes=2001), dict(reals=4090), dict(resolution=128), dict(poses="back")):
        assert protocol("fid", Pooled(), **(base | change)) != text


# The cache


def test_statistics_of_photographs_are_read_back_from_the_cache(tmp_path):
    extractor = Pooled()
    cached = metric(extractor, cache=str(tmp_path))
    first = cached(generate, Noise(), "", seed=0)
    assert extractor.seen == 150 + 90
    second = cached(generate, Noise(), "", seed=0)
    assert extractor.seen == 150 + 90 + 90
    assert [m.value for m in second] == pytest.approx([m.value for m in first], rel=1e-9)


def test_saved_statistics_are_the_same_when_loaded(tmp_path):
    for n in (30, 200):
        saved = statistics(gaussian(n, 64, seed=14))
        save_statistics(tmp_path / "s.npz", saved, "key")
        loaded = load_statistics(tmp_path / "s.npz", "key")
        assert loaded.n == n and loaded.few == saved.few and torch.equal(loaded.features, saved.features)
        torch.testing.assert_close(loaded.covariance, saved.covariance, rtol=1e-9, atol=1e-12)
    assert [p.name for p in tmp_path.iterdir()] == ["s.npz"]  # nothing temporary is left


def test_stale_statistics_are_refused_and_made_again(tmp_path):
    metric(cache=str(tmp_path)).real_statistics(Noise(seed=0))
    changed = Noise(seed=1)  # the same name and number of pictures, other pixels
    with pytest.warns(UserWarning, match="made from other pictures.*made again"):
        statistics = metric(cache=str(tmp_path)).real_statistics(changed)
    assert statistics.mean.numpy() == pytest.approx(Pooled()(changed.images).mean(0).numpy(), rel=1e-6)
    assert metric(cache=str(tmp_path)).real_statistics(changed).n == 150  # now without a warning


@pytest.mark.filterwarnings("error")
def test_statistics_of_other_protocols_lie_side_by_side(tmp_path):
    for reals in (None, 40, None, 40):
        metric(cache=str(tmp_path), reals=reals).real_statistics(Noise())
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("damage", ["truncate", "flip", "garbage", "empty", "pickle"])
def test_damaged_statistics_are_noticed_and_made_again(tmp_path, damage):
    whole = metric(cache=str(tmp_path)).real_statistics(Noise())
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    middle = len(content) // 2
    if damage == "pickle":
        np.savez(path, mu=np.array([object()], dtype=object), allow_pickle=True, fingerprint=np.array("x"))
    else:
        path.write_bytes({"truncate": content[:middle], "garbage": b"not a zip at all", "empty": b"",
                          "flip": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]}[damage])
    extractor = Pooled()
    with pytest.warns(UserWarning, match="made again"):
        again = metric(extractor, cache=str(tmp_path)).real_statistics(Noise())
    assert extractor.seen == 150 and torch.equal(again.covariance, whole.covariance)


def test_fast_config_builds_a_metric_that_needs_no_download():
    from hydra import compose, initialize_config_dir
    from hydra.utils import instantiate

    from gan3d.launch import CONFIGS

    with initialize_config_dir(str(CONFIGS), version_base=None):
        cfg = compose("metrics/fast")
        made = instantiate(cfg.metrics, _convert_="all")
        others = {name: compose(f"metrics/{name}").metrics for name in ("fid2k", "fid10k", "fid50k")}
    assert isinstance(made, DistributionMetric) and metric_names(made.extractor)[0] == "fd_efficientnet_lite0"
    assert {name: cfg.fakes for name, cfg in others.items()} == {"fid2k": 2000, "fid10k": 10_000, "fid50k": 50_000}
    for cfg in others.values():
        with pytest.raises(Exception, match="metrics.fetch inception"):
            instantiate(cfg, extractor={"path": "absent/inception.pt"})
