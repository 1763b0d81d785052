#pragma once
// exp, expm1, log, log1p, tanh, sigmoid, erf and the normal distribution function and density, in IEEE + - * fma and a
// correctly rounded reciprocal only: the same bits from every compiler and device that rounds correctly and does not
// contract. No branches. Inputs may be anything; results that are subnormal are rounded, not flushed; NaN gives NaN.
// Errors over every float32 input, in units of the last place of the result, are at most
//   exp 0.92  expm1 1.60  log 0.93  log1p 0.93  tanh 1.59  sigmoid 2.79  erf 1.70  normal 3.78, its density 1.51
// and less for subnormal results (`all` of csrc/tests/test_elementary.cpp looks at every input).
// Polynomials: minimax, derived by bench/fit_elementary.py.
#include "core/lane.h"

namespace pyzo {

// e^x = 2^n e^f with an integer n and |f| <= ln(2) / 2. Adding kRound to a number below 2^22 leaves the nearest integer
// in the low bits of the sum, from where a shift by 23 takes it into the exponent of a float. A bias added to kRound
// makes that float 2^n times the power of two that the bias says.
constexpr float kRound = 0x1.8p23f;
constexpr float kLog2E = 1.44269504f;
constexpr float kLn2High = 0x1.62e4p-1f, kLn2Low = 1.42860677e-06f;  // products of n and kLn2High are exact

// factor * q(scale f), where e^f = 1 + f + f^2 q(f). Both are powers of two, so that the constants stay exact.
template <class L>
PYZO_HD typename L::F exponential_terms(typename L::F f, float scale, float factor) {
  using F = typename L::F;
  const float scale2 = scale * scale;
  F q = L::splat(0.00138825795f * factor * scale2 * scale2);
  q = L::fma(q, f, L::splat(0.0083665112f * factor * scale2 * scale));
  q = L::fma(q, f, L::splat(0.0416671969f * factor * scale2));
  q = L::fma(q, f, L::splat(0.166665435f * factor * scale));
  return L::fma(q, f, L::splat(0.49999997f * factor));
}

// factor * e^(scale f)
template <class L>
PYZO_HD typename L::F exponential(typename L::F f, float scale, float factor) {
  using F = typename L::F;
  const F slope = L::fma(exponential_terms<L>(f, scale, factor * scale * scale), f, L::splat(factor * scale));
  return L::fma(slope, f, L::splat(factor));
}

template <class L>
PYZO_HD typename L::F with_sign_of(typename L::F x, typename L::F magnitude) {
  return L::as_f(L::as_u(magnitude) | (L::as_u(x) & L::splat(0x80000000u)));
}

template <class L>
PYZO_HD typename L::F exp(typename L::F x) {
  using F = typename L::F;
  using U = typename L::U;
  const F y = L::at_most(L::at_least(x, L::splat(-104.0f)), L::splat(89.0f));  // 0 and infinity lie within
  const F shifted = L::fma(y, L::splat(kLog2E), L::splat(kRound + 127.0f));
  const F n = shifted - L::splat(kRound + 127.0f);
  const F f = L::fma(n, L::splat(-kLn2Low), L::fma(n, L::splat(-kLn2High), y));
  // 2^n in two factors: neither it nor a product with it would be a normal number for every n.
  const F outer = L::if_less(y, L::splat(-80.0f), L::splat(0x1p-64f), L::splat(2.0f));
  const U inner = (L::as_u(shifted) << 23) + (L::splat(0x3f800000u) - L::as_u(outer));
  return exponential<L>(f, 1.0f, 1.0f) * L::as_f(inner) * outer;
}

// e^x - 1
template <class L>
PYZO_HD typename L::F expm1(typename L::F x) {
  using F = typename L::F;
  const F y = L::at_most(L::at_least(x, L::splat(-18.0f)), L::splat(89.0f));  // -1 and infinity lie within
  const F shifted = L::fma(y, L::splat(kLog2E), L::splat(kRound + 126.0f));
  const F n = shifted - L::splat(kRound + 126.0f);
  const F f = L::fma(n, L::splat(-kLn2Low), L::fma(n, L::splat(-kLn2High), y));
  const F less_one = L::fma(f * f, exponential_terms<L>(f, 1.0f, 1.0f), f);  // e^f - 1
  const F half = L::as_f(L::as_u(shifted) << 23);                            // of 2^n, which may be too large
  const F result = L::fma(less_one, half, half - L::splat(0.5f));
  return L::if_less(L::abs(x), L::splat(0x1p-25f), x, result + result);  // keeps -0 and all bits of subnormals
}

template <class F>
struct Sigmoids {
  F sigmoid, complement;  // 1 / (1 + e^-x), and 1 less that
};

// Both accurate relative to their size: with y = |x| they are 1 / (1 + e^-y) and e^-y / (1 + e^-y).
template <class L>
PYZO_HD Sigmoids<typename L::F> sigmoids(typename L::F x) {
  using F = typename L::F;
  const F y = L::at_most(L::abs(x), L::splat(104.0f));
  const F shifted = L::fma(y, L::splat(-kLog2E), L::splat(kRound + 151.0f));
  const F n = shifted - L::splat(kRound + 151.0f);
  const F f = L::fma(n, L::splat(kLn2Low), L::fma(n, L::splat(kLn2High), y));
  const F e = exponential<L>(f, -1.0f, 0x1p-24f) * L::as_f(L::as_u(shifted) << 23);
  const F large = L::reciprocal(e + L::splat(1.0f)), small = e * large, zero = L::splat(0.0f);
  return {L::if_less(x, zero, small, large), L::if_less(x, zero, large, small)};
}

template <class L>
PYZO_HD typename L::F sigmoid(typename L::F x) {
  return sigmoids<L>(x).sigmoid;
}

// 1 - 2 / (e^2y + 1) where y = |x| is large enough, an odd polynomial below that.
template <class L>
PYZO_HD typename L::F tanh(typename L::F x) {
  using F = typename L::F;
  using U = typename L::U;
  const F y = L::at_most(L::abs(x), L::splat(9.5f));  // 1 lies within
  const F s = y * y;
  F p = L::splat(0.0164381526f);
  p = L::fma(p, s, L::splat(-0.0526721403f));
  p = L::fma(p, s, L::splat(0.133207306f));
  p = L::fma(p, s, L::splat(-0.333329469f));
  const F near = L::fma(p * s, y, y);
  const F shifted = L::fma(y, L::splat(2.0f * kLog2E), L::splat(kRound));
  const F n = shifted - L::splat(kRound);
  const F f = L::fma(n, L::splat(-0.346573591f), y);  // ln(2) / 2 less 1e-9
  const U e = L::as_u(exponential<L>(f, 2.0f, 1.0f)) + (L::as_u(shifted) << 23);
  const F far = L::fma(L::reciprocal(L::as_f(e) + L::splat(1.0f)), L::splat(-2.0f), L::splat(1.0f));
  return with_sign_of<L>(x, L::if_less(L::splat(0.55f), y, far, near));
}

// An odd polynomial up to |x| = 1, from there 1 less the fourth power of a polynomial.
template <class L>
PYZO_HD typename L::F erf(typename L::F x) {
  using F = typename L::F;
  const F y = L::at_most(L::abs(x), L::splat(4.2f));  // 1 lies within
  const F s = y * y;
  F p = L::splat(-0.000561984314f);
  p = L::fma(p, s, L::splat(0.00491490168f));
  p = L::fma(p, s, L::splat(-0.0267092139f));
  p = L::fma(p, s, L::splat(0.112801135f));
  p = L::fma(p, s, L::splat(-0.37612319f));
  p = L::fma(p, s, L::splat(0.128379121f));
  F q = L::splat(-0.000155831891f);
  q = L::fma(q, y, L::splat(0.0029113912f));
  q = L::fma(q, y, L::splat(-0.0203693975f));
  q = L::fma(q, y, L::splat(0.0604014955f));
  q = L::fma(q, y, L::splat(-0.0400665998f));
  q = L::fma(q, y, L::splat(-0.0745549053f));
  q = L::fma(q, y, L::splat(-0.302314669f));
  q = L::fma(q, y, L::splat(1.00391805f));
  q = q * q;
  const F far = L::fma(-q, q, L::splat(1.0f));
  return with_sign_of<L>(x, L::if_less(L::splat(1.0f), y, far, L::fma(p, y, y)));
}

template <class F>
struct NormalDistribution {
  F below;    // the probability of being below x, the distribution function
  F density;  // e^(-x^2 / 2) / sqrt(2 pi)
};

// Both accurate relative to their size, however small. GELU(x) is x * below, its derivative below + x * density.
template <class L>
PYZO_HD NormalDistribution<typename L::F> normal_distribution(typename L::F x) {
  using F = typename L::F;
  const F t = L::at_most(L::abs(x), L::splat(14.42f));  // 0 and 1 lie within
  // e^(-t^2 / 2) = 2^n e^(-f / 2), f = t^2 + 2 n ln 2: the square is not rounded.
  const F shifted = L::fma(t * L::splat(-0.5f * kLog2E), t, L::splat(kRound));
  const F exact = L::fma(shifted, L::splat(2.0f * kLn2High), L::splat(-2.0f * kLn2High * kRound));  // 2 n kLn2High
  const F f = L::fma(exact, L::splat(kLn2Low / kLn2High), L::fma(t, t, exact));
  const F slope = L::fma(exponential_terms<L>(f, -0.5f, 0.25f), f, L::splat(-0.5f));
  const F less_one = slope * f;                                              // e^(-f / 2) - 1
  const F power = L::as_f((L::as_u(shifted) << 23) + L::splat(151u << 23));  // 2^n 2^24
  // Below -t lies e^(-t^2 / 2) / (c t + m / d), here d / (c t d + m). d comes times 2^-24.
  F d = L::splat(0.0173339322f * 0x1p-24f);
  d = L::fma(d, t, L::splat(0.162596792f * 0x1p-24f));
  d = L::fma(d, t, L::splat(0.705429971f * 0x1p-24f));
  d = L::fma(d, t, L::splat(1.63203514f * 0x1p-24f));
  d = L::fma(d, t, L::splat(1.78125f * 0x1p-24f));
  F m = L::splat(0.0432971604f);
  m = L::fma(m, t, L::splat(0.410972267f));
  m = L::fma(m, t, L::splat(1.64159489f));
  m = L::fma(m, t, L::splat(3.5625f));
  const F ratio = d * L::reciprocal(L::fma(t * L::splat(2.506634f * 0x1p24f), d, m));
  const F tail = L::fma(ratio, less_one, ratio) * power;
  const F scale = L::splat(0.398942292f * 0x1p-24f);
  return {L::if_less(L::splat(0.0f), x, L::splat(1.0f) - tail, tail), L::fma(scale, less_one, scale) * power};
}

// ln(1 + f) - k ln 2 / 2^23, f in [-1/4, 1/2]
template <class L>
PYZO_HD typename L::F logarithm(typename L::F f, typename L::F k) {
  using F = typename L::F;
  F q = L::splat(-0.0449051075f);
  q = L::fma(q, f, L::splat(0.104477048f));
  q = L::fma(q, f, L::splat(-0.131619781f));
  q = L::fma(q, f, L::splat(0.144820675f));
  q = L::fma(q, f, L::splat(-0.166477904f));
  q = L::fma(q, f, L::splat(0.199906096f));
  q = L::fma(q, f, L::splat(-0.250000536f));
  q = L::fma(q, f, L::splat(0.333334535f));
  q = L::fma(q, f, L::splat(-0.5f));
  return L::fma(k, L::splat(-8.26295832e-08f), L::fma(q, f * f, f));
}

// `result` where x is a positive number, else what the logarithm of x is.
template <class L>
PYZO_HD typename L::F logarithm_or_special(typename L::F x, typename L::F result) {
  using F = typename L::F;
  const F zero = L::splat(0.0f), infinity = L::splat(bits<float>(0x7f800000u));
  const F not_positive = L::if_less(x, zero, L::splat(bits<float>(0x7fc00000u)), x - infinity);
  return L::if_less(zero, x, L::if_less(x, infinity, result, x), not_positive);
}

template <class L>
PYZO_HD typename L::F log(typename L::F x) {
  using F = typename L::F;
  using U = typename L::U;
  const F least = L::splat(0x1p-126f);  // below it the exponent lies in the position of the first bit
  const F y = L::if_less(x, least, x * L::splat(0x1p23f), x);
  const F extra = L::if_less(x, least, L::splat(23.0f * 0x1p23f), L::splat(0.0f));
  // y = 2^n m, m in [3/4, 3/2). k is -n in the place of the exponent.
  const U k = (L::splat(0x3fbfffffu) - L::as_u(y)) & L::splat(0xff800000u);
  const F f = L::as_f(L::as_u(y) + k) - L::splat(1.0f);
  return logarithm_or_special<L>(x, logarithm<L>(f, L::float_of(L::as_i(k)) + extra));
}

// log(1 + x)
template <class L>
PYZO_HD typename L::F log1p(typename L::F x) {
  using F = typename L::F;
  using U = typename L::U;
  const F u = x + L::splat(1.0f);
  // 1 + x = 2^n m as in log, with m = 2^-n x + 2^-n: what rounding took from u is not lost.
  const U k = (L::splat(0x3fc00000u) - L::as_u(u)) & L::splat(0xff800000u);
  const F power = L::as_f(L::splat(0x40800000u) + k);                                     // 4 2^-n, a normal number
  const F f = L::as_f(L::as_u(x) + k) - L::fma(power, L::splat(-0.25f), L::splat(1.0f));  // -0 stays
  return logarithm_or_special<L>(u, logarithm<L>(f, L::float_of(L::as_i(k))));
}

}  // namespace pyzo
