// soft_fma against libm's fmaf and, where the CPU has it, the fused instruction: random patterns and hard cases.
#include <cmath>
#include <initializer_list>

#include "expect.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

using namespace pyzo;

#if defined(__x86_64__)
__attribute__((target("fma"))) float hardware_fma(float a, float b, float c) {
  return _mm_cvtss_f32(_mm_fmadd_ss(_mm_set_ss(a), _mm_set_ss(b), _mm_set_ss(c)));
}
const bool kHardware = __builtin_cpu_supports("fma");
#else
float hardware_fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
const bool kHardware = true;
#endif

void check(float a, float b, float c) {
  const float got = soft_fma(a, b, c), libm = std::fma(a, b, c);
  test::expect(test::same(got, libm), "fma(%a, %a, %a): libm has %a, got %a", double(a), double(b), double(c),
               double(libm), double(got));
  if (!kHardware) return;
  const float wired = hardware_fma(a, b, c);
  test::expect(test::same(got, wired), "fma(%a, %a, %a): the CPU has %a, got %a", double(a), double(b), double(c),
               double(wired), double(got));
}

void check_signs(float a, float b, float c) {
  for (int s = 0; s < 4; ++s) check(s & 1 ? -a : a, b, s & 2 ? -c : c);
}

// Products of half an ulp of c, give or take less than double precision can see: (1 + 2^-k)(1 - 2^-k) = 1 - 2^-2k.
void ties(test::Random& random) {
  for (int trial = 0; trial < 20000; ++trial) {
    const float c = std::ldexp(1.0f + float(random.below(1 << 23)) * 0x1p-23f, int(random.below(254)) - 126);
    const float half_ulp = (std::nextafter(c, INFINITY) - c) / 2;
    const float d = std::ldexp(1.0f, -int(random.below(24)) - 1);
    for (float u : {1.0f, 1.0f + d, 1.0f - d / 2})
      for (float v : {1.0f, 1.0f + d, 1.0f - d}) check_signs(half_ulp * u, v, c);
  }
}

void cancellations(test::Random& random) {
  for (int trial = 0; trial < 100000; ++trial) {
    const float a = random.any_float(), b = random.any_float();
    float c = -(a * b);
    check(a, b, c);
    check(a, b, std::nextafter(c, 0.0f));
    check(a, b, std::nextafter(c, INFINITY));
  }
}

void subnormals(test::Random& random) {
  for (int trial = 0; trial < 200000; ++trial) {
    const int e = int(random.below(60)) - 30;
    const float a = std::ldexp(float(random.word()), e - 100), b = std::ldexp(float(random.word()), -e - 110);
    check_signs(a, b, bits<float>(uint32_t(random.below(1 << 24))));
  }
}

}  // namespace

int main() {
  test::Random random{1};
  const float special[] = {
      0.0f,     0x1p-149f, 0x1p-148f,      0x3p-149f, 0x1p-127f, 0x1.fffffcp-127f, 0x1p-126f,      0x1p-75f,
      0x1p-74f, 0x1p-24f,  0x1p-23f,       0.5f,      1.0f,      0x1.000002p0f,    0x1.fffffep-1f, 1.5f,
      3.0f,     0x1p24f,   0x1.fffffep23f, 0x1p63f,   0x1p64f,   0x1.fffffep127f,  INFINITY,       NAN};
  for (float a : special)
    for (float b : special)
      for (float c : special) check_signs(a, b, c);
  for (int trial = 0; trial < 1000000; ++trial) check(random.any_float(), random.any_float(), random.any_float());
  for (int trial = 0; trial < 1000000; ++trial) {  // near each other, as in polynomials
    const auto draw = [&] { return std::ldexp(float(random.word()) - 0x1p31f, int(random.below(8)) - 36); };
    check(draw(), draw(), draw());
  }
  ties(random);
  cancellations(random);
  subnormals(random);
  std::printf("hardware fma: %s\n", kHardware ? "compared" : "this CPU has none");
  return test::report("soft_fma");
}
