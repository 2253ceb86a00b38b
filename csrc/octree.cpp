#include <algorithm>
#include <memory>
#include <vector>

#include "cpu.h"
#include "octree_checks.h"
#include "octree_lanes.h"

namespace gan3d {
namespace {

// --- building ------------------------------------------------------------------------------------------------------

uint64_t spread(uint64_t v) {  // 21 bits to every third
  v = (v | (v << 32)) & 0x001F00000000FFFF;
  v = (v | (v << 16)) & 0x001F0000FF0000FF;
  v = (v | (v << 8)) & 0x100F00F00F00F00F;
  v = (v | (v << 4)) & 0x10C30C30C30C30C3;
  return (v | (v << 2)) & 0x1249249249249249;
}

// Sorts by the lowest `bits` bits, 11 at a time.
void radix_sort(std::vector<uint64_t>& keys, int bits) {
  std::vector<uint64_t> other(keys.size());
  for (int shift = 0; shift < bits; shift += 11) {
    std::vector<size_t> start(2049, 0);
    for (const uint64_t key : keys) ++start[((key >> shift) & 2047) + 1];
    for (int i = 0; i < 2048; ++i) start[i + 1] += start[i];
    for (const uint64_t key : keys) other[start[(key >> shift) & 2047]++] = key;
    keys.swap(other);
  }
}

// The distinct deepest nodes that hold a position, in the order of their digits 4x + 2y + z.
template <class I>
std::vector<uint64_t> deepest_nodes(const I* positions, int64_t n, int depth) {
  std::vector<uint64_t> nodes(n);
  bool inside = true;
  for (int64_t i = 0; i < n; ++i) {
    const uint64_t x = uint64_t(positions[3 * i]), y = uint64_t(positions[3 * i + 1]), z = uint64_t(positions[3 * i + 2]);
    inside &= ((x | y | z) >> depth) == 0;
    nodes[i] = ((spread(x) << 2) | (spread(y) << 1) | spread(z)) >> 3;
  }
  TORCH_CHECK_VALUE(inside, "build_octree: positions must lie in [0, ", int64_t(1) << depth, ")");
  if (!std::is_sorted(nodes.begin(), nodes.end())) radix_sort(nodes, 3 * (depth - 1));
  nodes.erase(std::unique(nodes.begin(), nodes.end()), nodes.end());
  return nodes;
}

at::Tensor build_octree(const at::Tensor& positions, int64_t depth) {
  TORCH_CHECK_VALUE(depth >= 1 && depth <= kOctreeLevels, "build_octree: depth must be 1 to ", kOctreeLevels, ", got ", depth);
  const auto dtype = positions.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kInt || dtype == at::kLong, "build_octree: positions must be int32 or int64, got ", dtype);
  check("build_octree", "positions", positions, dtype, {-1, 3}, positions);
  const int64_t n = positions.size(0);
  const auto nodes = dtype == at::kInt ? deepest_nodes(positions.const_data_ptr<int32_t>(), n, int(depth))
                                       : deepest_nodes(positions.const_data_ptr<int64_t>(), n, int(depth));
  // the first level on which a node differs from the one before: there and below, it has nodes of its own
  const auto first_new = [&](size_t i) {
    return i == 0 ? 0 : int(depth) - 1 - (63 - __builtin_clzll(nodes[i] ^ nodes[i - 1])) / 3;
  };
  int64_t next[kOctreeLevels + 1] = {};  // counts, then the next free node of each level
  for (size_t i = 0; i < nodes.size(); ++i) ++next[first_new(i) + 1];
  for (int level = 1; level <= depth; ++level) next[level] += next[level - 1];  // a level has the nodes new above it too
  for (int level = 1; level <= depth; ++level) next[level] += next[level - 1];
  const int64_t count = max<int64_t>(next[depth], 1);
  TORCH_CHECK(count < (1 << 28), "build_octree: 2^28 nodes or more");
  at::Tensor child = at::zeros({count, 2, 2, 2}, positions.options().dtype(at::kInt));
  int32_t* table = child.mutable_data_ptr<int32_t>();
  int64_t path[kOctreeLevels] = {};
  for (size_t i = 0; i < nodes.size(); ++i) {
    for (int level = first_new(i); level < depth; ++level) {
      path[level] = next[level]++;
      if (level == 0) continue;
      const int cell = int(nodes[i] >> (3 * (depth - 1 - level))) & 7;
      table[8 * path[level - 1] + cell] = int32_t(path[level] - path[level - 1]);
    }
  }
  return child;
}

// --- queries -------------------------------------------------------------------------------------------------------

std::tuple<at::Tensor, at::Tensor> octree_query_cpu(const at::Tensor& child, const at::Tensor& points) {
  check_first("octree_query", "points", points, {-1, 3});
  const OctreeNodes tree = check_octree("octree_query", child, points);
  const int64_t n = points.size(0);
  at::Tensor leaf = at::empty({n}, child.options()), side = at::empty({n}, points.options());
  AT_DISPATCH_FLOATING_TYPES(points.scalar_type(), "octree_query", [&] {
    const scalar_t* p = points.const_data_ptr<scalar_t>();
    int32_t* found = leaf.mutable_data_ptr<int32_t>();
    scalar_t* edge = side.mutable_data_ptr<scalar_t>();
    constexpr int lanes = 64 / sizeof(scalar_t);
    parallel(n / lanes, 64, [=](int64_t i) {
      octree_query_lanes<lanes>(tree, p + 3 * lanes * i, found + lanes * i, edge + lanes * i);
    });
    for (int64_t i = n / lanes * lanes; i < n; ++i) {
      int32_t units;
      found[i] = octree_query(tree, load3(p + 3 * i), units);
      edge[i] = scalar_t(units) / scalar_t(kOctreeSide);
    }
  });
  return {leaf, side};
}

// --- traversal -----------------------------------------------------------------------------------------------------

constexpr int64_t kGroup = 1024;  // rays

// What the rays of a group cross, until it is known where it goes.
template <class T>
struct Group {
  std::unique_ptr<OctreePiece<T>[]> pieces;
  int64_t place[kGroup];
};

// What OctreeLanes::run does, for too few rays to fill the lanes.
template <class T, class Make>
void one_by_one(OctreeNodes tree, const uint8_t* occupied, int64_t first, int64_t last, const Make& make,
                int64_t max_leaves, std::vector<OctreePiece<T>>& pieces, int64_t* place, int32_t* counts) {
  for (int64_t i = first; i < last; ++i) {
    const size_t before = pieces.size();
    octree_traverse_ray(tree, make(i), [&](int32_t leaf, T from, T to) {
      if (occupied == nullptr || occupied[leaf]) pieces.push_back({leaf, from, to});
      return int64_t(pieces.size() - before) < max_leaves;
    });
    place[i - first] = int64_t(before), counts[i] = int32_t(pieces.size() - before);
  }
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> octree_traverse(
    const at::Tensor& child, const at::Tensor& rays_o, const at::Tensor& rays_d, const at::Tensor& aabb,
    const std::optional<at::Tensor>& occupied, double near, double far, int64_t max_leaves) {
  const OctreeNodes tree = check_octree("octree_traverse", child, rays_o);
  const uint8_t* flags = check_traverse(child, rays_o, rays_d, aabb, occupied, near, far, max_leaves);
  const int64_t n = rays_o.size(0);
  const int64_t groups = (n + kGroup - 1) / kGroup;
  at::Tensor offsets = at::empty({n + 1}, child.options()), ray_index, leaves, ts, deltas;
  AT_DISPATCH_FLOATING_TYPES(rays_o.scalar_type(), "octree_traverse", [&] {
    using T = scalar_t;
    const T *o = rays_o.const_data_ptr<T>(), *d = rays_d.const_data_ptr<T>(), *box = aabb.const_data_ptr<T>();
    const auto make = [=](int64_t i) {
      return make_octree_ray(load3(o + 3 * i), load3(d + 3 * i), box, T(near), T(far));
    };
    int32_t* offset = offsets.mutable_data_ptr<int32_t>();
    std::vector<Group<T>> found(groups);
    at::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
      OctreeLanes<T> lanes(tree, flags, box, max_leaves);
      std::vector<OctreePiece<T>> pieces;
      for (int64_t g = begin; g < end; ++g) {
        const int64_t first = g * kGroup, last = min(n, first + kGroup);
        pieces.clear();
        if (last - first < OctreeLanes<T>::kLanes) {
          one_by_one(tree, flags, first, last, make, max_leaves, pieces, found[g].place, offset + 1);
        } else {
          lanes.run(first, last, make, pieces, found[g].place, offset + 1);
        }
        found[g].pieces.reset(new OctreePiece<T>[pieces.size()]);
        std::copy(pieces.begin(), pieces.end(), found[g].pieces.get());
      }
    });
    int64_t total = 0;
    offset[0] = 0;
    for (int64_t i = 0; i < n; ++i) {
      total += offset[i + 1];
      TORCH_CHECK(total < (int64_t(1) << 31), "octree_traverse: 2^31 pieces or more; traverse fewer rays at once");
      offset[i + 1] = int32_t(total);
    }
    ray_index = at::empty({total}, offsets.options());
    leaves = at::empty({total}, offsets.options());
    ts = at::empty({total}, rays_o.options());
    deltas = at::empty({total}, rays_o.options());
    int32_t *index = ray_index.mutable_data_ptr<int32_t>(), *leaf = leaves.mutable_data_ptr<int32_t>();
    T *t = ts.mutable_data_ptr<T>(), *delta = deltas.mutable_data_ptr<T>();
    parallel(groups, 1, [&](int64_t g) {
      const int64_t first = g * kGroup, last = min(n, first + kGroup);
      for (int64_t i = first; i < last; ++i) {
        const OctreePiece<T>* piece = found[g].pieces.get() + found[g].place[i - first];
        for (int32_t k = offset[i]; k < offset[i + 1]; ++k, ++piece) {
          index[k] = int32_t(i), leaf[k] = piece->leaf;
          t[k] = (piece->from + piece->to) * T(0.5), delta[k] = piece->to - piece->from;
        }
      }
      found[g].pieces.reset();
    });
  });
  return {offsets, ray_index, leaves, ts, deltas};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(gan3d, m) {
  m.def("build_octree(Tensor positions, int depth) -> Tensor");
  m.def("octree_query(Tensor child, Tensor points) -> (Tensor, Tensor)");
  m.def("octree_traverse(Tensor child, Tensor rays_o, Tensor rays_d, Tensor aabb, Tensor? occupied, float near, "
        "float far, int max_leaves) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(gan3d, CPU, m) {
  m.impl("build_octree", &build_octree);
  m.impl("octree_query", &octree_query_cpu);
  m.impl("octree_traverse", &octree_traverse);
}

}  // namespace gan3d
