// Tiles of layers: up to kLayerTile elements. Kernels compute on numbers, floats (or doubles): those of the tensor
// itself, or of a copy in L1 where it has another dtype. So functions exist once per instruction set and not once more
// per dtype. Included once by each cpu/layers_*.cpp after its Lanes; lies in that file's own namespace.
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

// n elements from element i on; what lies beyond them in the last vector is 0.
template <Dtype T>
inline void load_tile(const void* from, int64_t i, int64_t n, LayerTile& tile) {
  const int64_t whole = n / kLanes;
  for (int64_t k = 0; k < whole; ++k) tile.v[k] = Lanes::load<T>(from, i + k * kLanes);
  if (const int64_t rest = n - whole * kLanes) {
    alignas(64) char buffer[8 * kLanes] = {};
    __builtin_memcpy(buffer, static_cast<const char*>(from) + (i + whole * kLanes) * size_of(T), rest * size_of(T));
    tile.v[whole] = Lanes::load<T>(buffer, 0);
  }
}

// Rounded to nearest.
template <Dtype T>
inline void store_tile(void* to, int64_t i, int64_t n, const LayerTile& tile) {
  const int64_t whole = n / kLanes;
  for (int64_t k = 0; k < whole; ++k) Lanes::store<T>(to, i + k * kLanes, to_storage<Lanes, T>(tile.v[k]));
  if (const int64_t rest = n - whole * kLanes) {
    alignas(64) char buffer[8 * kLanes];
    Lanes::store<T>(buffer, 0, to_storage<Lanes, T>(tile.v[whole]));
    __builtin_memcpy(static_cast<char*>(to) + (i + whole * kLanes) * size_of(T), buffer, rest * size_of(T));
  }
}

inline void load_tile(Dtype dtype, const void* from, int64_t i, int64_t n, LayerTile& tile) {
  with_dtype(dtype, [&](auto t) { load_tile<decltype(t)::value>(from, i, n, tile); });
}
inline void store_tile(Dtype dtype, void* to, int64_t i, int64_t n, const LayerTile& tile) {
  with_dtype(dtype, [&](auto t) { store_tile<decltype(t)::value>(to, i, n, tile); });
}

// The n numbers of a tensor from element i on: its own, or those of the tile, which is filled.
inline const Number* read_tile(Dtype dtype, const void* from, int64_t i, int64_t n, LayerTile& tile) {
  if (dtype == kNumber) return static_cast<const Number*>(from) + i;
  load_tile(dtype, from, i, n, tile);
  return reinterpret_cast<const Number*>(tile.v);
}

// Where numbers are put that belong to a tensor from element i on; write_tile brings them there.
inline Number* target(Dtype dtype, void* to, int64_t i, LayerTile& tile) {
  return dtype == kNumber ? static_cast<Number*>(to) + i : reinterpret_cast<Number*>(tile.v);
}
inline void write_tile(Dtype dtype, void* to, int64_t i, int64_t n, const LayerTile& tile) {
  if (dtype != kNumber) store_tile(dtype, to, i, n, tile);
}

// map(x, y) for vectors of n numbers: x the kIn that are read, y the kOut that are written. A result may take the place
// of what it was computed from.
template <int kIn, int kOut, class Map>
PYZO_HD void map_numbers(const Number* const (&in)[kIn], Number* const (&out)[kOut], int64_t n, const Map& map) {
  const auto vector = [&](const Number* const* from, Number* const* to, int64_t at) {
    F x[kIn], y[kOut];
    for (int j = 0; j < kIn; ++j) x[j] = Lanes::load<kNumber>(from[j], at);
    map(x, y);
    for (int j = 0; j < kOut; ++j) Lanes::store<kNumber>(to[j], at, y[j]);
  };
  int64_t i = 0;
#pragma GCC unroll 2
  for (; i + kLanes <= n; i += kLanes) vector(in, out, i);
  if (i < n) {
    alignas(64) Number buffers[kIn + kOut][kLanes] = {};
    const Number* from[kIn];
    Number* to[kOut];
    for (int j = 0; j < kIn; ++j) {
      __builtin_memcpy(buffers[j], in[j] + i, (n - i) * int64_t(sizeof(Number)));
      from[j] = buffers[j];
    }
    for (int j = 0; j < kOut; ++j) to[j] = buffers[kIn + j];
    vector(from, to, 0);
    for (int j = 0; j < kOut; ++j) __builtin_memcpy(out[j] + i, to[j], (n - i) * int64_t(sizeof(Number)));
  }
}

// Calls run(first element, number) for each tile of [begin, end).
template <class Run>
PYZO_HD void for_tiles(int64_t begin, int64_t end, const Run& run) {
  for (; begin < end; begin += kLayerTile) run(begin, end - begin < kLayerTile ? end - begin : kLayerTile);
}

}  // namespace pyzo::cpu::PYZO_ISA
