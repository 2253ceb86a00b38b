#pragma once

#include <ATen/ops/cumsum.h>
#include <ATen/ops/full.h>

#include "cuda.cuh"
#include "voxels.h"
#include "voxels_checks.h"

namespace gan3d::voxels_cuda {

inline at::Tensor ranked(const at::Tensor& words) {
  const int64_t n = words.size(0);
  at::Tensor counts = at::zeros({n + 1}, words.options().dtype(at::kInt));
  const int64_t* word = words.const_data_ptr<int64_t>();
  int32_t* count = counts.mutable_data_ptr<int32_t>();
  for_each(n, [=] __device__(int64_t w) { count[w + 1] = popcount(uint64_t(word[w])); });
  return at::cumsum(counts, 0, at::kInt);
}

inline int64_t rows_of(const at::Tensor& rank) { return rank.select(0, rank.size(0) - 1).item<int32_t>(); }

inline uint64_t* bits_out(at::Tensor& words) { return reinterpret_cast<uint64_t*>(words.mutable_data_ptr<int64_t>()); }

template <int axis>
void spread_along(const Cells& blocks, at::Tensor& words, at::Tensor& spare, int64_t steps) {
  for (int64_t step = 0; step < steps; ++step) {
    const uint64_t* from = bits_out(words);
    uint64_t* to = bits_out(spare);
    for_each(blocks.count(), [=] __device__(int64_t w) { to[w] = spread_word<axis>(blocks, from, w); });
    std::swap(words, spare);
  }
}

// The result is in `words` again; `spare` is as large.
inline void spread(const Cells& blocks, at::Tensor& words, at::Tensor& spare, int64_t steps) {
  spread_along<0>(blocks, words, spare, steps);
  spread_along<1>(blocks, words, spare, steps);
  spread_along<2>(blocks, words, spare, steps);
}

// Byte b of the words, eight cells of 2³, of a dense grid; exists(index in raster order) says which.
template <class Exists>
at::Tensor packed(const Cells& cells, const at::TensorOptions& options, const Exists& exists) {
  at::Tensor words = at::empty({cells.count() / 64}, options.dtype(at::kLong));
  uint8_t* bytes = reinterpret_cast<uint8_t*>(words.mutable_data_ptr<int64_t>());
  for_each(cells.count() / 8, [=] __device__(int64_t b) {
    uint32_t byte = 0;
    int32_t i, j, k;
    cells.position(8 * b, i, j, k);
    for (int c = 0; c < 8; ++c) {
      const int64_t at = (int64_t(i + (c & 1)) * cells.y + j + (c >> 1 & 1)) * cells.z + k + (c >> 2);
      byte |= uint32_t(exists(at)) << c;
    }
    bytes[b] = uint8_t(byte);
  });
  return words;
}

inline std::tuple<at::Tensor, at::Tensor> voxels_from_mask(const at::Tensor& mask) {
  check("voxels_from_mask", "mask", mask, at::kBool, {-1, -1, -1}, mask);
  const Cells cells = check_sides("voxels_from_mask", mask.sizes());
  const c10::cuda::CUDAGuard guard(mask.device());
  const bool* m = mask.const_data_ptr<bool>();
  at::Tensor words = packed(cells, mask.options(), [=] __device__(int64_t at) { return m[at]; });
  return {words, ranked(words)};
}

inline std::tuple<at::Tensor, at::Tensor> voxels_from_scores(const at::Tensor& score, double threshold,
                                                             int64_t dilate) {
  check_first("voxels_from_scores", "score", score, {-1, -1, -1});
  const Cells cells = check_sides("voxels_from_scores", score.sizes());
  check_dilate("voxels_from_scores", dilate);
  const c10::cuda::CUDAGuard guard(score.device());
  at::Tensor words;
  AT_DISPATCH_FLOATING_TYPES(score.scalar_type(), "voxels_from_scores", [&] {
    const scalar_t *s = score.const_data_ptr<scalar_t>(), limit = scalar_t(threshold);
    words = packed(cells, score.options(), [=] __device__(int64_t at) { return s[at] >= limit; });
  });
  if (dilate > 0) {
    at::Tensor spare = at::empty_like(words);
    spread(blocks_of(cells), words, spare, dilate);
  }
  return {words, ranked(words)};
}

inline std::tuple<at::Tensor, at::Tensor> voxels_from_positions(const at::Tensor& positions,
                                                                at::IntArrayRef resolution) {
  check_positions("voxels_from_positions", positions);
  const Cells cells = check_sides("voxels_from_positions", resolution);
  const c10::cuda::CUDAGuard guard(positions.device());
  at::Tensor exists = at::zeros({cells.count()}, positions.options().dtype(at::kBool));
  bool* cell = exists.mutable_data_ptr<bool>();
  AT_DISPATCH_INDEX_TYPES(positions.scalar_type(), "voxels_from_positions", [&] {
    const index_t* p = positions.const_data_ptr<index_t>();
    for_each(positions.size(0), [=] __device__(int64_t i) {
      const index_t* at = p + 3 * i;
      CUDA_KERNEL_ASSERT(contains(cells, at[0], at[1], at[2]));
      cell[cells.index(int32_t(at[0]), int32_t(at[1]), int32_t(at[2]))] = true;
    });
  });
  at::Tensor words = at::empty({cells.count() / 64}, positions.options().dtype(at::kLong));
  uint8_t* bytes = reinterpret_cast<uint8_t*>(words.mutable_data_ptr<int64_t>());
  for_each(cells.count() / 8, [=] __device__(int64_t b) {
    uint32_t byte = 0;
    for (int c = 0; c < 8; ++c) byte |= uint32_t(cell[8 * b + c]) << c;
    bytes[b] = uint8_t(byte);
  });
  return {words, ranked(words)};
}

inline at::Tensor rank_words(const at::Tensor& words) {
  check_words("rank_words", words, -1);
  const c10::cuda::CUDAGuard guard(words.device());
  return ranked(words);
}

inline at::Tensor voxel_mask(const at::Tensor& words, at::IntArrayRef resolution) {
  const Cells cells = check_sides("voxel_mask", resolution);
  check_words("voxel_mask", words, cells.count() / 64);
  const c10::cuda::CUDAGuard guard(words.device());
  at::Tensor mask = at::empty(resolution, words.options().dtype(at::kBool));
  const int64_t* word = words.const_data_ptr<int64_t>();
  bool* out = mask.mutable_data_ptr<bool>();
  for_each(cells.count(), [=] __device__(int64_t i) {
    const int64_t line = i / cells.z;
    const int64_t cell = cells.index(int32_t(line / cells.y), int32_t(line % cells.y), int32_t(i % cells.z));
    out[i] = uint64_t(word[cell >> 6]) >> (cell & 63) & 1;
  });
  return mask;
}

inline at::Tensor voxel_positions(const at::Tensor& words, const at::Tensor& rank, at::IntArrayRef resolution) {
  const VoxelIndex voxels = check_voxels("voxel_positions", words, rank, check_sides("voxel_positions", resolution));
  const c10::cuda::CUDAGuard guard(words.device());
  at::Tensor out = at::empty({rows_of(rank), 3}, rank.options());
  int32_t* p = out.mutable_data_ptr<int32_t>();
  for_each(voxels.cells.count(), [=] __device__(int64_t cell) {
    const int32_t row = voxels.row(cell);
    if (row >= 0) voxels.cells.position(cell, p[3 * row], p[3 * row + 1], p[3 * row + 2]);
  });
  return out;
}

inline at::Tensor voxel_rows(const at::Tensor& words, const at::Tensor& rank, const at::Tensor& positions,
                             at::IntArrayRef resolution) {
  const VoxelIndex voxels = check_voxels("voxel_rows", words, rank, check_sides("voxel_rows", resolution));
  check_positions("voxel_rows", positions);
  check("voxel_rows", "positions", positions, positions.scalar_type(), {-1, 3}, words);
  const c10::cuda::CUDAGuard guard(words.device());
  at::Tensor out = at::empty({positions.size(0)}, rank.options());
  AT_DISPATCH_INDEX_TYPES(positions.scalar_type(), "voxel_rows", [&] {
    const index_t* p = positions.const_data_ptr<index_t>();
    int32_t* row = out.mutable_data_ptr<int32_t>();
    for_each(positions.size(0), [=] __device__(int64_t i) {
      row[i] = row_at(voxels, p[3 * i], p[3 * i + 1], p[3 * i + 2]);
    });
  });
  return out;
}

// f(row, where in raster order, column) for every value of every voxel, neighbouring columns by neighbouring threads.
template <class F>
void for_each_value(const VoxelIndex& voxels, int64_t c, const F& f) {
  for_each(voxels.cells.count() * c, [=] __device__(int64_t i) {
    const int64_t cell = i / c;
    const int32_t row = voxels.row(cell);
    if (row < 0) return;
    int32_t x, y, z;
    voxels.cells.position(cell, x, y, z);
    f(int64_t(row), (int64_t(x) * voxels.cells.y + y) * voxels.cells.z + z, i % c);
  });
}

inline at::Tensor gather_voxels(const at::Tensor& dense, const at::Tensor& words, const at::Tensor& rank,
                                std::optional<int64_t> rows) {
  check_first("gather_voxels", "dense", dense, {-1, -1, -1, -1});
  const VoxelIndex voxels = check_voxels("gather_voxels", words, rank,
                                         check_sides("gather_voxels", dense.sizes().slice(0, 3)));
  check("gather_voxels", "dense", dense, dense.scalar_type(), {-1, -1, -1, -1}, words);
  const c10::cuda::CUDAGuard guard(dense.device());
  const int64_t c = dense.size(3), found = rows_of(rank);
  TORCH_CHECK_VALUE(!rows || *rows == found, "gather_voxels: rows is ", *rows, ", but ", found, " voxels exist");
  at::Tensor out = at::empty({found, c}, dense.options());
  AT_DISPATCH_FLOATING_TYPES(dense.scalar_type(), "gather_voxels", [&] {
    const scalar_t* from = dense.const_data_ptr<scalar_t>();
    scalar_t* to = out.mutable_data_ptr<scalar_t>();
    for_each_value(voxels, c, [=] __device__(int64_t row, int64_t at, int64_t column) {
      to[row * c + column] = from[at * c + column];
    });
  });
  return out;
}

inline at::Tensor scatter_voxels(const at::Tensor& values, const at::Tensor& words, const at::Tensor& rank,
                                 at::IntArrayRef resolution, double fill) {
  check_first("scatter_voxels", "values", values, {-1, -1});
  const VoxelIndex voxels = check_voxels("scatter_voxels", words, rank, check_sides("scatter_voxels", resolution));
  const c10::cuda::CUDAGuard guard(values.device());
  const int64_t c = values.size(1);
  check("scatter_voxels", "values", values, values.scalar_type(), {rows_of(rank), c}, words);
  at::Tensor out = at::full({resolution[0], resolution[1], resolution[2], c}, fill, values.options());
  AT_DISPATCH_FLOATING_TYPES(values.scalar_type(), "scatter_voxels", [&] {
    const scalar_t* from = values.const_data_ptr<scalar_t>();
    scalar_t* to = out.mutable_data_ptr<scalar_t>();
    for_each_value(voxels, c, [=] __device__(int64_t row, int64_t at, int64_t column) {
      to[at * c + column] = from[row * c + column];
    });
  });
  return out;
}

inline std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> prune_voxels(
    const at::Tensor& words, const at::Tensor& rank, const at::Tensor& score, double threshold, int64_t dilate,
    at::IntArrayRef resolution) {
  check_first("prune_voxels", "score", score, {-1});
  const VoxelIndex voxels = check_voxels("prune_voxels", words, rank, check_sides("prune_voxels", resolution));
  const c10::cuda::CUDAGuard guard(words.device());
  const int64_t rows = rows_of(rank), n = words.size(0);
  check("prune_voxels", "score", score, score.scalar_type(), {rows}, words);
  check_dilate("prune_voxels", dilate);
  at::Tensor kept = at::empty_like(words);
  AT_DISPATCH_FLOATING_TYPES(score.scalar_type(), "prune_voxels", [&] {
    const scalar_t *s = score.const_data_ptr<scalar_t>(), limit = scalar_t(threshold);
    uint8_t* bytes = reinterpret_cast<uint8_t*>(kept.mutable_data_ptr<int64_t>());
    for_each(8 * n, [=] __device__(int64_t b) {  // eight neighbouring cells, at most eight neighbouring scores
      const uint64_t word = uint64_t(voxels.words[b >> 3]);
      const int first = int(b & 7) * 8;
      int64_t row = voxels.rank[b >> 3] + rank_in_word(word, first);
      uint32_t byte = 0;
      for_each_bit(word >> first & 255, [&](int bit) { byte |= uint32_t(s[row++] >= limit) << bit; });
      bytes[b] = uint8_t(byte);
    });
  });
  if (dilate > 0) {
    at::Tensor spare = at::empty_like(words);
    spread(blocks_of(voxels.cells), kept, spare, dilate);
    uint64_t* keep = bits_out(kept);
    for_each(n, [=] __device__(int64_t w) { keep[w] &= uint64_t(voxels.words[w]); });
  }
  at::Tensor kept_rank = ranked(kept);
  at::Tensor new_to_old = at::empty({rows_of(kept_rank)}, rank.options());
  at::Tensor old_to_new = at::empty({rows}, rank.options());
  int32_t *to_old = new_to_old.mutable_data_ptr<int32_t>(), *to_new = old_to_new.mutable_data_ptr<int32_t>();
  const VoxelIndex left{kept.const_data_ptr<int64_t>(), kept_rank.const_data_ptr<int32_t>(), voxels.cells};
  for_each(64 * n, [=] __device__(int64_t cell) {
    const int32_t old = voxels.row(cell), now = left.row(cell);
    if (old >= 0) to_new[old] = now;
    if (now >= 0) to_old[now] = old;
  });
  return {kept, kept_rank, new_to_old, old_to_new};
}

inline at::Tensor compact_rows(const at::Tensor& values, const at::Tensor& new_to_old) {
  check_table("compact_rows", values, new_to_old, values.size(0));
  const c10::cuda::CUDAGuard guard(values.device());
  const int64_t m = new_to_old.size(0), rows = values.size(0), c = values.size(1);
  at::Tensor out = at::empty({m, c}, values.options());
  const int32_t* index = new_to_old.const_data_ptr<int32_t>();
  AT_DISPATCH_FLOATING_TYPES(values.scalar_type(), "compact_rows", [&] {
    const scalar_t* from = values.const_data_ptr<scalar_t>();
    scalar_t* to = out.mutable_data_ptr<scalar_t>();
    for_each(m * c, [=] __device__(int64_t i) {
      const int64_t row = index[i / c];
      CUDA_KERNEL_ASSERT(uint64_t(row) < uint64_t(rows));
      to[i] = from[row * c + i % c];
    });
  });
  return out;
}

inline at::Tensor spread_rows(const at::Tensor& values, const at::Tensor& new_to_old, int64_t rows) {
  check_table("spread_rows", values, new_to_old, rows);
  check("spread_rows", "values", values, values.scalar_type(), {new_to_old.size(0), -1}, values);
  const c10::cuda::CUDAGuard guard(values.device());
  const int64_t m = new_to_old.size(0), c = values.size(1);
  at::Tensor out = at::zeros({rows, c}, values.options());
  const int32_t* index = new_to_old.const_data_ptr<int32_t>();
  AT_DISPATCH_FLOATING_TYPES(values.scalar_type(), "spread_rows", [&] {
    const scalar_t* from = values.const_data_ptr<scalar_t>();
    scalar_t* to = out.mutable_data_ptr<scalar_t>();
    for_each(m * c, [=] __device__(int64_t i) {
      const int64_t row = index[i / c];
      CUDA_KERNEL_ASSERT(uint64_t(row) < uint64_t(rows));
      to[row * c + i % c] = from[i];
    });
  });
  return out;
}

inline std::tuple<at::Tensor, at::Tensor, at::Tensor> upsample_voxels(const at::Tensor& words, const at::Tensor& rank,
                                                                      at::IntArrayRef resolution) {
  const Cells cells = check_sides("upsample_voxels", resolution);
  check_sides("upsample_voxels", {2 * resolution[0], 2 * resolution[1], 2 * resolution[2]});
  const VoxelIndex voxels = check_voxels("upsample_voxels", words, rank, cells);
  const c10::cuda::CUDAGuard guard(words.device());
  const int64_t n = words.size(0), rows = rows_of(rank);
  at::Tensor fine = at::empty({8 * n}, words.options()), fine_rank = at::empty({8 * n + 1}, rank.options());
  at::Tensor parent = at::empty({8 * rows}, rank.options());
  uint64_t* out = bits_out(fine);
  int32_t *r = fine_rank.mutable_data_ptr<int32_t>(), *p = parent.mutable_data_ptr<int32_t>();
  for_each(8 * n + 1, [=] __device__(int64_t b) {
    if (b == 8 * n) {
      r[b] = int32_t(8 * rows);
      return;
    }
    const uint64_t word = uint64_t(voxels.words[b >> 3]);
    const int first = int(b & 7) * 8;
    out[b] = upsample_byte(uint32_t(word >> first) & 255);
    r[b] = 8 * (voxels.rank[b >> 3] + rank_in_word(word, first));
  });
  for_each(8 * rows, [=] __device__(int64_t i) { p[i] = int32_t(i) >> 3; });
  return {fine, fine_rank, parent};
}

inline at::Tensor upsample_rows(const at::Tensor& values) {
  check_first("upsample_rows", "values", values, {-1, -1});
  const c10::cuda::CUDAGuard guard(values.device());
  const int64_t n = values.size(0), c = values.size(1);
  at::Tensor out = at::empty({8 * n, c}, values.options());
  AT_DISPATCH_FLOATING_TYPES(values.scalar_type(), "upsample_rows", [&] {
    const scalar_t* from = values.const_data_ptr<scalar_t>();
    scalar_t* to = out.mutable_data_ptr<scalar_t>();
    for_each(8 * n * c, [=] __device__(int64_t i) { to[i] = from[(i / c >> 3) * c + i % c]; });
  });
  return out;
}

inline at::Tensor pool_rows(const at::Tensor& values) {
  check_first("pool_rows", "values", values, {-1, -1});
  TORCH_CHECK_VALUE(values.size(0) % 8 == 0, "pool_rows: values must be a multiple of 8, got ", values.size(0));
  const c10::cuda::CUDAGuard guard(values.device());
  const int64_t n = values.size(0) / 8, c = values.size(1);
  at::Tensor out = at::empty({n, c}, values.options());
  AT_DISPATCH_FLOATING_TYPES(values.scalar_type(), "pool_rows", [&] {
    const scalar_t* v = values.const_data_ptr<scalar_t>();
    scalar_t* y = out.mutable_data_ptr<scalar_t>();
    for_each(n * c, [=] __device__(int64_t i) { y[i] = sum_of_eight(v + i / c * 8 * c + i % c, c); });
  });
  return out;
}

inline at::Tensor voxel_neighbours(const at::Tensor& words, const at::Tensor& rank, at::IntArrayRef resolution) {
  const VoxelIndex voxels = check_voxels("voxel_neighbours", words, rank, check_sides("voxel_neighbours", resolution));
  const c10::cuda::CUDAGuard guard(words.device());
  at::Tensor out = at::empty({rows_of(rank), kNeighbours}, rank.options());
  int32_t* y = out.mutable_data_ptr<int32_t>();
  for_each(voxels.cells.count(), [=] __device__(int64_t cell) {
    const int32_t row = voxels.row(cell);
    if (row < 0) return;
    int32_t i, j, k;
    voxels.cells.position(cell, i, j, k);
    for (int n = 0; n < kNeighbours; ++n) {
      y[int64_t(kNeighbours) * row + n] = row_at(voxels, i + n / 9 - 1, j + n / 3 % 3 - 1, k + n % 3 - 1);
    }
  });
  return out;
}

TORCH_LIBRARY_IMPL(gan3d, CUDA, m) {
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

}  // namespace gan3d::voxels_cuda
