// Trilinear interpolation in a sparse voxel grid: the eight voxels around a point, their sum, its derivatives, and the
// walk of a ray that finds out which voxels are seen. Torch-free.
//
// The arithmetic is written for a lane type V: T itself, or a vector of T (the CPU's registers). A row of C channels is
// read as vectors at offsets 0, W, 2W, …, the last one pulled back to end with the row. No masks: lanes that overlap
// are computed twice.
#pragma once

#include "lanes.h"

namespace gan3d::sparse_grid {

// The cell of (i, j, k) is x(i) + y(j) + z(k): the axes have bits of their own in Morton order.
HD int64_t x_part(const Cells& c, int32_t i) {
  return (int64_t(i >> c.shift) * (c.y >> c.shift) * (c.z >> c.shift) << (3 * c.shift)) +
         Cells::spread(i & ((1u << c.shift) - 1));
}
HD int64_t y_part(const Cells& c, int32_t j) {
  return (int64_t(j >> c.shift) * (c.z >> c.shift) << (3 * c.shift)) + (Cells::spread(j & ((1u << c.shift) - 1)) << 1);
}
HD int64_t z_part(const Cells& c, int32_t k) {
  return (int64_t(k >> c.shift) << (3 * c.shift)) + (Cells::spread(k & ((1u << c.shift) - 1)) << 2);
}

// A point within the grid: clamped to [0, side − 1], the lower of its two voxels along each axis, how far beyond it.
template <class T>
struct Place {
  int32_t i, j, k;
  T x, y, z;  // 0 to 1

  HD static int32_t along(T& x, int32_t side) {
    x = clamp(x, T(0), T(side - 1));
    const int32_t i = max(min(int32_t(x), side - 2), 0);  // the last voxel is the upper one of the last pair; nan is 0
    x -= T(i);
    return i;
  }
};

template <class T>
HD Place<T> find_place(const Cells& cells, Vec3<T> p) {
  Place<T> at;
  at.i = Place<T>::along(p.x, cells.x), at.j = Place<T>::along(p.y, cells.y), at.k = Place<T>::along(p.z, cells.z);
  at.x = p.x, at.y = p.y, at.z = p.z;
  return at;
}

// Cells of the eight corners; bit 0 of the corner's number is x, bit 1 y, bit 2 z.
template <class T>
HD void corner_cells(const Cells& cells, const Place<T>& at, int64_t cell[8]) {
  const int64_t x[2] = {x_part(cells, at.i), x_part(cells, at.i + 1)};
  const int64_t y[2] = {y_part(cells, at.j), y_part(cells, at.j + 1)};
  const int64_t z[2] = {z_part(cells, at.k), z_part(cells, at.k + 1)};
  for (int c = 0; c < 8; ++c) cell[c] = x[c & 1] + y[(c >> 1) & 1] + z[c >> 2];
}

template <class T>
struct Corners {
  int32_t row[8];  // −1: no such voxel
  T weight[8];
  bool any;
};

template <class T>
HD Corners<T> find_corners(const VoxelIndex& grid, const Place<T>& at) {
  Corners<T> out;
  int64_t cell[8];
  corner_cells(grid.cells, at, cell);
  int32_t all = -1;
  for (int c = 0; c < 8; ++c) {
    out.row[c] = grid.row(cell[c]);
    all &= out.row[c];
  }
  out.any = all != -1;
  const T x[2] = {T(1) - at.x, at.x}, y[2] = {T(1) - at.y, at.y}, z[2] = {T(1) - at.z, at.z};
  for (int c = 0; c < 8; ++c) out.weight[c] = x[c & 1] * y[(c >> 1) & 1] * z[c >> 2];
  return out;
}

// C numbers of T as vectors V.
template <class V, class T, int C>
struct Lanes {
  static constexpr int width = int(sizeof(V) / sizeof(T)), count = (C + width - 1) / width;
  static_assert(width <= C);
  HD static constexpr int offset(int v) { return v * width < C - width ? v * width : C - width; }
};

// Σ weight·values over the corners, C channels of rows `stride` apart.
template <class V, int C, class T>
HD void interpolate(const Corners<T>& at, const T* values, int64_t stride, T* out) {
  using L = Lanes<V, T, C>;
  V sum[L::count] = {};
  for (int c = 0; c < 8; ++c) {
    if (at.row[c] < 0) continue;
    const T* row = values + at.row[c] * stride;
    for (int v = 0; v < L::count; ++v) sum[v] = sum[v] + at.weight[c] * load<V>(row + L::offset(v));
  }
  for (int v = 0; v < L::count; ++v) store(out + L::offset(v), sum[v]);
}

// Adds weight·g to the row of one corner.
template <class V, int C, class T>
HD void add_to_row(T weight, const T* g, T* row) {
  using L = Lanes<V, T, C>;
  V sum[L::count];  // all read before any is written: where the last two overlap, both write the same numbers
  for (int v = 0; v < L::count; ++v) sum[v] = load<V>(row + L::offset(v)) + weight * load<V>(g + L::offset(v));
  for (int v = 0; v < L::count; ++v) store(row + L::offset(v), sum[v]);
}

// Gradient of Σ g[c]·out[c] of `interpolate` with respect to x, y and z of the place, spread over lanes: the sum of the
// lanes is it. `g` holds vectors: lanes that overlap must be 0 in one of the two.
template <class V, int C, class T>
HD Vec3<V> place_gradient(const Corners<T>& at, const Place<T>& place, const T* values, int64_t stride,
                          const V (&g)[Lanes<V, T, C>::count]) {
  using L = Lanes<V, T, C>;
  const T x[2] = {T(1) - place.x, place.x}, y[2] = {T(1) - place.y, place.y}, z[2] = {T(1) - place.z, place.z};
  Vec3<V> out{V{}, V{}, V{}};
  for (int c = 0; c < 8; ++c) {
    if (at.row[c] < 0) continue;
    const T* row = values + at.row[c] * stride;
    V product = g[0] * load<V>(row);
    for (int v = 1; v < L::count; ++v) product = product + g[v] * load<V>(row + L::offset(v));
    const T wx = x[c & 1], wy = y[(c >> 1) & 1], wz = z[c >> 2];
    out.x = out.x + (c & 1 ? wy * wz : -(wy * wz)) * product;
    out.y = out.y + (c & 2 ? wx * wz : -(wx * wz)) * product;
    out.z = out.z + (c & 4 ? wx * wy : -(wx * wy)) * product;
  }
  return out;
}

// The gradient of a point from that of its place: clamped beyond the outermost voxels, nothing moves there.
template <class T>
HD void store_place_gradient(const VoxelIndex& grid, const T* point, Vec3<T> g, T* out) {
  const int32_t sides[3] = {grid.cells.x, grid.cells.y, grid.cells.z};
  for (int axis = 0; axis < 3; ++axis)
    out[axis] = point[axis] >= T(0) && point[axis] <= T(sides[axis] - 1) ? g[axis] : T(0);
}

// Channels of a point (density, then K coefficients of red, of green, of blue) to density and colour, and back.
template <int K, class T>
HD void evaluate_sh(const T* channels, const T* basis, T* density, T* rgb) {
  density[0] = channels[0];
  for (int c = 0; c < 3; ++c) {
    T sum = channels[1 + c * K] * basis[0];
    for (int k = 1; k < K; ++k) sum = fma(channels[1 + c * K + k], basis[k], sum);
    rgb[c] = sum;
  }
}
template <int K, class T>
HD void evaluate_sh_backward(T grad_density, const T* grad_rgb, const T* basis, T* channels) {
  channels[0] = grad_density;
  for (int c = 0; c < 3; ++c)
    for (int k = 0; k < K; ++k) channels[1 + c * K + k] = grad_rgb[c] * basis[k];
}

// A ray in grid coordinates: unit steps are voxels long, `length` scene units each.
template <class T>
struct GridRay {
  Vec3<T> origin, direction;
  T near, length;
  int32_t samples;  // at near + i·step, all within [−0.5, side − 0.5]
};

template <class T>
HD bool clip(T origin, T direction, T hi, T& near, T& far) {
  if (direction == T(0)) return origin >= T(-0.5) && origin <= hi;
  const T a = (T(-0.5) - origin) / direction, b = (hi - origin) / direction;
  near = max(near, min(a, b)), far = min(far, max(a, b));
  return true;
}

template <class T>
HD GridRay<T> enter(const Cells& cells, const T* rays_o, const T* rays_d, const T* aabb, T step) {
  const Vec3<T> o = load3(rays_o), d = load3(rays_d), lo = load3(aabb), hi = load3(aabb + 3);
  const Vec3<T> scale{T(cells.x) / (hi.x - lo.x), T(cells.y) / (hi.y - lo.y), T(cells.z) / (hi.z - lo.z)};
  GridRay<T> ray{{(o.x - lo.x) * scale.x - T(0.5), (o.y - lo.y) * scale.y - T(0.5), (o.z - lo.z) * scale.z - T(0.5)},
                 {d.x * scale.x, d.y * scale.y, d.z * scale.z}, T(0), T(0), 0};
  const Vec3<T> v = ray.direction;
  const T norm = std::sqrt(v.x * v.x + v.y * v.y + v.z * v.z);
  if (!(norm > T(0))) return ray;
  ray.direction = {v.x / norm, v.y / norm, v.z / norm};
  ray.length = std::sqrt(d.x * d.x + d.y * d.y + d.z * d.z) / norm;
  T near = 0, far = T(1e30);
  const bool hit = clip(ray.origin.x, ray.direction.x, T(cells.x) - T(0.5), near, far) &&
                   clip(ray.origin.y, ray.direction.y, T(cells.y) - T(0.5), near, far) &&
                   clip(ray.origin.z, ray.direction.z, T(cells.z) - T(0.5), near, far);
  ray.near = near;
  if (hit && near <= far) ray.samples = int32_t((far - near) / step) + 1;
  return ray;
}

// Where a ray within [lo, hi − 1] leaves it along one axis.
template <class T>
HD T leave(T origin, T direction, int32_t lo, int32_t hi, int32_t side) {
  if (direction > T(0)) return hi < side ? (T(hi - 1) - origin) / direction : T(1e30);
  if (direction < T(0)) return lo > 0 ? (T(lo) - origin) / direction : T(1e30);
  return T(1e30);
}

// The next sample to look at after sample i, around which no voxel exists. `cell` holds its lower corner; the largest
// empty cube of 4·2^l voxels around it is left in one step (cells of such a cube are consecutive: rank counts them).
// Within [lo, hi − 1] of the cube all eight corners are its own, and at the grid's border points are clamped into it.
template <class T>
HD int32_t skip(const VoxelIndex& grid, const GridRay<T>& ray, const Place<T>& at, int64_t cell, T step, int32_t i) {
  if (grid.words[cell >> 6] != 0) return i + 1;
  int32_t bits = 2;
  while (bits < grid.cells.shift) {
    const int64_t wider = (cell >> (3 * (bits + 1)) << (3 * (bits + 1))) >> 6;
    if (grid.rank[wider] != grid.rank[wider + (int64_t(1) << (3 * (bits + 1) - 6))]) break;
    ++bits;
  }
  const int32_t side = 1 << bits, x = at.i >> bits << bits, y = at.j >> bits << bits, z = at.k >> bits << bits;
  if ((at.i + 1 == x + side) | (at.j + 1 == y + side) | (at.k + 1 == z + side)) return i + 1;  // beyond hi − 1
  const T t = min(min(leave(ray.origin.x, ray.direction.x, x, x + side, grid.cells.x),
                      leave(ray.origin.y, ray.direction.y, y, y + side, grid.cells.y)),
                  leave(ray.origin.z, ray.direction.z, z, z + side, grid.cells.z));
  // The last sample before the exit is looked at, so that a rounding of t cannot lose the first one beyond it.
  const T steps = min((t - ray.near) / step, T(ray.samples));
  return max(i + 1, int32_t(steps));
}

// Calls seen(row, weight) for each voxel around each sample of positive density, until the transmittance falls below
// `stop`. The weight is that of the whole sample, not multiplied by the voxel's share.
template <class T, class F>
HD void walk(const VoxelIndex& grid, const T* density, const GridRay<T>& ray, T step, T stop, const F& seen) {
  T transmittance = 1;
  for (int32_t i = 0; i < ray.samples;) {
    const T t = fma(T(i), step, ray.near);
    const Vec3<T> point{fma(t, ray.direction.x, ray.origin.x), fma(t, ray.direction.y, ray.origin.y),
                        fma(t, ray.direction.z, ray.origin.z)};
    const Place<T> at = find_place(grid.cells, point);
    const Corners<T> corners = find_corners(grid, at);
    if (!corners.any) {
      i = skip(grid, ray, at, grid.cells.index(at.i, at.j, at.k), step, i);
      continue;
    }
    ++i;
    T raw = 0;
    interpolate<T, 1>(corners, density, 1, &raw);
    if (!(raw > T(0))) continue;
    const T through = exp(-raw * step * ray.length), weight = transmittance * (T(1) - through);
    for (int c = 0; c < 8; ++c)
      if (corners.row[c] >= 0) seen(corners.row[c], weight);
    transmittance *= through;
    if (transmittance < stop) return;
  }
}

// Numbers ≥ 0 compare like their bits.
HD int32_t bits_of(float x) {
  union { float f; int32_t i; } u{x};
  return u.i;
}
HD long long bits_of(double x) {
  union { double f; long long i; } u{x};
  return u.i;
}

}  // namespace gan3d::sparse_grid
