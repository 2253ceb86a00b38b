#include "counting_sort.h"
#include "cpu.h"
#include "grids_checks.h"

#include <algorithm>
#include <array>
#include <tuple>


namespace gan3d {
namespace {

constexpr int kBlock = 32;  // points whose rows are asked for from memory before the first of them is used

template <int C>
using Channels = std::integral_constant<int, C>;

// f(Channels<C>{}) with the number of channels where the loops over them are compiled for it, else with 0.
template <class F>
void for_channels(int64_t channels, const F& f) {
  switch (channels) {
    case 1: return f(Channels<1>{});
    case 4: return f(Channels<4>{});
    case 12: return f(Channels<12>{});
    case 13: return f(Channels<13>{});
    case 16: return f(Channels<16>{});
    case 28: return f(Channels<28>{});
    case 32: return f(Channels<32>{});
    default: return f(Channels<0>{});
  }
}

inline void prefetch(const void* begin, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(begin) + i);
}

template <class T>
HD void add_row(T* out, const T* g, T weight, int n) {
#pragma omp simd
  for (int c = 0; c < n; ++c) out[c] = fma(weight, g[c], out[c]);
}

// Points by the bucket their first row falls in, within a bucket in their own order. Gradients of rows are summed in
// this order whatever the number of threads.
struct Sorted {
  at::Tensor order_storage, start_storage;
  const int32_t *order, *start;  // points; where each bucket begins, and the end of the last
};

template <class F>
Sorted sort_points(int64_t n, int64_t buckets, const at::Tensor& like, const F& bucket) {  // −1: left out
  const auto options = like.options().dtype(at::kInt);
  at::Tensor keys = at::empty({n}, options), order = at::empty({n}, options);
  at::Tensor start = at::empty({buckets + 2}, options);  // what is left out goes to a last bucket of its own
  int32_t *key = keys.mutable_data_ptr<int32_t>(), *to = order.mutable_data_ptr<int32_t>(),
          *first = start.mutable_data_ptr<int32_t>();
  parallel(n, 4096, [&](int64_t i) {
    const int32_t b = bucket(i);
    key[i] = b < 0 ? int32_t(buckets) : b;
  });
  counting_sort(n, buckets + 1, [=](int64_t i) { return key[i]; }, to, first);
  return {order, start, to, first};
}

// f(begin, end) on consecutive ranges of buckets, a thread each, of about equal work: that of the points in a bucket
// and `fixed` (in points) for the bucket itself.
template <class F>
void share_buckets(const Sorted& sorted, int64_t buckets, double fixed, const F& f) {
  const int64_t threads = at::get_num_threads();
  const double total = sorted.start[buckets] + fixed * buckets;
  const auto bound = [&](int64_t t) {
    if (t == threads) return buckets;
    int64_t lo = 0, hi = buckets;
    while (lo < hi) {
      const int64_t middle = (lo + hi) / 2;
      (sorted.start[middle] + fixed * middle < total * t / threads ? lo = middle + 1 : hi = middle);
    }
    return lo;
  };
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) f(bound(t), bound(t + 1));
  });
}

// What sorting by column asks besides: its numbers are of 32 bits.
GridSizes check_grid(const char* op, const at::Tensor& grid, const at::Tensor& coordinates) {
  const GridSizes sizes = check_sizes(op, grid, coordinates);
  constexpr int64_t limit = int64_t(1) << 31;
  TORCH_CHECK_VALUE(sizes.batch * sizes.sides.x * sizes.sides.y < limit && sizes.batch * sizes.points < limit, op,
                    ": at most 2^31 - 1 points and columns of voxels");
  return sizes;
}

template <bool Zeros, int C, class T>
void grid_values(const T* grid, const T* coordinates, const GridSizes& sizes, T* out) {
  const int channels = int(sizes.channels);
  const int64_t blocks = (sizes.points + kBlock - 1) / kBlock;
  parallel(sizes.batch * blocks, 16, [=](int64_t block) {
    const int64_t batch = block / blocks, begin = block % blocks * kBlock;
    const int count = int(std::min<int64_t>(kBlock, sizes.points - begin));
    const T* values = grid + batch * sizes.voxels * channels;
    const T* p = coordinates + 3 * (batch * sizes.points + begin);
    T* to = out + (batch * sizes.points + begin) * channels;
    if constexpr (C == 1) {
#pragma omp simd
      for (int i = 0; i < count; ++i)
        trilinear_value<1>(values, trilinear<Zeros>(load3(p + 3 * i), sizes.sides), 1, to + i);
    } else {
      Trilinear<T> s[kBlock];
      for (int i = 0; i < count; ++i) {
        s[i] = trilinear<Zeros>(load3(p + 3 * i), sizes.sides);
        for (int corner = 0; corner < 8; corner += 2)  // two neighbours along z are one run
          prefetch(values + s[i].voxel(corner) * channels, 2 * channels * sizeof(T));
      }
      for (int i = 0; i < count; ++i) trilinear_value<C>(values, s[i], channels, to + int64_t(i) * channels);
    }
  });
}

template <bool Zeros, int C, class T>
void grid_slopes(const T* grad, const T* grid, const T* coordinates, const GridSizes& sizes, T* out) {
  const int channels = int(sizes.channels);
  const int64_t blocks = (sizes.points + kBlock - 1) / kBlock;
  parallel(sizes.batch * blocks, 16, [=](int64_t block) {
    const int64_t batch = block / blocks, begin = block % blocks * kBlock, first = batch * sizes.points + begin;
    const int count = int(std::min<int64_t>(kBlock, sizes.points - begin));
    const T* values = grid + batch * sizes.voxels * channels;
    Trilinear<T> s[kBlock];
    for (int i = 0; i < count; ++i) {
      s[i] = trilinear<Zeros>(load3(coordinates + 3 * (first + i)), sizes.sides);
      for (int corner = 0; corner < 8; corner += 2)
        prefetch(values + s[i].voxel(corner) * channels, 2 * channels * sizeof(T));
    }
    for (int i = 0; i < count; ++i) {
      const Vec3<T> slope = trilinear_slope<C>(values, s[i], channels, grad + (first + i) * channels);
      T* to = out + 3 * (first + i);
      to[0] = slope.x, to[1] = slope.y, to[2] = slope.z;
    }
  });
}

// A bucket is a column of voxels along z; a point adds to its own and to up to three later ones, at most Y + 1 further.
// A thread owns a range of columns: it visits the points of the Y + 1 columns before it too, adding only to its own.
template <bool Zeros, int C, class T>
void grid_scatter(const T* grad, const T* coordinates, const GridSizes& sizes, const at::Tensor& like, T* out) {
  const Sides sides = sizes.sides;
  const int channels = C > 0 ? C : int(sizes.channels);
  const int64_t columns = sizes.batch * sides.x * sides.y, row = int64_t(sides.z) * channels, points = sizes.points;
  const Sorted sorted = sort_points(sizes.batch * points, columns, like, [=](int64_t i) {
    const auto s = trilinear<Zeros>(load3(coordinates + 3 * i), sides);
    return s.nothing() ? -1 : int32_t((i / points * sides.x + s.x.lo) * sides.y + s.y.lo);
  });
  // Zeros for a voxel cost about a tenth of what a point does.
  share_buckets(sorted, columns, 0.1 * sides.z, [&](int64_t begin, int64_t end) {
    if (begin == end) return;
    int64_t ready = begin;  // columns before this one are filled with zeros: just before they are needed, in cache
    for (int64_t column = std::max<int64_t>(begin - sides.y - 1, 0); column < end; ++column) {
      const int64_t next = std::min(end, column + sides.y + 2);
      if (next > ready) {
        std::fill(out + ready * row, out + next * row, T(0));
        ready = next;
      }
      for (int32_t i = sorted.start[column]; i < sorted.start[column + 1]; ++i) {
        const int64_t point = sorted.order[i];
        if (i + 8 < sorted.start[columns]) {
          const int64_t later = sorted.order[i + 8];
          prefetch(coordinates + 3 * later, 1);
          prefetch(grad + later * channels, channels * sizeof(T));
        }
        const auto s = trilinear<Zeros>(load3(coordinates + 3 * point), sides);
        const T* g = grad + point * channels;
        const int64_t step_x = s.x.hi > s.x.lo ? sides.y : 0, step_y = s.y.hi - s.y.lo;
        for (int corner = 0; corner < 8; corner += 2) {
          const int64_t to = column + (corner & 4 ? step_x : 0) + (corner & 2 ? step_y : 0);
          if (to < begin || to >= end) continue;
          add_row(out + to * row + int64_t(s.z.lo) * channels, g, s.weight(corner), channels);
          add_row(out + to * row + int64_t(s.z.hi) * channels, g, s.weight(corner + 1), channels);
        }
      }
    }
  });
}

at::Tensor grid_sample_3d(const at::Tensor& grid, const at::Tensor& coordinates, bool zeros) {
  const GridSizes sizes = check_grid("grid_sample_3d", grid, coordinates);
  at::Tensor out = at::empty({sizes.batch, sizes.points, sizes.channels}, grid.options());
  AT_DISPATCH_FLOATING_TYPES(grid.scalar_type(), "grid_sample_3d", [&] {
    const scalar_t *v = grid.const_data_ptr<scalar_t>(), *p = coordinates.const_data_ptr<scalar_t>();
    scalar_t* y = out.mutable_data_ptr<scalar_t>();
    for_channels(sizes.channels, [&](auto c) {
      if (zeros) grid_values<true, c()>(v, p, sizes, y); else grid_values<false, c()>(v, p, sizes, y);
    });
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor> grid_sample_3d_backward(const at::Tensor& grad, const at::Tensor& grid,
                                                           const at::Tensor& coordinates, bool zeros,
                                                           std::array<bool, 2> needed) {
  const GridSizes sizes = check_grid("grid_sample_3d_backward", grid, coordinates);
  check("grid_sample_3d_backward", "grad", grad, grid.scalar_type(), {sizes.batch, sizes.points, sizes.channels}, grid);
  at::Tensor grad_grid = needed[0] ? fresh(grid.sizes(), grid.options()) : at::empty({0}, grid.options());
  at::Tensor grad_coordinates = needed[1] ? at::empty_like(coordinates) : at::empty({0}, grid.options());
  AT_DISPATCH_FLOATING_TYPES(grid.scalar_type(), "grid_sample_3d_backward", [&] {
    const scalar_t *g = grad.const_data_ptr<scalar_t>(), *v = grid.const_data_ptr<scalar_t>(),
                   *p = coordinates.const_data_ptr<scalar_t>();
    scalar_t *to_grid = grad_grid.mutable_data_ptr<scalar_t>(), *to_p = grad_coordinates.mutable_data_ptr<scalar_t>();
    const auto run = [&](auto outside_is_zero, auto c) {
      if (needed[0]) grid_scatter<outside_is_zero(), c()>(g, p, sizes, coordinates, to_grid);
      if (needed[1]) grid_slopes<outside_is_zero(), c()>(g, v, p, sizes, to_p);
    };
    for_channels(sizes.channels, [&](auto c) {
      if (zeros) run(std::true_type{}, c); else run(std::false_type{}, c);
    });
  });
  return {grad_grid, grad_coordinates};
}

// What sorting by row of pixels asks besides: its numbers are of 32 bits.
Planes check_planes(const char* op, const at::Tensor& planes, const at::Tensor& points, at::IntArrayRef axes) {
  const Planes found = check_layout(op, planes, points, axes);
  constexpr int64_t limit = int64_t(1) << 31;
  TORCH_CHECK_VALUE(points.size(0) * points.size(1) < limit && planes.size(0) * planes.size(3) < limit, op,
                    ": at most 2^31 - 1 points and rows of pixels");
  return found;
}

template <int C, class T>
void plane_values(const T* values, const T* points, int64_t batches, int64_t n, const Planes& planes, T scale, T* out) {
  constexpr int block_size = kBlock / 4;
  const int64_t blocks = (n + block_size - 1) / block_size, channels = planes.channels;
  parallel(batches * blocks, 32, [=, &planes](int64_t block) {
    const int64_t batch = block / blocks, begin = block % blocks * block_size, first = batch * n + begin;
    const int count = int(std::min<int64_t>(block_size, n - begin));
    const T* image = values + batch * planes.batch;
    Bilinear<T> s[block_size][kPlanes];
    for (int i = 0; i < count; ++i)
      for (int p = 0; p < kPlanes; ++p) {
        s[i][p] = bilinear(points + 3 * (first + i), p, planes);
        for (int corner = 0; corner < 4; ++corner)
          prefetch(image + p * planes.plane + s[i][p].pixel(corner), channels * sizeof(T));
      }
    for (int i = 0; i < count; ++i) triplane_value<C>(image, s[i], planes, scale, out + (first + i) * channels);
  });
}

// One plane after the other; a bucket is a row of pixels, and a point adds to its own row and perhaps to the next.
// The thread that owns the first row computes the point's gradient too.
template <int C, class T>
void plane_gradients(const T* grad, const T* values, const T* points, int64_t batches, int64_t n, const Planes& planes,
                     const Planes& to_planes, T scale, const at::Tensor& like, T* out, T* grad_points) {
  const int channels = C > 0 ? C : planes.channels;
  const int64_t rows = batches * planes.height;
  for (int p = 0; p < kPlanes; ++p) {
    const Sorted sorted = sort_points(batches * n, rows, like, [&](int64_t i) {
      const auto s = bilinear(points + 3 * i, p, planes);
      return s.nothing() ? -1 : int32_t(i / n * planes.height + s.v.lo);
    });
    share_buckets(sorted, rows, 0, [&](int64_t begin, int64_t end) {
      for (int64_t row = std::max<int64_t>(begin - 1, 0); row < end; ++row) {
        const int64_t batch = row / planes.height;
        const T* plane = values + batch * planes.batch + p * planes.plane;
        T* to = out == nullptr ? nullptr : out + batch * to_planes.batch + p * to_planes.plane;
        for (int32_t i = sorted.start[row]; i < sorted.start[row + 1]; ++i) {
          const int64_t point = sorted.order[i];
          if (i + 8 < sorted.start[rows]) {
            const int64_t later = sorted.order[i + 8];
            prefetch(points + 3 * later, 1);
            prefetch(grad + later * channels, channels * sizeof(T));
          }
          const T* g = grad + point * channels;
          const auto s = bilinear(points + 3 * point, p, planes);
          if (grad_points != nullptr && row >= begin)
            bilinear_slope<C>(plane, s, p, planes, scale, g, grad_points + 3 * point);
          if (to == nullptr) continue;
          const auto where = bilinear(points + 3 * point, p, to_planes);
          if (row >= begin) {
            add_row(to + where.pixel(0), g, scale * s.weight(0), channels);
            add_row(to + where.pixel(1), g, scale * s.weight(1), channels);
          }
          if (s.v.hi > s.v.lo ? row + 1 < end : row >= begin) {
            add_row(to + where.pixel(2), g, scale * s.weight(2), channels);
            add_row(to + where.pixel(3), g, scale * s.weight(3), channels);
          }
        }
      }
    });
  }
}

at::Tensor triplane_sample(const at::Tensor& planes, const at::Tensor& points, at::IntArrayRef axes, double scale) {
  const Planes sizes = check_planes("triplane_sample", planes, points, axes);
  const int64_t b = points.size(0), n = points.size(1);
  at::Tensor out = at::empty({b, n, sizes.channels}, points.options());
  AT_DISPATCH_FLOATING_TYPES(planes.scalar_type(), "triplane_sample", [&] {
    const scalar_t *v = planes.const_data_ptr<scalar_t>(), *p = points.const_data_ptr<scalar_t>();
    scalar_t* y = out.mutable_data_ptr<scalar_t>();
    for_channels(sizes.channels, [&](auto c) { plane_values<c()>(v, p, b, n, sizes, scalar_t(scale), y); });
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor> triplane_sample_backward(const at::Tensor& grad, const at::Tensor& planes,
                                                            const at::Tensor& points, at::IntArrayRef axes,
                                                            double scale, std::array<bool, 2> needed) {
  const Planes sizes = check_planes("triplane_sample_backward", planes, points, axes);
  const int64_t b = points.size(0), n = points.size(1);
  check("triplane_sample_backward", "grad", grad, planes.scalar_type(), {b, n, sizes.channels}, planes);
  at::Tensor grad_planes = needed[0] ? at::zeros_like(planes) : at::empty({0}, planes.options());
  at::Tensor grad_points = needed[1] ? at::zeros_like(points) : at::empty({0}, planes.options());
  const Planes to_sizes = needed[0] ? check_planes("triplane_sample_backward", grad_planes, points, axes) : sizes;
  AT_DISPATCH_FLOATING_TYPES(planes.scalar_type(), "triplane_sample_backward", [&] {
    const scalar_t *g = grad.const_data_ptr<scalar_t>(), *v = planes.const_data_ptr<scalar_t>(),
                   *p = points.const_data_ptr<scalar_t>();
    scalar_t* to_planes = needed[0] ? grad_planes.mutable_data_ptr<scalar_t>() : nullptr;
    scalar_t* to_points = needed[1] ? grad_points.mutable_data_ptr<scalar_t>() : nullptr;
    if (!needed[0] && !needed[1]) return;
    for_channels(sizes.channels, [&](auto c) {
      plane_gradients<c()>(g, v, p, b, n, sizes, to_sizes, scalar_t(scale), points, to_planes, to_points);
    });
  });
  return {grad_planes, grad_points};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(gan3d, m) {
  m.def("grid_sample_3d(Tensor grid, Tensor coordinates, bool zeros) -> Tensor");
  m.def("grid_sample_3d_backward(Tensor grad, Tensor grid, Tensor coordinates, bool zeros, bool[2] needed) -> "
        "(Tensor, Tensor)");
  m.def("triplane_sample(Tensor planes, Tensor points, int[] axes, float scale) -> Tensor");
  m.def("triplane_sample_backward(Tensor grad, Tensor planes, Tensor points, int[] axes, float scale, bool[2] needed) "
        "-> (Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(gan3d, CPU, m) {
  m.impl("grid_sample_3d", &grid_sample_3d);
  m.impl("grid_sample_3d_backward", &grid_sample_3d_backward);
  m.impl("triplane_sample", &triplane_sample);
  m.impl("triplane_sample_backward", &triplane_sample_backward);
}

}  // namespace gan3d
