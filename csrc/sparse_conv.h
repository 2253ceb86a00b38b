// Sparse convolutions: which rows of one grid meet which rows of another, tap by tap of a 3³ weight, and sums over them.
// Tap 9x + 3y + z of a weight [.., 3, 3, 3] is that at (x, y, z).
#pragma once

#include "voxels.h"

namespace gan3d::sparse_conv {

constexpr int kTaps = 27;

struct Pair {  // `source` times the tap's weight is added to `target`
  int32_t source, target;
};

// A transposed convolution with stride 2 adds the value at q, times the weight at t, to 2q + t: the coarse coordinate
// that reaches the fine coordinate p through tap t. Only taps of p's parity do; others must not be asked for.
HD constexpr int32_t coarse_coordinate(int32_t p, int tap) { return p / 2 - (tap == 2); }
HD constexpr bool reaches(int32_t p, int tap) { return ((p ^ tap) & 1) == 0; }

// The coarse row that reaches the fine voxel (x, y, z) through a tap; −1: none.
HD int32_t coarse_row(const VoxelIndex& coarse, int32_t x, int32_t y, int32_t z, int tap) {
  const int i = tap / 9, j = tap / 3 % 3, k = tap % 3;
  if (!(reaches(x, i) && reaches(y, j) && reaches(z, k))) return -1;
  return row_at(coarse, coarse_coordinate(x, i), coarse_coordinate(y, j), coarse_coordinate(z, k));
}

}  // namespace gan3d::sparse_conv
