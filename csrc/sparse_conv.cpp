#include "sparse_conv.h"

#include <algorithm>
#include <atomic>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu.h"
#include "sparse_conv_checks.h"
#include "tiny_mlp_lanes.h"

namespace gan3d::sparse_conv {
namespace {

#if defined(__AVX512F__)
constexpr int kRows = 8, kVectors = 3;  // 24 of 32 registers hold sums
#else
constexpr int kRows = 4, kVectors = 3;  // 12 of 16
#endif
constexpr int64_t kPairs = 100;  // of one tap that a block of targets should have
constexpr int64_t kChunk = 256;  // rows, or words

// f(std::integral_constant<int, n>) for n in [1, Most].
template <int Most, class F>
void with_constant(int n, const F& f) {
  if constexpr (Most > 0) {
    if (n == Most) f(std::integral_constant<int, Most>{});
    else with_constant<Most - 1>(n, f);
  }
}

// Columns of a table as vectors: `vectors` of them cover all, in panels of kVectors or fewer.
template <class S>
struct Columns {
  using T = mlp::Wide<S>;
  static constexpr int64_t lanes = mlp::Lane<T>::count;
  int64_t count, vectors, panels;

  explicit Columns(int64_t c)
      : count(c), vectors((c + lanes - 1) / lanes), panels((vectors + kVectors - 1) / kVectors) {}
  int64_t pitch() const { return vectors * lanes; }
  bool whole() const { return pitch() == count; }
  int64_t first(int64_t panel) const { return panel * vectors / panels; }  // vector
  int width(int64_t panel) const { return int(first(panel + 1) - first(panel)); }
};

template <class S>
struct Scratch {
  at::Tensor all;
  S* data;
  Scratch(int64_t size, const at::TensorOptions& options)
      : all(fresh({size}, options)), data(all.mutable_data_ptr<S>()) {}
};

// Targets are taken in blocks whose values stay in the cache for all taps. The pairs of a tap are sorted by target, so
// those of a block are a run of them, and the next block's run follows.
class Blocks {
 public:
  Blocks(const at::Tensor& pairs, const at::Tensor& start, int64_t rows)
      : pairs_(reinterpret_cast<const Pair*>(pairs.const_data_ptr<int32_t>())), start_(start.const_data_ptr<int64_t>()),
        taps_(start.size(0) - 1), rows_(rows),
        size_(std::clamp<int64_t>(rows * taps_ * kPairs / std::max<int64_t>(pairs.size(0), 1), 64, 1024)) {}

  int64_t count() const { return (rows_ + size_ - 1) / size_; }
  int64_t size() const { return size_; }

  // f(first row, last row, runs) for the blocks begin … end − 1; tap t's pairs are runs[t] … runs[taps + t].
  template <class F>
  void each(int64_t begin, int64_t end, const F& f) const {
    std::vector<const Pair*> runs(2 * taps_);
    const auto seek = [&](const Pair* from, const Pair* to, int64_t row) {
      return std::lower_bound(from, to, row, [](const Pair& p, int64_t r) { return p.target < r; });
    };
    for (int64_t t = 0; t < taps_; ++t) runs[t] = seek(pairs_ + start_[t], pairs_ + start_[t + 1], begin * size_);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b * size_, last = std::min(first + size_, rows_);
      for (int64_t t = 0; t < taps_; ++t) {
        const Pair* const stop = pairs_ + start_[t + 1];
        runs[taps_ + t] = seek(runs[t], runs[t] + std::min<int64_t>(stop - runs[t], last - first), last);
      }
      f(first, last, runs.data());
      std::copy_n(runs.begin() + taps_, taps_, runs.begin());
    }
  }

  // That every row exists, and that no target comes twice in a tap: what keeps reads and writes where they belong.
  void check(const char* op, int64_t sources) const {
    std::atomic<bool> wrong{false};
    at::parallel_for(0, taps_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const Pair* const p = pairs_ + start_[t];
        const int64_t n = start_[t + 1] - start_[t];
        int bad = n > 0 && (p[0].target < 0 || p[n - 1].target >= rows_);
#pragma omp simd reduction(| : bad)
        for (int64_t i = 0; i < n; ++i) bad |= uint32_t(p[i].source) >= uint64_t(sources);
#pragma omp simd reduction(| : bad)
        for (int64_t i = 1; i < n; ++i) bad |= p[i - 1].target >= p[i].target;
        if (bad) wrong = true;
      }
    });
    TORCH_CHECK_INDEX(!wrong, op, ": pairs must have sources from 0 to less than ", sources,
                      ", and in each tap increasing targets from 0 to less than ", rows_);
  }

 private:
  const Pair* pairs_;
  const int64_t* start_;
  int64_t taps_, rows_, size_;
};

// The targets of R pairs += their sources · weight [depth, V vectors]. Not inlined: among other loops its sums would not
// all stay in registers. Unrolled, so that the end of a short loop is foreseen.
template <class S, int V, int R>
__attribute__((noinline)) void multiply_add(const Pair* pairs, const S* values, int64_t depth, const S* weight, S* targets, int64_t pitch) {
  using T = mlp::Wide<S>;
  using L = mlp::Lane<T>;
  const S* source[R];
  T sum[R][V];
  GAN3D_UNROLL
  for (int r = 0; r < R; ++r) {
    source[r] = values + pairs[r].source * depth;
    GAN3D_UNROLL
    for (int v = 0; v < V; ++v) sum[r][v] = L::load(targets + pairs[r].target * pitch + v * L::count);
  }
#pragma GCC unroll 4
  for (int64_t k = 0; k < depth; ++k) {
    T column[V];
    GAN3D_UNROLL
    for (int v = 0; v < V; ++v) column[v] = L::load(weight + (k * V + v) * L::count);
    GAN3D_UNROLL
    for (int r = 0; r < R; ++r) {
      const T x = L::broadcast(source[r][k]);
      GAN3D_UNROLL
      for (int v = 0; v < V; ++v) sum[r][v] = L::fused(x, column[v], sum[r][v]);
    }
  }
  GAN3D_UNROLL
  for (int r = 0; r < R; ++r) {
    GAN3D_UNROLL
    for (int v = 0; v < V; ++v) L::store(targets + pairs[r].target * pitch + v * L::count, sum[r][v]);
  }
}

template <class S, int V>
void multiply_add(const Pair* pairs, int64_t n, const S* values, int64_t depth, const S* weight, S* targets,
                  int64_t pitch) {
  for (int64_t left = (n + kRows - 1) / kRows; left > 0; --left) {
    const int rows = int((n + left - 1) / left);  // of about equal height
    with_constant<kRows>(rows, [&](auto r) {
      multiply_add<S, V, decltype(r)::value>(pairs, values, depth, weight, targets, pitch);
    });
    pairs += rows, n -= rows;
  }
}

// weight [taps, c, o] → [panels, taps, c, panel], zeros where a panel has more columns than are left.
template <class S>
Scratch<S> packed(const at::Tensor& weight, const Columns<S>& columns) {
  const int64_t rows = weight.size(0) * weight.size(1), o = columns.count;
  Scratch<S> out(rows * columns.pitch(), weight.options());
  const S* const from = weight.const_data_ptr<S>();
  parallel(columns.panels, 1, [&](int64_t panel) {
    const int64_t at = columns.first(panel) * columns.lanes, width = columns.width(panel) * columns.lanes;
    const int64_t real = std::min(width, o - at);
    S* to = out.data + rows * at;
    for (int64_t i = 0; i < rows; ++i, to += width) {
      std::copy_n(from + i * o + at, real, to);
      std::fill(to + real, to + width, S(0));
    }
  });
  return out;
}

template <class S>
void convolve(const at::Tensor& values, const at::Tensor& weight, const Blocks& blocks, at::Tensor& out) {
  const int64_t taps = weight.size(0), c = weight.size(1);
  const Columns<S> columns(weight.size(2));
  const Scratch<S> panels = packed(weight, columns);
  const S* const x = values.const_data_ptr<S>();
  S* const y = out.mutable_data_ptr<S>();
  const int64_t pitch = columns.pitch();
  at::parallel_for(0, blocks.count(), 1, [&](int64_t begin, int64_t end) {
    const Scratch<S> own(columns.whole() ? 0 : blocks.size() * pitch, values.options());
    blocks.each(begin, end, [&](int64_t first, int64_t last, const Pair* const* runs) {
      S* const block = columns.whole() ? y + first * pitch : own.data;
      std::fill_n(block, (last - first) * pitch, S(0));
      for (int64_t panel = 0; panel < columns.panels; ++panel) {
        const int64_t at = columns.first(panel) * columns.lanes, width = columns.width(panel) * columns.lanes;
        with_constant<kVectors>(columns.width(panel), [&](auto v) {
          for (int64_t t = 0; t < taps; ++t) {
            multiply_add<S, decltype(v)::value>(runs[t], runs[taps + t] - runs[t], x, c,
                                                panels.data + taps * c * at + t * c * width, block - first * pitch + at,
                                                pitch);
          }
        });
      }
      if (columns.whole()) return;
      for (int64_t i = first; i < last; ++i) {
        std::copy_n(block + (i - first) * pitch, columns.count, y + i * columns.count);
      }
    });
  });
}

at::Tensor conv_rows(const at::Tensor& values, const at::Tensor& weight, const at::Tensor& pairs,
                       const at::Tensor& start, const std::optional<at::Tensor>&, int64_t rows) {
  const Sizes sizes = check_conv("conv_rows", values, weight, pairs, start, rows);
  const Blocks blocks(pairs, start, rows);
  blocks.check("conv_rows", values.size(0));
  at::Tensor out = fresh({rows, sizes.outputs}, values.options());
  if (out.numel() == 0) return out;
  AT_DISPATCH_FLOATING_TYPES(values.scalar_type(), "conv_rows", [&] {
    convolve<scalar_t>(values, weight, blocks, out);
  });
  return out;
}

// out [R, V vectors of pitch] += Σ over pairs of R columns of the source times V vectors of the target.
template <class S, int V, int R>
__attribute__((noinline)) void outer_products(const Pair* pairs, const Pair* stop, const S* values, int64_t c, const S* targets, int64_t pitch,
                    S* out) {
  using T = mlp::Wide<S>;
  using L = mlp::Lane<T>;
  T sum[R][V] = {};
  for (; pairs < stop; ++pairs) {
    const S *const source = values + pairs->source * c, *const target = targets + pairs->target * pitch;
    T column[V];
    GAN3D_UNROLL
    for (int v = 0; v < V; ++v) column[v] = L::load(target + v * L::count);
    GAN3D_UNROLL
    for (int r = 0; r < R; ++r) {
      const T x = L::broadcast(source[r]);
      GAN3D_UNROLL
      for (int v = 0; v < V; ++v) sum[r][v] = L::fused(x, column[v], sum[r][v]);
    }
  }
  GAN3D_UNROLL
  for (int r = 0; r < R; ++r) {
    GAN3D_UNROLL
    for (int v = 0; v < V; ++v) {
      S* const to = out + r * pitch + v * L::count;
      L::store(to, L::load(to) + sum[r][v]);
    }
  }
}

// A thread owns some taps and some columns of the sources, and goes through all blocks: no sum has two owners. A block's
// share is summed by itself, so that a long sum has few roundings.
template <class S>
void by_weight(const at::Tensor& values, const at::Tensor& grad, const Blocks& blocks, int64_t taps, at::Tensor& out) {
  const int64_t c = values.size(1), groups = (c + kRows - 1) / kRows;
  const Columns<S> columns(grad.size(1));
  const int64_t pitch = columns.pitch();
  const S *const x = values.const_data_ptr<S>(), *const g = grad.const_data_ptr<S>();
  const Scratch<S> wide(columns.whole() ? 0 : taps * c * pitch, out.options());
  S *const y = out.mutable_data_ptr<S>(), *const sums = columns.whole() ? y : wide.data;
  at::parallel_for(0, taps * groups, 1, [&](int64_t begin, int64_t end) {
    const auto row = [&](int64_t unit) { return unit / groups * c + unit % groups * kRows; };
    const int64_t from = row(begin), to = row(end);
    std::fill(sums + from * pitch, sums + to * pitch, S(0));
    const Scratch<S> own(columns.whole() ? 0 : blocks.size() * pitch, out.options());
    blocks.each(0, blocks.count(), [&](int64_t first, int64_t last, const Pair* const* runs) {
      const S* const block = columns.whole() ? g + first * pitch : own.data;
      if (!columns.whole()) {
        for (int64_t i = first; i < last; ++i) {
          S* const padded = own.data + (i - first) * pitch;
          std::copy_n(g + i * columns.count, columns.count, padded);
          std::fill(padded + columns.count, padded + pitch, S(0));
        }
      }
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t t = unit / groups, column = unit % groups * kRows;
        for (int64_t panel = 0; panel < columns.panels; ++panel) {
          const int64_t at = columns.first(panel) * columns.lanes;
          with_constant<kVectors>(columns.width(panel), [&](auto v) {
            with_constant<kRows>(int(std::min<int64_t>(kRows, c - column)), [&](auto r) {
              outer_products<S, decltype(v)::value, decltype(r)::value>(
                  runs[t], runs[taps + t], x + column, c, block - first * pitch + at, pitch,
                  sums + (t * c + column) * pitch + at);
            });
          });
        }
      }
    });
    if (columns.whole()) return;
    for (int64_t i = from; i < to; ++i) std::copy_n(sums + i * pitch, columns.count, y + i * columns.count);
  });
}

at::Tensor conv_rows_weight(const at::Tensor& values, const at::Tensor& grad, const at::Tensor& pairs,
                              const at::Tensor& start, const std::optional<at::Tensor>&) {
  const Sizes sizes = check_weight("conv_rows_weight", values, grad, pairs, start);
  const Blocks blocks(pairs, start, grad.size(0));
  blocks.check("conv_rows_weight", values.size(0));
  at::Tensor out = fresh({sizes.taps, sizes.inputs, sizes.outputs}, values.options());
  if (out.numel() == 0) return out;
  AT_DISPATCH_FLOATING_TYPES(values.scalar_type(), "conv_rows_weight", [&] {
    by_weight<scalar_t>(values, grad, blocks, sizes.taps, out);
  });
  return out;
}

struct Counted {  // where each chunk's pairs of each tap begin: from their numbers
  at::Tensor pairs, start;
  Counted(std::vector<int64_t>& counts, int64_t taps, const at::TensorOptions& options)
      : start(at::empty({taps + 1}, options.dtype(at::kLong))) {
    int64_t total = 0, *s = start.mutable_data_ptr<int64_t>();
    for (int64_t t = 0; t < taps; ++t) {
      s[t] = total;
      for (size_t i = size_t(t); i < counts.size(); i += size_t(taps)) total += std::exchange(counts[i], total);
    }
    s[taps] = total;
    pairs = fresh({total, 2}, options.dtype(at::kInt));
  }
  Pair* data() { return reinterpret_cast<Pair*>(pairs.mutable_data_ptr<int32_t>()); }
};

// Column after column of a table of sources, a row a target; −1 is none.
std::tuple<at::Tensor, at::Tensor> pairs_of_columns(const at::Tensor& table) {
  const int64_t rows = table.size(0), taps = table.size(1), chunks = (rows + kChunk - 1) / kChunk;
  const int32_t* const sources = table.const_data_ptr<int32_t>();
  std::vector<int64_t> counts(chunks * taps);
  parallel(chunks, 1, [&](int64_t chunk) {
    std::vector<int32_t> n(taps);
    for (int64_t i = chunk * kChunk; i < std::min(rows, (chunk + 1) * kChunk); ++i) {
#pragma omp simd
      for (int64_t t = 0; t < taps; ++t) n[t] += sources[i * taps + t] >= 0;
    }
    std::copy(n.begin(), n.end(), counts.begin() + chunk * taps);
  });
  Counted out(counts, taps, table.options());
  Pair* const pairs = out.data();
  parallel(chunks, 1, [&](int64_t chunk) {
    const int64_t first = chunk * kChunk, last = std::min(rows, first + kChunk);
    Pair found[kChunk + 1];  // written whether or not there is one: a branch would be guessed wrong too often
    for (int64_t t = 0; t < taps; ++t) {
      int64_t n = 0;
      for (int64_t i = first; i < last; ++i) {
        const int32_t source = sources[i * taps + t];
        found[n] = {source, int32_t(i)};
        n += source >= 0;
      }
      std::copy_n(found, n, pairs + counts[chunk * taps + t]);
    }
  });
  return {out.pairs, out.start};
}

std::tuple<at::Tensor, at::Tensor> neighbour_pairs(const at::Tensor& neighbours) {
  check_neighbours("neighbour_pairs", neighbours);
  return pairs_of_columns(neighbours);
}

// put(tap, coarse row, fine row) for all pairs of a block of 4³ fine cells, by fine row. All its coarse cells are 3³.
template <class Put>
void pairs_of_block(const TwoGrids& grids, int64_t word, const Put& put) {
  const uint64_t bits = uint64_t(grids.fine.words[word]);
  if (bits == 0) return;
  int32_t p[3];
  grids.fine.cells.position(word * 64, p[0], p[1], p[2]);
  int32_t near[kTaps];
  for (int i = 0; i < kTaps; ++i) {
    near[i] = row_at(grids.coarse, p[0] / 2 - 1 + i / 9, p[1] / 2 - 1 + i / 3 % 3, p[2] / 2 - 1 + i % 3);
  }
  int32_t row = grids.fine.rank[word];
  for_each_bit(bits, [&](int bit) {
    const int x = (bit & 1) | (bit >> 2 & 2), y = (bit >> 1 & 1) | (bit >> 3 & 2), z = (bit >> 2 & 1) | (bit >> 4 & 2);
    for (int i = x & 1; i < 3; i += 2) {
      for (int j = y & 1; j < 3; j += 2) {
        for (int k = z & 1; k < 3; k += 2) {
          const int32_t source = near[9 * (coarse_coordinate(x, i) + 1) + 3 * (coarse_coordinate(y, j) + 1) +
                                      coarse_coordinate(z, k) + 1];
          if (source >= 0) put(9 * i + 3 * j + k, source, row);
        }
      }
    }
    ++row;
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> upsampling_pairs(
    const at::Tensor& words, const at::Tensor& rank, at::IntArrayRef resolution, const at::Tensor& fine_words,
    const at::Tensor& fine_rank) {
  const TwoGrids grids = check_grids("upsampling_pairs", words, rank, resolution, fine_words, fine_rank);
  const int64_t n = fine_words.size(0), chunks = (n + kChunk - 1) / kChunk;
  std::vector<int64_t> counts(chunks * kTaps);
  parallel(chunks, 1, [&](int64_t chunk) {
    int64_t* const count = counts.data() + chunk * kTaps;
    for (int64_t w = chunk * kChunk; w < std::min(n, (chunk + 1) * kChunk); ++w) {
      pairs_of_block(grids, w, [=](int tap, int32_t, int32_t) { ++count[tap]; });
    }
  });
  Counted out(counts, kTaps, rank.options());
  Pair* const pairs = out.data();
  const int64_t rows = grids.coarse.rank[words.size(0)];
  at::Tensor table = fresh({rows, kTaps}, rank.options());
  int32_t* const fine_of = table.mutable_data_ptr<int32_t>();
  at::parallel_for(0, table.numel(), 1 << 15, [=](int64_t begin, int64_t end) {
    std::fill(fine_of + begin, fine_of + end, -1);
  });
  parallel(chunks, 1, [&](int64_t chunk) {
    int64_t* const next = counts.data() + chunk * kTaps;
    for (int64_t w = chunk * kChunk; w < std::min(n, (chunk + 1) * kChunk); ++w) {
      pairs_of_block(grids, w, [=](int tap, int32_t source, int32_t target) {
        pairs[next[tap]++] = {source, target};
        fine_of[int64_t(source) * kTaps + tap] = target;
      });
    }
  });
  return {out.pairs, std::get<0>(pairs_of_columns(table)), out.start};
}

}  // namespace

// `back` lists the same pairs by source, for derivatives alone; None: tap t's are those of tap taps − 1 − t.
TORCH_LIBRARY_FRAGMENT(gan3d, m) {
  m.def("neighbour_pairs(Tensor neighbours) -> (Tensor, Tensor)");
  m.def("upsampling_pairs(Tensor words, Tensor rank, int[] resolution, Tensor fine_words, Tensor fine_rank) "
        "-> (Tensor, Tensor, Tensor)");
  m.def("conv_rows(Tensor values, Tensor weight, Tensor pairs, Tensor start, Tensor? back, SymInt rows) -> Tensor");
  m.def("conv_rows_weight(Tensor values, Tensor grad, Tensor pairs, Tensor start, Tensor? back) -> Tensor");
}
TORCH_LIBRARY_IMPL(gan3d, CPU, m) {
  m.impl("neighbour_pairs", &neighbour_pairs);
  m.impl("upsampling_pairs", &upsampling_pairs);
  m.impl("conv_rows", &conv_rows);
  m.impl("conv_rows_weight", &conv_rows_weight);
}

}  // namespace gan3d::sparse_conv
