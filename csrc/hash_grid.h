// Instant-NGP's hash grid, one point in one level: the cell it lies in, the table rows of the cell's eight corners, and
// their trilinear weights. The rules are tiny-cuda-nn's, so its tables can be read.
//
// Corner c is the cell plus (c & 1, c >> 1 & 1, c >> 2). Cells are 32-bit unsigned and wrap: a point outside the unit
// cube reads some row of its level, never another level's. Cells are taken at most 2^30 away from zero, so that NaN and
// infinity have one as well; their weights are NaN.
#pragma once

#include "common.h"

namespace gan3d {

struct HashLevel {
  float scale;          // cells in a unit of length
  uint32_t resolution;  // corners along an axis
  uint32_t rows;        // of the table; a power of two if hashed
  bool dense;           // a row for every corner; otherwise hashed
  int64_t first;        // its first row
};

template <class T>
struct HashAxis {
  uint32_t cell;
  T fraction;  // in [0, 1)
};

HD float hash_floor(float x) { return ::floorf(x); }
HD double hash_floor(double x) { return ::floor(x); }

// The half shift keeps the corners of different levels from lining up.
template <class T>
HD HashAxis<T> hash_axis(T x, T scale) {
  const T p = x * scale + T(0.5), whole = hash_floor(p), limit = T(1 << 30);
  const T above = whole > -limit ? whole : -limit;  // in this order NaN becomes −limit
  const T cell = above < limit ? above : limit;
  return {uint32_t(int32_t(cell)), p - whole};
}

// Below `rows` if hashed. If dense: for corners of the unit cube below 2·rows (the last cell's far corners lie one
// beyond the grid), for others anything; the row is the remainder by `rows`.
template <bool dense>
HD uint32_t hash_index(const HashLevel& level, uint32_t x, uint32_t y, uint32_t z) {
  if (dense) return x + level.resolution * (y + level.resolution * z);
  return (x ^ y * 2654435761u ^ z * 805459861u) & (level.rows - 1);
}

template <class T>
struct HashCorners {
  uint32_t row[8];
  T fraction[3];

  HD T side(int axis, int upper) const { return upper ? fraction[axis] : T(1) - fraction[axis]; }
  HD T weight(int c) const { return side(0, c & 1) * (side(1, c >> 1 & 1) * side(2, c >> 2)); }
  // Derivative of the weight of corner c by the position along an axis, in cells.
  HD T slope(int c, int axis) const {
    const int a = axis == 0 ? 1 : 0, b = axis == 2 ? 1 : 2;
    const T face = side(a, c >> a & 1) * side(b, c >> b & 1);
    return c >> axis & 1 ? face : -face;
  }
};

template <class T>
HD HashCorners<T> hash_corners(const HashLevel& level, Vec3<T> point) {
  const T scale = T(level.scale);
  const HashAxis<T> x = hash_axis(point.x, scale), y = hash_axis(point.y, scale), z = hash_axis(point.z, scale);
  HashCorners<T> out;
  out.fraction[0] = x.fraction, out.fraction[1] = y.fraction, out.fraction[2] = z.fraction;
  for (int c = 0; c < 8; ++c) {
    const uint32_t i = x.cell + (c & 1), j = y.cell + (c >> 1 & 1), k = z.cell + (c >> 2);
    out.row[c] = level.dense ? hash_index<true>(level, i, j, k) % level.rows : hash_index<false>(level, i, j, k);
  }
  return out;
}

}  // namespace gan3d
