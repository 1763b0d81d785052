#pragma once
// The derivative of an activation function from its output, for layers whose output the next layer keeps anyway. GELU,
// SiLU and Mish fall to one minimum and rise from there, so one bit more says which x an output came from. With s the
// root of the height above the minimum, negative on the left, the derivative is one smooth function of s, and the
// quotients of polynomials derived by bench/fit_output.py are within 1e-4 of it (the rounding of a bfloat16 output
// costs 1e-2). The derivatives of ReLU, softplus, ELU and hard-swish follow from their outputs exactly.
#include "core/functions.h"

namespace pyzo {

// h' = (t + 1) P(t) / Q(t), t = scale s + offset in [-1, 1]: -1 where h is 0 on the left, 1 where h' counts as 1 on the
// right. Coefficients from the highest power down.
template <int kDegree>
struct OutputFit {
  float turn, least;  // x and value of the minimum
  float scale, offset;
  float numerator[kDegree + 1], denominator[kDegree + 1];
};

template <int kFunction>
struct OutputFitOf;

template <>
struct OutputFitOf<kGelu> {
  static constexpr OutputFit<7> value = {
      -0.751791537f,
      -0.169971213f,
      0.760347724f,
      -0.686527133f,
      {0.883961439f, -0.745410383f, -0.920314908f, 4.16007376f, 1.6789093f, -2.39921522f, 0.399550229f, 1.0254724f},
      {0.57650274f, 1.39220333f, 1.49689937f, 2.31922364f, 1.48398411f, -0.628188133f, 0.525560677f, 1.0f}};
};
template <>
struct OutputFitOf<kGeluTanh> {
  static constexpr OutputFit<7> value = {
      -0.752461433f,
      -0.170040756f,
      0.770296872f,
      -0.682360411f,
      {0.772758365f, -0.777626932f, -0.761083484f, 3.90377092f, 1.24820983f, -2.4067862f, 0.473815262f, 1.01336169f},
      {0.513404608f, 1.19343162f, 1.21119416f, 1.9704088f, 1.18198943f, -0.697199464f, 0.559837639f, 1.0f}};
};
template <>
struct OutputFitOf<kSilu> {
  static constexpr OutputFit<6> value = {
      -1.27846456f,
      -0.278464556f,
      0.479425907f,
      -0.747008204f,
      {0.669136167f, -0.341301501f, 2.71965337f, 5.52208567f, 1.79113245f, 1.12431669f, 1.09974921f},
      {0.965669632f, 3.86743522f, 6.46639204f, 6.71035767f, 4.15827942f, 1.99961042f, 1.0f}};
};
template <>
struct OutputFitOf<kMish> {
  static constexpr OutputFit<6> value = {
      -1.19243121f,
      -0.308843404f,
      0.620737255f,
      -0.655033469f,
      {1.00830221f, -1.08777523f, 2.26098347f, 4.92185926f, -0.414206564f, 0.157931119f, 1.03748643f},
      {1.02859604f, 3.4436655f, 3.94357061f, 3.93732285f, 1.94322419f, 0.471511483f, 1.0f}};
};

// Whether an output of the function comes from either side of a minimum, and a bit per element has to say from which.
PYZO_HD constexpr bool has_sides(int function) {
  return function == kGelu || function == kGeluTanh || function == kQuickGelu || function == kSilu ||
         function == kMish || function == kHardswish;
}

// Where the minimum is; the right side begins above it.
inline float turn_of(int function) {
  switch (function) {
    case kGelu:
      return OutputFitOf<kGelu>::value.turn;
    case kGeluTanh:
      return OutputFitOf<kGeluTanh>::value.turn;
    case kQuickGelu:
      return OutputFitOf<kSilu>::value.turn / 1.702f;
    case kSilu:
      return OutputFitOf<kSilu>::value.turn;
    case kMish:
      return OutputFitOf<kMish>::value.turn;
    default:
      return -1.5f;  // hard-swish
  }
}

// Horner's rule.
template <class L, int kCount>
PYZO_HD typename L::F polynomial(const float (&coefficients)[kCount], typename L::F x) {
  typename L::F p = L::splat(coefficients[0]);
  PYZO_UNROLL
  for (int i = 1; i < kCount; ++i) p = L::fma(p, x, L::splat(coefficients[i]));
  return p;
}

template <class L, int kFunction>
PYZO_HD typename L::F fitted_slope(typename L::F y, typename L::F side) {
  using F = typename L::F;
  constexpr auto fit = OutputFitOf<kFunction>::value;
  const F one = L::splat(1.0f);
  const F s = L::sqrt_any(L::at_least(y - L::splat(fit.least), L::splat(0.0f))) * side;
  const F t = L::at_least(L::at_most(L::fma(s, L::splat(fit.scale), L::splat(fit.offset)), one), -one);
  return (t + one) * polynomial<L>(fit.numerator, t) * L::reciprocal(polynomial<L>(fit.denominator, t));
}

// h'(x) from y = h(x) and the side of the minimum on which x lies: 1 right of it, else -1; not read where there is
// none.
template <class L, int kFunction>
PYZO_HD typename L::F slope_of_output(typename L::F y, typename L::F side) {
  using F = typename L::F;
  const F zero = constant<L>(0.0), one = constant<L>(1.0);
  if constexpr (kFunction == kRelu) {
    return L::if_less(zero, y, one, zero);
  } else if constexpr (kFunction == kElu) {
    return L::if_less(zero, y, one, y + one);
  } else if constexpr (kFunction == kSoftplus) {
    return -expm1<L>(-y);
  } else if constexpr (kFunction == kHardswish) {  // y = x (x + 3) / 6 between -3 and 3
    const F root = L::sqrt_any(L::at_least(L::fma(y, constant<L>(2.0 / 3.0), constant<L>(0.25)), zero));
    const F left = L::if_less(y, zero, -root, zero);
    return L::if_less(zero, side, L::if_less(y, constant<L>(3.0), root, one), left);
  } else if constexpr (kFunction == kQuickGelu) {  // silu(1.702 x) / 1.702
    return fitted_slope<L, kSilu>(y * constant<L>(1.702), side);
  } else {
    return fitted_slope<L, kFunction>(y, side);
  }
}

}  // namespace pyzo
