#pragma once

#include <ATen/ops/cat.h>
#include <ATen/ops/cumsum.h>
#include <ATen/ops/full.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/masked_select.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/nonzero.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/sum.h>

#include "cuda.cuh"
#include "sparse_conv.h"
#include "sparse_conv_checks.h"

namespace gan3d::sparse_conv_cuda {

using namespace sparse_conv;

// Column after column of a table of sources, a row a target; −1 is none.
inline std::tuple<at::Tensor, at::Tensor> pairs_of_columns(const at::Tensor& table) {
  const at::Tensor columns = table.t().contiguous(), exists = columns.ge(0);
  const at::Tensor target = at::nonzero(exists).select(1, 1).to(at::kInt);  // tap after tap, increasing within each
  const at::Tensor ends = at::cumsum(at::sum(exists, 1, false, at::kLong), 0).cpu();
  return {at::stack({columns.masked_select(exists), target}, 1), at::cat({at::zeros({1}, ends.options()), ends})};
}

inline std::tuple<at::Tensor, at::Tensor> neighbour_pairs(const at::Tensor& neighbours) {
  check_neighbours("neighbour_pairs", neighbours);
  const c10::cuda::CUDAGuard guard(neighbours.device());
  return pairs_of_columns(neighbours);
}

inline std::tuple<at::Tensor, at::Tensor, at::Tensor> upsampling_pairs(
    const at::Tensor& words, const at::Tensor& rank, at::IntArrayRef resolution, const at::Tensor& fine_words,
    const at::Tensor& fine_rank) {
  const TwoGrids grids = check_grids("upsampling_pairs", words, rank, resolution, fine_words, fine_rank);
  const c10::cuda::CUDAGuard guard(words.device());
  const auto table = [&](const at::Tensor& r) {
    return at::full({r.select(0, r.size(0) - 1).item<int32_t>(), kTaps}, -1, rank.options());
  };
  at::Tensor of_fine = table(fine_rank), of_coarse = table(rank);
  int32_t *f = of_fine.mutable_data_ptr<int32_t>(), *c = of_coarse.mutable_data_ptr<int32_t>();
  for_each(grids.fine.cells.count(), [=] __device__(int64_t cell) {
    const int32_t row = grids.fine.row(cell);
    if (row < 0) return;
    int32_t x, y, z;
    grids.fine.cells.position(cell, x, y, z);
    for (int tap = 0; tap < kTaps; ++tap) {
      const int32_t source = coarse_row(grids.coarse, x, y, z, tap);
      if (source < 0) continue;
      f[int64_t(row) * kTaps + tap] = source;
      c[int64_t(source) * kTaps + tap] = row;  // one fine voxel a tap
    }
  });
  const auto [pairs, start] = pairs_of_columns(of_fine);
  return {pairs, std::get<0>(pairs_of_columns(of_coarse)), start};
}

// f(tap, sources, targets) for each tap that has pairs.
template <class F>
void for_each_tap(const at::Tensor& pairs, const at::Tensor& start, const F& f) {
  const int64_t* s = start.const_data_ptr<int64_t>();
  for (int64_t tap = 0; tap + 1 < start.size(0); ++tap) {
    if (s[tap] == s[tap + 1]) continue;
    const at::Tensor own = pairs.slice(0, s[tap], s[tap + 1]);
    f(tap, own.select(1, 0).contiguous(), own.select(1, 1).contiguous());
  }
}

inline at::Tensor conv_rows(const at::Tensor& values, const at::Tensor& weight, const at::Tensor& pairs,
                              const at::Tensor& start, const std::optional<at::Tensor>&, int64_t rows) {
  const Sizes sizes = check_conv("conv_rows", values, weight, pairs, start, rows);
  const c10::cuda::CUDAGuard guard(values.device());
  const int64_t o = sizes.outputs;
  at::Tensor out = at::zeros({rows, o}, values.options());
  for_each_tap(pairs, start, [&](int64_t tap, const at::Tensor& sources, const at::Tensor& targets) {
    const at::Tensor products = at::mm(at::index_select(values, 0, sources), weight.select(0, tap));
    const int32_t* target = targets.const_data_ptr<int32_t>();
    AT_DISPATCH_FLOATING_TYPES(values.scalar_type(), "conv_rows", [&] {
      const scalar_t* p = products.const_data_ptr<scalar_t>();
      scalar_t* y = out.mutable_data_ptr<scalar_t>();
      for_each(products.numel(), [=] __device__(int64_t i) {  // in a tap no target comes twice: nothing is atomic
        CUDA_KERNEL_ASSERT(uint64_t(target[i / o]) < uint64_t(rows));
        y[int64_t(target[i / o]) * o + i % o] += p[i];
      });
    });
  });
  return out;
}

inline at::Tensor conv_rows_weight(const at::Tensor& values, const at::Tensor& grad, const at::Tensor& pairs,
                                     const at::Tensor& start, const std::optional<at::Tensor>&) {
  const Sizes sizes = check_weight("conv_rows_weight", values, grad, pairs, start);
  const c10::cuda::CUDAGuard guard(values.device());
  at::Tensor out = at::zeros({sizes.taps, sizes.inputs, sizes.outputs}, values.options());
  for_each_tap(pairs, start, [&](int64_t tap, const at::Tensor& sources, const at::Tensor& targets) {
    at::Tensor own = out.select(0, tap);
    at::mm_out(own, at::index_select(values, 0, sources).t(), at::index_select(grad, 0, targets));
  });
  return out;
}

TORCH_LIBRARY_IMPL(gan3d, CUDA, m) {
  m.impl("neighbour_pairs", &neighbour_pairs);
  m.impl("upsampling_pairs", &upsampling_pairs);
  m.impl("conv_rows", &conv_rows);
  m.impl("conv_rows_weight", &conv_rows_weight);
}

}  // namespace gan3d::sparse_conv_cuda
