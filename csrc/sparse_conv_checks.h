// The argument checks of the sparse convolutions, the same on the CPU and on CUDA devices.
#pragma once

#include "checks.h"
#include "sparse_conv.h"

namespace gan3d::sparse_conv {

// The number of taps. `start` lies on the CPU whatever the device: it says where loops begin and end.
inline int64_t check_start(const char* op, const at::Tensor& pairs, const at::Tensor& start, const at::Tensor& like) {
  check(op, "pairs", pairs, at::kInt, {-1, 2}, like);
  check(op, "start", start, at::kLong, {-1}, start);
  TORCH_CHECK_VALUE(start.device().is_cpu(), op, ": start is on ", start.device(), ", it must be on the CPU");
  const int64_t taps = start.size(0) - 1, n = pairs.size(0);
  TORCH_CHECK_VALUE(taps >= 1, op, ": start must have an entry more than there are taps, got ", start.size(0));
  const int64_t* s = start.const_data_ptr<int64_t>();
  bool good = s[0] == 0 && s[taps] == n;
  for (int64_t t = 0; t < taps; ++t) good = good && s[t] <= s[t + 1];
  TORCH_CHECK_VALUE(good, op, ": start must increase from 0 to the number of pairs, ", n);
  return taps;
}

struct Sizes {
  int64_t taps, inputs, outputs;  // channels
};

inline Sizes check_conv(const char* op, const at::Tensor& values, const at::Tensor& weight, const at::Tensor& pairs,
                        const at::Tensor& start, int64_t rows) {
  check_first(op, "values", values, {-1, -1});
  const int64_t taps = check_start(op, pairs, start, values);
  check(op, "weight", weight, values.scalar_type(), {taps, values.size(1), -1}, values);
  TORCH_CHECK_VALUE(rows >= 0 && rows < (int64_t(1) << 31) && values.size(0) < (int64_t(1) << 31), op,
                    ": rows must be 0 to 2^31 - 1, got ", rows, " and values of ", values.size(0));
  return {taps, values.size(1), weight.size(2)};
}

inline Sizes check_weight(const char* op, const at::Tensor& values, const at::Tensor& grad, const at::Tensor& pairs,
                          const at::Tensor& start) {
  check_first(op, "values", values, {-1, -1});
  const int64_t taps = check_start(op, pairs, start, values);
  check(op, "grad", grad, values.scalar_type(), {-1, -1}, values);
  TORCH_CHECK_VALUE(grad.size(0) < (int64_t(1) << 31) && values.size(0) < (int64_t(1) << 31), op, ": 2^31 rows or more");
  return {taps, values.size(1), grad.size(1)};
}

inline void check_neighbours(const char* op, const at::Tensor& neighbours) {
  check(op, "neighbours", neighbours, at::kInt, {-1, -1}, neighbours);
  TORCH_CHECK_VALUE(neighbours.size(1) >= 1, op, ": neighbours must have a column for each tap");
  TORCH_CHECK_VALUE(neighbours.size(0) < (int64_t(1) << 31), op, ": 2^31 rows or more");
}

struct TwoGrids {
  VoxelIndex coarse, fine;
};
inline TwoGrids check_grids(const char* op, const at::Tensor& words, const at::Tensor& rank, at::IntArrayRef resolution,
                            const at::Tensor& fine_words, const at::Tensor& fine_rank) {
  const Cells cells = check_sides(op, resolution);
  const Cells twice = check_sides(op, {2 * resolution[0], 2 * resolution[1], 2 * resolution[2]});
  return {check_voxels(op, words, rank, cells, words), check_voxels(op, fine_words, fine_rank, twice, words)};
}

}  // namespace gan3d::sparse_conv
