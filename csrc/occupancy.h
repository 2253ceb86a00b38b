// The occupancy bit field: which cells of a box, and of `levels` boxes each twice as wide, may hold something.
#pragma once

#include "common.h"

namespace gan3d {

constexpr int kMaxLevels = 16;

struct Cell3 {
  int32_t x, y, z;
};

// Level l covers the box scaled by 2^l about its centre with the same number of cells. A point's place is the cell of
// level 0, counted from the centre: cell = floor((p − centre)·scale), negative on one side. The cell of level l is then
// (cell >> l) + side / 2, exactly: levels nest to the bit, and each coordinate is a monotone function of the point's.
template <class T>
struct Occupancy {
  const uint64_t* words;  // [levels, cells / 64]
  Cells cells;
  int32_t levels;
  Vec3<T> centre, scale;
  T finest;  // one over the shortest side of a cell of level 0
  bool valid;

  HD static T down(T x) {
    if constexpr (sizeof(T) == 4) return ::floorf(x);
    else return ::floor(x);
  }
  HD static int32_t place(T p, T centre, T scale) {
    return int32_t(clamp(down((p - centre) * scale), T(-(1 << 30)), T(1 << 30)));
  }
  HD Cell3 place(Vec3<T> p) const {
    return {place(p.x, centre.x, scale.x), place(p.y, centre.y, scale.y), place(p.z, centre.z, scale.z)};
  }
  HD Cell3 at(Cell3 c, int l) const {
    return {(c.x >> l) + (cells.x >> 1), (c.y >> l) + (cells.y >> 1), (c.z >> l) + (cells.z >> 1)};
  }
  HD bool contains(Cell3 c) const { return cells.contains(c.x, c.y, c.z); }
  // The finest level from `lowest` on whose box contains the place; `levels` if none does.
  HD int level(Cell3 c, int lowest) const {
    int l = lowest;
    while (l < levels && !contains(at(c, l))) ++l;
    return l;
  }
  // Where an interval is longer than a cell (its shortest side), the cells of a coarser level are asked.
  HD int level_of_length(T length) const {
    const T size = length * finest;
    int l = 0;
    while (l < levels - 1 && size > T(1 << l)) ++l;
    return l;
  }
  HD uint64_t word(int l, int64_t cell) const { return words[l * (cells.count() >> 6) + (cell >> 6)]; }
  HD bool occupied(Vec3<T> p, int lowest) const {
    const Cell3 c = place(p);
    const int l = level(c, lowest);
    if (l == levels) return false;
    const Cell3 q = at(c, l);
    const int64_t cell = cells.index(q.x, q.y, q.z);
    return (word(l, cell) >> (cell & 63)) & 1;
  }
};

template <class T>
HD Occupancy<T> make_occupancy(const int64_t* words, Cells cells, int64_t levels, const T* aabb) {
  const Vec3<T> low = load3(aabb), high = load3(aabb + 3);
  Occupancy<T> g;
  g.words = reinterpret_cast<const uint64_t*>(words), g.cells = cells, g.levels = int32_t(levels);
  g.centre = {(low.x + high.x) * T(0.5), (low.y + high.y) * T(0.5), (low.z + high.z) * T(0.5)};
  g.scale = {T(cells.x) / (high.x - low.x), T(cells.y) / (high.y - low.y), T(cells.z) / (high.z - low.z)};
  g.finest = max(max(g.scale.x, g.scale.y), g.scale.z);
  g.valid = low.x < high.x && low.y < high.y && low.z < high.z && g.finest < T(INFINITY);
  return g;
}

// Moving maximum of one cell: max(decay·old, new); a negative value ("never seen") stays.
template <class T>
HD T decayed(T old, T decay) { return old < T(0) ? old : old * decay; }

}  // namespace gan3d
