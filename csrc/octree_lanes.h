// The functions of octree.h for many points or rays at once on a CPU, with the same arithmetic and therefore the same
// bits. Loops over lanes are made for vector registers: no branches, tables gathered.
#pragma once

#include <vector>

#include "octree.h"

namespace gan3d {

// octree_query of `n` points (a constant, so that the loops are unrolled), all going down together.
template <int n, class T>
void octree_query_lanes(OctreeNodes tree, const T* points, int32_t* leaf, T* side) {
  alignas(64) int32_t place[3][n], node[n], open[n];
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    const T x = points[3 * i], y = points[3 * i + 1], z = points[3 * i + 2];
    const int32_t inside = int32_t(x >= T(0)) & int32_t(y >= T(0)) & int32_t(z >= T(0)) & int32_t(x < T(1)) &
                           int32_t(y < T(1)) & int32_t(z < T(1));
    place[0][i] = int32_t((inside ? x : T(0)) * T(kOctreeSide));
    place[1][i] = int32_t((inside ? y : T(0)) * T(kOctreeSide));
    place[2][i] = int32_t((inside ? z : T(0)) * T(kOctreeSide));
    node[i] = 0, open[i] = inside, leaf[i] = -1, side[i] = T(0);
  }
  int32_t any = 1;
  for (int32_t level = 0; any && level < kOctreeLevels; ++level) {
    const int32_t shift = kOctreeLevels - 1 - level;
    const T edge = T(1 << shift) / T(kOctreeSide);
    any = 0;
#pragma omp simd reduction(| : any)
    for (int i = 0; i < n; ++i) {
      const int32_t x = (place[0][i] >> shift) & 1, y = (place[1][i] >> shift) & 1, z = (place[2][i] >> shift) & 1;
      const int32_t cell = 8 * node[i] + 4 * x + 2 * y + z, was = open[i];
      const int32_t next = int32_t(uint32_t(node[i]) + uint32_t(tree.child[cell]));
      const int32_t inner = was & int32_t(next != node[i]) & int32_t(uint32_t(next) < uint32_t(tree.count));
      leaf[i] = was ? cell : leaf[i];
      side[i] = was ? edge : side[i];
      node[i] = inner ? next : 0;  // lanes that wait ask the root, which is near
      open[i] = inner;
      any |= inner;
    }
  }
}

template <class T>
struct OctreePiece {
  int32_t leaf;
  T from, to;
};

// Traversal: kLanes rays at a time go from leaf to leaf, each at its own pace; where one has ended, the next takes its
// place. Every step goes down from the root, all lanes level by level.
template <class T>
class OctreeLanes {
 public:
  static constexpr int kLanes = 64 / sizeof(T);

  OctreeLanes(OctreeNodes tree, const uint8_t* occupied, const T* aabb, int64_t max_leaves)
      : tree_(tree), occupied_(occupied), low_(load3(aabb)), max_leaves_(int32_t(min<int64_t>(max_leaves, INT32_MAX))) {
    reserve(256);
  }

  // All rays [first, last) that make(i) returns: their pieces are appended ray by ray in some order; place[i − first]
  // says where those of ray i begin, counts[i] how many they are.
  template <class Make>
  void run(int64_t first, int64_t last, const Make& make, std::vector<OctreePiece<T>>& pieces, int64_t* place,
           int32_t* counts) {
    int64_t next = first;
    int live = 0;
    const auto fill = [&](int i) {  // the next ray that meets the box into lane i
      for (ray_[i] = -1; next < last; ++next) {
        const OctreeRay<T> ray = make(next);
        unit_ = ray.unit, counts[next] = 0, place[next - first] = 0;
        if (!(ray.from < ray.to)) continue;
        t_[i] = ray.from, to_[i] = ray.to;
        for (int axis = 0; axis < 3; ++axis) {
          origin_[axis][i] = ray.origin[axis], inverse_[axis][i] = ray.inverse[axis];
        }
        ray_[i] = int32_t(next++ - first), count_[i] = 0, ++live;
        return;
      }
      t_[i] = to_[i] = T(0);  // an idle lane: it finds leaves, but has nothing to report
    };
    for (int i = 0; i < kLanes; ++i) fill(i);
    while (live > 0) {
      descend();
      if (step()) {
        for (int i = 0; i < kLanes; ++i) {
          if (ray_[i] < 0 || (t_[i] < to_[i] && count_[i] < max_leaves_)) continue;
          place[ray_[i]] = int64_t(pieces.size()), counts[first + ray_[i]] = count_[i], --live;
          for (int32_t k = i * room_; k < i * room_ + count_[i]; ++k) pieces.push_back({leaves_[k], froms_[k], tos_[k]});
          fill(i);
        }
      }
    }
  }

 private:
  // The leaf of every lane at its t, and where its ray leaves it.
  void descend() {
    const OctreeNodes tree = tree_;
    const Vec3<T> low = low_, unit = unit_;
    for (int i = 0; i < kLanes; ++i) corner_[0][i] = corner_[1][i] = corner_[2][i] = T(0);
    for (int i = 0; i < kLanes; ++i) node_[i] = 0, open_[i] = 1, exit_[i] = to_[i];
    int32_t any = 1;
    for (int32_t half = kOctreeSide >> 1; any; half >>= 1) {
      const T by = T(half);
      const int32_t deeper = half > 1;
      any = 0;
#pragma omp simd reduction(| : any)
      for (int i = 0; i < kLanes; ++i) {
        const T t = t_[i], cx = corner_[0][i] + by, cy = corner_[1][i] + by, cz = corner_[2][i] + by;
        const T ix = inverse_[0][i], iy = inverse_[1][i], iz = inverse_[2][i];
        const T mx = octree_plane(cx, low.x, unit.x, origin_[0][i], ix);
        const T my = octree_plane(cy, low.y, unit.y, origin_[1][i], iy);
        const T mz = octree_plane(cz, low.z, unit.z, origin_[2][i], iz);
        const int32_t before_x = t < mx, before_y = t < my, before_z = t < mz;
        const int32_t ux = before_x == int32_t(ix < T(0)), uy = before_y == int32_t(iy < T(0)),
                      uz = before_z == int32_t(iz < T(0));
        T exit = exit_[i];
        exit = before_x && mx < exit ? mx : exit;
        exit = before_y && my < exit ? my : exit;
        exit = before_z && mz < exit ? mz : exit;
        const int32_t node = node_[i], cell = 8 * node + 4 * ux + 2 * uy + uz, open = open_[i];
        const int32_t next = int32_t(uint32_t(node) + uint32_t(tree.child[cell]));
        const int32_t inner = open & int32_t(next != node) & int32_t(uint32_t(next) < uint32_t(tree.count)) & deeper;
        leaf_[i] = open ? cell : leaf_[i];
        exit_[i] = open ? exit : exit_[i];
        corner_[0][i] = ux ? cx : corner_[0][i];
        corner_[1][i] = uy ? cy : corner_[1][i];
        corner_[2][i] = uz ? cz : corner_[2][i];
        node_[i] = inner ? next : 0;  // lanes that wait ask the root, which is near
        open_[i] = inner;
        any |= inner;
      }
    }
  }

  // Writes down what is to be reported and goes to the leaves' ends; whether a ray has ended.
  bool step() {
    for (int i = 0; i < kLanes; ++i) report_[i] = t_[i] < to_[i];
    if (occupied_ != nullptr) {
      for (int i = 0; i < kLanes; ++i) report_[i] &= int32_t(occupied_[leaf_[i]] != 0);
    }
    int32_t *leaves = leaves_.data(), ended = 0, most = 0;
    T *froms = froms_.data(), *tos = tos_.data();
    const int32_t room = room_, max_leaves = max_leaves_;
#pragma omp simd reduction(| : ended) reduction(max : most)
    for (int i = 0; i < kLanes; ++i) {
      const int32_t at = i * room + count_[i], count = count_[i] + report_[i];
      const T exit = exit_[i];
      leaves[at] = leaf_[i], froms[at] = t_[i], tos[at] = exit;  // counted or overwritten
      count_[i] = count, t_[i] = exit;
      ended |= int32_t(!(exit < to_[i])) | int32_t(count >= max_leaves);
      most = count > most ? count : most;
    }
    if (most == room_) reserve(2 * room_);
    return ended != 0;
  }

  // Room for so many pieces of each lane.
  void reserve(int32_t room) {
    std::vector<int32_t> leaves(size_t(kLanes) * room);
    std::vector<T> froms(leaves.size()), tos(leaves.size());
    for (int i = 0; i < kLanes; ++i) {
      for (int32_t k = 0; k < room_; ++k) {
        const size_t old = size_t(i) * room_ + k, now = size_t(i) * room + k;
        leaves[now] = leaves_[old], froms[now] = froms_[old], tos[now] = tos_[old];
      }
    }
    leaves_.swap(leaves), froms_.swap(froms), tos_.swap(tos), room_ = room;
  }

  const OctreeNodes tree_;
  const uint8_t* const occupied_;
  const Vec3<T> low_;
  Vec3<T> unit_{};
  const int32_t max_leaves_;
  alignas(64) T origin_[3][kLanes] = {}, inverse_[3][kLanes] = {}, corner_[3][kLanes] = {};
  alignas(64) T t_[kLanes] = {}, to_[kLanes] = {}, exit_[kLanes] = {};
  alignas(64) int32_t node_[kLanes] = {}, leaf_[kLanes] = {}, open_[kLanes] = {}, report_[kLanes] = {};
  alignas(64) int32_t count_[kLanes] = {}, ray_[kLanes] = {};
  int32_t room_ = 0;  // of each lane
  std::vector<int32_t> leaves_;
  std::vector<T> froms_, tos_;
};

}  // namespace gan3d
