#include "cpu.h"
#include "sparse_grid_checks.h"

namespace gan3d {
namespace {

using namespace sparse_grid;
using at::Tensor;
using Index = std::optional<Tensor>;

#ifdef __AVX512F__
constexpr int kRegister = 64;
#else
constexpr int kRegister = 32;
#endif

constexpr int width_for(int channels, int most) {
  int width = 1;
  while (2 * width <= channels && 2 * width <= most) width *= 2;
  return width;
}

// The vector of T that rows of C channels are read by.
template <class T, int C>
using Vector = typename LanesOf<T, width_for(C, kRegister / int(sizeof(T)))>::type;

template <class T, class V>
T sum_of(V v) {
  constexpr int width = sizeof(V) / sizeof(T);
  T lanes[width];
  std::memcpy(lanes, &v, sizeof(V));
  for (int half = width / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  return lanes[0];
}

// Any number of channels as pieces of 16, 8, 4, 2 and 1: f(size, first).
template <class F>
void in_pieces(int64_t channels, const F& f) {
  int64_t c = 0;
  for (; c + 16 <= channels; c += 16) f(std::integral_constant<int, 16>(), c);
  if (channels & 8) f(std::integral_constant<int, 8>(), c), c += 8;
  if (channels & 4) f(std::integral_constant<int, 4>(), c), c += 4;
  if (channels & 2) f(std::integral_constant<int, 2>(), c), c += 2;
  if (channels & 1) f(std::integral_constant<int, 1>(), c);
}

// Points whose corners have been found and whose rows are on their way from memory: f(i, corners, place) follows once
// sixteen have been pushed, in the same order.
template <class T, class F>
class Queue {
 public:
  Queue(const VoxelIndex& grid, const T* coordinates, const T* rows, int64_t stride, const F& f)
      : grid_(grid), coordinates_(coordinates), rows_(rows), stride_(stride), f_(f) {}
  ~Queue() { flush(); }

  void push(int64_t i) {
    find(i);
    fetch();
  }
  template <class Mine>
  void push(int64_t i, const Mine& mine) {  // the corners whose cells are mine
    find(i);
    int64_t cell[8];
    corner_cells(grid_.cells, place_[count_], cell);
    for (int c = 0; c < 8; ++c)
      if (!mine(cell[c])) corners_[count_].row[c] = -1;
    fetch();
  }

 private:
  static constexpr int kPoints = 16;
  VoxelIndex grid_;
  const T *coordinates_, *rows_;
  int64_t stride_;
  const F& f_;
  int count_ = 0;
  int64_t point_[kPoints];
  Place<T> place_[kPoints];
  Corners<T> corners_[kPoints];

  void find(int64_t i) {
    point_[count_] = i;
    place_[count_] = find_place(grid_.cells, load3(coordinates_ + 3 * i));
    corners_[count_] = find_corners(grid_, place_[count_]);
  }
  void fetch() {
    const Corners<T>& corners = corners_[count_];
    for (int c = 0; c < 8; ++c) {
      if (corners.row[c] < 0) continue;
      const T* row = rows_ + corners.row[c] * stride_;
      __builtin_prefetch(row);
      __builtin_prefetch(row + stride_ - 1);
    }
    if (++count_ == kPoints) flush();
  }

  void flush() {
    for (int p = 0; p < count_; ++p) f_(point_[p], corners_[p], place_[p]);
    count_ = 0;
  }
};

// f(i, corners, place) for every point.
template <class T, class F>
void for_points(const VoxelIndex& grid, const T* coordinates, int64_t n, const Tensor& values, const F& f) {
  at::parallel_for(0, n, 1024, [&](int64_t begin, int64_t end) {
    Queue<T, F> queue(grid, coordinates, values.const_data_ptr<T>(), values.size(1), f);
    for (int64_t i = begin; i < end; ++i) queue.push(i);
  });
}

// The thread that writes a cell's row: blocks of 4096 cells (16³ where cubes are that large) go round.
struct Owners {
  uint32_t count;
  uint32_t of(int64_t cell) const { return uint32_t(cell >> 12) % count; }
};

// f(i, corners, place) for the points where matters(i), the corners being divided among the threads: what f writes to
// their rows is written by one thread only, and by each thread in ascending order of the points. So every row's sum has
// the same order whatever the number of threads.
template <class T, class Matters, class F>
void for_rows(const VoxelIndex& grid, const T* coordinates, int64_t n, const Tensor& rows, const Matters& matters,
              const F& f) {
  const Owners owners{n < 1024 ? 1u : uint32_t(std::min(at::get_num_threads(), 32))};
  const T* table = rows.const_data_ptr<T>();
  if (owners.count == 1) {
    Queue<T, F> queue(grid, coordinates, table, rows.size(1), f);
    for (int64_t i = 0; i < n; ++i)
      if (matters(i)) queue.push(i);
    return;
  }
  const Tensor owned = at::empty({n}, at::kInt);  // a bit for the owner of each corner
  int32_t* masks = owned.mutable_data_ptr<int32_t>();
  parallel(n, 1024, [&](int64_t i) {
    uint32_t mask = 0;
    if (matters(i)) {
      int64_t cell[8];
      corner_cells(grid.cells, find_place(grid.cells, load3(coordinates + 3 * i)), cell);
      mask = 1u << owners.of(cell[0]);
      for (int c = 1; c < 8; ++c)
        if ((cell[c] ^ cell[0]) >> 12) mask |= 1u << owners.of(cell[c]);
    }
    masks[i] = int32_t(mask);
  });
  parallel(owners.count, 1, [&](int64_t me) {
    Queue<T, F> queue(grid, coordinates, table, rows.size(1), f);
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t mask = uint32_t(masks[i]);
      if (mask == 1u << me) queue.push(i);
      else if (mask >> me & 1) queue.push(i, [=](int64_t cell) { return owners.of(cell) == me; });
    }
  });
}

template <class V, int C, class T>
void add_to_rows(const Corners<T>& at, const T* g, T* rows, int64_t stride) {
  for (int c = 0; c < 8; ++c)
    if (at.row[c] >= 0) add_to_row<V, C>(at.weight[c], g, rows + at.row[c] * stride);
}

void check_rows(const char* op, const char* name, const Tensor& table, const VoxelIndex& grid) {
  const int32_t rows = grid.rank[grid.cells.count() / 64];
  TORCH_CHECK_VALUE(table.size(0) == rows, op, ": ", name, " must have a row for each of the ", rows, " voxels, got ",
                    table.size(0));
}

// ---- interpolation ----

Tensor sparse_sample(const Tensor& words, const Tensor& rank, at::IntArrayRef resolution, const Tensor& values,
                     const Tensor& coordinates) {
  check_points("sparse_sample", values, coordinates);
  const VoxelIndex grid = check_voxels("sparse_sample", words, rank, resolution, values);
  check_rows("sparse_sample", "values", values, grid);
  const int64_t n = coordinates.size(0), channels = values.size(1);
  Tensor out = at::empty({n, channels}, values.options());
  AT_DISPATCH_FLOATING_TYPES(values.scalar_type(), "sparse_sample", [&] {
    using T = scalar_t;
    const T *table = values.const_data_ptr<T>(), *points = coordinates.const_data_ptr<T>();
    T* result = out.mutable_data_ptr<T>();
    for_points(grid, points, n, values, [=](int64_t i, const Corners<T>& corners, const Place<T>&) {
      in_pieces(channels, [&](auto size, int64_t first) {
        interpolate<Vector<T, size>, size>(corners, table + first, channels, result + i * channels + first);
      });
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> sparse_sample_backward(const Tensor& grad, const Tensor& words, const Tensor& rank,
                                                  at::IntArrayRef resolution, const Tensor& values,
                                                  const Tensor& coordinates, std::array<bool, 2> needed) {
  check_points("sparse_sample_backward", values, coordinates);
  const VoxelIndex grid = check_voxels("sparse_sample_backward", words, rank, resolution, values);
  check_rows("sparse_sample_backward", "values", values, grid);
  const int64_t n = coordinates.size(0), channels = values.size(1);
  check("sparse_sample_backward", "grad", grad, values.scalar_type(), {n, channels}, values);
  Tensor to_values = needed[0] ? at::zeros_like(values) : at::empty({0}, values.options());
  Tensor to_coordinates = needed[1] ? at::empty_like(coordinates) : at::empty({0}, values.options());
  AT_DISPATCH_FLOATING_TYPES(values.scalar_type(), "sparse_sample_backward", [&] {
    using T = scalar_t;
    const T *table = values.const_data_ptr<T>(), *points = coordinates.const_data_ptr<T>(),
            *g = grad.const_data_ptr<T>();
    if (needed[0]) {
      T* out = to_values.mutable_data_ptr<T>();
      const auto all = [](int64_t) { return true; };
      for_rows(grid, points, n, to_values, all, [=](int64_t i, const Corners<T>& corners, const Place<T>&) {
        in_pieces(channels, [&](auto size, int64_t first) {
          add_to_rows<Vector<T, size>, size>(corners, g + i * channels + first, out + first, channels);
        });
      });
    }
    if (needed[1]) {
      T* out = to_coordinates.mutable_data_ptr<T>();
      for_points(grid, points, n, values, [=](int64_t i, const Corners<T>& corners, const Place<T>& place) {
        Vec3<T> sum{0, 0, 0};
        in_pieces(channels, [&](auto size, int64_t first) {
          using V = Vector<T, size>;
          V upstream[Lanes<V, T, size>::count];
          std::memcpy(upstream, g + i * channels + first, sizeof(upstream));  // a power of two: no lanes overlap
          const Vec3<V> part = place_gradient<V, size>(corners, place, table + first, channels, upstream);
          sum.x += sum_of<T>(part.x), sum.y += sum_of<T>(part.y), sum.z += sum_of<T>(part.z);
        });
        store_place_gradient(grid, points + 3 * i, sum, out + 3 * i);
      });
    }
  });
  return {to_values, to_coordinates};
}

// ---- interpolation and spherical harmonics ----

// Rows of the basis: that of a point's ray, or the point's own.
struct RayOf {
  const int32_t* index;
  int64_t operator()(int64_t i) const { return index ? index[i] : i; }
};

RayOf ray_of(const char* op, const Index& ray_index, int64_t rays) {
  if (!ray_index) return {nullptr};
  const int32_t* index = ray_index->const_data_ptr<int32_t>();
  const int64_t n = ray_index->numel();
  int32_t least = 0, most = -1;
  for (int64_t i = 0; i < n; ++i) least = std::min(least, index[i]), most = std::max(most, index[i]);
  TORCH_CHECK_INDEX(least >= 0 && most < rays, op, ": ray_index must be 0 to ", rays - 1, ", found ",
                    least < 0 ? least : most);
  return {index};
}

std::tuple<Tensor, Tensor> sparse_sample_sh(const Tensor& words, const Tensor& rank, at::IntArrayRef resolution,
                                            const Tensor& values, const Tensor& coordinates, const Tensor& basis,
                                            const Index& ray_index) {
  check_points("sparse_sample_sh", values, coordinates);
  const VoxelIndex grid = check_voxels("sparse_sample_sh", words, rank, resolution, values);
  const int64_t k = check_basis("sparse_sample_sh", values, coordinates, basis, ray_index), n = coordinates.size(0);
  check_rows("sparse_sample_sh", "values", values, grid);
  const RayOf ray = ray_of("sparse_sample_sh", ray_index, basis.size(0));
  Tensor density = at::empty({n}, values.options()), rgb = at::empty({n, 3}, values.options());
  AT_DISPATCH_FLOATING_TYPES(values.scalar_type(), "sparse_sample_sh", [&] {
    using T = scalar_t;
    const T *table = values.const_data_ptr<T>(), *points = coordinates.const_data_ptr<T>(),
            *y = basis.const_data_ptr<T>();
    T *to_density = density.mutable_data_ptr<T>(), *to_rgb = rgb.mutable_data_ptr<T>();
    with_terms(k, [&](auto terms) {
      constexpr int K = terms, C = 1 + 3 * K;
      for_points(grid, points, n, values, [=](int64_t i, const Corners<T>& corners, const Place<T>&) {
        T channels[C];
        interpolate<Vector<T, C>, C>(corners, table, C, channels);
        evaluate_sh<K>(channels, y + ray(i) * K, to_density + i, to_rgb + 3 * i);
      });
    });
  });
  return {density, rgb};
}

template <class T>
struct ShPoints {  // what the two halves of the backward pass read
  VoxelIndex grid;
  const T *values, *coordinates, *basis, *grad_density, *grad_rgb;
  RayOf ray;
  int64_t n;

  bool matters(int64_t i) const {
    const T* c = grad_rgb + 3 * i;
    return grad_density[i] != T(0) || c[0] != T(0) || c[1] != T(0) || c[2] != T(0);
  }
  template <int K>
  void upstream(int64_t i, T* g) const {
    evaluate_sh_backward<K>(grad_density[i], grad_rgb + 3 * i, basis + ray(i) * K, g);
  }
};

template <int K, class T>
void sh_to_values(const ShPoints<T>& in, const Tensor& gradient) {
  constexpr int C = 1 + 3 * K;
  T* out = gradient.mutable_data_ptr<T>();
  const auto matters = [=](int64_t i) { return in.matters(i); };  // most samples are behind a surface or in the air
  const auto add = [=](int64_t i, const Corners<T>& corners, const Place<T>&) {
    T g[C];
    in.template upstream<K>(i, g);
    add_to_rows<Vector<T, C>, C>(corners, g, out, C);
  };
  for_rows(in.grid, in.coordinates, in.n, gradient, matters, add);
}

// Gradients of one point's coordinates, if asked for, and, added, of its basis.
template <int K, class T>
void sh_to_point(const ShPoints<T>& in, int64_t i, const Corners<T>& corners, const Place<T>& place, T* to_coordinates,
                 T* to_basis) {
  constexpr int C = 1 + 3 * K;
  using V = Vector<T, C>;
  using L = Lanes<V, T, C>;
  if (to_coordinates) {
    T g[C];
    in.template upstream<K>(i, g);
    V upstream[L::count];
    for (int v = 0; v < L::count; ++v) upstream[v] = load<V>(g + L::offset(v));
    if constexpr (L::count > 1) {
      constexpr int twice = L::count * L::width - C;
      for (int l = 0; l < twice; ++l) upstream[L::count - 1][l] = T(0);
    }
    const Vec3<V> part = place_gradient<V, C>(corners, place, in.values, C, upstream);
    store_place_gradient(in.grid, in.coordinates + 3 * i, {sum_of<T>(part.x), sum_of<T>(part.y), sum_of<T>(part.z)},
                         to_coordinates + 3 * i);
  }
  if (to_basis && corners.any) {
    T channels[C];
    interpolate<V, C>(corners, in.values, C, channels);
    const T *g = in.grad_rgb + 3 * i, *c = channels + 1;
    T* out = to_basis + in.ray(i) * K;
    for (int k = 0; k < K; ++k) out[k] += g[0] * c[k] + g[1] * c[K + k] + g[2] * c[2 * K + k];
  }
}

// Points are divided among the threads; if the gradient of a basis is asked for whose rows several points share, by
// these rows: each row's sum is in the order of its points.
template <int K, class T>
void sh_to_points(const ShPoints<T>& in, const Tensor& values, T* to_coordinates, T* to_basis) {
  const auto f = [=](int64_t i, const Corners<T>& corners, const Place<T>& place) {
    sh_to_point<K>(in, i, corners, place, to_coordinates, to_basis);
  };
  if (!to_basis || !in.ray.index) {
    for_points(in.grid, in.coordinates, in.n, values, f);
    return;
  }
  const int64_t owners = in.n < 1024 ? 1 : at::get_num_threads();
  parallel(owners, 1, [&](int64_t me) {
    Queue<T, decltype(f)> queue(in.grid, in.coordinates, in.values, values.size(1), f);
    for (int64_t i = 0; i < in.n; ++i)
      if (in.ray.index[i] / 16 % owners == me) queue.push(i);
  });
}

std::tuple<Tensor, Tensor, Tensor> sparse_sample_sh_backward(
    const Tensor& grad_density, const Tensor& grad_rgb, const Tensor& words, const Tensor& rank,
    at::IntArrayRef resolution, const Tensor& values, const Tensor& coordinates, const Tensor& basis,
    const Index& ray_index, std::array<bool, 3> needed) {
  const char* op = "sparse_sample_sh_backward";
  check_points(op, values, coordinates);
  const VoxelIndex grid = check_voxels(op, words, rank, resolution, values);
  const int64_t k = check_basis(op, values, coordinates, basis, ray_index), n = coordinates.size(0);
  check_rows(op, "values", values, grid);
  check(op, "grad_density", grad_density, values.scalar_type(), {n}, values);
  check(op, "grad_rgb", grad_rgb, values.scalar_type(), {n, 3}, values);
  const RayOf ray = ray_of(op, ray_index, basis.size(0));
  Tensor to_values = needed[0] ? at::zeros_like(values) : at::empty({0}, values.options());
  Tensor to_coordinates = needed[1] ? at::empty_like(coordinates) : at::empty({0}, values.options());
  Tensor to_basis = needed[2] ? at::zeros_like(basis) : at::empty({0}, values.options());
  AT_DISPATCH_FLOATING_TYPES(values.scalar_type(), "sparse_sample_sh_backward", [&] {
    using T = scalar_t;
    const ShPoints<T> in{grid, values.const_data_ptr<T>(), coordinates.const_data_ptr<T>(), basis.const_data_ptr<T>(),
                         grad_density.const_data_ptr<T>(), grad_rgb.const_data_ptr<T>(), ray, n};
    T* c = needed[1] ? to_coordinates.mutable_data_ptr<T>() : nullptr;
    T* b = needed[2] ? to_basis.mutable_data_ptr<T>() : nullptr;
    with_terms(k, [&](auto terms) {
      if (needed[0]) sh_to_values<terms>(in, to_values);
      if (needed[1] || needed[2]) sh_to_points<terms>(in, values, c, b);
    });
  });
  return {to_values, to_coordinates, to_basis};
}

// ---- visibility ----

// *where = max(*where, what), both ≥ 0, whoever else writes: exact, and the order does not matter.
template <class T>
void raise(T* where, T what) {
  auto* bits = reinterpret_cast<decltype(bits_of(what))*>(where);
  const auto mine = bits_of(what);
  auto seen = __atomic_load_n(bits, __ATOMIC_RELAXED);
  while (mine > seen && !__atomic_compare_exchange_n(bits, &seen, mine, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
}

Tensor visibility(const Tensor& words, const Tensor& rank, at::IntArrayRef resolution, const Tensor& density,
                  const Tensor& rays_o, const Tensor& rays_d, const Tensor& aabb, double step, double stop) {
  const VoxelIndex grid = check_visibility(words, rank, resolution, density, rays_o, rays_d, aabb, step);
  check_rows("visibility", "density", density, grid);
  Tensor out = at::zeros_like(density);
  AT_DISPATCH_FLOATING_TYPES(density.scalar_type(), "visibility", [&] {
    using T = scalar_t;
    const T *sigma = density.const_data_ptr<T>(), *o = rays_o.const_data_ptr<T>(), *d = rays_d.const_data_ptr<T>(),
            *box = aabb.const_data_ptr<T>();
    T* weights = out.mutable_data_ptr<T>();
    parallel(rays_o.size(0), 64, [=](int64_t i) {
      const GridRay<T> ray = enter(grid.cells, o + 3 * i, d + 3 * i, box, T(step));
      walk(grid, sigma, ray, T(step), T(stop), [=](int32_t row, T weight) { raise(weights + row, weight); });
    });
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(gan3d, m) {
  m.def("sparse_sample(Tensor words, Tensor rank, int[] resolution, Tensor values, Tensor coordinates) -> Tensor");
  m.def("sparse_sample_backward(Tensor grad, Tensor words, Tensor rank, int[] resolution, Tensor values, "
        "Tensor coordinates, bool[2] needed) -> (Tensor, Tensor)");
  m.def("sparse_sample_sh(Tensor words, Tensor rank, int[] resolution, Tensor values, Tensor coordinates, "
        "Tensor basis, Tensor? ray_index) -> (Tensor, Tensor)");
  m.def("sparse_sample_sh_backward(Tensor grad_density, Tensor grad_rgb, Tensor words, Tensor rank, "
        "int[] resolution, Tensor values, Tensor coordinates, Tensor basis, Tensor? ray_index, bool[3] needed) "
        "-> (Tensor, Tensor, Tensor)");
  m.def("visibility(Tensor words, Tensor rank, int[] resolution, Tensor density, Tensor rays_o, Tensor rays_d, "
        "Tensor aabb, float step, float stop) -> Tensor");
}
TORCH_LIBRARY_IMPL(gan3d, CPU, m) {
  m.impl("sparse_sample", &sparse_sample);
  m.impl("sparse_sample_backward", &sparse_sample_backward);
  m.impl("sparse_sample_sh", &sparse_sample_sh);
  m.impl("sparse_sample_sh_backward", &sparse_sample_sh_backward);
  m.impl("visibility", &visibility);
}

}  // namespace gan3d
