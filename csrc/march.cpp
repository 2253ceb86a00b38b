#include "march.h"

#include <atomic>
#include <memory>
#include <vector>

#include "cpu.h"
#include "march_checks.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace gan3d {
namespace {

template <class T>
constexpr int kLanes = 64 / sizeof(T);

// Single-level marching on a CPU looks at kLanes lattice points at once, and before that at kLanes such chunks at once:
// a chunk whose ends lie in blocks of `side` cells that touch (or are one) is empty if the first of them and its 26
// neighbours are, as coordinates are monotone along the lattice. `Coarse` has that bit for every block.
struct Coarse {
  int32_t x, y, z, shift;      // number of blocks along each axis; log2 of their side; shift < 0: chunks are too long
  std::vector<uint32_t> bits;  // something in the block or its neighbours; raster order

  Coarse(const uint64_t* words, Cells cells, double cells_in_chunk) {
    shift = cells_in_chunk <= 4 ? 2 : cells_in_chunk <= 8 ? 3 : cells_in_chunk <= 16 ? 4 : -1;
    if (shift < 0) return;
    const auto blocks = [this](int32_t side) { return (side + (1 << shift) - 1) >> shift; };
    x = blocks(cells.x), y = blocks(cells.y), z = blocks(cells.z);
    std::vector<uint8_t> some(size_t(x) * y * z, 0), spread(some.size());
    const int down = shift - 2;
    std::vector<int64_t> along(cells.z / 4);  // a word's number is a sum of one term for each axis
    for (int32_t k = 0; k < cells.z / 4; ++k) along[k] = cells.index(0, 0, 4 * k) >> 6;
    for (int32_t i = 0; i < cells.x / 4; ++i) {
      for (int32_t j = 0; j < cells.y / 4; ++j) {
        const uint64_t* row = words + (cells.index(4 * i, 4 * j, 0) >> 6);
        uint8_t* out = some.data() + (int64_t(i >> down) * y + (j >> down)) * z;
        for (int32_t k = 0; k < cells.z / 4; ++k) out[k >> down] |= row[along[k]] != 0;
      }
    }
    widen(some.data(), spread.data(), z, 1);
    widen(spread.data(), some.data(), y, z);
    widen(some.data(), spread.data(), x, int64_t(y) * z);
    bits.assign((spread.size() + 31) / 32, 0);
    for (size_t i = 0; i < spread.size(); ++i) bits[i >> 5] |= uint32_t(spread[i]) << (i & 31);
  }

 private:
  // or of the entries one before and one after along an axis of n entries `stride` apart
  void widen(const uint8_t* in, uint8_t* out, int64_t n, int64_t stride) const {
    const int64_t outer = int64_t(x) * y * z / (n * stride);
    for (int64_t a = 0; a < outer; ++a) {
      for (int64_t i = 0; i < n; ++i) {
        const int64_t here = (a * n + i) * stride, before = i > 0 ? -stride : 0, after = i + 1 < n ? stride : 0;
        for (int64_t b = here; b < here + stride; ++b) out[b] = in[b] | in[b + before] | in[b + after];
      }
    }
  }
};

template <class T>
struct Ray {
  Vec3<T> o, d;
  T far;
};

// Bit i: the chunk that starts at lattice point k + i·kLanes may hold a sample.
template <class T>
uint32_t busy_chunks(const Coarse& coarse, const Occupancy<T>& grid, const Lattice<T>& lattice, const Ray<T>& ray,
                     int32_t k) {
  constexpr int n = kLanes<T>;
  const Cells cells = grid.cells;
  const uint32_t* bits = coarse.bits.data();
  const int shift = coarse.shift;
  const int32_t ny = coarse.y, nz = coarse.z;
  const int32_t hx = cells.x >> 1, hy = cells.y >> 1, hz = cells.z >> 1;
  uint32_t busy = 0;
#pragma omp simd reduction(| : busy)
  for (int i = 0; i < n; ++i) {
    const T a = lattice.near + T(k + i * n) * lattice.step, b = lattice.near + T(k + i * n + n) * lattice.step;
    const Vec3<T> p = point(ray.o, ray.d, a), q = point(ray.o, ray.d, b);
    const int32_t px = Occupancy<T>::place(p.x, grid.centre.x, grid.scale.x) + hx;
    const int32_t py = Occupancy<T>::place(p.y, grid.centre.y, grid.scale.y) + hy;
    const int32_t pz = Occupancy<T>::place(p.z, grid.centre.z, grid.scale.z) + hz;
    const int32_t dx = ((Occupancy<T>::place(q.x, grid.centre.x, grid.scale.x) + hx) >> shift) - (px >> shift);
    const int32_t dy = ((Occupancy<T>::place(q.y, grid.centre.y, grid.scale.y) + hy) >> shift) - (py >> shift);
    const int32_t dz = ((Occupancy<T>::place(q.z, grid.centre.z, grid.scale.z) + hz) >> shift) - (pz >> shift);
    const uint32_t far_apart = (uint32_t(dx + 1) > 2u) | (uint32_t(dy + 1) > 2u) | (uint32_t(dz + 1) > 2u);
    const uint32_t inside = (uint32_t(px) < uint32_t(cells.x)) & (uint32_t(py) < uint32_t(cells.y)) &
                            (uint32_t(pz) < uint32_t(cells.z));
    const uint32_t block = inside ? uint32_t(((px >> shift) * ny + (py >> shift)) * nz + (pz >> shift)) : 0u;
    const uint32_t some = (bits[block >> 5] >> (block & 31)) & 1u;
    busy |= (some | far_apart | (inside ^ 1u)) << i;
  }
  return busy;
}

HD uint32_t spread_bits(uint32_t v) {  // as Cells::spread; shifts are cheaper than products in vector registers
  v = (v | (v << 16)) & 0xFF0000FFu;
  v = (v | (v << 8)) & 0x0F00F00Fu;
  v = (v | (v << 4)) & 0xC30C30C3u;
  return (v | (v << 2)) & 0x49249249u;
}

// Bit i: lattice point k + i is a sample, at t[i].
template <class T>
uint32_t samples_in_chunk(const Occupancy<T>& grid, const Lattice<T>& lattice, const Ray<T>& ray, int32_t k, T* t) {
  constexpr int n = kLanes<T>;
  const Cells cells = grid.cells;
  const uint32_t* bits = reinterpret_cast<const uint32_t*>(grid.words);
  const int shift = cells.shift;
  const int32_t mask = (1 << shift) - 1, ny = cells.y >> shift, nz = cells.z >> shift;
  const int32_t hx = cells.x >> 1, hy = cells.y >> 1, hz = cells.z >> 1;
  alignas(64) T u[n];
  if (lattice.per_sample) {
    for (int i = 0; i < n; ++i) u[i] = lattice.u(k + i);
  } else {
    for (int i = 0; i < n; ++i) u[i] = lattice.offset;
  }
  uint32_t found = 0;
#pragma omp simd reduction(| : found)
  for (int i = 0; i < n; ++i) {
    const T at = lattice.near + (T(k + i) + u[i]) * lattice.step;
    t[i] = at;
    const Vec3<T> p = point(ray.o, ray.d, at);
    const int32_t x = Occupancy<T>::place(p.x, grid.centre.x, grid.scale.x) + hx;
    const int32_t y = Occupancy<T>::place(p.y, grid.centre.y, grid.scale.y) + hy;
    const int32_t z = Occupancy<T>::place(p.z, grid.centre.z, grid.scale.z) + hz;
    const uint32_t inside = (uint32_t(x) < uint32_t(cells.x)) & (uint32_t(y) < uint32_t(cells.y)) &
                            (uint32_t(z) < uint32_t(cells.z)) & uint32_t(at < ray.far);
    const uint32_t low = spread_bits(x & mask) | (spread_bits(y & mask) << 1) | (spread_bits(z & mask) << 2);
    const uint32_t cube = uint32_t(((x >> shift) * ny + (y >> shift)) * nz + (z >> shift));
    const uint32_t cell = inside ? (cube << (3 * shift)) | low : 0u;
    found |= (((bits[cell >> 5] >> (cell & 31)) & inside) & 1u) << i;
  }
  return found;
}

// March of one ray in a single level, cone = 0: the samples of `march_even`, found in chunks.
template <class T>
void march_chunks(const Coarse& coarse, const Occupancy<T>& grid, const Lattice<T>& lattice, const Ray<T>& ray,
                  int64_t most, std::vector<T>& out) {
  constexpr int n = kLanes<T>;
  int32_t first, last;
  lattice_range(lattice, span(grid, ray.o, ray.d, lattice.near, ray.far), first, last);
  const size_t stop = out.size() + size_t(most);
  alignas(64) T t[n];
  for (int32_t row = first; row < last; row += n * n) {
    const int32_t chunks = min((last - row + n - 1) / n, n);
    uint32_t busy = (coarse.shift < 0 ? ~0u : busy_chunks(coarse, grid, lattice, ray, row)) & ((2u << (chunks - 1)) - 1);
    for (; busy != 0; busy &= busy - 1) {
      uint32_t found = samples_in_chunk(grid, lattice, ray, row + n * __builtin_ctz(busy), t);
      for (; found != 0; found &= found - 1) {
        out.push_back(t[__builtin_ctz(found)]);
        if (out.size() == stop) return;
      }
    }
  }
}

// Rays are marched once, in groups; a group's t (and delta, if they vary) wait in memory of exactly their size until
// the number of all samples is known. Groups do not depend on the number of threads, nor does the order of rays.
template <class T>
struct Group {
  std::unique_ptr<T[]> t, delta;
};

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> march(
    const at::Tensor& rays_o, const at::Tensor& rays_d, const at::Tensor& near, const at::Tensor& far,
    const std::optional<at::Tensor>& words, const std::optional<at::Tensor>& aabb, at::IntArrayRef resolution,
    double step, double cone, double max_step, int64_t max_samples, int64_t jitter, int64_t seed) {
  check_march(rays_o, rays_d, near, far, words, aabb, resolution, step, cone, max_step, max_samples, jitter);
  const int64_t n = rays_o.size(0);
  constexpr int64_t kGroup = 256;
  const int64_t groups = (n + kGroup - 1) / kGroup;
  at::Tensor offsets = at::empty({n + 1}, rays_o.options().dtype(at::kInt)), ray_index, ts, deltas;
  AT_DISPATCH_FLOATING_TYPES(rays_o.scalar_type(), "march", [&] {
    using T = scalar_t;
    const T *o = rays_o.const_data_ptr<T>(), *d = rays_d.const_data_ptr<T>();
    const T *start = near.const_data_ptr<T>(), *end = far.const_data_ptr<T>();
    int32_t* offset = offsets.mutable_data_ptr<int32_t>();
    Occupancy<T> grid{};
    std::unique_ptr<Coarse> coarse;
    if (words) {
      const Cells cells = make_cells(resolution[0], resolution[1], resolution[2]);
      grid = make_occupancy(words->const_data_ptr<int64_t>(), cells, words->size(0), aabb->const_data_ptr<T>());
      // few rays do not pay for a look at the whole grid
      if (grid.levels == 1 && grid.valid && cone == 0 && cells.count() / 64 <= 256 * n) {
        coarse = std::make_unique<Coarse>(grid.words, cells, kLanes<T> * step * double(grid.finest));
      }
    }
    std::vector<Group<T>> found(groups);
    at::parallel_for(0, groups, 1, [&](int64_t begin, int64_t stop) {
      std::vector<T> t, delta;
      for (int64_t g = begin; g < stop; ++g) {
        t.clear(), delta.clear();
        for (int64_t i = g * kGroup; i < min(n, (g + 1) * kGroup); ++i) {
          const auto lattice = make_lattice(start[i], T(step), T(cone), T(max_step), jitter, seed, i);
          const Ray<T> ray{load3(o + 3 * i), load3(d + 3 * i), end[i]};
          const size_t before = t.size();
          if (!coarse) {
            march_ray(words ? &grid : nullptr, lattice, ray.o, ray.d, ray.far, [&](T at, T length) {
              t.push_back(at);
              if (cone > 0) delta.push_back(length);
              return t.size() - before < size_t(max_samples);
            });
          } else if (lattice.near < ray.far && finite(lattice.near) && finite(ray.o) && finite(ray.d)) {
            march_chunks(*coarse, grid, lattice, ray, max_samples, t);
          }
          offset[i + 1] = int32_t(t.size() - before);
        }
        found[g].t.reset(new T[t.size()]);
        std::copy(t.begin(), t.end(), found[g].t.get());
        found[g].delta.reset(new T[delta.size()]);
        std::copy(delta.begin(), delta.end(), found[g].delta.get());
      }
    });
    int64_t total = 0;
    offset[0] = 0;
    for (int64_t i = 0; i < n; ++i) {
      total += offset[i + 1];
      TORCH_CHECK(total < (int64_t(1) << 31), "march: 2^31 samples or more; march fewer rays at once");
      offset[i + 1] = int32_t(total);
    }
    ray_index = at::empty({total}, offsets.options());
    ts = at::empty({total}, rays_o.options());
    deltas = at::empty({total}, rays_o.options());
    int32_t* index = ray_index.mutable_data_ptr<int32_t>();
    T *t = ts.mutable_data_ptr<T>(), *delta = deltas.mutable_data_ptr<T>();
    parallel(groups, 1, [&](int64_t g) {
      const int64_t from = g * kGroup, to = min(n, from + kGroup);
      const int32_t a = offset[from], b = offset[to];
      std::copy_n(found[g].t.get(), b - a, t + a);
      found[g].t.reset();
      if (cone > 0) {
        std::copy_n(found[g].delta.get(), b - a, delta + a);
        found[g].delta.reset();
      } else {
        std::fill(delta + a, delta + b, T(step));
      }
      for (int64_t i = from; i < to; ++i) std::fill(index + offset[i], index + offset[i + 1], int32_t(i));
    });
  });
  return {offsets, ray_index, ts, deltas};
}

std::tuple<at::Tensor, at::Tensor> ray_aabb_cpu(const at::Tensor& rays_o, const at::Tensor& rays_d,
                                                const at::Tensor& boxes, double near, double far) {
  check_ray_aabb(rays_o, rays_d, boxes);
  const int64_t n = rays_o.size(0), m = boxes.size(0);
  at::Tensor enter = at::empty({n, m}, rays_o.options()), leave = at::empty_like(enter);
  AT_DISPATCH_FLOATING_TYPES(rays_o.scalar_type(), "ray_aabb", [&] {
    using T = scalar_t;
    const T *o = rays_o.const_data_ptr<T>(), *d = rays_d.const_data_ptr<T>(), *box = boxes.const_data_ptr<T>();
    T *a = enter.mutable_data_ptr<T>(), *b = leave.mutable_data_ptr<T>();
    parallel(n, 4096 / (m + 1) + 1, [=](int64_t i) {
      const Vec3<T> origin = load3(o + 3 * i), direction = load3(d + 3 * i);
      for (int64_t j = 0; j < m; ++j) {
        ray_aabb(origin, direction, box + 6 * j, T(near), T(far), a[i * m + j], b[i * m + j]);
      }
    });
  });
  return {enter, leave};
}

// Bit i: v[i] > threshold, for 64 values.
HD uint64_t above(const float* v, float threshold) {
#if defined(__AVX512F__)
  const __m512 limit = _mm512_set1_ps(threshold);
  uint64_t word = 0;
  for (int i = 0; i < 4; ++i) {
    word |= uint64_t(_mm512_cmp_ps_mask(_mm512_loadu_ps(v + 16 * i), limit, _CMP_GT_OQ)) << (16 * i);
  }
  return word;
#else
  uint64_t word = 0;
#pragma omp simd reduction(| : word)
  for (int i = 0; i < 64; ++i) word |= uint64_t(v[i] > threshold) << i;
  return word;
#endif
}
HD uint64_t above(const double* v, double threshold) {
  uint64_t word = 0;
#pragma omp simd reduction(| : word)
  for (int i = 0; i < 64; ++i) word |= uint64_t(v[i] > threshold) << i;
  return word;
}

at::Tensor pack_bits(const at::Tensor& values, const at::Tensor& threshold) {
  check_pack(values, threshold);
  const int64_t n = values.numel() / 64;
  at::Tensor words = at::empty({n}, values.options().dtype(at::kLong));
  AT_DISPATCH_FLOATING_TYPES(values.scalar_type(), "pack_bits", [&] {
    const scalar_t *v = values.const_data_ptr<scalar_t>(), limit = *threshold.const_data_ptr<scalar_t>();
    int64_t* w = words.mutable_data_ptr<int64_t>();
    parallel(n, 4096, [=](int64_t i) { w[i] = int64_t(above(v + 64 * i, limit)); });
  });
  return words;
}

at::Tensor occupied(const at::Tensor& points, const at::Tensor& words, const at::Tensor& aabb,
                    at::IntArrayRef resolution) {
  check_first("occupied", "points", points, {-1, 3});
  check_grid("occupied", words, aabb, resolution, points);
  const int64_t n = points.size(0);
  at::Tensor out = at::empty({n}, points.options().dtype(at::kBool));
  AT_DISPATCH_FLOATING_TYPES(points.scalar_type(), "occupied", [&] {
    const auto grid = make_occupancy(words.const_data_ptr<int64_t>(),
                                     make_cells(resolution[0], resolution[1], resolution[2]), words.size(0),
                                     aabb.const_data_ptr<scalar_t>());
    const scalar_t* p = points.const_data_ptr<scalar_t>();
    bool* y = out.mutable_data_ptr<bool>();
    parallel(n, 4096, [=](int64_t i) {
      const Vec3<scalar_t> at = load3(p + 3 * i);
      y[i] = grid.valid && finite(at) && grid.occupied(at, 0);
    });
  });
  return out;
}

// In two sweeps over the index, so that it may name a cell twice: all asked cells get decay·old, then the maximum. Each
// thread takes the cells of its own range, whatever their place in the index.
at::Tensor update_occupancy(const at::Tensor& values, const at::Tensor& index, const at::Tensor& fresh, double decay,
                            bool everywhere) {
  check_update(values, index, fresh);
  const int64_t n = values.size(0), k = index.size(0);
  at::Tensor out = at::empty_like(values);
  std::atomic<bool> outside = false;
  AT_DISPATCH_FLOATING_TYPES(values.scalar_type(), "update_occupancy", [&] {
    using T = scalar_t;
    const T *old = values.const_data_ptr<T>(), *v = fresh.const_data_ptr<T>(), factor = T(decay);
    const int64_t* cell = index.const_data_ptr<int64_t>();
    T* y = out.mutable_data_ptr<T>();
    at::parallel_for(0, n, 1 << 18, [&](int64_t begin, int64_t end) {
      if (everywhere) {
        for (int64_t i = begin; i < end; ++i) y[i] = decayed(old[i], factor);
      } else {
        std::copy(old + begin, old + end, y + begin);
        for (int64_t i = 0; i < k; ++i) {
          if (cell[i] >= begin && cell[i] < end) y[cell[i]] = decayed(old[cell[i]], factor);
        }
      }
      bool bad = false;
      for (int64_t i = 0; i < k; ++i) {
        const int64_t c = cell[i];
        bad |= uint64_t(c) >= uint64_t(n);
        if (c >= begin && c < end && !(y[c] < T(0))) y[c] = max(y[c], v[i]);
      }
      if (bad) outside = true;
    });
  });
  TORCH_CHECK_INDEX(!outside && (n > 0 || k == 0), "update_occupancy: index must lie in [0, ", n, ")");
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(gan3d, m) {
  m.def("ray_aabb(Tensor rays_o, Tensor rays_d, Tensor boxes, float near, float far) -> (Tensor, Tensor)");
  m.def("march(Tensor rays_o, Tensor rays_d, Tensor near, Tensor far, Tensor? words, Tensor? aabb, int[] resolution, "
        "float step, float cone, float max_step, int max_samples, int jitter, SymInt seed) "
        "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def("pack_bits(Tensor values, Tensor threshold) -> Tensor");
  m.def("occupied(Tensor points, Tensor words, Tensor aabb, int[] resolution) -> Tensor");
  m.def("update_occupancy(Tensor values, Tensor index, Tensor fresh, float decay, bool everywhere) -> Tensor");
}
TORCH_LIBRARY_IMPL(gan3d, CPU, m) {
  m.impl("ray_aabb", &ray_aabb_cpu);
  m.impl("march", &march);
  m.impl("pack_bits", &pack_bits);
  m.impl("occupied", &occupied);
  m.impl("update_occupancy", &update_occupancy);
}

}  // namespace gan3d
