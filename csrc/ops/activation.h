#pragma once
// The operators of activations. A Device has static functions of the same names that take raw pointers and the tensor
// whose device (and stream) is meant.
#include <tuple>

#include "body/activation.h"
#include "ops/layers.h"

namespace pyzo {

inline Levels check_levels(const char* name, const std::vector<double>& levels, int64_t extra) {
  Levels out = {0, {}};
  while (out.bits < kMaxBits && (int64_t(1) << out.bits) < int64_t(levels.size()) + extra) ++out.bits;
  STD_TORCH_CHECK(out.bits > 0 && (int64_t(1) << out.bits) == int64_t(levels.size()) + extra, name, ": expected 2^bits",
                  extra ? " - 1" : "", " numbers for 1 to 4 bits, got ", levels.size());
  for (size_t i = 0; i < levels.size(); ++i) out.level[i] = float(levels[i]);
  return out;
}

inline void check_codes(const Tensor& codes, const Tensor& gradient, int bits) {
  STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Byte && codes.is_contiguous() && same_device(codes, gradient) &&
                      codes.numel() == code_bytes(gradient.numel(), bits),
                  "codes: expected a contiguous uint8 tensor of ", code_bytes(gradient.numel(), bits), " bytes beside ",
                  describe(gradient), ", got ", describe(codes));
}

inline Tensor new_codes(const Tensor& x, int bits) {
  return torch::stable::new_empty(x, {code_bytes(x.numel(), bits)}, ScalarType::Byte);
}

template <class Device>
Tensor activation(Tensor x, int64_t function) {
  const Dtype dtype = check_layer(x, "x");
  check_range("function", function, 0, kFunctions);
  Tensor y = torch::stable::empty_like(x);
  if (x.numel() > 0) Device::activation(x, {dtype, x.numel(), {x.data_ptr()}, y.data_ptr()}, int(function));
  return y;
}

template <class Device>
Tensor activation_backward(Tensor gradient, Tensor x, int64_t function) {
  const Dtype dtype = check_layer(x, "x");
  check_like(gradient, "gradient", x, "x");
  check_range("function", function, 0, kFunctions);
  Tensor out = torch::stable::empty_like(x);
  if (x.numel() > 0)
    Device::activation_backward(x, {dtype, x.numel(), {gradient.data_ptr(), x.data_ptr()}, out.data_ptr()},
                                int(function));
  return out;
}

// The values take the place of the gradient.
template <class Device>
Tensor activation_backward_(Tensor gradient, Tensor x, int64_t function) {
  const Dtype dtype = check_layer(x, "x");
  check_like(gradient, "gradient", x, "x");
  check_range("function", function, 0, kFunctions);
  const char *const a = static_cast<const char*>(gradient.data_ptr()), *const b =
                                                                           static_cast<const char*>(x.data_ptr());
  const int64_t bytes = x.numel() * x.element_size();
  STD_TORCH_CHECK(a + bytes <= b || b + bytes <= a, "gradient: expected memory apart from that of x, got ",
                  describe(gradient));
  Tensor out = torch::stable::empty_like(x);
  if (x.numel() > 0)
    Device::activation_backward(
        x, {dtype, x.numel(), {gradient.data_ptr(), x.data_ptr()}, out.data_ptr(), gradient.data_ptr()}, int(function));
  return out;
}

// The slopes are for the backward pass, which is given what this one was.
template <class Device>
std::tuple<Tensor, Tensor> coded_activation(Tensor x, int64_t function, std::vector<double> thresholds,
                                            std::vector<double> slopes) {
  const Dtype dtype = check_layer(x, "x");
  check_range("function", function, 0, kFunctions);
  const Levels levels = check_levels("thresholds", thresholds, 1);
  STD_TORCH_CHECK(slopes.size() == thresholds.size() + 1, "slopes: expected ", thresholds.size() + 1,
                  " numbers, one more than thresholds, got ", slopes.size());
  for (size_t i = 1; i < thresholds.size(); ++i)
    STD_TORCH_CHECK(levels.level[i - 1] < levels.level[i], "thresholds: expected increasing float32 numbers, got ",
                    thresholds[i - 1], " before ", thresholds[i]);
  Tensor y = torch::stable::empty_like(x), codes = new_codes(x, levels.bits);
  if (x.numel() > 0)
    Device::coded_activation(x, {dtype, x.numel(), {x.data_ptr()}, y.data_ptr()}, int(function), levels,
                             static_cast<uint8_t*>(codes.data_ptr()));
  return {y, codes};
}

template <class Device>
Tensor coded_activation_backward(Tensor gradient, Tensor codes, std::vector<double> slopes) {
  const Dtype dtype = check_layer(gradient, "gradient");
  const Levels levels = check_levels("slopes", slopes, 0);
  check_codes(codes, gradient, levels.bits);
  Tensor out = torch::stable::empty_like(gradient);
  if (gradient.numel() > 0)
    Device::coded_activation_backward(gradient, {dtype, gradient.numel(), {gradient.data_ptr()}, out.data_ptr()},
                                      levels, static_cast<const uint8_t*>(codes.data_ptr()));
  return out;
}

// y, and where the function has a minimum a bit per element that says whether x lies right of it.
template <class Device>
std::tuple<Tensor, Tensor> output_activation(Tensor x, int64_t function) {
  const Dtype dtype = check_layer(x, "x");
  check_range("function", function, 0, kFunctions);
  const bool sided = has_sides(int(function));
  Tensor y = torch::stable::empty_like(x);
  Tensor sides = torch::stable::new_empty(x, {sided ? code_bytes(x.numel(), 1) : 0}, ScalarType::Byte);
  const Elements e = {dtype, x.numel(), {x.data_ptr()}, y.data_ptr()};
  if (x.numel() > 0 && sided)
    Device::coded_activation(x, e, int(function), {1, {turn_of(int(function))}},
                             static_cast<uint8_t*>(sides.data_ptr()));
  else if (x.numel() > 0)
    Device::activation(x, e, int(function));
  return {y, sides};
}

template <class Device>
Tensor output_activation_backward(Tensor gradient, Tensor y, Tensor sides, int64_t function) {
  const Dtype dtype = check_layer(y, "y");
  check_like(gradient, "gradient", y, "y");
  check_range("function", function, 0, kFunctions);
  if (has_sides(int(function))) check_codes(sides, gradient, 1);
  Tensor out = torch::stable::empty_like(y);
  if (y.numel() > 0)
    Device::output_activation_backward(y, {dtype, y.numel(), {gradient.data_ptr(), y.data_ptr()}, out.data_ptr()},
                                       int(function), static_cast<const uint8_t*>(sides.data_ptr()));
  return out;
}

}  // namespace pyzo
