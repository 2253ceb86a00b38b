#include "conv3x3.h"

#include <algorithm>

#include "cpu.h"
#include "tiny_mlp_lanes.h"

namespace gan3d::winograd {
namespace {

using T = mlp::FloatLanes;
using L = mlp::Lane<T>;
#if defined(__AVX512F__)
constexpr int kRows = 14, kVectors = 2;  // 28 of 32 registers hold sums
#else
constexpr int kRows = 6, kVectors = 2;  // 12 of 16
#endif
constexpr int kPanel = kVectors * L::count;   // outputs summed at a time
constexpr int64_t kChannels = 64;             // numbers of channels must be multiples of this: panels of any processor
constexpr int64_t kBlock = 7 * (1 << 17);     // bytes of transformed inputs, about half of a second-level cache
constexpr int64_t kSmall = int64_t(12) << 20;  // bytes of transformed inputs that are kept for all panels

// Asks for memory that will be read soon, a cache line each time.
struct Soon {
  const float* at;
  void operator()() {
    __builtin_prefetch(at, 0, 2);
    at += 64 / sizeof(float);
  }
};

// y [R, panel] = a [R, depth] · b [depth, panel].
template <int R>
void multiply(const float* a, int64_t row, const float* b, int64_t depth, float* y, Soon& soon) {
  T sum[R][kVectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
    soon();
    T column[kVectors];
    GAN3D_UNROLL
    for (int v = 0; v < kVectors; ++v) column[v] = L::load(b + k * kPanel + v * L::count);
    GAN3D_UNROLL
    for (int r = 0; r < R; ++r) {
      const T w = L::broadcast(a[r * row + k]);
      GAN3D_UNROLL
      for (int v = 0; v < kVectors; ++v) sum[r][v] = L::fused(w, column[v], sum[r][v]);
    }
  }
  for (int r = 0; r < R; ++r) {
    GAN3D_UNROLL
    for (int v = 0; v < kVectors; ++v) L::store(y + r * kPanel + v * L::count, sum[r][v]);
  }
}

template <int R>
void multiply(int rows, const float* a, int64_t row, const float* b, int64_t depth, float* y, Soon& soon) {
  if constexpr (R > 0) {
    if (rows == R) multiply<R>(a, row, b, depth, y, soon);
    else multiply<R - 1>(rows, a, row, b, depth, y, soon);
  }
}

// How far apart arrays of `size` numbers lie that are written at the same time: not a multiple of 4 KiB, or they would
// drive each other out of the first-level cache.
constexpr int64_t apart(int64_t size) { return size + 64 / int64_t(sizeof(float)); }

// weight [o, 3, 3, c] in memory; `transposed`: o are the inputs, c the outputs, and the taps are turned by 180°.
struct Weight {
  const float* data;
  int64_t o, c;
  bool transposed;

  int64_t inputs() const { return transposed ? o : c; }
  int64_t outputs() const { return transposed ? c : o; }
  int64_t panels() const { return outputs() / kPanel; }
  int64_t step() const { return apart(inputs() * kPanel); }    // between the 16 of a transformed panel
  int64_t size() const { return kTransformed * step(); }

  // → [16, inputs, panel]: products read it from first to last.
  template <class Method>
  void transform(int64_t panel, float* out) const {
    for (int64_t at = 0; at < kPanel; at += L::count, out += L::count) {
      const float* const first = data + (panel * kPanel + at) * (transposed ? 1 : 9 * c);
      if (transposed) {
        for (int64_t i = 0; i < o; ++i) {
          put<Method>([&](int tap) { return L::load(first + (i * 9 + 8 - tap) * c); }, out + i * kPanel);
        }
        continue;
      }
      for (int64_t i = 0; i < c; i += L::count) {
        T taps[9][L::count];
        for (int t = 0; t < 9; ++t) {
          for (int j = 0; j < L::count; ++j) {
            const float* const from = first + (j * 9 + t) * c + i;
            __builtin_prefetch(from + 4 * L::count, 0, 2);
            taps[t][j] = L::load(from);
          }
          mlp::transpose(taps[t]);
        }
        for (int j = 0; j < L::count; ++j) put<Method>([&](int tap) { return taps[tap][j]; }, out + (i + j) * kPanel);
      }
    }
  }

  template <class Method, class F>
  void put(const F& tap, float* out) const {
    T g[kTransformed];
    for (int i = 0; i < 3; ++i) {
      for (int j = 0; j < 3; ++j) g[i * kSide + j] = tap(i * 3 + j);
    }
    for (int j = 0; j < 3; ++j) Method::transform_weight(g + j, kSide);
    for (int i = 0; i < kSide; ++i) Method::transform_weight(g + i * kSide, 1);
    for (int k = 0; k < kTransformed; ++k) L::store(out + k * step(), g[k]);
  }
};

// A batch of channels-last pictures, and the tiles that cover `over` × `across` pixels of each, two by two.
struct Tiles {
  const float* pictures;
  int64_t channels, batch, height, width, rows, columns;

  Tiles(const at::Tensor& x, int64_t over, int64_t across)
      : pictures(x.const_data_ptr<float>()), channels(x.size(1)), batch(x.size(0)), height(x.size(2)), width(x.size(3)),
        rows((over + 1) / 2), columns((across + 1) / 2) {}

  int64_t count() const { return batch * rows * columns; }
  struct Place { int64_t picture, row, column; };
  Place place(int64_t n) const { return {n / columns / rows, n / columns % rows, n % columns}; }

  // Inputs of tile n, transformed → `to`: 16 times all channels, `step` apart.
  template <class Method>
  void gather(int64_t n, const float* zeros, float* to, int64_t step) const {
    const Place p = place(n);
    const float* pixels[kTransformed];
    for (int k = 0; k < kTransformed; ++k) {
      const int64_t i = 2 * p.row - 1 + k / kSide, j = 2 * p.column - 1 + k % kSide;
      const bool inside = i >= 0 && i < height && j >= 0 && j < width;
      pixels[k] = inside ? pictures + ((p.picture * height + i) * width + j) * channels : zeros;
    }
    for (int64_t channel = 0; channel < channels; channel += L::count) {
      T d[kTransformed];
      for (int i = 0; i < Method::patch; ++i) {
        for (int j = 0; j < Method::patch; ++j) d[i * kSide + j] = L::load(pixels[i * kSide + j] + channel);
      }
      for (int j = 0; j < Method::patch; ++j) Method::transform_input(d + j, kSide);
      for (int i = 0; i < kSide; ++i) Method::transform_input(d + i * kSide, 1);
      for (int k = 0; k < kTransformed; ++k) L::store(to + k * step + channel, d[k]);
    }
  }
};

static_assert(kChannels % kPanel == 0);

struct Blocks {  // 16 matrices, `step` numbers apart
  const float* data;
  int64_t step;
  const float* at(int i, int j) const { return data + (i * kSide + j) * step; }
};

// `count` tiles times a panel of the weight: inputs [16; count, c], weight [16; c, panel] → [products², count, panel].
// What the next product takes is fetched meanwhile, inputs or weight, whichever does not stay in the cache; then `then`.
template <class Method>
void multiply_tiles(Blocks inputs, Blocks weight, int64_t count, int64_t c, float* products, bool inputs_stream,
                    const float* then) {
  constexpr int side = Method::products, last = side * side - 1;
  const auto a = [=](int k) { return inputs.at(Method::input(k / side), Method::input(k % side)); };
  const auto b = [=](int k) { return weight.at(Method::weight(k / side), Method::weight(k % side)); };
  for (int k = 0; k <= last; ++k) {
    Soon soon{k == last ? then : inputs_stream ? a(k + 1) : b(k + 1)};
    for (int64_t i = 0, left = (count + kRows - 1) / kRows; left > 0; --left) {
      const int rows = int((count - i + left - 1) / left);  // of about equal height
      multiply<kRows>(rows, a(k) + i * c, c, b(k), c, products + (k * count + i) * kPanel, soon);
      i += rows;
    }
  }
}

// put(tile, channel, outputs) for each of the tiles and each vector of the panel's channels.
template <class Method, class F>
void sum_products(const float* products, int64_t count, const F& put) {
  constexpr int side = Method::products;
  for (int64_t i = 0; i < count; ++i) {
    for (int channel = 0; channel < kPanel; channel += L::count) {
      T m[side * side];
      for (int k = 0; k < side * side; ++k) m[k] = L::load(products + (k * count + i) * kPanel + channel);
      for (int j = 0; j < side; ++j) Method::transform_output(m + j, side);
      for (int j = 0; j < Method::outputs; ++j) Method::transform_output(m + j * side, 1);
      put(i, channel, m);
    }
  }
}

struct Scratch {
  at::Tensor all;
  float* data;
  Scratch(int64_t size, const at::TensorOptions& options)
      : all(fresh({size}, options)), data(all.mutable_data_ptr<float>()) {}
};

// Few tiles: all inputs are transformed first, a panel's weight where it is needed, and read once.
// sum(panel, from, count, products, own) takes the products of each block of tiles, done(panel, own) follows the last;
// own: `extra` numbers.
template <class Method, class Sum, class Done>
void panel_by_panel(const Tiles& tiles, const Weight& weight, const float* zeros, const at::TensorOptions& options,
                    int64_t extra, const Sum& sum, const Done& done) {
  const int64_t c = weight.inputs(), count = tiles.count(), step = apart(count * c), most = 2 * kRows;
  const Scratch inputs(kTransformed * step, options);
  parallel(count, 16, [&](int64_t i) { tiles.gather<Method>(i, zeros, inputs.data + i * c, step); });
  at::parallel_for(0, weight.panels(), 1, [&](int64_t begin, int64_t end) {
    const int64_t size = Method::products * Method::products * most * kPanel;
    const Scratch memory(weight.size() + size + extra, options);
    float *const products = memory.data + weight.size(), *const own = products + size;
    for (int64_t panel = begin; panel < end; ++panel) {
      weight.transform<Method>(panel, memory.data);
      for (int64_t from = 0; from < count; from += most) {
        const int64_t n = std::min(most, count - from);
        multiply_tiles<Method>({inputs.data + from * c, step}, {memory.data, weight.step()}, n, c, products, true,
                               inputs.data + (from + most < count ? from + most : 0) * c);
        sum(panel, from, n, products, own);
      }
      done(panel, own);
    }
  });
}

// Many tiles: the weight is transformed first, a block's inputs where they are needed; the weight is read once a block.
template <class Method>
struct BlockByBlock {
  const Tiles& tiles;
  const Weight& weight;
  const float* zeros;
  int64_t c, most, step;  // most: tiles in a block
  Scratch weights;

  BlockByBlock(const Tiles& t, const Weight& w, const float* nothing, const at::TensorOptions& options)
      : tiles(t), weight(w), zeros(nothing), c(w.inputs()),
        most(std::max<int64_t>(kRows, kBlock / (kTransformed * c * int64_t(sizeof(float))) / kRows * kRows)),
        step(apart(most * c)), weights(w.panels() * w.size(), options) {
    parallel(w.panels(), 1, [&](int64_t panel) { w.transform<Method>(panel, weights.data + panel * w.size()); });
  }
  int64_t memory() const { return kTransformed * step + most * Method::products * Method::products * kPanel; }

  // sum(panel, from, count, products) of the tiles begin … end − 1 for every panel.
  template <class Sum>
  void operator()(int64_t begin, int64_t end, float* memory, const Sum& sum) const {
    float* const products = memory + kTransformed * step;
    for (int64_t from = begin; from < end;) {
      const int64_t groups = (end - from + most - 1) / most, n = (end - from + groups - 1) / groups;
      for (int64_t i = 0; i < n; ++i) tiles.gather<Method>(from + i, zeros, memory + i * c, step);
      for (int64_t panel = 0; panel < weight.panels(); ++panel) {
        const auto transformed = [&](int64_t i) { return weights.data + i * weight.size(); };
        multiply_tiles<Method>({memory, step}, {transformed(panel), weight.step()}, n, c, products, false,
                               transformed((panel + 1) % weight.panels()));
        sum(panel, from, n, products);
      }
      from += n;
    }
  }
};

// Whether reading all transformed inputs for each panel takes less than writing the transformed weight and reading it
// for each block of tiles.
bool few(const Tiles& tiles, const Weight& weight) {
  return tiles.count() <= 2 * weight.outputs() &&
         kTransformed * tiles.channels * tiles.count() * int64_t(sizeof(float)) <= kSmall;
}

void convolve(const Tiles& tiles, const Weight& weight, float* y, const at::TensorOptions& options) {
  const at::Tensor zero = at::zeros({weight.inputs()}, options);
  const float* const zeros = zero.const_data_ptr<float>();
  const int64_t o = weight.outputs();
  const auto sum = [&](int64_t panel, int64_t from, int64_t n, const float* products) {
    sum_products<Same>(products, n, [&](int64_t i, int channel, const T* out) {
      const Tiles::Place p = tiles.place(from + i);
      for (int k = 0; k < 4; ++k) {
        const int64_t over = 2 * p.row + k / 2, across = 2 * p.column + k % 2;
        if (over >= tiles.height || across >= tiles.width) continue;
        L::store(y + ((p.picture * tiles.height + over) * tiles.width + across) * o + panel * kPanel + channel,
                 out[k / 2 * Same::products + k % 2]);
      }
    });
  };
  if (few(tiles, weight)) {
    panel_by_panel<Same>(tiles, weight, zeros, options, 0,
                         [&](int64_t panel, int64_t from, int64_t n, const float* products, float*) {
                           sum(panel, from, n, products);
                         },
                         [](int64_t, float*) {});
    return;
  }
  const BlockByBlock<Same> blocks(tiles, weight, zeros, options);
  at::parallel_for(0, (tiles.count() + blocks.most - 1) / blocks.most, 1, [&](int64_t begin, int64_t end) {
    const Scratch memory(blocks.memory(), options);
    blocks(begin * blocks.most, std::min(tiles.count(), end * blocks.most), memory.data, sum);
  });
}

// Some rows of the transposed convolution, the others forgotten: `channels` at each place, one place of zeros before
// each row, and zeros in row −1.
struct Ring {
  float* data;
  int64_t rows, stride, channels;

  float* row(int64_t i) const { return data + (i + rows) % rows * stride; }
  int64_t size() const { return rows * stride; }
  void clear() const {
    for (int64_t i = 0; i < rows; ++i) std::fill_n(row(i), i + 1 == rows ? stride : channels, 0.0f);
  }
  void put(const Tiles::Place& p, int64_t channel, const T* out) const {
    for (int over = 0; over < 4; ++over) {
      float* const to = row(4 * p.row + over) + (4 * p.column + 1) * channels + channel;
      for (int across = 0; across < 4; ++across) L::store(to + across * channels, out[over * Up::products + across]);
    }
  }
  // Row i of the filtered picture: `width` times some of its o channels.
  void filter(int64_t i, int64_t width, float* mixed, float* y, int64_t o) const {
    filter(row(i - 1), row(i), row(i + 1), row(i + 2), mixed, (width + 3) * channels);
    for (int64_t j = 0; j < width; ++j, mixed += channels) {
      filter(mixed, mixed + channels, mixed + 2 * channels, mixed + 3 * channels, y + j * o, channels);
    }
  }
  static void filter(const float* a, const float* b, const float* c, const float* d, float* out, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = smooth(a[i], b[i], c[i], d[i], 0.25f);
  }
};

void upconvolve(const Tiles& tiles, const Weight& weight, float* y, const at::TensorOptions& options) {
  const at::Tensor zero = at::zeros({weight.inputs()}, options);
  const float* const zeros = zero.const_data_ptr<float>();
  const int64_t o = weight.outputs(), height = 2 * tiles.height, width = 2 * tiles.width;
  const int64_t across = 4 * tiles.columns + 1;
  if (few(tiles, weight)) {
    const Ring all{nullptr, 4 * tiles.rows + 1, across * kPanel, kPanel};
    const auto ring = [&](float* own, int64_t picture) {
      return Ring{own + picture * all.size(), all.rows, all.stride, all.channels};
    };
    panel_by_panel<Up>(tiles, weight, zeros, options, tiles.batch * all.size() + all.stride,
                       [&](int64_t, int64_t from, int64_t n, const float* products, float* own) {
                         if (from == 0) {
                           for (int64_t picture = 0; picture < tiles.batch; ++picture) ring(own, picture).clear();
                         }
                         sum_products<Up>(products, n, [&](int64_t i, int channel, const T* out) {
                           const Tiles::Place p = tiles.place(from + i);
                           ring(own, p.picture).put(p, channel, out);
                         });
                       },
                       [&](int64_t panel, float* own) {
                         for (int64_t i = 0; i < tiles.batch * height; ++i) {
                           ring(own, i / height).filter(i % height, width, own + tiles.batch * all.size(),
                                                        y + i * width * o + panel * kPanel, o);
                         }
                       });
    return;
  }
  const BlockByBlock<Up> tiled(tiles, weight, zeros, options);
  const int64_t depth = std::clamp<int64_t>(tiled.most / tiles.columns, 1, tiles.rows);  // rows of tiles in a block
  const int64_t blocks = (tiles.rows + depth - 1) / depth;
  at::parallel_for(0, tiles.batch * blocks, 1, [&](int64_t begin, int64_t end) {
    Ring ring{nullptr, 4 * depth + 4, across * o, o};
    const Scratch memory(tiled.memory() + ring.size() + ring.stride, options);
    ring.data = memory.data + tiled.memory();
    const auto rows_of_tiles = [&](int64_t picture, int64_t first, int64_t last) {
      tiled((picture * tiles.rows + first) * tiles.columns, (picture * tiles.rows + last) * tiles.columns, memory.data,
            [&](int64_t panel, int64_t from, int64_t n, const float* products) {
              sum_products<Up>(products, n, [&](int64_t i, int channel, const T* out) {
                ring.put(tiles.place(from + i), panel * kPanel + channel, out);
              });
            });
    };
    for (int64_t block = begin; block < end; ++block) {
      const int64_t picture = block / blocks, first = block % blocks * depth;
      const int64_t last = std::min(first + depth, tiles.rows);
      if (first == 0 || block == begin) ring.clear();
      if (first > 0 && block == begin) rows_of_tiles(picture, first - 1, first);  // the thread before has these, too
      rows_of_tiles(picture, first, last);
      for (int64_t i = std::max<int64_t>(4 * first - 2, 0); i < std::min(4 * last - 2, height); ++i) {
        ring.filter(i, width, ring.data + ring.size(), y + (picture * height + i) * width * o, o);
      }
    }
  });
}

Weight check_arguments(const char* op, const at::Tensor& x, const at::Tensor& weight, bool transposed) {
  for (const auto& [name, tensor] : {std::pair{"x", &x}, std::pair{"weight", &weight}}) {
    TORCH_CHECK_TYPE(tensor->scalar_type() == at::kFloat, op, ": ", name, " must be float32, got ",
                     tensor->scalar_type());
    TORCH_CHECK_VALUE(tensor->dim() == 4 && tensor->is_contiguous(at::MemoryFormat::ChannelsLast), op, ": ", name,
                      " must have four axes, channels-last in memory, got shape ", tensor->sizes());
  }
  TORCH_CHECK_VALUE(weight.size(2) == 3 && weight.size(3) == 3, op, ": weight must be [o, c, 3, 3], got ",
                    weight.sizes());
  TORCH_CHECK_VALUE(weight.size(0) % kChannels == 0 && weight.size(1) % kChannels == 0, op,
                    ": weight must be [o, c, 3, 3], o and c multiples of ", kChannels, ", got ", weight.sizes());
  const Weight w{weight.const_data_ptr<float>(), weight.size(0), weight.size(1), transposed};
  TORCH_CHECK_VALUE(x.size(1) == w.inputs(), op, ": x must have ", w.inputs(), " channels, got ", x.size(1));
  return w;
}

at::Tensor pictures(const at::Tensor& x, int64_t channels, int scale) {
  at::Tensor y = at::empty({x.size(0), channels, scale * x.size(2), scale * x.size(3)},
                           x.options().memory_format(at::MemoryFormat::ChannelsLast));
  if (y.numel() > 0) prefer_huge_pages(y.mutable_data_ptr(), int64_t(y.nbytes()));
  return y;
}

at::Tensor conv3x3(const at::Tensor& x, const at::Tensor& weight, bool transposed) {
  const Weight w = check_arguments("conv3x3", x, weight, transposed);
  at::Tensor y = pictures(x, w.outputs(), 1);
  if (y.numel() > 0) convolve(Tiles(x, x.size(2), x.size(3)), w, y.mutable_data_ptr<float>(), x.options());
  return y;
}

at::Tensor upconv3x3(const at::Tensor& x, const at::Tensor& weight) {
  const Weight w = check_arguments("upconv3x3", x, weight, false);
  at::Tensor y = pictures(x, w.outputs(), 2);
  if (y.numel() > 0) upconvolve(Tiles(x, x.size(2) + 1, x.size(3) + 1), w, y.mutable_data_ptr<float>(), x.options());
  return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(gan3d, m) {
  m.def("conv3x3(Tensor x, Tensor weight, bool transposed) -> Tensor");
  m.def("upconv3x3(Tensor x, Tensor weight) -> Tensor");
}
TORCH_LIBRARY_IMPL(gan3d, CPU, m) {
  m.impl("conv3x3", &conv3x3);
  m.impl("upconv3x3", &upconv3x3);
}

}  // namespace gan3d::winograd
