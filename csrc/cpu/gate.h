// Kernels of gates. Included once by each cpu/layers_*.cpp after its tiles (cpu/layer_tile.h); lies in that file's own
// namespace.
#include "body/gate.h"

namespace pyzo::cpu::PYZO_ISA {

// Calls run(row, first column, number) for tiles [begin, end); a tile lies in one row.
template <class Run>
PYZO_HD void for_row_tiles(const GateArgs& a, int64_t begin, int64_t end, const Run& run) {
  const int64_t each = gate_tiles(a.columns);
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t row = tile / each, first = tile % each * kLayerTile;
    run(row, first, a.columns - first < kLayerTile ? a.columns - first : kLayerTile);
  }
}

inline void* row_at(const GateArgs& a, const Rows& r, int64_t row) {
  return static_cast<char*>(r.data) + row * r.stride * size_of(a.dtype);
}

inline void gate(const GateArgs& a, int f, int64_t begin, int64_t end) {
  for_row_tiles(a, begin, end, [&](int64_t row, int64_t i, int64_t n) {
    LayerTile gate, up;
    load_tile(a.dtype, row_at(a, a.gate, row), i, n, gate);
    load_tile(a.dtype, row_at(a, a.up, row), i, n, up);
    with_function(f, [&](auto tag) {
      for (int64_t k = 0; k < vectors(n); ++k) up.v[k] = gated<Lanes, decltype(tag)::value>(gate.v[k], up.v[k]);
    });
    store_tile(a.dtype, row_at(a, a.to_product, row), i, n, up);
  });
}

inline void gate_backward(const GateArgs& a, int f, int64_t begin, int64_t end) {
  for_row_tiles(a, begin, end, [&](int64_t row, int64_t i, int64_t n) {
    LayerTile gradient, gate, up;
    load_tile(a.dtype, row_at(a, a.gradient, row), i, n, gradient);
    load_tile(a.dtype, row_at(a, a.gate, row), i, n, gate);
    load_tile(a.dtype, row_at(a, a.up, row), i, n, up);
    with_function(f, [&](auto tag) {
      for (int64_t k = 0; k < vectors(n); ++k) {
        const auto g = gate_gradients<Lanes, decltype(tag)::value>(gradient.v[k], gate.v[k], up.v[k]);
        gate.v[k] = g.gate, up.v[k] = g.up, gradient.v[k] = g.product;
      }
    });
    store_tile(a.dtype, row_at(a, a.to_gate, row), i, n, gate);
    store_tile(a.dtype, row_at(a, a.to_up, row), i, n, up);
    if (a.to_product.data) store_tile(a.dtype, row_at(a, a.to_product, row), i, n, gradient);
  });
}

}  // namespace pyzo::cpu::PYZO_ISA
