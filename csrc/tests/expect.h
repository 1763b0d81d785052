#pragma once
// What the tests share: a counter of checks and failures, a generator of test inputs, and the golden hash.
#include <cinttypes>
#include <cstdarg>
#include <cstdio>

#include "core/field.h"

namespace pyzo::test {

inline int64_t checks = 0, failures = 0;

// Counts a check; the first failures are printed.
__attribute__((format(printf, 2, 3))) inline void expect(bool ok, const char* format, ...) {
  ++checks;
  if (ok || ++failures > 20) return;
  va_list list;
  va_start(list, format);
  std::printf("FAILED: ");
  std::vprintf(format, list);
  std::printf("\n");
  va_end(list);
}

// Prints the outcome; what main returns.
inline int report(const char* what) {
  std::printf("%s: %" PRId64 " checks, %" PRId64 " failures\n", what, checks, failures);
  return failures ? 1 : 0;
}

// Test inputs: a splitmix64 sequence.
struct Random {
  uint64_t state;
  uint64_t next() { return mix64(state += 0x9E3779B97F4A7C15u); }
  uint32_t word() { return uint32_t(next() >> 32); }
  int64_t below(int64_t n) { return int64_t(next() % uint64_t(n)); }
  float any_float() { return bits<float>(word()); }  // every exponent, infinities and NaN
};

inline bool is_nan(float x) { return (bits<uint32_t>(x) & 0x7fffffffu) > 0x7f800000u; }
// Equal bits, or both NaN: arithmetic does not say which NaN.
inline bool same(float a, float b) { return bits<uint32_t>(a) == bits<uint32_t>(b) || (is_nan(a) && is_nan(b)); }

// The hash of tests/golden.txt over patterns of 16 or 32 bits.
template <class Pattern>
uint64_t golden_hash(const void* data, int64_t n) {
  uint64_t h = 0;
  for (int64_t i = 0; i < n; ++i) {
    Pattern p;
    __builtin_memcpy(&p, static_cast<const char*>(data) + i * int64_t(sizeof p), sizeof p);
    h += mix64(uint64_t(i + 1) * 0x9E3779B97F4A7C15u ^ uint64_t(p));
  }
  return h;
}

}  // namespace pyzo::test
