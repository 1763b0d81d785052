#pragma once
// The operator of dropout. A Device has a static function of the same name that takes raw pointers and the tensor whose
// device (and stream) is meant.
#include <cmath>

#include "body/dropout.h"
#include "ops/layers.h"

namespace pyzo {

inline Dropout check_probability(double p) {
  const double keep = std::nearbyint((1.0 - p) * double(kKeepAll));  // to even, as Python's round
  STD_TORCH_CHECK(p >= 0.0 && keep >= 1.0, "p: expected a number in [0, 1 - 2^-17), got ", p);
  return {uint32_t(keep), double(kKeepAll) / keep};
}

inline const int64_t* check_seed(const Tensor& seed, const Tensor& x) {
  STD_TORCH_CHECK(
      seed.scalar_type() == ScalarType::Long && seed.dim() == 1 && seed.size(0) == 1 && same_device(seed, x),
      "seed: expected an int64 tensor [1] on the device of x, which is ", describe(x), ", got ", describe(seed));
  return static_cast<const int64_t*>(seed.data_ptr());
}

template <class Device>
Tensor dropout(Tensor x, Tensor seed, double p) {
  const Dtype dtype = check_layer(x, "x");
  const int64_t* from = check_seed(seed, x);
  const Dropout d = check_probability(p);
  Tensor y = torch::stable::empty_like(x);
  if (x.numel() > 0) Device::dropout(x, {dtype, x.numel(), {x.data_ptr()}, y.data_ptr()}, d, from);
  return y;
}

}  // namespace pyzo
