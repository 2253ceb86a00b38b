// What both devices ask of the arguments of tiny_mlp.
#pragma once

#include <optional>

#include "checks.h"
#include "tiny_mlp.h"

namespace gan3d::mlp {

inline Mlp check_mlp(const char* op, const at::Tensor& x, const at::Tensor& parameters,
                     const std::optional<at::Tensor>& offsets, at::IntArrayRef widths, bool bias, int64_t activation) {
  TORCH_CHECK_VALUE(widths.size() >= 2 && widths.size() <= kMaxMlpLayers + 1, op, ": widths must name 1 to ",
                    kMaxMlpLayers, " layers, got ", widths);
  for (size_t i = 0; i < widths.size(); ++i) {
    TORCH_CHECK_VALUE(widths[i] >= 1 && widths[i] <= (i == 0 ? kMaxMlpInput : kMaxMlpWidth), op, ": widths must be 1 to ",
                      kMaxMlpWidth, " (the first: to ", kMaxMlpInput, "), got ", widths);
  }
  TORCH_CHECK_VALUE(activation >= kLinear && activation <= kSoftplus, op, ": activation must be 0 to 2, got ", activation);
  Mlp m{int32_t(widths.size()) - 1, int32_t(activation), bias, {}};
  for (size_t i = 0; i < widths.size(); ++i) m.widths[i] = int32_t(widths[i]);
  check_first(op, "x", x, {-1, m.inputs()});
  check(op, "parameters", parameters, x.scalar_type(), {offsets ? -1 : 1, m.parameters()}, x);
  if (offsets) check(op, "offsets", *offsets, at::kLong, {parameters.size(0) + 1}, x);
  return m;
}

inline void check_cells(const at::Tensor& cell, int64_t count) {
  TORCH_CHECK_VALUE(count >= 0, "sort_by_cell: count must be 0 or more, got ", count);
  const auto dtype = cell.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kInt || dtype == at::kLong, "sort_by_cell: cell must be int32 or int64, got ", dtype);
  check("sort_by_cell", "cell", cell, dtype, {-1}, cell);
}

}  // namespace gan3d::mlp
