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
  with_kernel(a.dtype, f, [&](auto t, auto tag) {
    for_row_tiles(a, begin, end, [&](int64_t row, int64_t i, int64_t n) {
      const auto at = [&](const Rows& r) { return element(a.dtype, row_at(a, r, row), i); };
      map_elements<decltype(t)::value, 2, 1>(
          {at(a.gate), at(a.up)}, {at(a.to_product)}, n,
          [](const F* x, F* y, auto...) { y[0] = gated<Lanes, decltype(tag)::value>(x[0], x[1]); });
    });
  });
}

inline void gate_backward(const GateArgs& a, int f, int64_t begin, int64_t end) {
  with_kernel(a.dtype, f, [&](auto t, auto tag) {
    LayerTile unwanted;
    for_row_tiles(a, begin, end, [&](int64_t row, int64_t i, int64_t n) {
      const auto at = [&](const Rows& r) { return r.data ? element(a.dtype, row_at(a, r, row), i) : unwanted.v; };
      map_elements<decltype(t)::value, 3, 3>(
          {at(a.gradient), at(a.gate), at(a.up)}, {at(a.to_gate), at(a.to_up), at(a.to_product)}, n,
          [](const F* x, F* y, auto...) {
            const auto g = gate_gradients<Lanes, decltype(tag)::value>(x[0], x[1], x[2]);
            y[0] = g.gate, y[1] = g.up, y[2] = g.product;
          });
    });
  });
}

}  // namespace pyzo::cpu::PYZO_ISA
