#pragma once
// The operators of gates. gate and up may be views whose rows are contiguous, as the two halves of one tensor are.
#include <optional>
#include <tuple>

#include "body/gate.h"
#include "ops/layers.h"

namespace pyzo {

// How a tensor lies in memory as rows of contiguous elements, as few as there can be; nothing where it does not.
struct RowShape {
  int64_t columns, stride;
};

inline std::optional<RowShape> row_shape(const Tensor& t) {
  if (t.is_contiguous()) return RowShape{t.numel(), t.numel()};
  const int64_t last = t.dim() - 1, columns = t.size(last);
  if (t.stride(last) != 1) return std::nullopt;
  int64_t stride = 0, next = 0;  // of a row; of what the next dimension has to be to go on in rows
  for (int64_t i = last - 1; i >= 0; --i) {
    if (t.size(i) == 1) continue;
    if (stride == 0 ? t.stride(i) < columns : t.stride(i) != next) return std::nullopt;
    if (stride == 0) stride = t.stride(i);
    next = t.stride(i) * t.size(i);
  }
  return RowShape{columns, stride == 0 ? columns : stride};
}

inline bool same_sizes(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t i = 0; i < a.dim(); ++i)
    if (a.size(i) != b.size(i)) return false;
  return true;
}

// gate and up, checked; everything else is contiguous and comes later.
inline GateArgs check_gate(const Tensor& gate, const Tensor& up, int64_t function) {
  const Dtype dtype = check_layer_dtype(gate, "gate");
  const auto of_gate = row_shape(gate), of_up = row_shape(up);
  STD_TORCH_CHECK(of_gate, "gate: expected rows of contiguous elements, got ", describe(gate));
  STD_TORCH_CHECK(up.scalar_type() == gate.scalar_type() && same_sizes(up, gate) && same_device(up, gate) && of_up,
                  "up: expected rows of contiguous elements of the dtype, shape and device of gate, which is ",
                  describe(gate), ", got ", describe(up));
  check_range("function", function, 0, kFunctions);
  // A contiguous tensor can be seen as rows of any length.
  const int64_t n = gate.numel(), columns = std::min(of_gate->columns, of_up->columns);
  const auto rows = [&](const Tensor& t, const RowShape& s) {
    return Rows{t.data_ptr(), s.columns == columns ? s.stride : columns};
  };
  return {dtype, n == 0 ? 0 : n / columns, columns, rows(gate, *of_gate), rows(up, *of_up), {}, {}, {}, {}};
}

inline Rows contiguous_rows(const Tensor& t, const GateArgs& a) { return {t.data_ptr(), a.columns}; }

template <class Device>
Tensor gate(Tensor gate, Tensor up, int64_t function) {
  GateArgs a = check_gate(gate, up, function);
  Tensor product = new_like(gate);
  a.to_product = contiguous_rows(product, a);
  if (a.rows > 0) Device::gate(gate, a, int(function));
  return product;
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> gate_backward(Tensor gradient, Tensor gate, Tensor up, int64_t function,
                                                 bool product) {
  GateArgs a = check_gate(gate, up, function);
  check_like(gradient, "gradient", gate, "gate");
  Tensor to_gate = new_like(gate), to_up = new_like(gate);
  Tensor to_product = product ? new_like(gate) : torch::stable::new_empty(gate, {0});
  a.gradient = contiguous_rows(gradient, a);
  a.to_gate = contiguous_rows(to_gate, a);
  a.to_up = contiguous_rows(to_up, a);
  if (product) a.to_product = contiguous_rows(to_product, a);
  if (a.rows > 0) Device::gate_backward(gate, a, int(function));
  return {to_gate, to_up, to_product};
}

// Whether rows that are written have no element in common: they lie apart, or side by side as the halves of one tensor.
inline bool apart(const Rows& a, const Rows& b, const GateArgs& args, int64_t size) {
  const int64_t from = int64_t(reinterpret_cast<uintptr_t>(b.data) - reinterpret_cast<uintptr_t>(a.data));
  const auto span = [&](const Rows& r) { return ((args.rows - 1) * r.stride + args.columns) * size; };
  if (from >= span(a) || -from >= span(b)) return true;
  const int64_t stride = a.stride * size, width = args.columns * size, shift = (from % stride + stride) % stride;
  return a.stride == b.stride && shift >= width && shift <= stride - width;
}

template <class Device>
void gate_backward_(Tensor gradient, Tensor gate, Tensor up, int64_t function, bool product) {
  GateArgs a = check_gate(gate, up, function);
  check_like(gradient, "gradient", gate, "gate");
  a.gradient = contiguous_rows(gradient, a);
  a.to_gate = a.gate;
  a.to_up = a.up;
  if (product) a.to_product = a.gradient;
  if (a.rows == 0) return;
  const int64_t size = gate.element_size();
  STD_TORCH_CHECK(apart(a.gate, a.up, a, size), "up: expected memory apart from that of gate, got ", describe(up));
  STD_TORCH_CHECK(apart(a.gradient, a.gate, a, size) && apart(a.gradient, a.up, a, size),
                  "gradient: expected memory apart from that of gate and up, got ", describe(gradient));
  Device::gate_backward(gate, a, int(function));
}

}  // namespace pyzo
