#pragma once
// Rounding a float to the values of a storage type, still as a float: to nearest even, or stochastically with 16 random
// bits. Infinities and NaN pass. Stochastic rounding is exact in expectation to 2^-16 of a quantum and never moves a
// representable value.
#include "core/lane.h"

namespace pyzo {

// kAnyNaN = false leaves out what only NaNs with long payloads need: numbers, infinities and a plain NaN (payload
// 0x400000, either sign) still pass. Passes use it where arithmetic makes plain NaNs, since a weight that is NaN keeps
// its bits anyway.
// Weights have the first three; float64 is for layers on the CPU, where gradients are checked numerically.
enum Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

// A dtype as an argument that the compiler knows.
template <Dtype T>
struct DtypeTag {
  static constexpr Dtype value = T;
};

template <class L>
PYZO_HD typename L::U magnitude(typename L::F x) {
  return L::as_u(x) & L::splat(0x7fffffffu);
}

// What rounding to bfloat16 makes of a float's bits: the upper half is the result's code.
template <class L>
PYZO_HD typename L::U bfloat16_in_upper_half(typename L::U u) {
  return u + L::splat(0x7fffu) + ((u >> 16) & L::splat(1u));
}

template <class L, Dtype T, bool kAnyNaN = true>
PYZO_HD typename L::F round_nearest(typename L::F x) {
  using F = typename L::F;
  using U = typename L::U;
  if constexpr (T == kFloat32 || T == kFloat64) {
    return x;
  } else if constexpr (T == kBFloat16) {
    const U u = L::as_u(x);
    const U rounded = bfloat16_in_upper_half<L>(u) & L::splat(0xffff0000u);
    if constexpr (!kAnyNaN) return L::as_f(rounded);
    return L::as_f(L::below(magnitude<L>(x), L::splat(0x7f800000u), rounded, u));
  } else {
    const U sign = L::as_u(x) & L::splat(0x80000000u), u = magnitude<L>(x);
    const U rounded = (u + L::splat(0xfffu) + ((u >> 13) & L::splat(1u))) & L::splat(0xffffe000u);
    const U capped = L::below(rounded, L::splat(0x47800000u), rounded, L::splat(0x7f800000u));
    const F half = L::splat(0.5f);  // floats in [1/2, 1) are as far apart as half's subnormals
    const U small = L::as_u((L::as_f(u) + half) - half);
    const U finite = L::below(u, L::splat(0x38800000u), small, capped);
    return L::as_f(sign | L::below(u, L::splat(0x7f800001u), finite, u));
  }
}

// The 16-bit code of a float that is representable as half, and back. NaN payloads survive the round trip (x86's own
// conversion would quiet a signalling NaN).
template <class L>
PYZO_HD typename L::U narrow_half(typename L::F x) {
  using U = typename L::U;
  const U sign = (L::as_u(x) >> 16) & L::splat(0x8000u), u = magnitude<L>(x);
  const U subnormal = L::below(u, L::splat(0x38800000u), u, L::splat(0u));
  const U small = L::as_u(L::truncate(L::as_f(subnormal) * L::splat(0x1p24f)));
  const U normal = (u >> 13) - L::splat(112u << 10);
  const U special = ((u >> 13) & L::splat(0x3ffu)) | L::splat(0x7c00u);
  const U finite = L::below(u, L::splat(0x38800000u), small, normal);
  return sign | L::below(u, L::splat(0x7f800000u), finite, special);
}

template <class L>
PYZO_HD typename L::F widen_half(typename L::U code) {
  using U = typename L::U;
  const U sign = (code & L::splat(0x8000u)) << 16, u = code & L::splat(0x7fffu);
  const U small = L::as_u(L::float_of(L::as_i(L::below(u, L::splat(0x400u), u, L::splat(0u)))) * L::splat(0x1p-24f));
  const U normal = (u << 13) + L::splat(112u << 23);
  const U special = (u << 13) | L::splat(0x7f800000u);
  const U finite = L::below(u, L::splat(0x400u), small, normal);
  return L::as_f(sign | L::below(u, L::splat(0x7c00u), finite, special));
}

// random: 16 bits.
template <class L, Dtype T, bool kAnyNaN = true>
PYZO_HD typename L::F round_stochastic(typename L::F x, typename L::U random) {
  using U = typename L::U;
  static_assert(T != kFloat32, "float32 updates are rounded to nearest");
  const U u = magnitude<L>(x);
  if constexpr (T == kBFloat16) {
    const U rounded = (L::as_u(x) + random) & L::splat(0xffff0000u);
    if constexpr (!kAnyNaN) return L::as_f(rounded);
    return L::as_f(L::below(u, L::splat(0x7f800000u), rounded, L::as_u(x)));
  } else {
    const U sign = L::as_u(x) & L::splat(0x80000000u);
    const U rounded = (u + (random >> 3)) & L::splat(0xffffe000u);
    const U capped = L::below(rounded, L::splat(0x47800000u), rounded, L::splat(0x7f800000u));
    // Below 2^-14 the quantum is 2^-24: |x| / 2^-24 in 16.16 fixed point.
    const U subnormal = L::below(u, L::splat(0x38800000u), u, L::splat(0u));
    const U units = (L::as_u(L::truncate(L::as_f(subnormal) * L::splat(0x1p40f))) + random) >> 16;
    const U small = L::as_u(L::float_of(L::as_i(units)) * L::splat(0x1p-24f));
    const U finite = L::below(u, L::splat(0x38800000u), small, capped);
    return L::as_f(sign | L::below(u, L::splat(0x7f800000u), finite, u));
  }
}

// The bits that round state s, from those of the weight: a permutation of 16 bits for each s, so uniform too, and as
// good as independent (correlations below 4e-4).
template <class L>
PYZO_HD typename L::U state_bits(typename L::U random, int s) {
  return (random * L::splat(s == 0 ? 0x9E37u : 0x79B9u)) & L::splat(0xffffu);
}

// What bodies call: the lane's own instruction where it has one that gives the same bits, else the definition above.
template <class L, Dtype T>
PYZO_HD typename L::F to_storage(typename L::F x) {
  if constexpr (requires { L::template round_nearest<T>(x); })
    return L::template round_nearest<T>(x);
  else
    return round_nearest<L, T, !L::kPlainNaN>(x);
}

}  // namespace pyzo
