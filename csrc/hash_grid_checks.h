// The arguments of the hash grid's ops, checked, and its levels.
#pragma once

#include <vector>

#include "checks.h"
#include "hash_grid.h"

namespace gan3d {

inline std::vector<HashLevel> check_hash_grid(const char* op, const at::Tensor& points, const at::Tensor& table,
                                              at::ArrayRef<double> scales, at::IntArrayRef resolutions,
                                              at::IntArrayRef offsets) {
  check_first(op, "points", points, {-1, 3});
  check(op, "table", table, points.scalar_type(), {-1, -1}, points);
  const size_t count = scales.size();
  TORCH_CHECK_VALUE(count > 0 && resolutions.size() == count && offsets.size() == count + 1, op,
                    ": scales and resolutions must have one entry a level, offsets one more, got ", count, ", ",
                    resolutions.size(), " and ", offsets.size());
  const int64_t features = table.size(1);
  TORCH_CHECK_VALUE(features > 0, op, ": table must have at least one feature");
  TORCH_CHECK_VALUE(offsets[0] == 0 && offsets[count] == table.size(0), op, ": offsets must go from 0 to the table's ",
                    table.size(0), " rows, got ", offsets);
  std::vector<HashLevel> levels(count);
  for (size_t i = 0; i < count; ++i) {
    const int64_t rows = offsets[i + 1] - offsets[i], r = resolutions[i];
    TORCH_CHECK_VALUE(rows > 0 && rows < (int64_t(1) << 31) / features, op, ": offsets must grow by 1 to 2^31/",
                      features, " rows, got ", offsets);
    TORCH_CHECK_VALUE(r > 0 && r <= int64_t(1) << 30, op, ": resolutions must be 1 to 2^30, got ", resolutions);
    const bool dense = r <= 1290 && r * r * r <= rows;  // 1290³ < 2^31 < 1291³
    TORCH_CHECK_VALUE(dense || (rows & (rows - 1)) == 0, op, ": a hashed level's rows must be a power of two, got ",
                      rows, " for resolution ", r);
    levels[i] = {float(scales[i]), uint32_t(r), uint32_t(rows), dense, offsets[i]};
  }
  return levels;
}

}  // namespace gan3d
