// Linear interpolation along an axis, and of a voxel grid whose channels are the last axis: a voxel is one row.
#pragma once

#include "common.h"

namespace gan3d {

// The two cells around a coordinate: cell i has its centre at coordinate i. Both indices are cells that exist, whatever
// the coordinate; what lies beyond the sides has weight 0.
template <class T>
struct Axis {
  int32_t lo, hi;
  T weight_lo, weight_hi;  // of the value at lo and hi
  T slope_lo, slope_hi;    // derivatives of the weights: −1 or 0, 1 or 0

  HD bool nothing() const { return weight_lo == T(0) && weight_hi == T(0); }
};

// The coordinate moves to [0, side − 1] first. On the ends and beyond the slopes are 0; nan gives weights of nan.
template <class T>
HD Axis<T> border_axis(T x, int32_t side) {
  const T last = T(side - 1), y = clamp(x, T(0), last);
  const T slope = x > T(0) && x < last ? T(1) : T(0);
  const int32_t lo = min(int32_t(y > T(0) ? y : T(0)), side - 1);
  const T part = y - T(lo);
  return {lo, min(lo + 1, side - 1), T(1) - part, part, -slope, slope};
}

// Cells beyond the sides are 0; so is everything where x is nan. The slopes are those of F.grid_sample: at a cell's
// centre, the ones on its right.
template <class T>
HD Axis<T> zeros_axis(T x, int32_t side) {
  const bool inside = x >= T(-1) && x < T(side);
  const T y = inside ? x : T(-2);  // between two cells that are not there
  const int32_t lo = int32_t(std::floor(y));
  const T part = y - T(lo);
  const bool has_lo = lo >= 0, has_hi = lo >= -1 && lo < side - 1;
  return {clamp(lo, 0, side - 1), clamp(lo + 1, 0, side - 1), has_lo ? T(1) - part : T(0), has_hi ? part : T(0),
          has_lo ? T(-1) : T(0), has_hi ? T(1) : T(0)};
}

struct Sides {
  int32_t x, y, z;
};

// The eight voxels around a point, corner bits x·4 + y·2 + z.
template <class T>
struct Trilinear {
  Axis<T> x, y, z;
  int64_t first;  // voxel (x.lo, y.lo, z.lo)
  int64_t step_x, step_y, step_z;  // to the other voxel along each axis, in voxels

  HD int64_t voxel(int corner) const {
    return first + (corner & 4 ? step_x : 0) + (corner & 2 ? step_y : 0) + (corner & 1 ? step_z : 0);
  }
  HD T weight(int corner) const {
    return (corner & 4 ? x.weight_hi : x.weight_lo) * (corner & 2 ? y.weight_hi : y.weight_lo) *
           (corner & 1 ? z.weight_hi : z.weight_lo);
  }
  HD bool nothing() const { return x.nothing() || y.nothing() || z.nothing(); }
};

template <bool Zeros, class T>
HD Trilinear<T> trilinear(Vec3<T> p, Sides sides) {
  Trilinear<T> s;
  s.x = Zeros ? zeros_axis(p.x, sides.x) : border_axis(p.x, sides.x);
  s.y = Zeros ? zeros_axis(p.y, sides.y) : border_axis(p.y, sides.y);
  s.z = Zeros ? zeros_axis(p.z, sides.z) : border_axis(p.z, sides.z);
  s.first = (int64_t(s.x.lo) * sides.y + s.y.lo) * sides.z + s.z.lo;
  s.step_x = int64_t(s.x.hi - s.x.lo) * sides.y * sides.z;
  s.step_y = int64_t(s.y.hi - s.y.lo) * sides.z;
  s.step_z = s.z.hi - s.z.lo;
  return s;
}

// C channels where the compiler knows how many (C > 0), else `channels`.
template <int C, class T>
HD void trilinear_value(const T* grid, const Trilinear<T>& s, int channels, T* out) {
  const int n = C > 0 ? C : channels;
  const T *v0 = grid + s.voxel(0) * n, *v1 = grid + s.voxel(1) * n, *v2 = grid + s.voxel(2) * n,
          *v3 = grid + s.voxel(3) * n, *v4 = grid + s.voxel(4) * n, *v5 = grid + s.voxel(5) * n,
          *v6 = grid + s.voxel(6) * n, *v7 = grid + s.voxel(7) * n;
  const T w0 = s.weight(0), w1 = s.weight(1), w2 = s.weight(2), w3 = s.weight(3), w4 = s.weight(4), w5 = s.weight(5),
          w6 = s.weight(6), w7 = s.weight(7);
#pragma omp simd
  for (int c = 0; c < n; ++c) {
    const T low = fma(w3, v3[c], fma(w2, v2[c], fma(w1, v1[c], w0 * v0[c])));
    out[c] = low + fma(w7, v7[c], fma(w6, v6[c], fma(w5, v5[c], w4 * v4[c])));
  }
}

// Gradient of Σ g·value in the point's coordinates.
template <int C, class T>
HD Vec3<T> trilinear_slope(const T* grid, const Trilinear<T>& s, int channels, const T* g) {
  const int n = C > 0 ? C : channels;
  T along_x = 0, along_y = 0, along_z = 0;
  for (int column = 0; column < 4; ++column) {  // the four pairs of voxels along z
    const Axis<T>&x = s.x, &y = s.y, &z = s.z;
    const bool hi_x = column & 2, hi_y = column & 1;
    const T wx = hi_x ? x.weight_hi : x.weight_lo, wy = hi_y ? y.weight_hi : y.weight_lo;
    const T *v0 = grid + s.voxel(2 * column) * n, *v1 = grid + s.voxel(2 * column + 1) * n;
    T dot0 = 0, dot1 = 0;
#pragma omp simd reduction(+ : dot0, dot1)
    for (int c = 0; c < n; ++c) dot0 += g[c] * v0[c], dot1 += g[c] * v1[c];  // an fma would not vectorise here
    const T value = z.weight_lo * dot0 + z.weight_hi * dot1;
    along_x = fma((hi_x ? x.slope_hi : x.slope_lo) * wy, value, along_x);
    along_y = fma(wx * (hi_y ? y.slope_hi : y.slope_lo), value, along_y);
    along_z = fma(wx * wy, z.slope_lo * dot0 + z.slope_hi * dot1, along_z);
  }
  return {along_x, along_y, along_z};
}

}  // namespace gan3d
