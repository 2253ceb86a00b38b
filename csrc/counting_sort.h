// A stable counting sort: points by the bin they fall in, within a bin in their own order.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "cpu.h"

namespace gan3d {

// order: the n points, bin after bin; start[0 … bins]: where each bin begins, and n. bin(i) lies in [0, bins) and is asked
// twice. Each part of the points counts for itself; more parts than points per bin would only cost memory. The result
// does not depend on how many there are.
template <class Index, class F>
void counting_sort(int64_t n, int64_t bins, const F& bin, Index* order, Index* start) {
  const int64_t most = n / std::max<int64_t>(4096, bins);
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(at::get_num_threads(), most));
  std::vector<Index> counts(parts * bins);
  const auto begin = [=](int64_t part) { return n * part / parts; };
  parallel(parts, 1, [&](int64_t part) {
    Index* own = counts.data() + part * bins;
    for (int64_t i = begin(part); i < begin(part + 1); ++i) ++own[bin(i)];
  });
  Index total = 0;
  for (int64_t b = 0; b < bins; ++b) {
    start[b] = total;
    for (int64_t part = 0; part < parts; ++part) total += std::exchange(counts[part * bins + b], total);
  }
  start[bins] = total;
  parallel(parts, 1, [&](int64_t part) {
    Index* next = counts.data() + part * bins;
    for (int64_t i = begin(part); i < begin(part + 1); ++i) order[next[bin(i)]++] = Index(i);
  });
}

}  // namespace gan3d
