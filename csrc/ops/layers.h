#pragma once
// Checks that the operators of layers share.
#include <torch/csrc/stable/ops.h>

#include "ops/check.h"

namespace pyzo {

// A float tensor of a layer. float64 is for numerical checks of gradients, on the CPU only.
inline Dtype check_layer_dtype(const Tensor& t, Name name) {
  const std::optional<Dtype> dtype = dtype_of(t.scalar_type());
  STD_TORCH_CHECK(dtype && !(*dtype == kFloat64 && t.is_cuda()), name,
                  ": expected a float32, bfloat16 or float16 tensor (float64 on the CPU only), got ", describe(t));
  return *dtype;
}

inline Dtype check_layer(const Tensor& t, Name name) {
  STD_TORCH_CHECK(t.is_contiguous(), name, ": expected a contiguous tensor, got ", describe(t));
  return check_layer_dtype(t, name);
}

// Another tensor of the same dtype, size and device.
inline void check_like(const Tensor& t, Name name, const Tensor& like, Name of) {
  STD_TORCH_CHECK(
      t.scalar_type() == like.scalar_type() && t.numel() == like.numel() && t.is_contiguous() && same_device(t, like),
      name, ": expected a contiguous tensor of the dtype, size and device of ", of, ", which is ", describe(like),
      ", got ", describe(t));
}

// A contiguous tensor of the shape of t, whose strides do not matter.
inline Tensor new_like(const Tensor& t, std::optional<ScalarType> dtype = std::nullopt) {
  return torch::stable::new_empty(t, t.sizes(), dtype);
}

}  // namespace pyzo
