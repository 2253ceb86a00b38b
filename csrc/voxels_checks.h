// The argument checks of the voxel ops, the same on the CPU and on CUDA devices.
#pragma once

#include "checks.h"
#include "voxels.h"

namespace gan3d {

inline void check_words(const char* op, const at::Tensor& words, int64_t n) {
  check(op, "words", words, at::kLong, {n}, words);
  TORCH_CHECK_VALUE(words.size(0) < (int64_t(1) << 25), op, ": 2^31 cells or more");
}

inline VoxelIndex check_voxels(const char* op, const at::Tensor& words, const at::Tensor& rank, Cells cells) {
  return check_voxels(op, words, rank, cells, words);
}

inline void check_positions(const char* op, const at::Tensor& positions) {
  const auto dtype = positions.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kInt || dtype == at::kLong, op, ": positions must be int32 or int64, got ", dtype);
  check(op, "positions", positions, dtype, {-1, 3}, positions);
  TORCH_CHECK_VALUE(positions.size(0) < (int64_t(1) << 31), op, ": 2^31 positions or more");
}

inline void check_dilate(const char* op, int64_t dilate) {
  TORCH_CHECK_VALUE(dilate >= 0 && dilate <= 2048, op, ": dilate must be 0 to 2048, got ", dilate);
}

inline void check_table(const char* op, const at::Tensor& values, const at::Tensor& new_to_old, int64_t rows) {
  check_first(op, "values", values, {-1, -1});
  check(op, "new_to_old", new_to_old, at::kInt, {-1}, values);
  TORCH_CHECK_VALUE(rows >= 0 && rows < (int64_t(1) << 31), op, ": rows must be 0 to 2^31 - 1, got ", rows);
  TORCH_CHECK_VALUE(new_to_old.size(0) <= rows, op, ": new_to_old has ", new_to_old.size(0), " entries for ", rows,
                    " rows");
}

}  // namespace gan3d
