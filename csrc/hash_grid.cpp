#include "hash_grid.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <vector>

#include "cpu.h"
#include "hash_grid_checks.h"
#include "lanes.h"

namespace gan3d {
namespace {

constexpr int kLanes = 16;          // points located together
constexpr int64_t kBlock = 8192;    // points taken through all levels while their features stay in the cache
constexpr int64_t kNear = 1 << 19;  // bytes: a level as small as this stays in the second-level cache by itself

template <class T, int F>
HD T sum(typename LanesOf<T, F>::type v) {
  if constexpr (F == 1) return v;
  else {
    T total = v[0];
    for (int f = 1; f < F; ++f) total += v[f];
    return total;
  }
}

// Points of a block, axis by axis, padded to whole lanes.
template <class T>
struct Points {
  int count = 0;
  std::vector<T> axis[3];

  explicit Points(int64_t most) {
    for (auto& a : axis) a.resize((most + kLanes - 1) / kLanes * kLanes);
  }
  void load(const T* points, int64_t n) {
    count = int(n);
    for (int64_t i = 0; i < n; ++i)
      for (int a = 0; a < 3; ++a) axis[a][i] = points[3 * i + a];
  }
};

// f(first, points) for every block of n points, in parallel; small ones if there is little to do for many threads.
template <class T, class F>
void for_each_block(const T* points, int64_t n, const F& f) {
  const int64_t threads = at::get_num_threads();
  const int64_t block = clamp<int64_t>((n + threads - 1) / threads, 256, kBlock);
  at::parallel_for(0, (n + block - 1) / block, 1, [&](int64_t from, int64_t to) {
    Points<T> p(block);
    for (int64_t i = from; i < to; ++i) {
      p.load(points + 3 * i * block, min(block, n - i * block));
      f(i * block, p);
    }
  });
}

template <class T>
struct Corners {
  alignas(64) uint32_t at[8][kLanes];  // where in the level the features begin
  alignas(64) T weight[8][kLanes];
  alignas(64) T fraction[3][kLanes];
};

template <bool dense, class T>
void locate(const HashLevel& level, const Points<T>& points, int first, uint32_t stride, uint32_t feature,
            Corners<T>& out) {
  const T scale = T(level.scale);
  uint32_t cell[3][kLanes], outside[kLanes] = {};
  for (int a = 0; a < 3; ++a) {
    const T* p = points.axis[a].data() + first;
#pragma omp simd
    for (int i = 0; i < kLanes; ++i) {
      const HashAxis<T> x = hash_axis(p[i], scale);
      cell[a][i] = x.cell;
      out.fraction[a][i] = x.fraction;
    }
  }
  const auto corner = [&](int c, int i) {
    return hash_index<dense>(level, cell[0][i] + (c & 1), cell[1][i] + (c >> 1 & 1), cell[2][i] + (c >> 2));
  };
  for (int c = 0; c < 8; ++c) {
#pragma omp simd
    for (int i = 0; i < kLanes; ++i) {
      uint32_t index = corner(c, i);
      if (dense) {
        index = min(index, index - level.rows);  // the remainder of what is below 2·rows
        outside[i] |= index >= level.rows ? 1 : 0;
      }
      out.at[c][i] = index * stride + feature;
      const T x = c & 1 ? out.fraction[0][i] : T(1) - out.fraction[0][i];
      const T y = c & 2 ? out.fraction[1][i] : T(1) - out.fraction[1][i];
      const T z = c & 4 ? out.fraction[2][i] : T(1) - out.fraction[2][i];
      out.weight[c][i] = x * (y * z);
    }
  }
  if (std::all_of(outside, outside + kLanes, [](uint32_t any) { return any == 0; })) return;
  for (int c = 0; c < 8; ++c)
    for (int i = 0; i < kLanes; ++i) out.at[c][i] = corner(c, i) % level.rows * stride + feature;
}

// use(corners, first point, number of points) for 16 points at a time, whose rows have been asked for one step before:
// the rows of a large level come from far, and many of them have to be under way at once.
template <bool dense, class T, class Use>
void sweep(const HashLevel& level, const Points<T>& points, uint32_t stride, uint32_t feature, const T* table,
           const Use& use) {
  const bool far = int64_t(level.rows) * stride * int64_t(sizeof(T)) > kNear;
  Corners<T> corners[2];
  locate<dense>(level, points, 0, stride, feature, corners[0]);
  for (int first = 0, turn = 0; first < points.count; first += kLanes, turn ^= 1) {
    if (first + kLanes < points.count) {
      Corners<T>& next = corners[turn ^ 1];
      locate<dense>(level, points, first + kLanes, stride, feature, next);
      if (far)
        for (int c = 0; c < 8; ++c)
          for (int i = 0; i < kLanes; ++i) __builtin_prefetch(table + next.at[c][i], 0, 3);
    }
    use(corners[turn], first, min(kLanes, points.count - first));
  }
}

// use(F, feature, corners, first point, number of points) for the points of a block in one level: F adjacent features
// of a row at a time, from `feature` on. F is an integral_constant, 8, 4, 2 or 1.
template <class T, class Use>
void each_piece(const HashLevel& level, const Points<T>& points, int64_t features, const T* table, const Use& use) {
  const auto piece = [&](auto width, int64_t feature) {
    const auto with = [&](const Corners<T>& c, int first, int count) { use(width, feature, c, first, count); };
    if (level.dense) sweep<true>(level, points, uint32_t(features), uint32_t(feature), table, with);
    else sweep<false>(level, points, uint32_t(features), uint32_t(feature), table, with);
  };
  int64_t done = 0;
  for (; features - done >= 8; done += 8) piece(std::integral_constant<int, 8>(), done);
  if (features - done >= 4) piece(std::integral_constant<int, 4>(), done), done += 4;
  if (features - done >= 2) piece(std::integral_constant<int, 2>(), done), done += 2;
  if (features - done >= 1) piece(std::integral_constant<int, 1>(), done);
}

template <int F, class T>
void interpolate(const Corners<T>& corners, int count, const T* table, T* out, int64_t stride) {
  using V = typename LanesOf<T, F>::type;
  for (int i = 0; i < count; ++i) {
    V total = load<V>(table + corners.at[0][i]) * corners.weight[0][i];
    for (int c = 1; c < 8; ++c) total += load<V>(table + corners.at[c][i]) * corners.weight[c][i];
    store(out + i * stride, total);
  }
}

template <class T>
void forward(const T* points, const T* table, const std::vector<HashLevel>& levels, int64_t n, int64_t features,
             T* out) {
  const int64_t width = int64_t(levels.size()) * features;
  for_each_block(points, n, [&](int64_t begin, const Points<T>& p) {
    T* to = out + begin * width;
    for (const HashLevel& level : levels) {
      const T* rows = table + level.first * features;
      each_piece(level, p, features, rows, [&](auto F, int64_t feature, const Corners<T>& c, int first, int count) {
        interpolate<decltype(F)::value>(c, count, rows, to + first * width + feature, width);
      });
      to += features;
    }
  });
}

// Adds the gradients of some points to `size` elements of the rows from `low` on; the others are another thread's.
template <int F, class T>
void scatter(const Corners<T>& corners, int count, const T* grad, int64_t stride, T* table, uint32_t low,
             uint32_t size) {
  using V = typename LanesOf<T, F>::type;
  for (int i = 0; i < count; ++i) {
    const V g = load<V>(grad + i * stride);
    for (int c = 0; c < 8; ++c)
      if (corners.at[c][i] - low < size) {
        T* row = table + corners.at[c][i];
        store(row, load<V>(row) + g * corners.weight[c][i]);
      }
  }
}

// Every row belongs to one thread, which adds to it in the order of the points: the sums do not depend on the number of
// threads. With more threads than levels, several share the rows of a level.
template <class T>
void backward_table(const T* grad, const T* points, const std::vector<HashLevel>& levels, int64_t n, int64_t features,
                    T* out) {
  const int64_t count = int64_t(levels.size()), width = count * features, threads = at::get_num_threads();
  const int64_t shares = (threads + count - 1) / count, parts = count * shares, workers = min(threads, parts);
  // f(index of the level, first element, number of elements) for the parts of a worker: every so many-th, so that
  // everybody has small and large levels.
  const auto each_part = [&](int64_t worker, const auto& f) {
    for (int64_t i = worker; i < parts; i += workers) {
      const int64_t rows = levels[i / shares].rows, share = i % shares;
      const int64_t low = rows * share / shares, high = rows * (share + 1) / shares;
      f(i / shares, low * features, (high - low) * features);
    }
  };
  parallel(workers, 1, [&](int64_t worker) {
    each_part(worker, [&](int64_t index, int64_t low, int64_t size) {
      std::memset(out + levels[index].first * features + low, 0, size * sizeof(T));
    });
    Points<T> p(min(n, kBlock));
    for (int64_t begin = 0; begin < n; begin += kBlock) {
      p.load(points + 3 * begin, min(kBlock, n - begin));
      each_part(worker, [&](int64_t index, int64_t low, int64_t size) {
        T* rows = out + levels[index].first * features;
        const T* g = grad + begin * width + index * features;
        each_piece(levels[index], p, features, rows,
                   [&](auto F, int64_t feature, const Corners<T>& c, int first, int many) {
          scatter<decltype(F)::value>(c, many, g + first * width + feature, width, rows, uint32_t(low), uint32_t(size));
        });
      });
    }
  });
}

// Adds the gradients of some points, axis by axis.
template <int F, class T>
void slopes(const HashLevel& level, const Corners<T>& corners, int count, const T* table, const T* grad,
            int64_t stride, T* gx, T* gy, T* gz) {
  using V = typename LanesOf<T, F>::type;
  for (int i = 0; i < count; ++i) {
    V v[8];
    for (int c = 0; c < 8; ++c) v[c] = load<V>(table + corners.at[c][i]);
    const V g = load<V>(grad + i * stride) * T(level.scale);
    const T x = corners.fraction[0][i], y = corners.fraction[1][i], z = corners.fraction[2][i];
    const T ex = T(1) - x, ey = T(1) - y, ez = T(1) - z;
    const V along_x = ((v[1] - v[0]) * ey + (v[3] - v[2]) * y) * ez + ((v[5] - v[4]) * ey + (v[7] - v[6]) * y) * z;
    const V along_y = ((v[2] - v[0]) * ex + (v[3] - v[1]) * x) * ez + ((v[6] - v[4]) * ex + (v[7] - v[5]) * x) * z;
    const V along_z = ((v[4] - v[0]) * ex + (v[5] - v[1]) * x) * ey + ((v[6] - v[2]) * ex + (v[7] - v[3]) * x) * y;
    gx[i] += sum<T, F>(g * along_x);
    gy[i] += sum<T, F>(g * along_y);
    gz[i] += sum<T, F>(g * along_z);
  }
}

template <class T>
void backward_points(const T* grad, const T* points, const T* table, const std::vector<HashLevel>& levels, int64_t n,
                     int64_t features, T* out) {
  const int64_t width = int64_t(levels.size()) * features;
  for_each_block(points, n, [&](int64_t begin, const Points<T>& p) {
    std::vector<T> total[3];
    for (auto& t : total) t.resize(p.count);
    const T* g = grad + begin * width;
    for (const HashLevel& level : levels) {
      const T* rows = table + level.first * features;
      each_piece(level, p, features, rows, [&](auto F, int64_t feature, const Corners<T>& c, int first, int count) {
        slopes<decltype(F)::value>(level, c, count, rows, g + first * width + feature, width, total[0].data() + first,
                                   total[1].data() + first, total[2].data() + first);
      });
      g += features;
    }
    for (int64_t i = 0; i < p.count; ++i)
      for (int a = 0; a < 3; ++a) out[3 * (begin + i) + a] = total[a][i];
  });
}

at::Tensor hash_grid(const at::Tensor& points, const at::Tensor& table, at::ArrayRef<double> scales,
                     at::IntArrayRef resolutions, at::IntArrayRef offsets) {
  const auto levels = check_hash_grid("hash_grid", points, table, scales, resolutions, offsets);
  const int64_t n = points.size(0), features = table.size(1);
  at::Tensor out = at::empty({n, int64_t(levels.size()) * features}, points.options());
  AT_DISPATCH_FLOATING_TYPES(points.scalar_type(), "hash_grid", [&] {
    forward(points.const_data_ptr<scalar_t>(), table.const_data_ptr<scalar_t>(), levels, n, features,
            out.mutable_data_ptr<scalar_t>());
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor> hash_grid_backward(const at::Tensor& grad, const at::Tensor& points,
                                                      const at::Tensor& table, at::ArrayRef<double> scales,
                                                      at::IntArrayRef resolutions, at::IntArrayRef offsets,
                                                      std::array<bool, 2> needed) {
  const auto levels = check_hash_grid("hash_grid_backward", points, table, scales, resolutions, offsets);
  const int64_t n = points.size(0), features = table.size(1);
  check("hash_grid_backward", "grad", grad, points.scalar_type(), {n, int64_t(levels.size()) * features}, points);
  at::Tensor of_points = needed[0] ? at::empty_like(points) : at::empty({0}, points.options());
  at::Tensor of_table = needed[1] ? at::empty_like(table) : at::empty({0}, table.options());
  AT_DISPATCH_FLOATING_TYPES(points.scalar_type(), "hash_grid_backward", [&] {
    const scalar_t *g = grad.const_data_ptr<scalar_t>(), *p = points.const_data_ptr<scalar_t>();
    if (needed[0])
      backward_points(g, p, table.const_data_ptr<scalar_t>(), levels, n, features,
                      of_points.mutable_data_ptr<scalar_t>());
    if (needed[1]) backward_table(g, p, levels, n, features, of_table.mutable_data_ptr<scalar_t>());
  });
  return {of_points, of_table};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(gan3d, m) {
  m.def("hash_grid(Tensor points, Tensor table, float[] scales, int[] resolutions, int[] offsets) -> Tensor");
  m.def("hash_grid_backward(Tensor grad, Tensor points, Tensor table, float[] scales, int[] resolutions, "
        "int[] offsets, bool[2] needed) -> (Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(gan3d, CPU, m) {
  m.impl("hash_grid", &hash_grid);
  m.impl("hash_grid_backward", &hash_grid_backward);
}

}  // namespace gan3d
