#pragma once
// Host/device portability: the only core file that knows which compiler is running.
#include <cstdint>

#if defined(__FAST_MATH__) || defined(__USE_FAST_MATH__)
#error "pyzo's noise is specified bit for bit: build without -ffast-math and --use_fast_math"
#endif

#if defined(__CUDACC__)
#define PYZO_HD __host__ __device__ __forceinline__
#define PYZO_UNROLL _Pragma("unroll")
#else
#define PYZO_HD inline __attribute__((always_inline))
#define PYZO_UNROLL
#endif

namespace pyzo {

// The object representation of x read as another type of the same size.
template <class To, class From>
PYZO_HD To bits(const From& x) {
  static_assert(sizeof(To) == sizeof(From), "bits: size mismatch");
  return __builtin_bit_cast(To, x);
}

// a * b + c in double precision, correctly rounded to float: what IEEE calls fma, for machines that have none.
// The product of two floats is exact in double; the sum is rounded to odd (TwoSum finds whether it was exact), so that
// the final rounding to float sees on which side of a tie the exact value lies. 53 >= 24 + 2 bits makes that enough.
PYZO_HD float soft_fma(float a, float b, float c) {
  const double p = double(a) * double(b), d = double(c);
  const double s = p + d;
  const double t = s - p;
  const double error = (p - (s - t)) + (d - t);
  const uint64_t u = bits<uint64_t>(s);
  const bool finite = (u & 0x7ff0000000000000u) != 0x7ff0000000000000u;
  const bool nudge = finite && error != 0.0 && (u & 1u) == 0u;
  const uint64_t toward = ((error > 0.0) == (s > 0.0)) ? u + 1u : u - 1u;
  return float(bits<double>(nudge ? toward : u));
}

}  // namespace pyzo
