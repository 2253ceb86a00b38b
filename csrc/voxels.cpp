#include "voxels.h"

#include <ATen/ops/from_blob.h>

#include <array>
#include <atomic>
#include <cstring>
#include <type_traits>

#ifdef __linux__
#include <sys/mman.h>
#endif
#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "cpu.h"
#include "voxels_checks.h"

namespace gan3d {
namespace {

// Zeros that nobody writes: pages come from the system cleared, those that stay untouched never come.
at::Tensor zero_table(at::IntArrayRef sizes, const at::TensorOptions& options) {
#ifdef __linux__
  const size_t bytes = size_t(c10::multiply_integers(sizes)) * options.dtype().itemsize();
  if (int64_t(bytes) >= kLarge) {
    void* where = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (where != MAP_FAILED) {
      prefer_huge_pages(where, int64_t(bytes));
      return at::from_blob(where, sizes, [bytes](void* p) { munmap(p, bytes); }, options);
    }
  }
#endif
  return at::zeros(sizes, options);
}

// f(N) with the size of a row as a constant if it is a usual one, else with 0: a copy of N bytes is a few instructions.
template <class F>
void with_row_size(int64_t bytes, const F& f) {
  switch (bytes) {
    case 4: return f(std::integral_constant<int, 4>{});
    case 8: return f(std::integral_constant<int, 8>{});
    case 16: return f(std::integral_constant<int, 16>{});
    case 32: return f(std::integral_constant<int, 32>{});
    case 64: return f(std::integral_constant<int, 64>{});
    case 128: return f(std::integral_constant<int, 128>{});
    default: return f(std::integral_constant<int, 0>{});
  }
}
template <int N>
HD void copy_row(char* to, const char* from, std::integral_constant<int, N>, int64_t bytes) {
  if constexpr (N > 0) __builtin_memcpy(to, from, N);
  else std::memcpy(to, from, size_t(bytes));
}

const char* bytes_in(const at::Tensor& x) { return static_cast<const char*>(x.const_data_ptr()); }
char* bytes_out(at::Tensor& x) { return static_cast<char*>(x.mutable_data_ptr()); }

constexpr int64_t kChunk = 1024;  // words

int32_t count_bits(const int64_t* words, int64_t begin, int64_t end) {
  int64_t sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t w = begin; w < end; ++w) sum += popcount(uint64_t(words[w]));
  return int32_t(sum);
}

at::Tensor ranked(const at::Tensor& words) {
  const int64_t n = words.size(0), chunks = (n + kChunk - 1) / kChunk;
  at::Tensor rank = at::empty({n + 1}, words.options().dtype(at::kInt)), sums = at::empty({chunks}, rank.options());
  const int64_t* w = words.const_data_ptr<int64_t>();
  int32_t *r = rank.mutable_data_ptr<int32_t>(), *sum = sums.mutable_data_ptr<int32_t>();
  parallel(chunks, 64, [=](int64_t c) { sum[c] = count_bits(w, c * kChunk, min((c + 1) * kChunk, n)); });
  int32_t total = 0;
  for (int64_t c = 0; c < chunks; ++c) {
    const int32_t here = sum[c];
    sum[c] = total, total += here;
  }
  parallel(chunks, 64, [=](int64_t c) {
    int32_t before = sum[c];
    for (int64_t i = c * kChunk; i < min((c + 1) * kChunk, n); ++i) r[i] = before, before += popcount(uint64_t(w[i]));
  });
  r[n] = total;
  return rank;
}

// The number of rows, after the ranks have been found to be right: everything below writes where they say.
int64_t checked_rows(const char* op, const VoxelIndex& voxels) {
  const int64_t n = voxels.cells.count() / 64;
  std::atomic<bool> wrong{voxels.rank[0] != 0};
  at::parallel_for(0, n, 64 * kChunk, [&](int64_t begin, int64_t end) {
    int bad = 0;
#pragma omp simd reduction(| : bad)
    for (int64_t w = begin; w < end; ++w) {
      bad |= voxels.rank[w + 1] - voxels.rank[w] - popcount(uint64_t(voxels.words[w]));
    }
    if (bad != 0) wrong = true;
  });
  TORCH_CHECK_VALUE(!wrong, op, ": rank is not that of words (rank_words makes it)");
  return voxels.rank[n];
}

HD uint64_t at_least(const float* v, int n, float threshold) {
  uint64_t bits = 0;
#if defined(__AVX512F__)
  const __m512 limit = _mm512_set1_ps(threshold);
  for (int i = 0; i < n; i += 16) {
    const __mmask16 lanes = n - i >= 16 ? 0xFFFF : __mmask16((1 << (n - i)) - 1);
    bits |= uint64_t(_mm512_mask_cmp_ps_mask(lanes, _mm512_maskz_loadu_ps(lanes, v + i), limit, _CMP_GE_OQ)) << i;
  }
#else
  for (int i = 0; i < n; ++i) bits |= uint64_t(v[i] >= threshold) << i;
#endif
  return bits;
}
HD uint64_t at_least(const double* v, int n, double threshold) {
  uint64_t bits = 0;
  for (int i = 0; i < n; ++i) bits |= uint64_t(v[i] >= threshold) << i;
  return bits;
}

// The lowest bits of `bits`, to the places where `word` has ones.
HD uint64_t deposit(uint64_t bits, uint64_t word) {
#if defined(__BMI2__)
  return _pdep_u64(bits, word);
#else
  uint64_t out = 0;
  for (; word != 0; word &= word - 1, bits >>= 1) out |= (bits & 1) ? word & -word : 0;
  return out;
#endif
}

// Spreads bits `steps` cells along every axis; `spare` is as large as `words`, and the result is in one of the two.
uint64_t* spread(const Cells& blocks, uint64_t* words, uint64_t* spare, int64_t steps) {
  const int64_t n = blocks.count();
  const auto pass = [&](auto axis) {
    for (int64_t step = 0; step < steps; ++step) {
      parallel(n, 1024, [=](int64_t w) { spare[w] = spread_word<decltype(axis)::value>(blocks, words, w); });
      std::swap(words, spare);
    }
  };
  pass(std::integral_constant<int, 0>{});
  pass(std::integral_constant<int, 1>{});
  pass(std::integral_constant<int, 2>{});
  return words;
}

// words[w], block after block, from the cells of a dense grid: read(first of four cells along z) gives their bits where
// `bit_of` has them for x = y = 0, at 0, 4, 32 and 36.
template <class T, class Read>
void pack(const Cells& cells, const T* dense, uint64_t* words, const Read& read) {
  const Cells blocks = blocks_of(cells);
  parallel(blocks.count(), 256, [=](int64_t w) {
    int32_t i, j, k;
    blocks.position(w, i, j, k);
    uint64_t word = 0;
    for (int x = 0; x < 4; ++x) {
      for (int y = 0; y < 4; ++y) {
        word |= read(dense + (int64_t(4 * i + x) * cells.y + 4 * j + y) * cells.z + 4 * k) << bit_of(x, y, 0);
      }
    }
    words[w] = word;
  });
}

uint64_t* bits_out(at::Tensor& words) { return reinterpret_cast<uint64_t*>(words.mutable_data_ptr<int64_t>()); }

std::tuple<at::Tensor, at::Tensor> voxels_from_mask(const at::Tensor& mask) {
  check("voxels_from_mask", "mask", mask, at::kBool, {-1, -1, -1}, mask);
  const Cells cells = check_sides("voxels_from_mask", mask.sizes());
  at::Tensor words = at::empty({cells.count() / 64}, mask.options().dtype(at::kLong));
  pack(cells, reinterpret_cast<const uint8_t*>(mask.const_data_ptr<bool>()), bits_out(words), [](const uint8_t* m) {
    uint32_t four;
    std::memcpy(&four, m, 4);
    four |= four >> 4;  // bytes 1 and 3 join 0 and 2, four places on
    return uint64_t(four & 0x11) | uint64_t(four & 0x110000) << 16;
  });
  return {words, ranked(words)};
}

std::tuple<at::Tensor, at::Tensor> voxels_from_scores(const at::Tensor& score, double threshold, int64_t dilate) {
  check_first("voxels_from_scores", "score", score, {-1, -1, -1});
  const Cells cells = check_sides("voxels_from_scores", score.sizes());
  check_dilate("voxels_from_scores", dilate);
  at::Tensor words = at::empty({cells.count() / 64}, score.options().dtype(at::kLong));
  AT_DISPATCH_FLOATING_TYPES(score.scalar_type(), "voxels_from_scores", [&] {
    const scalar_t limit = scalar_t(threshold);
    pack(cells, score.const_data_ptr<scalar_t>(), bits_out(words), [=](const scalar_t* s) {
      return uint64_t(s[0] >= limit) | uint64_t(s[1] >= limit) << 4 | uint64_t(s[2] >= limit) << 32 |
             uint64_t(s[3] >= limit) << 36;
    });
  });
  if (dilate > 0) {
    at::Tensor spare = at::empty_like(words);
    if (spread(blocks_of(cells), bits_out(words), bits_out(spare), dilate) != bits_out(words)) words = spare;
  }
  return {words, ranked(words)};
}

// Each thread sets the bits of its own words, whatever the place of the positions.
std::tuple<at::Tensor, at::Tensor> voxels_from_positions(const at::Tensor& positions, at::IntArrayRef resolution) {
  check_positions("voxels_from_positions", positions);
  const Cells cells = check_sides("voxels_from_positions", resolution);
  const int64_t n = positions.size(0);
  at::Tensor words = at::zeros({cells.count() / 64}, positions.options().dtype(at::kLong));
  at::Tensor index = at::empty({n}, positions.options().dtype(at::kInt));
  int32_t* cell = index.mutable_data_ptr<int32_t>();
  std::atomic<bool> outside{false};
  AT_DISPATCH_INDEX_TYPES(positions.scalar_type(), "voxels_from_positions", [&] {
    const index_t* p = positions.const_data_ptr<index_t>();
    at::parallel_for(0, n, 4096, [&, p](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const index_t *at = p + 3 * i;
        if (!contains(cells, at[0], at[1], at[2])) {
          outside = true;
          return;
        }
        cell[i] = int32_t(cells.index(int32_t(at[0]), int32_t(at[1]), int32_t(at[2])));
      }
    });
  });
  TORCH_CHECK_INDEX(!outside, "voxels_from_positions: a position lies outside the grid of ", resolution, " cells");
  uint64_t* word = bits_out(words);
  at::parallel_for(0, words.size(0), 1024, [=](int64_t begin, int64_t end) {
    for (int64_t i = 0; i < n; ++i) {
      const int64_t w = cell[i] >> 6;
      if (w >= begin && w < end) word[w] |= uint64_t(1) << (cell[i] & 63);
    }
  });
  return {words, ranked(words)};
}

at::Tensor rank_words(const at::Tensor& words) {
  check_words("rank_words", words, -1);
  return ranked(words);
}

at::Tensor voxel_mask(const at::Tensor& words, at::IntArrayRef resolution) {
  const Cells cells = check_sides("voxel_mask", resolution), blocks = blocks_of(cells);
  check_words("voxel_mask", words, blocks.count());
  at::Tensor mask = fresh(resolution, words.options().dtype(at::kBool));
  const int64_t* word = words.const_data_ptr<int64_t>();
  char* out = bytes_out(mask);
  parallel(blocks.count(), 256, [=](int64_t w) {
    int32_t i, j, k;
    blocks.position(w, i, j, k);
    for (int x = 0; x < 4; ++x) {
      for (int y = 0; y < 4; ++y) {
        const uint64_t z = uint64_t(word[w]) >> bit_of(x, y, 0);
        const uint32_t four = uint32_t(z & 1) | uint32_t(z >> 4 & 1) << 8 | uint32_t(z >> 32 & 1) << 16 |
                              uint32_t(z >> 36 & 1) << 24;
        std::memcpy(out + (int64_t(4 * i + x) * cells.y + 4 * j + y) * cells.z + 4 * k, &four, 4);
      }
    }
  });
  return mask;
}

// f(row, x, y, z) for every voxel.
template <class F>
void for_each_voxel(const VoxelIndex& voxels, const F& f) {
  parallel(voxels.cells.count() / 64, 256, [=](int64_t w) {
    const uint64_t word = uint64_t(voxels.words[w]);
    if (word == 0) return;
    int32_t i, j, k;
    voxels.cells.position(64 * w, i, j, k);
    int64_t row = voxels.rank[w];
    for_each_bit(word, [&](int bit) {
      const auto along = [bit](int axis) { return (bit >> axis & 1) | (bit >> (axis + 2) & 2); };
      f(row++, i + along(0), j + along(1), k + along(2));
    });
  });
}

at::Tensor voxel_positions(const at::Tensor& words, const at::Tensor& rank, at::IntArrayRef resolution) {
  const VoxelIndex voxels = check_voxels("voxel_positions", words, rank, check_sides("voxel_positions", resolution));
  at::Tensor out = fresh({checked_rows("voxel_positions", voxels), 3}, rank.options());
  int32_t* p = out.mutable_data_ptr<int32_t>();
  for_each_voxel(voxels, [=](int64_t row, int32_t x, int32_t y, int32_t z) {
    p[3 * row] = x, p[3 * row + 1] = y, p[3 * row + 2] = z;
  });
  return out;
}

at::Tensor voxel_rows(const at::Tensor& words, const at::Tensor& rank, const at::Tensor& positions,
                      at::IntArrayRef resolution) {
  const VoxelIndex voxels = check_voxels("voxel_rows", words, rank, check_sides("voxel_rows", resolution));
  check_positions("voxel_rows", positions);
  check("voxel_rows", "positions", positions, positions.scalar_type(), {-1, 3}, words);
  const int64_t n = positions.size(0);
  at::Tensor out = at::empty({n}, rank.options());
  AT_DISPATCH_INDEX_TYPES(positions.scalar_type(), "voxel_rows", [&] {
    const index_t* p = positions.const_data_ptr<index_t>();
    int32_t* row = out.mutable_data_ptr<int32_t>();
    parallel(n, 2048, [=](int64_t i) { row[i] = row_at(voxels, p[3 * i], p[3 * i + 1], p[3 * i + 2]); });
  });
  return out;
}

at::Tensor gather_voxels(const at::Tensor& dense, const at::Tensor& words, const at::Tensor& rank,
                         std::optional<int64_t> rows) {
  check_first("gather_voxels", "dense", dense, {-1, -1, -1, -1});
  const Cells cells = check_sides("gather_voxels", dense.sizes().slice(0, 3));
  const VoxelIndex voxels = check_voxels("gather_voxels", words, rank, cells);
  const int64_t found = checked_rows("gather_voxels", voxels), c = dense.size(3), bytes = c * dense.element_size();
  TORCH_CHECK_VALUE(!rows || *rows == found, "gather_voxels: rows is ", *rows, ", but ", found, " voxels exist");
  at::Tensor out = fresh({found, c}, dense.options());
  const char* from = bytes_in(dense);
  char* to = bytes_out(out);
  with_row_size(bytes, [&](auto size) {
    for_each_voxel(voxels, [=](int64_t row, int32_t x, int32_t y, int32_t z) {
      copy_row(to + bytes * row, from + bytes * ((int64_t(x) * cells.y + y) * cells.z + z), size, bytes);
    });
  });
  return out;
}

at::Tensor scatter_voxels(const at::Tensor& values, const at::Tensor& words, const at::Tensor& rank,
                          at::IntArrayRef resolution, double fill) {
  check_first("scatter_voxels", "values", values, {-1, -1});
  const Cells cells = check_sides("scatter_voxels", resolution);
  const VoxelIndex voxels = check_voxels("scatter_voxels", words, rank, cells);
  const int64_t c = values.size(1), bytes = c * values.element_size();
  check("scatter_voxels", "values", values, values.scalar_type(), {checked_rows("scatter_voxels", voxels), c}, words);
  const std::array<int64_t, 4> sizes{resolution[0], resolution[1], resolution[2], c};
  at::Tensor out = fill == 0 ? zero_table(sizes, values.options()) : fresh(sizes, values.options());
  if (fill != 0) {
    AT_DISPATCH_FLOATING_TYPES(values.scalar_type(), "scatter_voxels", [&] {
      scalar_t* y = out.mutable_data_ptr<scalar_t>();
      at::parallel_for(0, out.numel(), 1 << 15, [=](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) y[i] = scalar_t(fill);
      });
    });
  }
  const char* from = bytes_in(values);
  char* to = bytes_out(out);
  with_row_size(bytes, [&](auto size) {
    for_each_voxel(voxels, [=](int64_t row, int32_t x, int32_t y, int32_t z) {
      copy_row(to + bytes * ((int64_t(x) * cells.y + y) * cells.z + z), from + bytes * row, size, bytes);
    });
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> prune_voxels(
    const at::Tensor& words, const at::Tensor& rank, const at::Tensor& score, double threshold, int64_t dilate,
    at::IntArrayRef resolution) {
  check_first("prune_voxels", "score", score, {-1});
  const Cells cells = check_sides("prune_voxels", resolution);
  const VoxelIndex voxels = check_voxels("prune_voxels", words, rank, cells);
  const int64_t rows = checked_rows("prune_voxels", voxels), n = words.size(0);
  check("prune_voxels", "score", score, score.scalar_type(), {rows}, words);
  check_dilate("prune_voxels", dilate);
  at::Tensor kept = at::empty_like(words);
  uint64_t* keep = bits_out(kept);
  AT_DISPATCH_FLOATING_TYPES(score.scalar_type(), "prune_voxels", [&] {
    const scalar_t *s = score.const_data_ptr<scalar_t>(), limit = scalar_t(threshold);
    parallel(n, 512, [=](int64_t w) {
      const uint64_t word = uint64_t(voxels.words[w]);
      const int32_t first = voxels.rank[w];
      keep[w] = deposit(at_least(s + first, voxels.rank[w + 1] - first, limit), word);
    });
  });
  if (dilate > 0) {
    at::Tensor spare = at::empty_like(words);
    const uint64_t* wide = spread(blocks_of(cells), keep, bits_out(spare), dilate);
    parallel(n, 4096, [=](int64_t w) { keep[w] = wide[w] & uint64_t(voxels.words[w]); });
  }
  at::Tensor kept_rank = ranked(kept);
  const int32_t* new_rank = kept_rank.const_data_ptr<int32_t>();
  at::Tensor new_to_old = fresh({new_rank[n]}, rank.options()), old_to_new = fresh({rows}, rank.options());
  int32_t *to_old = new_to_old.mutable_data_ptr<int32_t>(), *to_new = old_to_new.mutable_data_ptr<int32_t>();
  parallel(n, 256, [=](int64_t w) {
    const uint64_t word = uint64_t(voxels.words[w]);
    const int32_t first = voxels.rank[w], last = voxels.rank[w + 1];
    for (int32_t row = first; row < last; ++row) to_new[row] = -1;
    int32_t now = new_rank[w];
    for_each_bit(keep[w], [&](int bit) {
      const int32_t old = first + rank_in_word(word, bit);
      to_old[now] = old, to_new[old] = now++;
    });
  });
  return {kept, kept_rank, new_to_old, old_to_new};
}

// Rows in increasing order, each once, is what keeps the writes of two threads apart.
void check_increasing(const char* op, const at::Tensor& new_to_old, int64_t rows) {
  const int64_t m = new_to_old.size(0);
  if (m == 0) return;
  const int32_t* index = new_to_old.const_data_ptr<int32_t>();
  int bad = index[0] < 0 || index[m - 1] >= rows;
#pragma omp simd reduction(| : bad)
  for (int64_t i = 1; i < m; ++i) bad |= index[i - 1] >= index[i];
  TORCH_CHECK_INDEX(!bad, op, ": new_to_old must increase from 0 or more to less than ", rows);
}

at::Tensor compact_rows(const at::Tensor& values, const at::Tensor& new_to_old) {
  check_table("compact_rows", values, new_to_old, values.size(0));
  check_increasing("compact_rows", new_to_old, values.size(0));
  const int64_t m = new_to_old.size(0), c = values.size(1), bytes = c * values.element_size();
  at::Tensor out = fresh({m, c}, values.options());
  const int32_t* index = new_to_old.const_data_ptr<int32_t>();
  const char* from = bytes_in(values);
  char* to = bytes_out(out);
  with_row_size(bytes, [&](auto size) {
    parallel(m, 1024, [=](int64_t i) { copy_row(to + bytes * i, from + bytes * index[i], size, bytes); });
  });
  return out;
}

at::Tensor spread_rows(const at::Tensor& values, const at::Tensor& new_to_old, int64_t rows) {
  check_table("spread_rows", values, new_to_old, rows);
  check("spread_rows", "values", values, values.scalar_type(), {new_to_old.size(0), -1}, values);
  check_increasing("spread_rows", new_to_old, rows);
  const int64_t m = new_to_old.size(0), c = values.size(1), bytes = c * values.element_size();
  at::Tensor out = zero_table({rows, c}, values.options());
  const int32_t* index = new_to_old.const_data_ptr<int32_t>();
  const char* from = bytes_in(values);
  char* to = bytes_out(out);
  with_row_size(bytes, [&](auto size) {
    parallel(m, 1024, [=](int64_t i) { copy_row(to + bytes * index[i], from + bytes * i, size, bytes); });
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> upsample_voxels(const at::Tensor& words, const at::Tensor& rank,
                                                               at::IntArrayRef resolution) {
  const Cells cells = check_sides("upsample_voxels", resolution);
  check_sides("upsample_voxels", {2 * resolution[0], 2 * resolution[1], 2 * resolution[2]});
  const VoxelIndex voxels = check_voxels("upsample_voxels", words, rank, cells);
  const int64_t n = words.size(0), rows = checked_rows("upsample_voxels", voxels);
  at::Tensor fine = at::empty({8 * n}, words.options()), fine_rank = at::empty({8 * n + 1}, rank.options());
  at::Tensor parent = fresh({8 * rows}, rank.options());
  uint64_t* out = bits_out(fine);
  int32_t *r = fine_rank.mutable_data_ptr<int32_t>(), *p = parent.mutable_data_ptr<int32_t>();
  parallel(n, 1024, [=](int64_t w) {
    const uint64_t word = uint64_t(voxels.words[w]);
    for (int b = 0; b < 8; ++b) {
      out[8 * w + b] = upsample_byte(uint32_t(word >> (8 * b)) & 255);
      r[8 * w + b] = 8 * (voxels.rank[w] + rank_in_word(word, 8 * b));
    }
  });
  r[8 * n] = int32_t(8 * rows);
  at::parallel_for(0, 8 * rows, 1 << 15, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) p[i] = int32_t(i) >> 3;
  });
  return {fine, fine_rank, parent};
}

at::Tensor upsample_rows(const at::Tensor& values) {
  check_first("upsample_rows", "values", values, {-1, -1});
  const int64_t n = values.size(0), c = values.size(1), bytes = c * values.element_size();
  at::Tensor out = fresh({8 * n, c}, values.options());
  const char* from = bytes_in(values);
  char* to = bytes_out(out);
  with_row_size(bytes, [&](auto size) {
    parallel(n, 512, [=](int64_t i) {
      for (int child = 0; child < 8; ++child) copy_row(to + bytes * (8 * i + child), from + bytes * i, size, bytes);
    });
  });
  return out;
}

at::Tensor pool_rows(const at::Tensor& values) {
  check_first("pool_rows", "values", values, {-1, -1});
  TORCH_CHECK_VALUE(values.size(0) % 8 == 0, "pool_rows: values must be a multiple of 8, got ", values.size(0));
  const int64_t n = values.size(0) / 8, c = values.size(1);
  at::Tensor out = fresh({n, c}, values.options());
  AT_DISPATCH_FLOATING_TYPES(values.scalar_type(), "pool_rows", [&] {
    const scalar_t* v = values.const_data_ptr<scalar_t>();
    scalar_t* y = out.mutable_data_ptr<scalar_t>();
    parallel(n, 512, [=](int64_t i) {
      for (int64_t j = 0; j < c; ++j) y[c * i + j] = sum_of_eight(v + 8 * c * i + j, c);
    });
  });
  return out;
}

// A block and a shell of one cell around it, 6 × 6 × 6; rows of 8 so that four at a time may be read anywhere.
constexpr int kShellZ = 8, kShellY = 6 * kShellZ, kShell = 6 * kShellY;

struct Place {
  uint8_t bit;
  uint16_t at;
};
struct Places {  // for each of the 27 blocks around, which of its cells lie in the shell, and where
  Place place[216] = {};
  int first[kNeighbours + 1] = {};
  uint16_t corner[64] = {};  // of the 3³ cells around a cell of the block
};
constexpr Places kPlaces = [] {
  Places p;
  int n = 0;
  for (int around = 0; around < kNeighbours; ++around) {
    p.first[around] = n;
    const int d[3] = {around / 9 - 1, around / 3 % 3 - 1, around % 3 - 1};
    for (int cell = 0; cell < 64; ++cell) {
      const int x = cell / 16 + 4 * d[0] + 1, y = cell / 4 % 4 + 4 * d[1] + 1, z = cell % 4 + 4 * d[2] + 1;
      if (x < 0 || x > 5 || y < 0 || y > 5 || z < 0 || z > 5) continue;
      const int bit = bit_of(cell / 16, cell / 4 % 4, cell % 4);
      p.place[n++] = {uint8_t(bit), uint16_t(x * kShellY + y * kShellZ + z)};
      if (around == 13) p.corner[bit] = uint16_t((x - 1) * kShellY + (y - 1) * kShellZ + z - 1);
    }
  }
  p.first[kNeighbours] = n;
  return p;
}();

void neighbours_of_block(const VoxelIndex& voxels, const Cells& blocks, int64_t block, int32_t* out) {
  int64_t around[kNeighbours];
  around[13] = block;
  const auto both_ways = [&](int from, int stride, int axis) {
    for (int step = -1; step <= 1; step += 2) {
      around[from + stride * step] = around[from] < 0 ? -1 : next_cell(blocks, around[from], axis, step);
    }
  };
  both_ways(13, 9, 0);
  for (int i = 4; i < kNeighbours; i += 9) both_ways(i, 3, 1);
  for (int i = 1; i < kNeighbours; i += 3) both_ways(i, 1, 2);
  int32_t shell[kShell];
  for (int32_t& row : shell) row = -1;
  for (int i = 0; i < kNeighbours; ++i) {
    const uint64_t word = around[i] < 0 ? 0 : uint64_t(voxels.words[around[i]]);
    if (word == 0) continue;
    const int32_t rank = voxels.rank[around[i]];
    for (int k = kPlaces.first[i]; k < kPlaces.first[i + 1]; ++k) {
      const Place p = kPlaces.place[k];
      const int32_t row = rank + rank_in_word(word, p.bit);
      shell[p.at] = word >> p.bit & 1 ? row : -1;
    }
  }
  int32_t* y = out + int64_t(kNeighbours) * voxels.rank[block];
  for_each_bit(uint64_t(voxels.words[block]), [&](int bit) {
    const int32_t* corner = shell + kPlaces.corner[bit];
    for (int i = 0; i < 8; ++i) std::memcpy(y + 3 * i, corner + i / 3 * kShellY + i % 3 * kShellZ, 16);  // one too many
    std::memcpy(y + 24, corner + 2 * kShellY + 2 * kShellZ, 12);
    y += kNeighbours;
  });
}

at::Tensor voxel_neighbours(const at::Tensor& words, const at::Tensor& rank, at::IntArrayRef resolution) {
  const Cells cells = check_sides("voxel_neighbours", resolution), blocks = blocks_of(cells);
  const VoxelIndex voxels = check_voxels("voxel_neighbours", words, rank, cells);
  at::Tensor out = fresh({checked_rows("voxel_neighbours", voxels), kNeighbours}, rank.options());
  int32_t* y = out.mutable_data_ptr<int32_t>();
  parallel(blocks.count(), 64, [=](int64_t w) {
    if (voxels.words[w] != 0) neighbours_of_block(voxels, blocks, w, y);
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(gan3d, m) {
  m.def("voxels_from_mask(Tensor mask) -> (Tensor, Tensor)");
  m.def("voxels_from_scores(Tensor score, float threshold, int dilate) -> (Tensor, Tensor)");
  m.def("voxels_from_positions(Tensor positions, int[] resolution) -> (Tensor, Tensor)");
  m.def("rank_words(Tensor words) -> Tensor");
  m.def("voxel_mask(Tensor words, int[] resolution) -> Tensor");
  m.def("voxel_positions(Tensor words, Tensor rank, int[] resolution) -> Tensor");
  m.def("voxel_rows(Tensor words, Tensor rank, Tensor positions, int[] resolution) -> Tensor");
  m.def("gather_voxels(Tensor dense, Tensor words, Tensor rank, SymInt? rows) -> Tensor");
  m.def("scatter_voxels(Tensor values, Tensor words, Tensor rank, int[] resolution, float fill) -> Tensor");
  m.def("prune_voxels(Tensor words, Tensor rank, Tensor score, float threshold, int dilate, int[] resolution) "
        "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def("compact_rows(Tensor values, Tensor new_to_old) -> Tensor");
  m.def("spread_rows(Tensor values, Tensor new_to_old, SymInt rows) -> Tensor");
  m.def("upsample_voxels(Tensor words, Tensor rank, int[] resolution) -> (Tensor, Tensor, Tensor)");
  m.def("upsample_rows(Tensor values) -> Tensor");
  m.def("pool_rows(Tensor values) -> Tensor");
  m.def("voxel_neighbours(Tensor words, Tensor rank, int[] resolution) -> Tensor");
}
TORCH_LIBRARY_IMPL(gan3d, CPU, m) {
  m.impl("voxels_from_mask", &voxels_from_mask);
  m.impl("voxels_from_scores", &voxels_from_scores);
  m.impl("voxels_from_positions", &voxels_from_positions);
  m.impl("rank_words", &rank_words);
  m.impl("voxel_mask", &voxel_mask);
  m.impl("voxel_positions", &voxel_positions);
  m.impl("voxel_rows", &voxel_rows);
  m.impl("gather_voxels", &gather_voxels);
  m.impl("scatter_voxels", &scatter_voxels);
  m.impl("prune_voxels", &prune_voxels);
  m.impl("compact_rows", &compact_rows);
  m.impl("spread_rows", &spread_rows);
  m.impl("upsample_voxels", &upsample_voxels);
  m.impl("upsample_rows", &upsample_rows);
  m.impl("pool_rows", &pool_rows);
  m.impl("voxel_neighbours", &voxel_neighbours);
}

}  // namespace gan3d
