// The lane policy of float64: one number, libm's functions. Layers take float64 so that gradients can be checked
// numerically (torch.autograd.gradcheck); nothing here is fast or promises bits.
#include <cmath>

#include "core/functions.h"
#include "core/rounding.h"

namespace pyzo::cpu::PYZO_ISA {

constexpr int kLanes = PYZO_LANES;

struct Lanes {
  using F = double;
  using U = uint32_t;
  using I = int32_t;
  using Number = double;
  static constexpr int kWidth = 1;
  static constexpr bool kPlainNaN = true;

  static F splat(float x) { return x; }
  static U splat(uint32_t x) { return x; }
  static F fma(F a, F b, F c) { return a * b + c; }
  static F sqrt_any(F x) { return std::sqrt(x); }
  static F divide(F a, F b) { return a / b; }
  static F reciprocal(F x) { return 1.0 / x; }
  static F abs(F x) { return std::fabs(x); }
  static F if_less(F a, F b, F yes, F no) { return a < b ? yes : no; }
  static F if_below(U a, U b, F yes, F no) { return a < b ? yes : no; }
  static F at_most(F x, F high) { return high < x ? high : x; }
  static F at_least(F x, F low) { return x < low ? low : x; }
  static U above(F a, F b) { return a > b ? 1u : 0u; }
  static U load_u16(const uint16_t* p) { return *p; }

  template <Dtype T>
    requires(T == kFloat64)
  static F load(const void* base, int64_t i) {
    return static_cast<const double*>(base)[i];
  }
  template <Dtype T>
    requires(T == kFloat64)
  static void store(void* base, int64_t i, F x) {
    static_cast<double*>(base)[i] = x;
  }
  template <Dtype T>
  static F read(const void* base, int64_t i) {
    return load<T>(base, i);
  }
  template <Dtype T>
  static void write(void* base, int64_t i, F x) {
    store<T>(base, i, x);
  }

  template <Dtype T>
  static constexpr bool kAlternate = false;
  template <Dtype T>
  static void load_pair(const void* base, int64_t i, F& a, F& b) {
    a = load<T>(base, i), b = load<T>(base, i + 1);
  }
  template <Dtype T>
  static void store_pair(void* base, int64_t i, F a, F b) {
    store<T>(base, i, a), store<T>(base, i + 1, b);
  }
};

}  // namespace pyzo::cpu::PYZO_ISA

namespace pyzo {

using Double = cpu::PYZO_ISA::Lanes;

template <>
inline double exp<Double>(double x) {
  return std::exp(x);
}
template <>
inline double expm1<Double>(double x) {
  return std::expm1(x);
}
template <>
inline double log1p<Double>(double x) {
  return std::log1p(x);
}
template <>
inline Sigmoids<double> sigmoids<Double>(double x) {
  const double e = std::exp(-std::fabs(x)), large = 1.0 / (1.0 + e), small = e * large;
  return x < 0 ? Sigmoids<double>{small, large} : Sigmoids<double>{large, small};
}
template <>
inline NormalDistribution<double> normal_distribution<Double>(double x) {
  return {0.5 * std::erfc(x * -0.70710678118654752440), 0.39894228040143267794 * std::exp(-0.5 * x * x)};
}

}  // namespace pyzo
