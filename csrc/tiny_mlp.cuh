#pragma once

#include <ATen/Context.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/where.h>

#include "cuda.cuh"
#include "tiny_mlp.h"
#include "tiny_mlp_checks.h"

namespace gan3d::tiny_mlp_cuda {

using namespace mlp;

// Which network each point belongs to.
struct Networks {
  const int64_t* offsets;  // null: all to one
  int64_t count, points;

  HD int64_t of(int64_t point) const {  // −1: none
    if (!offsets) return 0;
    int64_t lo = 0, hi = count;  // the last one that begins at or before the point
    while (lo < hi) {
      const int64_t middle = (lo + hi) / 2;
      if (offsets[middle + 1] <= point) lo = middle + 1;
      else hi = middle;
    }
    return lo < count ? lo : -1;
  }
  HD int64_t end(int64_t network) const { return offsets ? offsets[network + 1] : points; }
};

inline Networks networks(const std::optional<at::Tensor>& offsets, const at::Tensor& parameters, int64_t points) {
  return {offsets ? offsets->const_data_ptr<int64_t>() : nullptr, parameters.size(0), points};
}

inline at::Tensor tiny_mlp(const at::Tensor& x, const at::Tensor& parameters, const std::optional<at::Tensor>& offsets,
                           at::IntArrayRef widths, bool bias, int64_t activation) {
  const Mlp m = check_mlp("tiny_mlp", x, parameters, offsets, widths, bias, activation);
  const c10::cuda::CUDAGuard guard(x.device());
  const Networks all = networks(offsets, parameters, x.size(0));
  at::Tensor out = at::empty({x.size(0), m.outputs()}, x.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "tiny_mlp", [&] {
    const scalar_t *in = x.const_data_ptr<scalar_t>(), *p = parameters.const_data_ptr<scalar_t>();
    scalar_t* y = out.mutable_data_ptr<scalar_t>();
    for_each(x.size(0), [=] __device__(int64_t i) {
      scalar_t h[2][kMaxMlpWidth];
      const int64_t network = all.of(i);
      const scalar_t* values = in + i * m.inputs();
      scalar_t* to = y + i * m.outputs();
      if (network < 0) {
        for (int o = 0; o < m.outputs(); ++o) to[o] = 0;
        return;
      }
      Nothing nothing;
      for (int l = 0; l < m.layers; ++l) {
        scalar_t* next = l + 1 < m.layers ? h[l % 2] : to;
        mlp_layer<1, scalar_t>(m, l, p + network * m.parameters(), values, next, nothing);
        values = next;
      }
    });
  });
  return out;
}

// Where the value or the delta of a layer's unit lies in the rows of a slice of points.
template <class S>
struct Rows {
  const S *x, *grad;      // of the slice's first point
  S *values, *deltas;     // [slice, hidden units]: of every layer's outputs but the last one's
  int hidden;
  int begins[kMaxMlpLayers];  // where a layer's outputs begin in them

  HD const S* value(const Mlp& m, int layer, int64_t i) const {  // what enters the layer
    return layer == 0 ? x + i * m.inputs() : values + i * hidden + begins[layer - 1];
  }
  HD const S* delta(const Mlp& m, int layer, int64_t i) const {  // the gradient at the layer's sums
    return layer + 1 == m.layers ? grad + i * m.outputs() : deltas + i * hidden + begins[layer];
  }
};

// One thread a point: hidden values again, the gradients at them, the gradient of x.
template <class S>
void point_gradients(const Mlp& m, const Networks& all, const S* parameters, const Rows<S>& rows, int64_t first,
                     int64_t count, S* grad_x) {
  for_each(count, [=] __device__(int64_t i) {
    const int64_t network = all.of(first + i);
    if (network < 0) {
      for (int k = 0; grad_x && k < m.inputs(); ++k) grad_x[(first + i) * m.inputs() + k] = 0;
      return;
    }
    const S* p = parameters + network * m.parameters();
    Nothing nothing;
    for (int l = 0; l + 1 < m.layers; ++l) {
      mlp_layer<1, S>(m, l, p, rows.value(m, l, i), rows.values + i * rows.hidden + rows.begins[l], nothing);
    }
    for (int l = m.layers - 1; l >= (grad_x ? 0 : 1); --l) {
      S* before = l ? rows.deltas + i * rows.hidden + rows.begins[l - 1] : grad_x + (first + i) * m.inputs();
      mlp_layer_backward<1, S>(m, l, p, rows.delta(m, l, i), rows.value(m, l, i), before, nothing);
    }
  });
}

// One thread a parameter and 256 points: it adds to the gradient once for each network it meets.
template <class S>
void parameter_gradients(const Mlp& m, const Networks& all, const Rows<S>& rows, int64_t first, int64_t count, S* out) {
  constexpr int64_t many = 256;
  const int64_t size = m.parameters();
  for_each((count + many - 1) / many * size, [=] __device__(int64_t thread) {
    const int parameter = int(thread % size);
    int layer = 0;
    while (m.weight(layer + 1) <= parameter) ++layer;
    const int in = m.widths[layer], at = parameter - m.weight(layer), biases = at - in * m.widths[layer + 1];
    const int o = biases < 0 ? at / in : biases, k = biases < 0 ? at % in : -1;
    const int64_t begin = thread / size * many, end = min(count, begin + many);
    for (int64_t i = begin; i < end;) {
      const int64_t network = all.of(first + i);
      if (network < 0) return;
      const int64_t stop = min(end, all.end(network) - first);
      S sum = 0;
      for (; i < stop; ++i) sum = fma(rows.delta(m, layer, i)[o], k < 0 ? S(1) : rows.value(m, layer, i)[k], sum);
      atomicAdd(out + network * size + parameter, sum);
    }
  });
}

// In slices of points: hidden values and their gradients are kept for one slice only.
inline std::tuple<at::Tensor, at::Tensor> tiny_mlp_backward(const at::Tensor& grad, const at::Tensor& x,
                                                            const at::Tensor& parameters,
                                                            const std::optional<at::Tensor>& offsets,
                                                            at::IntArrayRef widths, bool bias, int64_t activation,
                                                            std::array<bool, 2> needed) {
  const Mlp m = check_mlp("tiny_mlp_backward", x, parameters, offsets, widths, bias, activation);
  const int64_t n = x.size(0);
  check("tiny_mlp_backward", "grad", grad, x.scalar_type(), {n, m.outputs()}, x);
  if (needed[1]) at::globalContext().alertNotDeterministic("gan3d::tiny_mlp_backward");
  const c10::cuda::CUDAGuard guard(x.device());
  const Networks all = networks(offsets, parameters, n);
  constexpr int64_t slice = 1 << 16;
  int hidden = 0, begins[kMaxMlpLayers] = {};
  for (int l = 0; l + 1 < m.layers; ++l) {
    begins[l] = hidden;
    hidden += m.widths[l + 1];
  }
  at::Tensor grad_x = needed[0] ? at::empty_like(x) : at::empty({0}, x.options());
  at::Tensor grad_parameters = needed[1] ? at::zeros_like(parameters) : at::empty({0}, x.options());
  at::Tensor kept = at::empty({2, n < slice ? n : slice, hidden}, x.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "tiny_mlp_backward", [&] {
    scalar_t* values = kept.mutable_data_ptr<scalar_t>();
    for (int64_t first = 0; first < n; first += slice) {
      const int64_t count = n - first < slice ? n - first : slice;
      Rows<scalar_t> rows{x.const_data_ptr<scalar_t>() + first * m.inputs(),
                          grad.const_data_ptr<scalar_t>() + first * m.outputs(), values, values + kept.numel() / 2,
                          hidden, {}};
      for (int l = 0; l < kMaxMlpLayers; ++l) rows.begins[l] = begins[l];
      point_gradients(m, all, parameters.const_data_ptr<scalar_t>(), rows, first, count,
                      needed[0] ? grad_x.mutable_data_ptr<scalar_t>() : nullptr);
      if (needed[1]) parameter_gradients(m, all, rows, first, count, grad_parameters.mutable_data_ptr<scalar_t>());
    }
  });
  return {grad_x, grad_parameters};
}

inline std::tuple<at::Tensor, at::Tensor> sort_by_cell(const at::Tensor& cell, int64_t count) {
  check_cells(cell, count);
  const c10::cuda::CUDAGuard guard(cell.device());
  const at::Tensor key = at::where(cell.ge(0).logical_and(cell.lt(count)), cell, at::full_like(cell, count));
  auto [sorted, order] = at::sort(key, /*stable=*/true, /*dim=*/0, /*descending=*/false);
  return {order, at::searchsorted(sorted, at::arange(count + 1, cell.options()))};
}

TORCH_LIBRARY_IMPL(gan3d, CUDA, m) {
  m.impl("tiny_mlp", &tiny_mlp);
  m.impl("tiny_mlp_backward", &tiny_mlp_backward);
  m.impl("sort_by_cell", &sort_by_cell);
}

}  // namespace gan3d::tiny_mlp_cuda
