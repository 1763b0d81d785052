// Elements of layers in vectors of floats (or doubles), and tiles of them in L1, up to kLayerTile elements. Included
// once by each cpu/layers_*.cpp after its Lanes; lies in that file's own namespace.
#include <type_traits>

#include "cpu/layers.h"

namespace pyzo::cpu::PYZO_ISA {

using F = Lanes::F;
using U = Lanes::U;

using Number = Lanes::Number;
constexpr Dtype kNumber = sizeof(Number) == 8 ? kFloat64 : kFloat32;

struct alignas(64) LayerTile {
  F v[kLayerTile / kLanes];
};

constexpr int64_t size_of(Dtype dtype) { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2; }

// Calls run(DtypeTag<T>{}) for one of the dtypes that these lanes serve.
template <class Run>
PYZO_HD void with_dtype(Dtype dtype, const Run& run) {
  if constexpr (sizeof(Lanes::Number) == 8) {
    run(DtypeTag<kFloat64>{});
  } else {
    if (dtype == kFloat32)
      run(DtypeTag<kFloat32>{});
    else if (dtype == kBFloat16)
      run(DtypeTag<kBFloat16>{});
    else
      run(DtypeTag<kFloat16>{});
  }
}

// Calls run(DtypeTag<T>{}, FunctionTag<f>{}) for a dtype and a function that are known only now.
template <class Run>
PYZO_HD void with_kernel(Dtype dtype, int f, const Run& run) {
  with_dtype(dtype, [&](auto t) { with_function(f, [&](auto tag) { run(t, tag); }); });
}

// n elements from element i on; what lies beyond them in the last vector is 0.
template <Dtype T>
inline void load_tile(const void* from, int64_t i, int64_t n, LayerTile& tile) {
  const int64_t whole = n / kLanes;
  for (int64_t k = 0; k < whole; ++k) tile.v[k] = Lanes::read<T>(from, i + k * kLanes);
  if (const int64_t rest = n - whole * kLanes) {
    alignas(64) char buffer[8 * kLanes] = {};
    __builtin_memcpy(buffer, static_cast<const char*>(from) + (i + whole * kLanes) * size_of(T), rest * size_of(T));
    tile.v[whole] = Lanes::read<T>(buffer, 0);
  }
}

// Rounded to nearest.
template <Dtype T>
inline void store_tile(void* to, int64_t i, int64_t n, const LayerTile& tile) {
  const int64_t whole = n / kLanes;
  for (int64_t k = 0; k < whole; ++k) Lanes::write<T>(to, i + k * kLanes, tile.v[k]);
  if (const int64_t rest = n - whole * kLanes) {
    alignas(64) char buffer[8 * kLanes];
    Lanes::write<T>(buffer, 0, tile.v[whole]);
    __builtin_memcpy(static_cast<char*>(to) + (i + whole * kLanes) * size_of(T), buffer, rest * size_of(T));
  }
}

inline void load_tile(Dtype dtype, const void* from, int64_t i, int64_t n, LayerTile& tile) {
  with_dtype(dtype, [&](auto t) { load_tile<decltype(t)::value>(from, i, n, tile); });
}
inline void store_tile(Dtype dtype, void* to, int64_t i, int64_t n, const LayerTile& tile) {
  with_dtype(dtype, [&](auto t) { store_tile<decltype(t)::value>(to, i, n, tile); });
}

// From element i on.
PYZO_HD const void* element(Dtype dtype, const void* of, int64_t i) {
  return static_cast<const char*>(of) + i * size_of(dtype);
}
PYZO_HD void* element(Dtype dtype, void* of, int64_t i) { return static_cast<char*>(of) + i * size_of(dtype); }

// Which half of a pair of vectors, as an argument that the compiler knows.
template <int k>
using Half = std::integral_constant<int, k>;
constexpr int64_t kPair = 2 * kLanes;

// map(x, y, first element of the pair, Half) for the vectors of n elements: x the kIn that are read, y the kOut that
// are written, rounded to nearest. A result may take the place of what it was computed from.
template <Dtype T, int kIn, int kOut, class Map>
PYZO_HD void map_elements(const void* const (&in)[kIn], void* const (&out)[kOut], int64_t n, const Map& map) {
  const auto pair = [&](const void* const* from, void* const* to, int64_t at, int64_t i) {
    F x[2][kIn], y[2][kOut];
    for (int j = 0; j < kIn; ++j) Lanes::load_pair<T>(from[j], at, x[0][j], x[1][j]);
    map(x[0], y[0], i, Half<0>{});
    map(x[1], y[1], i, Half<1>{});
    for (int j = 0; j < kOut; ++j) Lanes::store_pair<T>(to[j], at, y[0][j], y[1][j]);
  };
  int64_t i = 0;
  for (; i + kPair <= n; i += kPair) pair(in, out, i, i);
  if (i < n) {
    alignas(64) char buffers[kIn + kOut][kPair * size_of(T)] = {};
    const void* from[kIn];
    void* to[kOut];
    for (int j = 0; j < kIn; ++j) from[j] = __builtin_memcpy(buffers[j], element(T, in[j], i), (n - i) * size_of(T));
    for (int j = 0; j < kOut; ++j) to[j] = buffers[kIn + j];
    pair(from, to, 0, i);
    for (int j = 0; j < kOut; ++j) __builtin_memcpy(element(T, out[j], i), to[j], (n - i) * size_of(T));
  }
}

// Calls run(first element, number) for each tile of [begin, end).
template <class Run>
PYZO_HD void for_tiles(int64_t begin, int64_t end, const Run& run) {
  for (; begin < end; begin += kLayerTile) run(begin, end - begin < kLayerTile ? end - begin : kLayerTile);
}

}  // namespace pyzo::cpu::PYZO_ISA
