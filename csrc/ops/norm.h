#pragma once
// The operators of norms. A Device has static functions of the same names that take raw pointers, a scratch of the size
// it asks for, and the tensor whose device (and stream) is meant.
#include <cmath>
#include <optional>
#include <tuple>

#include "body/norm.h"
#include "ops/layers.h"

namespace pyzo {

constexpr int64_t kMostColumns = int64_t(1) << 30;

inline Dtype check_norm_dtype(const char* name, ScalarType dtype, const Tensor& x, Name of) {
  const bool wide = x.scalar_type() == ScalarType::Double;
  const std::optional<Dtype> found = dtype_of(dtype);
  STD_TORCH_CHECK(found && (*found == kFloat64) == wide, name,
                  wide ? ": expected Double" : ": expected Float, BFloat16 or Half", ", for ", of, " is ", describe(x),
                  ", got ", torch::headeronly::toString(dtype));
  return *found;
}

inline const void* check_norm_parameter(const std::optional<Tensor>& t, const char* name, const Tensor& x, Name of,
                                        int64_t columns, Dtype& dtype) {
  if (!t) return nullptr;
  STD_TORCH_CHECK(t->dim() == 1 && t->numel() == columns && t->is_contiguous() && same_device(*t, x), name,
                  ": expected a contiguous tensor of ", columns, " elements on the device of ", of, ", which is ",
                  describe(x), ", got ", describe(*t));
  dtype = check_norm_dtype(name, t->scalar_type(), x, of);
  return t->data_ptr();
}

// t: x, or what backward has of its shape.
inline NormArgs check_norm(const Tensor& t, Name name, const std::optional<Tensor>& weight,
                           const std::optional<Tensor>& bias, double eps, bool centered, double offset) {
  check_layer(t, name);
  STD_TORCH_CHECK(t.dim() > 0 && t.size(t.dim() - 1) > 0 && t.size(t.dim() - 1) <= kMostColumns, name,
                  ": expected a last dimension from 1 to 2^30, got ", describe(t));
  STD_TORCH_CHECK(eps >= 0 && std::isfinite(eps), "eps: expected a finite number >= 0, got ", eps);
  NormArgs a = {};
  a.columns = t.size(t.dim() - 1), a.rows = t.numel() / a.columns;
  a.centered = centered, a.eps = eps, a.offset = offset;
  a.weight = check_norm_parameter(weight, "weight", t, name, a.columns, a.weight_dtype);
  a.bias = check_norm_parameter(bias, "bias", t, name, a.columns, a.bias_dtype);
  return a;
}

inline ScalarType statistics_dtype(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// from_input is for the backward pass.
template <class Device>
std::tuple<Tensor, Tensor> norm(Tensor x, std::optional<Tensor> weight, std::optional<Tensor> bias, double eps,
                                bool centered, double weight_offset, bool, ScalarType dtype) {
  NormArgs a = check_norm(x, "x", weight, bias, eps, centered, weight_offset);
  a.input = check_layer(x, "x");
  a.output = check_norm_dtype("dtype", dtype, x, "x");
  Tensor y = new_like(x, dtype), rstd = torch::stable::new_empty(x, {a.rows}, statistics_dtype(x));
  if (a.rows > 0) {
    Tensor scratch = torch::stable::new_empty(x, {Device::norm_scratch(a, false)}, statistics_dtype(x));
    Device::norm(x, a, {x.data_ptr(), y.data_ptr(), rstd.data_ptr()}, scratch.data_ptr());
  }
  return {y, rstd};
}

// dtype: of x, and so of its gradient. Gradients of parameters are empty where not wanted.
template <class Device>
std::tuple<Tensor, Tensor, Tensor> norm_backward(Tensor gradient, Tensor saved, Tensor rstd,
                                                 std::optional<Tensor> weight, std::optional<Tensor> bias,
                                                 bool centered, double weight_offset, bool from_input, ScalarType dtype,
                                                 bool weight_gradient, bool bias_gradient) {
  NormArgs a = check_norm(gradient, "gradient", weight, bias, 0.0, centered, weight_offset);
  a.output = check_layer(gradient, "gradient");
  a.input = check_norm_dtype("dtype", dtype, gradient, "gradient");
  const ScalarType expected = from_input ? dtype : gradient.scalar_type();
  STD_TORCH_CHECK(saved.scalar_type() == expected && saved.numel() == gradient.numel() && saved.is_contiguous() &&
                      same_device(saved, gradient),
                  "saved: expected a contiguous tensor of ", torch::headeronly::toString(expected),
                  " of the size and device of gradient, which is ", describe(gradient), ", got ", describe(saved));
  STD_TORCH_CHECK(rstd.scalar_type() == statistics_dtype(gradient) && rstd.numel() == a.rows && rstd.is_contiguous() &&
                      same_device(rstd, gradient),
                  "rstd: expected a contiguous tensor of ", a.rows, " elements of ",
                  torch::headeronly::toString(statistics_dtype(gradient)), " beside gradient, got ", describe(rstd));
  STD_TORCH_CHECK(weight || !weight_gradient, "weight: expected a tensor where its gradient is wanted, got none");
  STD_TORCH_CHECK(bias || !bias_gradient, "bias: expected a tensor where its gradient is wanted, got none");
  Tensor dx = new_like(gradient, dtype);
  Tensor dweight = weight_gradient ? torch::stable::empty_like(*weight) : torch::stable::new_empty(gradient, {0});
  Tensor dbias = bias_gradient ? torch::stable::empty_like(*bias) : torch::stable::new_empty(gradient, {0});
  const bool sums = weight_gradient || bias_gradient;
  if (a.rows > 0 || sums) {
    Tensor scratch = torch::stable::new_empty(gradient, {Device::norm_scratch(a, sums)}, statistics_dtype(gradient));
    Device::norm_backward(
        gradient, a,
        {gradient.data_ptr(), saved.data_ptr(), rstd.data_ptr(), dx.data_ptr(),
         weight_gradient ? dweight.data_ptr() : nullptr, bias_gradient ? dbias.data_ptr() : nullptr, from_input},
        scratch.data_ptr());
  }
  return {dx, dweight, dbias};
}

}  // namespace pyzo
