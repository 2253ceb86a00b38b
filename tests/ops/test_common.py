"""csrc/common.h by itself: a small C++ program includes it, built as the ops are, and answers questions."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from gan3d.ops import extension
from gan3d.ops.cells import Resolution, cell_index

PROGRAM = r"""
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "common.h"

static uint32_t bits(float x) { uint32_t u; std::memcpy(&u, &x, 4); return u; }
static float number(uint32_t u) { float x; std::memcpy(&x, &u, 4); return x; }

template <class T>
static std::vector<T> input() {
  std::vector<T> all;
  T one;
  while (std::fread(&one, sizeof(T), 1, stdin) == 1) all.push_back(one);
  return all;
}
template <class T>
static void output(const std::vector<T>& all) { std::fwrite(all.data(), sizeof(T), all.size(), stdout); }

// The largest error of exp in units of the last place over every stride-th float of both signs up to 90.
static void sweep(uint32_t stride) {
  double worst = 0, at = 0;
  long long wrong_zero = 0, wrong_inf = 0, count = 0;
  for (uint32_t u = 0; u <= bits(90.0f); u += stride) {
    for (const float x : {number(u), -number(u)}) {
      const float y = gan3d::exp(x);
      const long double exact = expl((long double)x);
      ++count;
      if (x < -87.33654f) { wrong_zero += bits(y) != 0; continue; }
      if (x > 88.72283f) { wrong_inf += bits(y) != bits(INFINITY); continue; }
      const double error = std::fabs(double(((long double)y - exact) / ldexpl(1, ilogbl(exact) - 23)));
      if (!(error <= worst)) worst = error, at = x;
    }
  }
  std::printf("{\"worst\": %.9g, \"at\": %.9g, \"wrong_zero\": %lld, \"wrong_inf\": %lld, \"count\": %lld}\n", worst,
              at, wrong_zero, wrong_inf, count);
}

int main(int, char** argv) {
  const char* mode = argv[1];
  if (!std::strcmp(mode, "sweep")) {
    sweep(uint32_t(std::atoi(argv[2])));
  } else if (!std::strcmp(mode, "exp")) {
    std::vector<float> x = input<float>();
    for (float& v : x) v = gan3d::exp(v);  // a loop the compiler may put into vector registers
    output(x);
  } else if (!std::strcmp(mode, "exp1")) {
    std::vector<float> x = input<float>();
    for (float& v : x) {
      volatile float one = v;
      v = gan3d::exp(one);
    }
    output(x);
  } else if (!std::strcmp(mode, "cells")) {  // positions in; index, position again, contained or not out
    const gan3d::Cells cells = gan3d::make_cells(std::atoi(argv[2]), std::atoi(argv[3]), std::atoi(argv[4]));
    const std::vector<int32_t> p = input<int32_t>();
    std::vector<int64_t> out{cells.count(), cells.shift};
    for (size_t n = 0; n + 2 < p.size(); n += 3) {
      const bool contained = cells.contains(p[n], p[n + 1], p[n + 2]);
      const int64_t index = contained ? cells.index(p[n], p[n + 1], p[n + 2]) : -1;
      int32_t i = -1, j = -1, k = -1;
      if (contained) cells.position(index, i, j, k);
      out.insert(out.end(), {index, i, j, k});
    }
    output(out);
  } else if (!std::strcmp(mode, "rows")) {  // words and ranks in; the row of every cell out
    const std::vector<int64_t> all = input<int64_t>();
    const size_t words = all.size() / 2;
    const std::vector<int32_t> rank(all.begin() + words, all.end());
    const gan3d::VoxelIndex index{all.data(), rank.data(), gan3d::make_cells(64, 1, int64_t(words))};
    std::vector<int32_t> rows;
    for (size_t cell = 0; cell < 64 * words; ++cell) rows.push_back(index.row(cell) - (index.exists(cell) ? 0 : 1));
    output(rows);
  } else if (!std::strcmp(mode, "bits")) {  // seed, a, b in
    const std::vector<uint64_t> q = input<uint64_t>();
    std::vector<uint32_t> out;
    for (size_t n = 0; n + 2 < q.size(); n += 3) {
      out.push_back(gan3d::random_bits(q[n], uint32_t(q[n + 1]), uint32_t(q[n + 2])));
    }
    output(out);
  } else if (!std::strcmp(mode, "unit")) {  // seed, a, b in
    const std::vector<uint64_t> q = input<uint64_t>();
    std::vector<double> out;
    for (size_t n = 0; n + 2 < q.size(); n += 3) {
      out.push_back(gan3d::random_unit<double>(q[n], uint32_t(q[n + 1]), uint32_t(q[n + 2])));
      out.push_back(double(gan3d::random_unit<float>(q[n], uint32_t(q[n + 1]), uint32_t(q[n + 2]))));
    }
    output(out);
  }
}
"""


class Asked:
    def __init__(self, program: Path) -> None:
        self.program = program

    def __call__(self, *arguments: object, given: np.ndarray | None = None, dtype: type = np.float32) -> np.ndarray:
        data = b"" if given is None else np.ascontiguousarray(given).tobytes()
        return np.frombuffer(self.raw(*arguments, given=data), dtype=dtype)

    def raw(self, *arguments: object, given: bytes = b"") -> bytes:
        return subprocess.run([self.program, *map(str, arguments)], input=given, capture_output=True, check=True).stdout


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Asked:
    compiler = extension._compiler()
    if shutil.which(compiler) is None:
        pytest.skip(f"no C++ compiler `{compiler}` on the PATH")
    folder = tmp_path_factory.mktemp("common")
    (folder / "ask.cpp").write_text(PROGRAM)
    done = subprocess.run([compiler, "-std=c++17", *extension.CPU_FLAGS, f"-I{extension.CSRC}", "ask.cpp", "-o", "ask"],
                          cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Asked(folder / "ask")


# the exponential


def test_exp_is_right_to_one_and_a_half_units_in_the_last_place(ask: Asked) -> None:
    found = json.loads(ask.raw("sweep", 331))  # a prime: every exponent, all kinds of mantissas
    assert found["count"] > 6_000_000
    assert found["worst"] < 1.5, found
    assert found["wrong_zero"] == found["wrong_inf"] == 0


def test_exp_of_what_is_special(ask: Asked) -> None:
    x = np.array([np.nan, -np.inf, np.inf, 0.0, -0.0, -1e30, 1e30, 3.4e38, -3.4e38, 1e-45, -1e-45], np.float32)
    expected = np.array([np.nan, 0, np.inf, 1, 1, 0, np.inf, np.inf, 0, 1, 1], np.float32)
    for mode in ("exp", "exp1"):
        np.testing.assert_array_equal(ask(mode, given=x), expected)


def test_exp_at_the_ends_of_its_range(ask: Asked) -> None:
    low, high = np.float32(-87.33654), np.float32(88.72283)
    x = np.array([np.nextafter(low, np.float32(-90)), low, high, np.nextafter(high, np.float32(90))], np.float32)
    y = ask("exp1", given=x)
    assert y[0] == 0 and np.isinf(y[3])
    np.testing.assert_allclose(y[1:3], np.exp(x[1:3].astype(np.float64)), rtol=1.5 * 2.0**-23)


def test_exp_in_vector_registers_gives_the_same_bits(ask: Asked) -> None:
    x = np.random.default_rng(0).uniform(-95, 95, 100_003).astype(np.float32)
    assert ask("exp", given=x).tobytes() == ask("exp1", given=x).tobytes()


def test_exp_decreases_nowhere_by_more_than_one_unit_in_the_last_place(ask: Asked) -> None:
    # neighbours in sorted order, among them every float around powers of two
    x = [np.random.default_rng(0).uniform(-88, 88, 300_000).astype(np.float32)]
    for centre in np.arange(-126, 128) * np.log(2.0):
        start = np.float32(centre).view(np.int32)
        x.append((start + np.arange(-200, 200, dtype=np.int32)).view(np.float32))
    for centre in (np.arange(-126, 128) + 0.5) * np.log(2.0):  # where the reduction changes its multiple
        start = np.float32(centre).view(np.int32)
        x.append((start + np.arange(-200, 200, dtype=np.int32)).view(np.float32))
    values = np.sort(np.concatenate(x)[np.isfinite(np.concatenate(x))])
    y = ask("exp", given=values)
    step = np.diff(y) / np.spacing(y[:-1].clip(1e-37, 1e38))
    assert step.min() >= -1, values[:-1][step.argmin()]


# cells


RESOLUTIONS: list[Resolution] = [(4, 4, 4), (8, 8, 8), (12, 8, 4), (20, 12, 8), (64, 32, 96), (36, 4, 100)]


@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_cells_have_the_place_that_python_gives_them(ask: Asked, resolution: Resolution) -> None:
    p = torch.cartesian_prod(*(torch.arange(side) for side in resolution))
    check_cells(ask, p, resolution)


@pytest.mark.parametrize("resolution", [(1024, 1024, 1024), (2048, 1024, 1000), (2048, 2048, 508), (2048, 4, 4),
                                        (160, 2048, 1056)])
def test_cells_of_large_grids_have_the_place_that_python_gives_them(ask: Asked, resolution: Resolution) -> None:
    random = torch.Generator().manual_seed(0)
    p = (torch.rand(20_000, 3, generator=random, dtype=torch.float64) * torch.tensor(resolution)).long()
    p[:8] = torch.cartesian_prod(*(torch.tensor([0, side - 1]) for side in resolution))
    check_cells(ask, p, resolution)


def check_cells(ask: Asked, p: torch.Tensor, resolution: Resolution) -> None:
    out = ask("cells", *resolution, given=p.numpy().astype(np.int32), dtype=np.int64)
    assert out[0] == resolution[0] * resolution[1] * resolution[2]
    index, again = out[2:].reshape(-1, 4)[:, 0], out[2:].reshape(-1, 4)[:, 1:]
    np.testing.assert_array_equal(index, cell_index(p, resolution).numpy())
    np.testing.assert_array_equal(again, p.numpy())


def test_cells_outside_are_not_contained(ask: Asked) -> None:
    p = np.array([[-1, 0, 0], [0, -1, 0], [0, 0, -1], [12, 0, 0], [0, 8, 0], [0, 0, 4], [-2**31, 0, 0]], np.int32)
    out = ask("cells", 12, 8, 4, given=p, dtype=np.int64)[2:].reshape(-1, 4)
    assert (out == -1).all()


def test_rows_count_the_voxels_before(ask: Asked) -> None:
    random = np.random.default_rng(0)
    exists = random.random((9, 64)) < np.array([0, 1, 0.5, 0.1, 0.9, 0.5, 0, 1, 0.5])[:, None]
    words = (exists.astype(np.uint64) << np.arange(64, dtype=np.uint64)).sum(1, dtype=np.uint64).view(np.int64)
    counts = exists.sum(1)
    rows = ask("rows", given=np.concatenate([words, counts.cumsum() - counts]), dtype=np.int32)
    flat = exists.reshape(-1)
    np.testing.assert_array_equal(rows, np.where(flat, flat.cumsum() - 1, -2))  # −1 for none, less 1: not exists()


# random numbers


def philox(seed: int, a: int, b: int) -> int:
    """Philox2x32-10 with the second half of the key mixed in after five rounds, in Python's integers."""
    key, other = seed & 0xFFFFFFFF, seed >> 32
    for turn in range(10):
        product = 0xD256D193 * a
        a, b = (product >> 32) ^ key ^ b, product & 0xFFFFFFFF
        key = (key + 0x9E3779B9) & 0xFFFFFFFF
        if turn == 4:
            key ^= other
    return a


def test_random_bits_are_philox(ask: Asked) -> None:
    # known answers of the authors' Random123 for keys of 32 bits
    known = np.array([[0, 0, 0], [0xFFFFFFFF] * 3, [0x13198A2E, 0x243F6A88, 0x85A308D3]], np.uint64)
    assert ask("bits", given=known, dtype=np.uint32).tolist() == [0xFF1DAE59, 0x2C3F628B, 0xDD7CE038]
    asked = np.random.default_rng(0).integers(0, 2**32, (500, 3), dtype=np.uint64)
    asked[:, 0] |= np.random.default_rng(1).integers(0, 2**32, 500, dtype=np.uint64) << np.uint64(32)
    assert ask("bits", given=asked, dtype=np.uint32).tolist() == [philox(*map(int, row)) for row in asked]


def chi_squared(values: np.ndarray, bins: int) -> float:
    """Of the counts in equal bins, in standard deviations from its mean, were the values uniform."""
    counts, expected = np.bincount(values, minlength=bins), len(values) / bins
    return (((counts - expected) ** 2 / expected).sum() - (bins - 1)) / np.sqrt(2 * (bins - 1))


@pytest.mark.parametrize("varied", ["a", "b", "seed", "upper half of the seed"])
def test_random_numbers_are_uniform_and_independent(ask: Asked, varied: str) -> None:
    n = 1 << 18
    asked = np.tile(np.array([7, 3, 5], np.uint64), (n, 1))
    column = {"a": 1, "b": 2}.get(varied, 0)
    shift = np.uint64(32 if varied == "upper half of the seed" else 0)
    asked[:, column] = np.arange(n, dtype=np.uint64) << shift
    u, low = ask("unit", given=asked, dtype=np.float64).reshape(n, 2).T
    np.testing.assert_array_equal(u, low)  # a multiple of 2^−24 is exact in float too
    assert u.min() >= 0 and u.max() < 1 and (u * 2**24 == np.floor(u * 2**24)).all()
    # numbers that follow each other, as pairs; high and low digits: within 5 standard deviations
    cell = np.floor(u * 64).astype(np.int64)
    assert abs(chi_squared(cell[:-1] * 64 + cell[1:], 4096)) < 5
    assert abs(chi_squared((u * 2**24).astype(np.int64) % 256, 256)) < 5
    assert abs(u.mean() - 0.5) < 5 / np.sqrt(12 * n)
