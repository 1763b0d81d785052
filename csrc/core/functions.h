#pragma once
// Activation functions and their derivatives, in the elementary functions of core. They agree with torch's functions of
// the same name to rounding; constants are those of torch.
#include "core/elementary.h"

namespace pyzo {

// Numbered as pyzo/ops/activations.py lists their names.
enum Function : int { kRelu, kGelu, kGeluTanh, kQuickGelu, kSilu, kMish, kSoftplus, kElu, kHardswish, kFunctions };

template <class F>
struct ValueSlope {
  F value, slope;
};

// A constant in the lane's own precision.
template <class L>
PYZO_HD typename L::F constant(double c) {
  if constexpr (sizeof(typename L::F) / L::kWidth == sizeof(double))
    return typename L::F(c);
  else
    return L::splat(float(c));
}

// x held within [-bound, bound], where bound is so far out that derivatives are constant beyond it: a derivative stays
// finite at infinity. NaN stays.
template <class L>
PYZO_HD typename L::F within(typename L::F x, double bound) {
  return L::at_most(L::at_least(x, constant<L>(-bound)), constant<L>(bound));
}

// x sigmoid(u(x)), given u and u'. Relative to the size of the value accurate on the far left too.
template <class L>
PYZO_HD ValueSlope<typename L::F> gated_by_sigmoid(typename L::F x, typename L::F u, typename L::F slope_of_u) {
  const Sigmoids<typename L::F> s = sigmoids<L>(u);
  return {x * s.sigmoid, s.sigmoid * L::fma(within<L>(x, 128.0) * slope_of_u, s.complement, constant<L>(1.0))};
}

// h(x) and h'(x); what is not used costs nothing.
template <class L, int kFunction>
PYZO_HD ValueSlope<typename L::F> function(typename L::F x) {
  using F = typename L::F;
  const F zero = constant<L>(0.0), one = constant<L>(1.0);
  if constexpr (kFunction == kRelu) {
    return {L::at_least(x, zero), L::if_less(zero, x, one, zero)};
  } else if constexpr (kFunction == kGelu) {
    const NormalDistribution<F> normal = normal_distribution<L>(x);
    return {x * normal.below, L::fma(within<L>(x, 64.0), normal.density, normal.below)};
  } else if constexpr (kFunction == kGeluTanh) {  // (1 + tanh u) / 2 = sigmoid(2 u), u = sqrt(2 / pi) (x + a x^3)
    const F y = within<L>(x, 128.0), scale = constant<L>(1.5957691216057308), a = constant<L>(0.044715);
    const F square = y * y;
    return gated_by_sigmoid<L>(x, scale * L::fma(a * square, y, y), scale * L::fma(constant<L>(3.0) * a, square, one));
  } else if constexpr (kFunction == kQuickGelu) {
    const F scale = constant<L>(1.702);
    return gated_by_sigmoid<L>(x, scale * x, scale);
  } else if constexpr (kFunction == kSilu) {
    return gated_by_sigmoid<L>(x, x, one);
  } else if constexpr (kFunction == kMish) {  // tanh(log(1 + e)) = n / (n + 2), n = e^2 + 2 e, e = e^x
    const F e = exp<L>(L::at_most(x, constant<L>(22.0))), two = constant<L>(2.0);  // tanh is 1 from there on
    const F n = L::fma(e, e, e + e), r = L::reciprocal(n + two);
    const F w = L::if_less(x, zero, n * r, L::fma(-two, r, one));
    return {x * w, L::fma(within<L>(x, 128.0) * (e * (constant<L>(4.0) * r)), L::fma(e, r, r), w)};
  } else if constexpr (kFunction == kSoftplus) {
    return {log1p<L>(exp<L>(-L::abs(x))) + L::at_least(x, zero), sigmoid<L>(x)};
  } else if constexpr (kFunction == kElu) {
    return {L::if_less(zero, x, x, expm1<L>(x)), L::if_less(zero, x, one, exp<L>(x))};
  } else {
    static_assert(kFunction == kHardswish);
    const F three = constant<L>(3.0), sixth = constant<L>(1.0 / 6.0);
    const F ramp = L::at_most(L::at_least(x + three, zero), constant<L>(6.0));
    const F inner = L::fma(x, constant<L>(1.0 / 3.0), constant<L>(0.5));
    return {x * ramp * sixth, L::if_less(-three, x, L::if_less(x, three, inner, one), zero)};
  }
}

}  // namespace pyzo
