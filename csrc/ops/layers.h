#pragma once
// Checks that the operators of layers share.
#include <torch/csrc/stable/ops.h>

#include "ops/check.h"

namespace pyzo {

// A float tensor of a layer. float64 is for numerical checks of gradients, on the CPU only.
inline Dtype check_layer_dtype(const Tensor& t, const std::string& name) {
  const ScalarType type = t.scalar_type();
  const bool known = type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half ||
                     (type == ScalarType::Double && !t.is_cuda());
  STD_TORCH_CHECK(known, name, ": expected a float32, bfloat16 or float16 tensor (float64 on the CPU only), got ",
                  describe(t));
  return type == ScalarType::Float      ? kFloat32
         : type == ScalarType::BFloat16 ? kBFloat16
         : type == ScalarType::Half     ? kFloat16
                                        : kFloat64;
}

inline Dtype check_layer(const Tensor& t, const std::string& name) {
  STD_TORCH_CHECK(t.is_contiguous(), name, ": expected a contiguous tensor, got ", describe(t));
  return check_layer_dtype(t, name);
}

// Another tensor of the same dtype, size and device.
inline void check_like(const Tensor& t, const std::string& name, const Tensor& like, const std::string& of) {
  STD_TORCH_CHECK(
      t.scalar_type() == like.scalar_type() && t.numel() == like.numel() && t.is_contiguous() && same_device(t, like),
      name, ": expected a contiguous tensor of the dtype, size and device of ", of, ", which is ", describe(like),
      ", got ", describe(t));
}

}  // namespace pyzo
