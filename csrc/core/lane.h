#pragma once
// The scalar lane: what an element is on a GPU thread, and in host code that handles one element at a time.
// core/ is written over a lane policy L: types F, U, I (float, uint32, int32 per lane) and the few operations that
// C++ has no operator for. cpu/lanes.h holds the vector policies; the arithmetic itself exists once.
#include "core/hd.h"

namespace pyzo {

struct Scalar {
  using F = float;
  using U = uint32_t;
  using I = int32_t;
  static constexpr int kWidth = 1;
  static constexpr bool kPlainNaN = true;  // the NaN that arithmetic makes has payload 0x400000 and no more

  static PYZO_HD F splat(float x) { return x; }
  static PYZO_HD U splat(uint32_t x) { return x; }

  static PYZO_HD F fma(F a, F b, F c) {
#if defined(__CUDA_ARCH__)
    return __fmaf_rn(a, b, c);
#elif defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return __builtin_fmaf(a, b, c);
#else
    return soft_fma(a, b, c);
#endif
  }

  // Square root of a normal number in [2^-64, 2^64], correctly rounded. On the device: the reciprocal-root estimate and
  // one residual step, the sequence nvcc itself emits for sqrt.rn inside this range, without its range check and slow
  // path.
  static PYZO_HD F sqrt(F x) {
#if defined(__CUDA_ARCH__)
    float y;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    const float g = __fmul_rn(x, y);
    return __fmaf_rn(__fmaf_rn(-g, g, x), __fmul_rn(0.5f, y), g);
#else
    return __builtin_sqrtf(x);
#endif
  }

  // Correctly rounded, for every number that is not negative.
  static PYZO_HD F sqrt_any(F x) {
#if defined(__CUDA_ARCH__)
    return __fsqrt_rn(x);
#else
    return __builtin_sqrtf(x);
#endif
  }
  static PYZO_HD double sqrt64(double x) {
#if defined(__CUDA_ARCH__)
    return __dsqrt_rn(x);
#else
    return __builtin_sqrt(x);
#endif
  }
  static PYZO_HD F divide(F a, F b) {
#if defined(__CUDA_ARCH__)
    return __fdiv_rn(a, b);
#else
    return a / b;
#endif
  }

  // 1 / x of a number in [2^-64, 2^64], correctly rounded. On the device: the estimate and one Newton step, the
  // sequence nvcc itself emits for rcp.rn inside this range, without its range check and slow path.
  static PYZO_HD F reciprocal(F x) {
#if defined(__CUDA_ARCH__)
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return __fmaf_rn(y, __fmaf_rn(-x, y, 1.0f), y);
#else
    return 1.0f / x;
#endif
  }

  static PYZO_HD F float_of(I x) { return float(x); }    // round to nearest even
  static PYZO_HD I truncate(F x) { return int32_t(x); }  // |x| < 2^31
  static PYZO_HD U as_u(F x) { return bits<uint32_t>(x); }
  static PYZO_HD F as_f(U x) { return bits<float>(x); }
  static PYZO_HD I as_i(U x) { return int32_t(x); }
  static PYZO_HD U as_u(I x) { return uint32_t(x); }
  static PYZO_HD I min(I a, I b) { return a < b ? a : b; }
  static PYZO_HD F positive_one(F x) { return x > 0.0f ? 1.0f : 0.0f; }  // x > 0 ? 1 : 0
  static PYZO_HD U above(F a, F b) { return a > b ? 1u : 0u; }
  static PYZO_HD U mul_hi_lo(uint32_t m, U x, U& lo) {
    const uint64_t p = uint64_t(m) * x;
    lo = uint32_t(p);
    return uint32_t(p >> 32);
  }
  // a < b ? yes : no, for a and b below 2^31
  static PYZO_HD U below(U a, U b, U yes, U no) { return a < b ? yes : no; }
  static PYZO_HD F if_below(U a, U b, F yes, F no) { return a < b ? yes : no; }
  // x <= most ? yes : no, for x below 2^31
  static PYZO_HD F if_at_most(U x, int32_t most, F yes, F no) { return int32_t(x) <= most ? yes : no; }
  // a < b ? yes : no, of numbers; no where either is NaN
  static PYZO_HD F if_less(F a, F b, F yes, F no) { return a < b ? yes : no; }
  // x held within a bound. NaN stays NaN.
  static PYZO_HD F at_most(F x, F high) { return high < x ? high : x; }
  static PYZO_HD F at_least(F x, F low) { return x < low ? low : x; }
  static PYZO_HD F abs(F x) { return __builtin_fabsf(x); }
  static PYZO_HD F sign_at_top(U x) { return bits<float>((x & 0x80000000u) | 0x3f800000u); }  // -1 or 1
  // a unless a equals b or either is NaN: keeps the bits of b (-0.0, NaN payloads) where nothing changed.
  static PYZO_HD F if_changed(F a, F b) { return (a < b || a > b) ? a : b; }
};

}  // namespace pyzo
