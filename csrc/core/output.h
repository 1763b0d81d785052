#pragma once
// The derivative of an activation function from its output, for layers whose output the next layer keeps anyway. GELU,
// SiLU and Mish fall to one minimum and rise from there, so one bit more says which x an output came from. With s the
// root of the height above the minimum the derivative is smooth in s on the right and in w, the root of 1 - s / (s at
// 0), on the left (SiLU and Mish, which fall to 0 slowly, need no root there); polynomials derived by
// bench/fit_output.py are within 1e-4 of it (the rounding of a bfloat16 output costs 1e-2). The derivatives of ReLU,
// softplus, ELU and hard-swish follow from their outputs exactly.
#include "core/functions.h"

namespace pyzo {

// Coefficients from the highest power down.
struct OutputFit {
  float turn, least;              // x and value of the minimum
  float right_scale, left_scale;  // 2 / (s where the derivative counts as 1), 1 / (s at 0)
  bool root;                      // whether w is a root
  float right[17], left[10];
};

template <int kFunction>
struct OutputFitOf;

template <>
struct OutputFitOf<kGelu> {
  static constexpr OutputFit value = {
      -0.751791537f,
      -0.169971213f,
      0.901672721f,
      2.42556167f,
      true,
      {-0.666259289f, 0.098605223f, 3.28369594f, 0.0301932544f, -6.69488287f, -1.2356261f, 7.03512573f, 2.81625032f,
       -3.52297091f, -2.73305964f, -0.0760735795f, 0.967607141f, 1.37635946f, 0.314222455f, -1.35275126f, 0.241827175f,
       1.11776638f},
      {-0.00693167793f, 0.0126130851f, -0.000377373362f, -0.00745116873f, -0.00340794143f, 0.00106328959f,
       -0.0246052369f, 0.220467672f, 0.0371927954f, -0.228566095f}};
};
template <>
struct OutputFitOf<kGeluTanh> {
  static constexpr OutputFit value = {
      -0.752461433f,
      -0.170040756f,
      0.915733457f,
      2.42506552f,
      true,
      {-0.205009446f, 0.318607718f, 1.28283787f, -1.0634371f, -3.24297094f, 0.989149988f, 4.16298914f, 0.486734629f,
       -2.55690312f, -1.48328435f, 0.0726192221f, 0.74046725f, 1.18669987f, 0.230796874f, -1.31374097f, 0.280980945f,
       1.11348855f},
      {-0.0102125984f, 0.0184673294f, -0.000229434707f, -0.0111261057f, -0.00528691849f, 0.00543268118f, -0.0235993415f,
       0.213979855f, 0.0422262326f, -0.229655623f}};
};
template <>
struct OutputFitOf<kSilu> {
  static constexpr OutputFit value = {
      -1.27846456f,
      -0.278464556f,
      0.548853636f,
      1.89502549f,
      false,
      {-0.314901143f, 0.347262353f, 1.59392476f, -1.59650409f, -3.57017183f, 3.17163634f, 4.77884579f, -3.67192245f,
       -4.46795273f, 3.01189733f, 3.29601312f, -2.4611876f, -1.53058183f, 1.91558969f, -0.367524534f, -0.216753319f,
       1.08236039f},
      {0.0162114203f, -0.0271087568f, -0.00563657656f, 0.02418698f, 0.000673767645f, -0.0129332766f, 0.00574662723f,
       -0.0264107455f, 0.224153414f, -0.198875979f}};
};
template <>
struct OutputFitOf<kMish> {
  static constexpr OutputFit value = {-1.19243121f,
                                      -0.308843404f,
                                      0.750120521f,
                                      1.79941285f,
                                      false,
                                      {0.846726239f, 0.33046025f, -3.98873711f, -1.71135068f, 7.98298264f, 3.91949224f,
                                       -8.85947037f, -5.32345676f, 5.95416784f, 4.94858789f, -2.51845384f, -3.58497858f,
                                       1.04799962f, 1.96911383f, -1.05315924f, -0.0478505902f, 1.08796632f},
                                      {0.0186929833f, -0.0313061625f, -0.00636421144f, 0.0277220029f, 0.00106821337f,
                                       -0.0159613658f, 0.00742090354f, -0.0226972513f, 0.245975927f, -0.224543124f}};
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

// Even and odd powers apart: two short chains of operations in place of a long one.
template <class L, int kCount>
PYZO_HD typename L::F polynomial(const float (&coefficients)[kCount], typename L::F x) {
  typename L::F p[2] = {L::splat(coefficients[0]), L::splat(coefficients[1])};
  const typename L::F square = x * x;
  PYZO_UNROLL
  for (int i = 2; i < kCount; ++i) p[i % 2] = L::fma(p[i % 2], square, L::splat(coefficients[i]));
  return L::fma(p[kCount % 2], x, p[1 - kCount % 2]);
}

template <class L, int kFunction>
PYZO_HD typename L::F fitted_slope(typename L::F y, typename L::F right) {
  using F = typename L::F;
  constexpr OutputFit fit = OutputFitOf<kFunction>::value;
  const F zero = L::splat(0.0f), one = L::splat(1.0f), two = L::splat(2.0f);
  const F s = L::sqrt_any(L::at_least(y - L::splat(fit.least), zero));
  const F t = L::at_most(L::fma(s, L::splat(fit.right_scale), -one), one);
  F w = L::at_least(L::fma(s, L::splat(-fit.left_scale), one), zero);
  if constexpr (fit.root) w = L::sqrt_any(w);
  return L::if_less(zero, right, polynomial<L>(fit.right, t), w * polynomial<L>(fit.left, L::fma(w, two, -one)));
}

// h'(x) from y = h(x) and whether x lies right of the minimum (positive if so; not read where there is none).
template <class L, int kFunction>
PYZO_HD typename L::F slope_of_output(typename L::F y, typename L::F right) {
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
    return L::if_less(zero, right, L::if_less(y, constant<L>(3.0), root, one), left);
  } else if constexpr (kFunction == kQuickGelu) {  // silu(1.702 x) / 1.702
    return fitted_slope<L, kSilu>(y * constant<L>(1.702), right);
  } else {
    return fitted_slope<L, kFunction>(y, right);
  }
}

}  // namespace pyzo
