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
    LayerTile first, second, out;
    const Number* gate = read_tile(a.dtype, row_at(a, a.gate, row), i, n, first);
    const Number* up = read_tile(a.dtype, row_at(a, a.up, row), i, n, second);
    with_function(f, [&](auto tag) {
      map_numbers({gate, up}, {target(a.dtype, row_at(a, a.to_product, row), i, out)}, n,
                  [](const F* x, F* y) { y[0] = gated<Lanes, decltype(tag)::value>(x[0], x[1]); });
    });
    write_tile(a.dtype, row_at(a, a.to_product, row), i, n, out);
  });
}

inline void gate_backward(const GateArgs& a, int f, int64_t begin, int64_t end) {
  for_row_tiles(a, begin, end, [&](int64_t row, int64_t i, int64_t n) {
    LayerTile in[3], out[3];
    const Rows from[3] = {a.gradient, a.gate, a.up}, to[3] = {a.to_gate, a.to_up, a.to_product};
    const Number* x[3];
    Number* y[3];
    for (int j = 0; j < 3; ++j) {
      x[j] = read_tile(a.dtype, row_at(a, from[j], row), i, n, in[j]);
      y[j] = to[j].data ? target(a.dtype, row_at(a, to[j], row), i, out[j]) : reinterpret_cast<Number*>(out[j].v);
    }
    with_function(f, [&](auto tag) {
      map_numbers({x[0], x[1], x[2]}, {y[0], y[1], y[2]}, n, [](const F* x, F* y) {
        const auto g = gate_gradients<Lanes, decltype(tag)::value>(x[0], x[1], x[2]);
        y[0] = g.gate, y[1] = g.up, y[2] = g.product;
      });
    });
    for (int j = 0; j < 3; ++j)
      if (to[j].data) write_tile(a.dtype, row_at(a, to[j], row), i, n, out[j]);
  });
}

}  // namespace pyzo::cpu::PYZO_ISA
