// The structure of a sparse grid of voxels. Existing voxels are bits; 64 consecutive cells, one word, are a block of
// 4³, and what happens to a neighbourhood happens to whole words.
#pragma once

#include "common.h"

namespace gan3d {

constexpr int kNeighbours = 27;

// Bit i of a word is the cell at (x, y, z) of its block with i = x₀ + 2y₀ + 4z₀ + 8x₁ + 16y₁ + 32z₁ (x = x₀ + 2x₁, …).
HD constexpr uint64_t digit_is_zero(int digit) {  // the bits i whose digit'th bit is 0
  return ~uint64_t(0) / ((uint64_t(1) << (1 << digit)) + 1);
}
HD constexpr int bit_of(int x, int y, int z) {
  return (x & 1) | (y & 1) << 1 | (z & 1) << 2 | (x & 2) << 2 | (y & 2) << 3 | (z & 2) << 4;
}

// Blocks are cells themselves, of a grid a quarter as wide in the same order: the index of a block is that of its word.
HD Cells blocks_of(Cells cells) { return {cells.x >> 2, cells.y >> 2, cells.z >> 2, cells.shift - 2}; }

// The index of the cell one further (step 1) or one back (−1) along an axis; −1 outside the grid. Inside a cube the
// digits of one axis count up or down while the carry runs over the others.
HD int64_t next_cell(const Cells& cells, int64_t index, int axis, int step) {
  const int64_t digits = int64_t(0x49249249u << axis) & ((int64_t(1) << (3 * cells.shift)) - 1);
  const int64_t here = index & digits;
  if (step > 0 ? here != digits : here != 0) {
    const int64_t moved = step > 0 ? (here | ~digits) + 1 : here - 1;
    return (index & ~digits) | (moved & digits);
  }
  int32_t p[3];
  cells.position(index, p[0], p[1], p[2]);
  p[axis] += step;
  return cells.contains(p[0], p[1], p[2]) ? cells.index(p[0], p[1], p[2]) : -1;
}

// What exists after every voxel of a block has been spread one cell along an axis, both ways; `before` and `after` are
// the words of the adjoining blocks (0 outside). Along x: 0 → 1 and 2 → 3 are one bit, 1 → 2 seven, 3 → 0 nine bits
// down in the next word; along y and z twice and four times as many.
template <int axis>
HD uint64_t spread_word(uint64_t before, uint64_t word, uint64_t after) {
  constexpr int s = 1 << axis;
  const uint64_t low = digit_is_zero(axis), high = digit_is_zero(axis + 3);
  return word | (word & low) << s | (word & ~low) >> s | (word & ~low & high) << 7 * s | (word & low & ~high) >> 7 * s |
         (before & ~low & ~high) >> 9 * s | (after & low & high) << 9 * s;
}
template <int axis>
HD uint64_t spread_word(const Cells& blocks, const uint64_t* words, int64_t index) {
  const int64_t before = next_cell(blocks, index, axis, -1), after = next_cell(blocks, index, axis, 1);
  return spread_word<axis>(before < 0 ? 0 : words[before], words[index], after < 0 ? 0 : words[after]);
}

// A voxel's children are 8·cell … 8·cell + 7 of a grid twice as wide, as its Morton cubes are twice as wide too: 8 bits
// of a word, each 8 times, are a word there.
HD uint64_t upsample_byte(uint32_t byte) {
  const uint64_t one = (byte * uint64_t(0x0101010101010101)) & 0x8040201008040201u;  // byte k holds bit k, in place
  return (((one + 0x7F7F7F7F7F7F7F7Fu) >> 7) & 0x0101010101010101u) * 255;
}

// Existing voxels before bit `bit` of a word.
HD int32_t rank_in_word(uint64_t word, int bit) { return popcount(word & ((uint64_t(1) << bit) - 1)); }

HD bool contains(const Cells& cells, int64_t x, int64_t y, int64_t z) {  // int64 positions, not cut to 32 bits
  return uint64_t(x) < uint64_t(cells.x) && uint64_t(y) < uint64_t(cells.y) && uint64_t(z) < uint64_t(cells.z);
}
HD int32_t row_at(const VoxelIndex& voxels, int64_t x, int64_t y, int64_t z) {  // −1: no such voxel
  if (!contains(voxels.cells, x, y, z)) return -1;
  return voxels.row(voxels.cells.index(int32_t(x), int32_t(y), int32_t(z)));
}

// The sum of the eight rows of a parent's children, one column: in pairs, so that the order is fixed and errors small.
template <class T>
HD T sum_of_eight(const T* v, int64_t stride) {
  const T a = (v[0] + v[stride]) + (v[2 * stride] + v[3 * stride]);
  return a + ((v[4 * stride] + v[5 * stride]) + (v[6 * stride] + v[7 * stride]));
}

// f(bit) for every bit that is set, from the lowest.
template <class F>
HD void for_each_bit(uint64_t word, const F& f) {
  for (; word != 0; word &= word - 1) {
#ifdef __CUDA_ARCH__
    f(__ffsll(static_cast<long long>(word)) - 1);
#else
    f(__builtin_ctzll(word));
#endif
  }
}

}  // namespace gan3d
