// Marching a ray through the occupancy bit field. The samples are points of a lattice that depends on the ray alone:
// skipping empty space changes which points are looked at, never where they are.
#pragma once

#include "occupancy.h"

namespace gan3d {

// Where a ray is inside a box, kept to [near, far]; a miss, or a mere touch, gives near twice. A ray parallel to a slab
// is inside it if its origin is, faces included.
template <class T>
HD void ray_aabb(Vec3<T> o, Vec3<T> d, const T* box, T near, T far, T& enter, T& leave) {
  T from = near, to = far;
  for (int axis = 0; axis < 3; ++axis) {
    const T low = box[axis], high = box[3 + axis];
    if (d[axis] == T(0)) {
      if (!(low <= o[axis] && o[axis] <= high)) to = T(-INFINITY);
    } else {
      const T a = (low - o[axis]) / d[axis], b = (high - o[axis]) / d[axis];
      from = max(from, min(a, b)), to = min(to, max(a, b));
    }
  }
  const bool hit = from < to;
  enter = hit ? from : near, leave = hit ? to : near;
}

constexpr int32_t kLatticeEnd = 1 << 24;  // counts stay exact in float
enum Jitter { kMiddle, kPerRay, kPerSample };

template <class T>
struct Lattice {
  T near, step, cone, max_step, offset;
  uint64_t seed;
  uint32_t ray;
  bool per_sample;

  HD T u(int32_t k) const { return per_sample ? random_unit<T>(seed, ray, uint32_t(k)) : offset; }
  HD T at(int32_t k) const { return near + (T(k) + u(k)) * step; }  // cone = 0; never decreases with k
  HD T width(T s) const { return clamp(s * cone, step, max_step); }
};

template <class T>
HD Lattice<T> make_lattice(T near, T step, T cone, T max_step, int64_t jitter, int64_t seed, int64_t ray) {
  const T offset = jitter == kPerRay ? random_unit<T>(uint64_t(seed), uint32_t(ray), 0) : T(0.5);
  return {near, step, cone, max_step, offset, uint64_t(seed), uint32_t(ray), jitter == kPerSample};
}

// A span of t outside which no point of the ray lies in the outermost box or in [near, far), rounding of the points and
// of this computation included. Empty: from ≥ to.
struct Span {
  double from, to;
};

template <class T>
HD Span span(const Occupancy<T>& grid, Vec3<T> o, Vec3<T> d, T near, T far) {
  const double eps = sizeof(T) == 4 ? 1.1920929e-7 : 2.220446049250313e-16;
  double from = double(near), to = double(far);
  for (int axis = 0; axis < 3; ++axis) {
    const double centre = double(grid.centre[axis]), origin = double(o[axis]), slope = double(d[axis]);
    const int32_t side = axis == 0 ? grid.cells.x : axis == 1 ? grid.cells.y : grid.cells.z;
    double reach = double(side) * double(1 << (grid.levels - 1)) * 0.5 / double(grid.scale[axis]);
    reach += 32 * eps * (fabs(origin) + fabs(centre) + reach);
    if (slope == 0) {
      if (fabs(origin - centre) > reach) to = from;
    } else {
      const double inverse = 1 / slope, middle = (centre - origin) * inverse, half = fabs(reach * inverse);
      const double a = middle - half, b = middle + half;
      from = max(from, a - 8 * eps * fabs(a)), to = min(to, b + 8 * eps * fabs(b));
    }
  }
  return {from, to};
}

// The lattice points of a span when cone = 0: first ≤ k < last.
template <class T>
HD void lattice_range(const Lattice<T>& lattice, Span span, int32_t& first, int32_t& last) {
  first = last = 0;
  if (!(span.from < span.to)) return;
  const double eps = sizeof(T) == 4 ? 1.1920929e-7 : 2.220446049250313e-16;
  const double near = double(lattice.near), per = 1 / double(lattice.step);
  // a lattice point is off by some roundings of its size, and up to one step before or after its number
  const double a = (span.from - near) * per, b = (span.to - near) * per;
  const double slack = 2 + 8 * eps * fabs(near) * per;
  const double low = a - slack - 8 * eps * fabs(a), high = b + slack + 8 * eps * fabs(b);
  first = int32_t(clamp(low, 0.0, double(kLatticeEnd)));
  last = high < double(kLatticeEnd) ? int32_t(max(high, 0.0)) : kLatticeEnd;
}

template <class T>
HD bool finite(T x) { return x - x == T(0); }
template <class T>
HD bool finite(Vec3<T> v) { return finite(v.x) && finite(v.y) && finite(v.z); }

template <class T>
HD Vec3<T> point(Vec3<T> o, Vec3<T> d, T t) { return {o.x + t * d.x, o.y + t * d.y, o.z + t * d.z}; }

// The number of the last lattice point before the ray leaves the 4³ block `low` of level l; an estimate.
template <class T>
HD T leaving(const Occupancy<T>& grid, Cell3 low, int l, Vec3<T> o, Vec3<T> d, const Lattice<T>& lattice) {
  T t = T(INFINITY);
  for (int axis = 0; axis < 3; ++axis) {
    if (d[axis] == T(0)) continue;
    const int32_t side = axis == 0 ? grid.cells.x : axis == 1 ? grid.cells.y : grid.cells.z;
    const int32_t edge = (axis == 0 ? low.x : axis == 1 ? low.y : low.z) + (d[axis] > T(0) ? 4 : 0) - (side >> 1);
    t = min(t, (grid.centre[axis] + T(edge) * T(1 << l) / grid.scale[axis] - o[axis]) / d[axis]);
  }
  return (t - lattice.near) / lattice.step - (lattice.per_sample ? T(1) : lattice.offset);
}

// emit(t, delta) for each sample, near to far, until it returns false. cone = 0. Where a word of the bit field is
// zero, a block of 4³ cells is empty, and the march goes on behind it. The jump is proved, not estimated: coordinates
// are monotone along the lattice, so if the last point passed over lies in the block, all before it do.
template <class T, class Emit>
HD void march_even(const Occupancy<T>& grid, const Lattice<T>& lattice, Vec3<T> o, Vec3<T> d, T far, const Emit& emit) {
  int32_t k, last;
  lattice_range(lattice, span(grid, o, d, lattice.near, far), k, last);
  const int lowest = grid.level_of_length(lattice.step);
  while (k < last) {
    const T t = lattice.at(k);
    if (!(t < far)) return;
    const Cell3 c = grid.place(point(o, d, t));
    const int l = grid.level(c, lowest);
    int32_t next = k + 1;
    if (l < grid.levels) {
      const Cell3 q = grid.at(c, l);
      const int64_t cell = grid.cells.index(q.x, q.y, q.z);
      const uint64_t word = grid.word(l, cell);
      if ((word >> (cell & 63)) & 1) {
        if (!emit(t, lattice.step)) return;
      } else if (word == 0) {
        const Cell3 low{q.x & ~3, q.y & ~3, q.z & ~3};
        // all of the block must belong to level l: none of it to the box of the finer level
        const auto outside = [](int32_t at, int32_t side) { return at + 4 <= side / 4 || at >= side / 4 * 3; };
        const bool whole = l == lowest || outside(low.x, grid.cells.x) || outside(low.y, grid.cells.y) ||
                           outside(low.z, grid.cells.z);
        T guess = whole ? leaving(grid, low, l, o, d, lattice) : T(0);
        for (int tries = 0; tries < 2 && guess >= T(next); ++tries, guess -= T(1)) {
          const int32_t passed = int32_t(min(guess, T(last - 1)));
          const Cell3 p = grid.at(grid.place(point(o, d, lattice.at(passed))), l);
          if ((p.x & ~3) == low.x && (p.y & ~3) == low.y && (p.z & ~3) == low.z) {
            next = max(next, passed + 1);
            break;
          }
        }
      }
    }
    k = next;
  }
}

// The same with intervals that grow: each start is the sum of the widths before it, so every interval is visited.
template <class T, class Emit>
HD void march_cone(const Occupancy<T>& grid, const Lattice<T>& lattice, Vec3<T> o, Vec3<T> d, T far, const Emit& emit) {
  const Span limits = span(grid, o, d, lattice.near, far);
  if (!(limits.from < limits.to)) return;
  T s = lattice.near;
  for (int32_t k = 0; k < kLatticeEnd && double(s) < limits.to; ++k) {
    const T width = lattice.width(s), next = s + width, delta = next - s;
    if (double(next) + double(width) > limits.from) {  // the width once more, for the rounding of t
      const T t = s + lattice.u(k) * delta;
      if (t < far && grid.occupied(point(o, d, t), grid.level_of_length(width)) && !emit(t, delta)) return;
    }
    s = next;
  }
}

// Everything between near and far: emit(t, delta) until it returns false.
template <class T, class Emit>
HD void march_all(const Lattice<T>& lattice, T far, const Emit& emit) {
  T s = lattice.near;
  for (int32_t k = 0; k < kLatticeEnd; ++k) {
    const T next = lattice.cone > T(0) ? s + lattice.width(s) : s;
    const T t = lattice.cone > T(0) ? s + lattice.u(k) * (next - s) : lattice.at(k);
    if (lattice.cone > T(0) ? !(s < far) : !(t < far)) return;
    if (t < far && !emit(t, lattice.cone > T(0) ? next - s : lattice.step)) return;
    s = next;
  }
}

// One ray of the op, whatever the options. Rays that are not finite, or end before they start, have no samples.
template <class T, class Emit>
HD void march_ray(const Occupancy<T>* grid, const Lattice<T>& lattice, Vec3<T> o, Vec3<T> d, T far, const Emit& emit) {
  if (!(lattice.near < far) || !finite(lattice.near)) return;
  if (grid == nullptr) return march_all(lattice, far, emit);
  if (!grid->valid || !finite(o) || !finite(d)) return;
  if (lattice.cone > T(0)) return march_cone(*grid, lattice, o, d, far, emit);
  march_even(*grid, lattice, o, d, far, emit);
}

}  // namespace gan3d
