// TORCH_CHECKs that name the op, the argument, what it is and what it should be.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include "common.h"

namespace gan3d {

// A contiguous tensor of `dtype` with `sizes` on the device of `like`; a size of −1 is free.
inline void check(const char* op, const char* name, const at::Tensor& x, at::ScalarType dtype, at::IntArrayRef sizes,
                  const at::Tensor& like) {
  TORCH_CHECK(x.device() == like.device(), op, ": ", name, " is on ", x.device(), ", the other arguments on ",
              like.device());
  TORCH_CHECK_TYPE(x.scalar_type() == dtype, op, ": ", name, " must be ", dtype, ", got ", x.scalar_type());
  bool fits = x.dim() == int64_t(sizes.size());
  for (size_t i = 0; fits && i < sizes.size(); ++i) fits = sizes[i] < 0 || x.size(i) == sizes[i];
  TORCH_CHECK_VALUE(fits, op, ": ", name, " must have shape ", sizes, " (-1: any), got ", x.sizes());
  TORCH_CHECK_VALUE(x.is_contiguous(), op, ": ", name, " must be contiguous");
}

// The same for the tensor that decides dtype and device of the others: float or double.
inline void check_first(const char* op, const char* name, const at::Tensor& x, at::IntArrayRef sizes) {
  const auto dtype = x.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble, op, ": ", name, " must be float32 or float64, got ", dtype);
  check(op, name, x, dtype, sizes, x);
}

// The cells of a grid with these sides.
inline Cells check_sides(const char* op, at::IntArrayRef sides) {
  TORCH_CHECK_VALUE(sides.size() == 3, op, ": resolution must be X, Y and Z, got ", sides);
  int64_t cells = 1;
  for (const int64_t side : sides) {
    TORCH_CHECK_VALUE(side >= 4 && side <= 2048 && side % 4 == 0, op, ": resolution ", sides,
                      ": sides must be multiples of 4 from 4 to 2048");
    cells *= side;
  }
  TORCH_CHECK_VALUE(cells < (int64_t(1) << 31), op, ": resolution ", sides, ": 2^31 cells or more");
  return make_cells(sides[0], sides[1], sides[2]);
}

// That words and rank fit each other and the cells, in size; the counts themselves are the caller's word.
inline VoxelIndex check_voxels(const char* op, const at::Tensor& words, const at::Tensor& rank, Cells cells,
                               const at::Tensor& like) {
  check(op, "words", words, at::kLong, {cells.count() / 64}, like);
  check(op, "rank", rank, at::kInt, {cells.count() / 64 + 1}, like);
  return {words.const_data_ptr<int64_t>(), rank.const_data_ptr<int32_t>(), cells};
}

}  // namespace gan3d
