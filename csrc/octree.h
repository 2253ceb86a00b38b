// Sparse voxel octrees as PlenOctrees (2021) store them: a node is a table of 2³ cells, in the order 4x + 2y + z; `child`
// holds for each cell how many nodes ahead its child node lies, 0 for a leaf. Node 0 is the root. A leaf's number is
// 8·node + cell.
//
// Places inside the tree are integers in units of the finest cell there can be, 2^−20 of the root. Where a ray crosses
// plane k of an axis is one formula, `octree_plane`, monotone in k whatever is rounded, and every choice of the way is a
// comparison with it: the leaves of a ray therefore cut its span into pieces without a gap, an overlap or a piece of no
// length, and a ray cannot stick to a face. svox and volrend add 1e-5 … 1e-3 of the root to each step instead, which
// lengthens every piece and skips thinner ones.
#pragma once

#include "common.h"

namespace gan3d {

constexpr int kOctreeLevels = 20;  // of nodes; deeper ones are not entered
constexpr int32_t kOctreeSide = 1 << kOctreeLevels;

struct OctreeNodes {
  const int32_t* child;
  int32_t count;

  // The node under this cell, or −1 for a leaf; so is what an offset out of the table points to.
  HD int32_t below(int32_t node, int32_t leaf) const {
    const int32_t next = int32_t(uint32_t(node) + uint32_t(child[leaf]));
    return next != node && uint32_t(next) < uint32_t(count) ? next : -1;
  }
};

// The leaf at a point of the unit cube and the edge of its cell in units; −1 and 0 outside [0, 1)³.
template <class T>
HD int32_t octree_query(OctreeNodes tree, Vec3<T> p, int32_t& side) {
  side = 0;
  if (!(p.x >= T(0) && p.y >= T(0) && p.z >= T(0) && p.x < T(1) && p.y < T(1) && p.z < T(1))) return -1;
  const int32_t x = int32_t(p.x * T(kOctreeSide)), y = int32_t(p.y * T(kOctreeSide)), z = int32_t(p.z * T(kOctreeSide));
  int32_t leaf = 0;
  for (int32_t node = 0, half = kOctreeSide >> 1; half > 0 && node >= 0; half >>= 1) {
    leaf = 8 * node + ((x & half) ? 4 : 0) + ((y & half) ? 2 : 0) + ((z & half) ? 1 : 0);
    side = half;
    node = tree.below(node, leaf);
  }
  return leaf;
}

// Where along a ray plane k of an axis is crossed: at −inf or inf, or NaN in the plane, if the ray is parallel to it.
template <class T>
HD T octree_plane(T k, T low, T unit, T origin, T inverse) { return (low + k * unit - origin) * inverse; }

template <class T>
struct OctreeRay {
  Vec3<T> origin, inverse, low, unit;  // inverse: 1 ÷ direction
  T from, to;                          // the span inside the root and [near, far]; empty unless from < to

  HD T plane(int axis, int32_t k) const {
    return octree_plane(T(k), low[axis], unit[axis], origin[axis], inverse[axis]);
  }
};

template <class T>
HD OctreeRay<T> make_octree_ray(Vec3<T> o, Vec3<T> d, const T* aabb, T near, T far) {
  const T scale = T(1) / T(kOctreeSide);  // + 0: a direction of −0 counts as forward
  OctreeRay<T> ray{o, {T(1) / (d.x + T(0)), T(1) / (d.y + T(0)), T(1) / (d.z + T(0))}, load3(aabb),
                   {(aabb[3] - aabb[0]) * scale, (aabb[4] - aabb[1]) * scale, (aabb[5] - aabb[2]) * scale}, near, far};
  bool valid = true;
  for (int axis = 0; axis < 3; ++axis) {
    const bool backward = ray.inverse[axis] < T(0);
    // a NaN is never the larger or the smaller one: a ray in a face of the root is inside it
    ray.from = max(ray.from, ray.plane(axis, backward ? kOctreeSide : 0));
    ray.to = min(ray.to, ray.plane(axis, backward ? 0 : kOctreeSide));
    const T low = ray.low[axis], unit = ray.unit[axis];
    valid = valid && o[axis] - o[axis] == T(0) && d[axis] - d[axis] == T(0) && low - low == T(0) && unit > T(0) &&
            unit < T(INFINITY);
  }
  if (!(valid && ray.to < T(INFINITY))) ray.to = ray.from;
  return ray;
}

// emit(leaf, from, to) for each leaf on the way, near to far, until it returns false.
template <class T, class Emit>
HD void octree_traverse_ray(OctreeNodes tree, const OctreeRay<T>& ray, const Emit& emit) {
  T t = ray.from;
  if (!(t < ray.to)) return;
  int32_t nodes[kOctreeLevels];  // on the way down, and where the ray leaves them
  T leave[kOctreeLevels];
  nodes[0] = 0, leave[0] = ray.to;
  int32_t corner[3] = {0, 0, 0};
  for (int level = 0;;) {
    const int32_t half = kOctreeSide >> (level + 1), node = nodes[level];
    int32_t cell = 0;
    T exit = leave[level];  // an axis whose middle is passed leaves the cell where it leaves the node
    for (int axis = 0; axis < 3; ++axis) {
      corner[axis] &= ~(2 * half - 1);
      const T middle = ray.plane(axis, corner[axis] + half);
      const bool passed = !(t < middle), upper = passed != (ray.inverse[axis] < T(0));
      if (!passed) exit = min(exit, middle);
      if (upper) corner[axis] += half;
      cell = 2 * cell + (upper ? 1 : 0);
    }
    const int32_t leaf = 8 * node + cell, below = half > 1 ? tree.below(node, leaf) : -1;
    if (below >= 0) {
      ++level;
      nodes[level] = below, leave[level] = exit;
      continue;
    }
    if (!emit(leaf, t, exit)) return;
    t = exit;
    if (!(t < ray.to)) return;
    while (!(t < leave[level])) --level;
  }
}

}  // namespace gan3d
