// TORCH_CHECKs that name the op, the argument, what it is and what it should be.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <initializer_list>
#include <string>

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

}  // namespace gan3d
