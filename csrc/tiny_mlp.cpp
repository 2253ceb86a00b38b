#include "tiny_mlp.h"

#include <algorithm>
#include <vector>

#include "counting_sort.h"
#include "cpu.h"
#include "tiny_mlp_checks.h"
#include "tiny_mlp_lanes.h"

namespace gan3d::mlp {
namespace {

// Points of one network that one thread takes one after the other. Where the pieces end does not depend on the number
// of threads, so neither does any sum.
struct Piece {
  int64_t network, begin, end;
  int64_t partial;  // its place among the sums of networks cut into pieces; −1: the only piece of its network
};
constexpr int64_t kPiece = 4096;

struct Pieces {
  std::vector<Piece> all;  // in the order of points, none empty
  std::vector<int64_t> summed;  // networks whose gradient no single piece writes: none, or several
  int64_t partials = 0, points = 0;

  Pieces(const char* op, const int64_t* offsets, int64_t networks, int64_t n) {
    TORCH_CHECK_VALUE(!offsets || offsets[0] == 0, op, ": offsets must begin with 0, got ", offsets[0]);
    for (int64_t j = 0; j < networks; ++j) {
      const int64_t begin = offsets ? offsets[j] : 0, end = offsets ? offsets[j + 1] : n;
      TORCH_CHECK_VALUE(begin <= end && end <= n, op, ": offsets must not decrease nor exceed the ", n,
                        " rows of x; network ", j, " has ", begin, " to ", end);
      if (begin == end || end - begin > kPiece) summed.push_back(j);
      for (int64_t i = begin; i < end; i += kPiece) {
        all.push_back({j, i, std::min(end, i + kPiece), end - begin > kPiece ? partials++ : -1});
      }
      points = end;
    }
  }

  // f(pieces of a thread), balanced by points.
  template <class F>
  void parallel(const F& f) const {
    at::parallel_for(0, points, 1024, [&](int64_t begin, int64_t end) {
      const auto first = [&](int64_t point) {
        return std::lower_bound(all.data(), all.data() + all.size(), point,
                                [](const Piece& piece, int64_t p) { return piece.begin < p; });
      };
      const Piece *a = first(begin), *b = first(end);
      if (a != b) f(a, b);
    });
  }
};

// f<V>(begin, count): the points of a piece in blocks of V vectors of about equal size, the last one partly filled.
template <class S, class F>
void for_blocks(const Piece& piece, const F& f) {
  constexpr int lanes = Lane<Wide<S>>::count;
  int64_t vectors = (piece.end - piece.begin + lanes - 1) / lanes, blocks = (vectors + kVectors - 1) / kVectors;
  for (int64_t begin = piece.begin; begin < piece.end; --blocks) {
    const int v = int((vectors + blocks - 1) / blocks);
    const int count = int(std::min<int64_t>(piece.end - begin, v * lanes));
    if (v == 1) f(std::integral_constant<int, 1>{}, begin, count);
    if (v == 2) f(std::integral_constant<int, 2>{}, begin, count);
    if constexpr (kVectors > 2) {
      if (v == 3) f(std::integral_constant<int, 3>{}, begin, count);
      if (v == 4) f(std::integral_constant<int, 4>{}, begin, count);
    }
    begin += count;
    vectors -= v;
  }
}

// Three layouts of w features of a block of V vectors of points. Rows as tensors have them, [count w]. Columns [w points]:
// vectors of points. Padded rows [points vectors·lanes]: vectors of features, of which the last one overlaps the one before
// (features w−lanes … w−1) where lanes do not divide w, so that every load and store is a full one.
template <class S>
struct Layout {
  using T = Wide<S>;
  using L = Lane<T>;
  static constexpr int lanes = L::count;

  static int vectors(int w) { return (w + lanes - 1) / lanes; }
  static int padded(int w) { return vectors(w) * lanes; }
  static int start(int w, int vector) { return std::max(0, std::min(vector * lanes, w - lanes)); }
  // Features at the end that are cheaper one by one than as a vector.
  static int singles(int w) { return w < lanes || w % lanes < 4 ? w % lanes : 0; }

  template <int V>
  static void rows_to_columns(const S* rows, int count, int w, S* columns) {
    constexpr int points = V * lanes;
    static const S zeros[lanes] = {};
    const int single = singles(w);
    for (int v = 0; v < V; ++v) {
      for (int k = 0; k < vectors(w - single); ++k) {
        const int first = start(w - single, k);
        T tile[lanes];
        GAN3D_UNROLL
        for (int i = 0; i < lanes; ++i) {
          const int p = v * lanes + i;
          tile[i] = L::load(p < count ? rows + int64_t(p) * w + first : zeros);
        }
        transpose(tile);
        GAN3D_UNROLL
        for (int i = 0; i < lanes; ++i) L::store(columns + (first + i) * points + v * lanes, tile[i]);
      }
    }
    for (int f = w - single; f < w; ++f) {
      for (int p = 0; p < points; ++p) columns[f * points + p] = p < count ? rows[int64_t(p) * w + f] : S(0);
    }
  }

  template <int V>
  static void columns_to_rows(const S* columns, int count, int w, S* rows) {
    constexpr int points = V * lanes;
    const int single = singles(w);
    for (int v = 0; v < V; ++v) {
      for (int k = 0; k < vectors(w - single); ++k) {
        const int first = start(w - single, k), many = std::min(lanes, count - v * lanes);
        T tile[lanes];
        GAN3D_UNROLL
        for (int i = 0; i < lanes; ++i) tile[i] = L::load(columns + (first + i) * points + v * lanes);
        transpose(tile);
        S* row = rows + int64_t(v) * lanes * w + first;
        GAN3D_UNROLL
        for (int i = 0; i < lanes; ++i) {
          if (i < many) L::store(row + int64_t(i) * w, tile[i]);
        }
      }
    }
    for (int f = w - single; f < w; ++f) {
      for (int p = 0; p < count; ++p) rows[int64_t(p) * w + f] = columns[f * points + p];
    }
  }

  // `columns` has at least `lanes` rows, zero past w.
  template <int V>
  static void columns_to_padded(const S* columns, int w, S* out) {
    constexpr int points = V * lanes;
    for (int v = 0; v < V; ++v) {
      for (int k = 0; k < vectors(w); ++k) {
        T tile[lanes];
        GAN3D_UNROLL
        for (int i = 0; i < lanes; ++i) tile[i] = L::load(columns + (start(w, k) + i) * points + v * lanes);
        transpose(tile);
        GAN3D_UNROLL
        for (int i = 0; i < lanes; ++i) L::store(out + (v * lanes + i) * padded(w) + k * lanes, tile[i]);
      }
    }
  }

  static void rows_to_padded(const S* rows, int count, int w, S* out) {
    for (int p = 0; p < count; ++p, rows += w, out += padded(w)) {
      if (w < lanes) {
        for (int f = 0; f < lanes; ++f) out[f] = f < w ? rows[f] : S(0);
      } else {
        for (int k = 0; k < vectors(w); ++k) L::store(out + k * lanes, L::load(rows + start(w, k)));
      }
    }
  }

  static void padded_to_rows(const S* in, int count, int w, S* rows) {
    for (int p = 0; p < count; ++p, rows += w, in += padded(w)) {
      if (w < lanes) {
        for (int f = 0; f < w; ++f) rows[f] = in[f];
      } else {
        for (int k = 0; k < vectors(w); ++k) L::store(rows + start(w, k), L::load(in + k * lanes));
      }
    }
  }
};

template <class S>
struct Memory {  // of one thread, zero at first, on cache lines
  std::vector<S> all;
  size_t used = 0;

  explicit Memory(size_t most) : all(most + 64) {
    used = (64 - reinterpret_cast<uintptr_t>(all.data()) % 64) % 64 / sizeof(S);
  }
  S* take(size_t count) {
    S* const at = all.data() + used;
    used += (count + 15) / 16 * 16;
    TORCH_INTERNAL_ASSERT(used <= all.size());
    return at;
  }
};

// Asks for memory that will be read soon, some cache lines each time it is called.
struct Fetch {
  struct Range { const char *at, *end; } ranges[3] = {};
  int count = 0;

  void operator()() {
    for (int line = 0; line < 16;) {
      if (count == 0) return;
      Range& range = ranges[count - 1];
      if (range.at >= range.end) {
        --count;
        continue;
      }
      __builtin_prefetch(range.at, 0, 2);
      range.at += 64;
      ++line;
    }
  }
  template <class S>
  void soon(const S* at, int64_t size) {
    ranges[count++] = {reinterpret_cast<const char*>(at), reinterpret_cast<const char*>(at + size)};
  }
};

template <class S>
void forward(const Mlp& m, const S* x, const S* parameters, const Pieces& pieces, S* y) {
  using L = Layout<S>;
  constexpr int points = kVectors * L::lanes;
  pieces.parallel([&](const Piece* piece, const Piece* end) {
    Memory<S> memory(2 * points * kMaxMlpInput);
    S* const buffers[2] = {memory.take(points * kMaxMlpInput), memory.take(points * kMaxMlpInput)};
    for (; piece != end; ++piece) {
      const S* const p = parameters + piece->network * m.parameters();
      for_blocks<S>(*piece, [&](auto vectors, int64_t begin, int count) {
        constexpr int V = vectors;
        Fetch fetch;
        if (piece + 1 != end && begin + count == piece->end) fetch.soon(p + m.parameters(), m.parameters());
        fetch.soon(x + (begin + count) * m.inputs(), points * m.inputs());
        L::template rows_to_columns<V>(x + begin * m.inputs(), count, m.inputs(), buffers[0]);
        for (int l = 0; l < m.layers; ++l) {
          mlp_layer<V, typename L::T>(m, l, p, buffers[l % 2], buffers[(l + 1) % 2], fetch);
        }
        L::template columns_to_rows<V>(buffers[m.layers % 2], count, m.outputs(), y + begin * m.outputs());
      });
    }
  });
}

// Everything a thread needs for the backward pass through a block, and the sums of the parameters' gradient.
template <class S>
struct Backward {
  using L = Layout<S>;
  using T = typename L::T;
  static constexpr int points = kVectors * L::lanes;

  const Mlp& m;
  Memory<S> memory;
  S *columns[kMaxMlpLayers], *padded, *delta[2];        // columns: x and the hidden values
  S *weights[kMaxMlpLayers], *biases[kMaxMlpLayers];    // sums: [out, padded in]; [out, lanes], to be added up at the end
  size_t sums = 0;

  static size_t most(const Mlp& m) {
    size_t count = points * 3 * kMaxMlpInput + 1024;
    for (int l = 0; l < m.layers; ++l) {
      count += (points + m.widths[l + 1]) * (m.widths[l] + L::lanes) + (m.widths[l + 1] + L::lanes) * L::lanes + 64;
    }
    return count;
  }

  explicit Backward(const Mlp& mlp) : m(mlp), memory(most(mlp)) {
    padded = memory.take(points * kMaxMlpInput);
    for (S*& d : delta) d = memory.take(points * kMaxMlpInput);
    for (int l = 0; l < m.layers; ++l) columns[l] = memory.take(points * std::max(m.widths[l], L::lanes));
    const size_t before = memory.used;
    for (int l = 0; l < m.layers; ++l) {
      weights[l] = memory.take(m.widths[l + 1] * L::padded(m.widths[l]));
      biases[l] = memory.take(L::padded(m.widths[l + 1]) * L::lanes);
    }
    sums = memory.used - before;
  }

  void clear() { std::fill_n(weights[0], sums, S(0)); }

  template <int V>
  void block(const S* grad, const S* x, const S* parameters, int count, bool wanted, S* grad_x, Fetch& fetch) {
    L::template rows_to_columns<V>(x, count, m.inputs(), columns[0]);
    for (int l = 0; l + 1 < m.layers; ++l) mlp_layer<V, T>(m, l, parameters, columns[l], columns[l + 1], fetch);
    L::template rows_to_columns<V>(grad, count, m.outputs(), delta[0]);  // 0 for the points that fill the block up
    for (int l = m.layers - 1; l >= 0; --l) {
      if (wanted) {
        if (l == 0) L::rows_to_padded(x, count, m.inputs(), padded);
        else L::template columns_to_padded<V>(columns[l], m.widths[l], padded);
        sum<V>(l, count, fetch);
      }
      if (l == 0 && !grad_x) return;
      mlp_layer_backward<V, T>(m, l, parameters, delta[0], columns[l], delta[1], fetch);
      std::swap(delta[0], delta[1]);
    }
    L::template columns_to_rows<V>(delta[0], count, m.inputs(), grad_x);
  }

  // weights += delta · padded, a vector of inputs at a time; biases += delta.
  template <int V>
  void sum(int l, int count, Fetch& fetch) {
    const int out = m.widths[l + 1], width = L::padded(m.widths[l]);
    for (int k = 0; k < width;) {
      const int v = std::min(kVectors, (width - k) / L::lanes);
      if (v == 1) outer<V, 1>(l, count, k, fetch);
      if (v == 2) outer<V, 2>(l, count, k, fetch);
      if constexpr (kVectors > 2) {
        if (v == 3) outer<V, 3>(l, count, k, fetch);
        if (v == 4) outer<V, 4>(l, count, k, fetch);
      }
      k += v * L::lanes;
    }
    if (!m.bias) return;
    for (int o = 0; o < out; ++o) {
      T total = L::L::load(biases[l] + o * L::lanes);
      for (int v = 0; v < V; ++v) total += L::L::load(delta[0] + (o * V + v) * L::lanes);
      L::L::store(biases[l] + o * L::lanes, total);
    }
  }

  template <int V, int W>
  void outer(int l, int count, int first, Fetch& fetch) {
    const int width = L::padded(m.widths[l]);
    product<W, T>(delta[0], V * L::lanes, 1, padded + first, width, count, static_cast<const S*>(nullptr), true,
                  weights[l] + first, width, m.widths[l + 1], fetch);
  }

  void write(S* out) {
    for (int l = 0; l < m.layers; ++l) {
      const int rows = m.widths[l + 1];
      L::padded_to_rows(weights[l], rows, m.widths[l], out + m.weight(l));
      if (!m.bias) continue;
      S* const to = out + m.weight(l) + rows * m.widths[l];
      for (int o = 0; o < rows; o += L::lanes) {
        T tile[L::lanes], total{};
        for (int i = 0; i < L::lanes; ++i) tile[i] = L::L::load(biases[l] + (o + i) * L::lanes);
        transpose(tile);
        for (int i = 0; i < L::lanes; ++i) total += tile[i];
        for (int i = 0; i < std::min(L::lanes, rows - o); ++i) to[o + i] = total[i];
      }
    }
  }
};

template <class S>
void backward(const Mlp& m, const S* grad, const S* x, const S* parameters, const Pieces& pieces, S* grad_x,
              S* grad_parameters, S* partials) {
  const int64_t size = m.parameters();
  for (int64_t j : grad_parameters ? pieces.summed : std::vector<int64_t>()) {
    std::fill_n(grad_parameters + j * size, size, S(0));
  }
  pieces.parallel([&](const Piece* piece, const Piece* end) {
    Backward<S> work(m);
    for (; piece != end; ++piece) {
      if (grad_parameters) work.clear();
      for_blocks<S>(*piece, [&](auto vectors, int64_t begin, int count) {
        Fetch fetch;
        const S* const p = parameters + piece->network * size;
        if (piece + 1 != end && begin + count == piece->end) fetch.soon(p + size, size);
        fetch.soon(x + (begin + count) * m.inputs(), work.points * m.inputs());
        fetch.soon(grad + (begin + count) * m.outputs(), work.points * m.outputs());
        work.template block<vectors>(grad + begin * m.outputs(), x + begin * m.inputs(), p, count,
                                     grad_parameters != nullptr, grad_x ? grad_x + begin * m.inputs() : nullptr, fetch);
      });
      if (!grad_parameters) continue;
      work.write(piece->partial < 0 ? grad_parameters + piece->network * size : partials + piece->partial * size);
    }
  });
  if (!partials) return;
  for (const Piece& piece : pieces.all) {  // in order
    if (piece.partial < 0) continue;
    S* const to = grad_parameters + piece.network * size;
    const S* const from = partials + piece.partial * size;
    for (int64_t i = 0; i < size; ++i) to[i] += from[i];
  }
}

at::Tensor tiny_mlp(const at::Tensor& x, const at::Tensor& parameters, const std::optional<at::Tensor>& offsets,
                    at::IntArrayRef widths, bool bias, int64_t activation) {
  const Mlp m = check_mlp("tiny_mlp", x, parameters, offsets, widths, bias, activation);
  const int64_t n = x.size(0);
  at::Tensor out = at::empty({n, m.outputs()}, x.options());
  const Pieces pieces("tiny_mlp", offsets ? offsets->const_data_ptr<int64_t>() : nullptr, parameters.size(0), n);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "tiny_mlp", [&] {
    scalar_t* y = out.mutable_data_ptr<scalar_t>();
    forward(m, x.const_data_ptr<scalar_t>(), parameters.const_data_ptr<scalar_t>(), pieces, y);
    std::fill(y + pieces.points * m.outputs(), y + n * m.outputs(), scalar_t(0));
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor> tiny_mlp_backward(const at::Tensor& grad, const at::Tensor& x,
                                                     const at::Tensor& parameters,
                                                     const std::optional<at::Tensor>& offsets, at::IntArrayRef widths,
                                                     bool bias, int64_t activation, std::array<bool, 2> needed) {
  const Mlp m = check_mlp("tiny_mlp_backward", x, parameters, offsets, widths, bias, activation);
  const int64_t n = x.size(0);
  check("tiny_mlp_backward", "grad", grad, x.scalar_type(), {n, m.outputs()}, x);
  const Pieces pieces("tiny_mlp_backward", offsets ? offsets->const_data_ptr<int64_t>() : nullptr, parameters.size(0),
                      n);
  at::Tensor grad_x = needed[0] ? at::empty_like(x) : at::empty({0}, x.options());
  at::Tensor grad_parameters = needed[1] ? at::empty_like(parameters) : at::empty({0}, x.options());
  at::Tensor partials = at::empty({needed[1] ? pieces.partials : 0, m.parameters()}, x.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "tiny_mlp_backward", [&] {
    scalar_t* gx = needed[0] ? grad_x.mutable_data_ptr<scalar_t>() : nullptr;
    if (!gx && !needed[1]) return;
    backward(m, grad.const_data_ptr<scalar_t>(), x.const_data_ptr<scalar_t>(), parameters.const_data_ptr<scalar_t>(),
             pieces, gx, needed[1] ? grad_parameters.mutable_data_ptr<scalar_t>() : nullptr,
             partials.numel() ? partials.mutable_data_ptr<scalar_t>() : nullptr);
    if (gx) std::fill(gx + pieces.points * m.inputs(), gx + n * m.inputs(), scalar_t(0));
  });
  return {grad_x, grad_parameters};
}

// A stable counting sort. The order is unique, so how many threads shared the work cannot be seen.
std::tuple<at::Tensor, at::Tensor> sort_by_cell(const at::Tensor& cell, int64_t count) {
  check_cells(cell, count);
  const int64_t n = cell.numel();
  at::Tensor order = at::empty({n}, cell.options().dtype(at::kLong));
  at::Tensor offsets = at::empty({count + 1}, cell.options().dtype(at::kLong));
  AT_DISPATCH_INDEX_TYPES(cell.scalar_type(), "sort_by_cell", [&] {
    const index_t* c = cell.const_data_ptr<index_t>();
    int64_t *to = order.mutable_data_ptr<int64_t>(), *starts = offsets.mutable_data_ptr<int64_t>();
    std::vector<int64_t> bounds(count + 2);
    const auto bin = [=](int64_t i) { return c[i] >= 0 && c[i] < count ? int64_t(c[i]) : count; };
    counting_sort(n, count + 1, bin, to, bounds.data());
    std::copy_n(bounds.begin(), count + 1, starts);
  });
  return {order, offsets};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(gan3d, m) {
  m.def("tiny_mlp(Tensor x, Tensor parameters, Tensor? offsets, int[] widths, bool bias, int activation) -> Tensor");
  m.def("tiny_mlp_backward(Tensor grad, Tensor x, Tensor parameters, Tensor? offsets, int[] widths, bool bias, "
        "int activation, bool[2] needed) -> (Tensor, Tensor)");
  m.def("sort_by_cell(Tensor cell, int count) -> (Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(gan3d, CPU, m) {
  m.impl("tiny_mlp", &tiny_mlp);
  m.impl("tiny_mlp_backward", &tiny_mlp_backward);
  m.impl("sort_by_cell", &sort_by_cell);
}

}  // namespace gan3d::mlp
