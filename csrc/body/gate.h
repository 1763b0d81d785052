#pragma once
// Gates: what their kernels are given, and their arithmetic on one lane. No torch.
#include "body/activation.h"

namespace pyzo {

// Rows of contiguous elements; from one row to the next are `stride` elements.
struct Rows {
  void* data;
  int64_t stride;
};

// The forward pass writes the product alone. The backward pass writes the product too where it has memory; it may
// write over what it reads, element by element.
struct GateArgs {
  Dtype dtype;
  int64_t rows, columns;
  Rows gate, up, gradient;          // read
  Rows to_gate, to_up, to_product;  // written
};

template <class L, int kFunction>
PYZO_HD typename L::F gated(typename L::F gate, typename L::F up) {
  return function<L, kFunction>(gate).value * up;
}

template <class F>
struct GateGradients {
  F gate, up, product;
};

template <class L, int kFunction>
PYZO_HD GateGradients<typename L::F> gate_gradients(typename L::F gradient, typename L::F gate, typename L::F up) {
  const ValueSlope<typename L::F> h = function<L, kFunction>(gate);
  return {gradient * up * h.slope, gradient * h.value, h.value * up};
}

}  // namespace pyzo
