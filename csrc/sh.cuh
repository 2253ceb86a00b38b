#pragma once

#include "cuda.cuh"
#include "sh.h"

namespace gan3d::sh_cuda {

inline at::Tensor sh(const at::Tensor& directions, int64_t degree) {
  TORCH_CHECK_VALUE(degree >= 0 && degree <= 4, "sh: degree must be 0 to 4, got ", degree);
  check_first("sh", "directions", directions, {-1, 3});
  const c10::cuda::CUDAGuard guard(directions.device());
  const int64_t n = directions.size(0), terms = (degree + 1) * (degree + 1);
  at::Tensor out = at::empty({n, terms}, directions.options());
  AT_DISPATCH_FLOATING_TYPES(directions.scalar_type(), "sh", [&] {
    const scalar_t* d = directions.const_data_ptr<scalar_t>();
    scalar_t* y = out.mutable_data_ptr<scalar_t>();
    for_each(n, [=] __device__(int64_t i) { sh_basis(load3(d + 3 * i), int(degree), y + terms * i); });
  });
  return out;
}

inline at::Tensor sh_backward(const at::Tensor& grad, const at::Tensor& directions, int64_t degree) {
  check_first("sh_backward", "directions", directions, {-1, 3});
  const c10::cuda::CUDAGuard guard(directions.device());
  const int64_t n = directions.size(0), terms = (degree + 1) * (degree + 1);
  check("sh_backward", "grad", grad, directions.scalar_type(), {n, terms}, directions);
  at::Tensor out = at::empty_like(directions);
  AT_DISPATCH_FLOATING_TYPES(directions.scalar_type(), "sh_backward", [&] {
    const scalar_t *d = directions.const_data_ptr<scalar_t>(), *g = grad.const_data_ptr<scalar_t>();
    scalar_t* y = out.mutable_data_ptr<scalar_t>();
    for_each(n, [=] __device__(int64_t i) {
      const Vec3<scalar_t> v = sh_basis_backward(load3(d + 3 * i), int(degree), g + terms * i);
      y[3 * i] = v.x, y[3 * i + 1] = v.y, y[3 * i + 2] = v.z;
    });
  });
  return out;
}

TORCH_LIBRARY_IMPL(gan3d, CUDA, m) {
  m.impl("sh", &sh);
  m.impl("sh_backward", &sh_backward);
}

}  // namespace gan3d::sh_cuda
