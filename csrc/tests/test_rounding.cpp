// Rounding to storage against its definition in double precision: all 65,536 codes of both types, every boundary
// between them; the bits that round weight and states, all together; and masters in two parts.
#include <cmath>
#include <initializer_list>
#include <vector>

#include "core/rounding.h"
#include "core/split.h"
#include "expect.h"

namespace {

using namespace pyzo;

struct Format {
  int fraction_bits, min_exponent;
  double overflow;  // the first value beyond the finite ones
};

template <Dtype T>
constexpr Format kFormat = T == kBFloat16 ? Format{7, -126, 0x1p128} : Format{10, -14, 0x1p16};

// Distance of neighbouring values at |x|.
template <Dtype T>
double quantum(double x) {
  int e;
  std::frexp(x, &e);
  e -= 1;
  if (x == 0.0 || e < kFormat<T>.min_exponent) e = kFormat<T>.min_exponent;
  return std::ldexp(1.0, e - kFormat<T>.fraction_bits);
}

template <Dtype T>
float expected_nearest(float x) {
  const double q = quantum<T>(x), r = std::nearbyint(double(x) / q) * q;
  return std::fabs(r) >= kFormat<T>.overflow ? std::copysign(INFINITY, x) : std::copysign(float(r), x);
}

template <Dtype T>
float expected_stochastic(float x, uint32_t random) {
  const double q = quantum<T>(x), units = (std::floor(std::fabs(double(x)) / q * 65536.0) + double(random)) / 65536.0;
  const double r = std::floor(units) * q;
  return std::copysign(r >= kFormat<T>.overflow ? INFINITY : float(r), x);
}

// The value of a code, from the definition of the format.
template <Dtype T>
float value_of(uint32_t code) {
  if (T == kBFloat16) return bits<float>(code << 16);
  const uint32_t e = code >> 10 & 31, m = code & 0x3ff;
  if (e == 31 && m) return bits<float>((code & 0x8000u) << 16 | 0x7f800000u | m << 13);
  const double v = e == 31 ? INFINITY : e ? std::ldexp(1024.0 + m, int(e) - 25) : std::ldexp(double(m), -24);
  return float(code & 0x8000u ? -v : v);
}

template <Dtype T>
void check_point(float x) {
  const float nearest = round_nearest<Scalar, T>(x);
  test::expect(bits<uint32_t>(nearest) == bits<uint32_t>(expected_nearest<T>(x)),
               "round_nearest<%d>(%a): expected %a, got %a", int(T), double(x), double(expected_nearest<T>(x)),
               double(nearest));
  for (uint32_t random : {0u, 1u, 7u, 8u, 0x7fffu, 0x8000u, 0x8001u, 0xfff8u, 0xffffu}) {
    const float got = round_stochastic<Scalar, T>(x, random), want = expected_stochastic<T>(x, random);
    test::expect(bits<uint32_t>(got) == bits<uint32_t>(want), "round_stochastic<%d>(%a, %04x): expected %a, got %a",
                 int(T), double(x), random, double(want), double(got));
  }
}

template <Dtype T>
void check_boundaries() {
  for (uint32_t code = 0; code < 0x10000u; ++code) {
    const float x = value_of<T>(code);
    const uint32_t u = bits<uint32_t>(x);
    test::expect(bits<uint32_t>(round_nearest<Scalar, T>(x)) == u, "round_nearest<%d>: code %04x moved", int(T), code);
    for (uint32_t random : {0u, 0x8000u, 0xffffu})
      test::expect(bits<uint32_t>(round_stochastic<Scalar, T>(x, random)) == u, "round_stochastic<%d>: code %04x moved",
                   int(T), code);
    if (!std::isfinite(x)) continue;
    const float tie = float(double(x) + (code & 0x8000u ? -0.5 : 0.5) * quantum<T>(x));
    for (float y : {std::nextafter(x, 0.0f), x, std::nextafter(x, INFINITY), std::nextafter(tie, -INFINITY), tie,
                    std::nextafter(tie, INFINITY)})
      if (std::isfinite(y)) check_point<T>(y);
  }
}

// Over all 65,536 random values the share that rounds up is the fraction itself, to 2^-16.
template <Dtype T>
void check_expectation(test::Random& random) {
  for (int trial = 0; trial < 200; ++trial) {
    const float x = std::ldexp(1.0f + float(random.below(1 << 23)) * 0x1p-23f, int(random.below(38)) - 25);
    if (double(x) + quantum<T>(x) >= kFormat<T>.overflow) continue;
    double sum = 0;
    for (uint32_t r = 0; r < 0x10000u; ++r) sum += double(round_stochastic<Scalar, T>(x, r)) - double(x);
    const double bias = sum / 65536.0 / quantum<T>(x);
    test::expect(std::fabs(bias) <= 0x1p-16, "round_stochastic<%d>(%a): bias %.3e quanta, more than 2^-16", int(T),
                 double(x), bias);
  }
}

template <Dtype T>
void check_type(test::Random& random) {
  check_boundaries<T>();
  for (int trial = 0; trial < 500000; ++trial) {
    const float x = random.any_float();
    if (std::isfinite(x)) {
      check_point<T>(x);
    } else {
      test::expect(test::same(round_nearest<Scalar, T>(x), x) && test::same(round_stochastic<Scalar, T>(x, 0xffffu), x),
                   "%08x did not pass", bits<uint32_t>(x));
    }
  }
  for (float special : {0.0f, -0.0f, 0x1p-149f, -0x1p-149f, 0x1p-126f, 0x1.fffffep127f, -0x1.fffffep127f, 65504.0f,
                        65519.996f, 65520.0f, 65536.0f})
    check_point<T>(special);
  check_expectation<T>(random);
}

// A weight and two states round up where their bits are at or above thresholds of their own. Over all 65,536 bits r of
// the weight, how often all three do is the product of the shares, to 2^-12: as if their bits were independent.
void check_state_bits() {
  constexpr size_t kGrid = 64;  // thresholds
  std::vector<int> below(kGrid * kGrid * kGrid);
  const auto at = [&](size_t i, size_t j, size_t k) -> int& { return below[(i * kGrid + j) * kGrid + k]; };
  std::vector<bool> seen[2] = {std::vector<bool>(0x10000), std::vector<bool>(0x10000)};
  for (uint32_t r = 0; r < 0x10000u; ++r) {
    const uint32_t s0 = state_bits<Scalar>(r, 0), s1 = state_bits<Scalar>(r, 1);
    test::expect(s0 < 0x10000u && s1 < 0x10000u, "state_bits(%04x): more than 16 bits", r);
    seen[0][s0 & 0xffffu] = seen[1][s1 & 0xffffu] = true;
    ++at(r * kGrid >> 16, (s0 & 0xffffu) * kGrid >> 16, (s1 & 0xffffu) * kGrid >> 16);
  }
  for (const std::vector<bool>& values : seen)
    for (uint32_t r = 0; r < 0x10000u; ++r) test::expect(values[r], "state_bits: %04x never comes", r);
  double worst = 0;
  for (size_t i = 0; i < kGrid; ++i)  // sums over boxes, one dimension after the other
    for (size_t j = 0; j < kGrid; ++j)
      for (size_t k = 1; k < kGrid; ++k) at(i, j, k) += at(i, j, k - 1);
  for (size_t i = 0; i < kGrid; ++i)
    for (size_t j = 1; j < kGrid; ++j)
      for (size_t k = 0; k < kGrid; ++k) at(i, j, k) += at(i, j - 1, k);
  for (size_t i = 1; i < kGrid; ++i)
    for (size_t j = 0; j < kGrid; ++j)
      for (size_t k = 0; k < kGrid; ++k) at(i, j, k) += at(i - 1, j, k);
  for (size_t i = 0; i < kGrid; ++i)
    for (size_t j = 0; j < kGrid; ++j)
      for (size_t k = 0; k < kGrid; ++k) {
        const double product = double((i + 1) * (j + 1) * (k + 1)) / double(kGrid * kGrid * kGrid);
        worst = std::fmax(worst, std::fabs(at(i, j, k) / 65536.0 - product));
      }
  std::printf("bits of weight and states: joint shares within %.2e of products\n", worst);
  test::expect(worst <= 0x1p-12, "bits of weight and states: joint shares off by %.3e, more than 2^-12", worst);
}

// A master that its weight rounds to nearest comes back from its two parts.
void check_master(float master) {
  const Parts<Scalar> parts = split<Scalar>(master);
  const uint32_t u = bits<uint32_t>(master), weight = bits<uint32_t>(parts.weight);
  test::expect((weight & 0xffffu) == 0 && parts.low < 0x10000u, "split(%08x): got %08x and %08x", u, weight, parts.low);
  const uint32_t largest = (u & 0x80000000u) | 0x7f7f7fffu;
  const uint32_t want = std::isfinite(master) && (u & 0x7fffffffu) > 0x7f7f7fffu ? largest : u;
  const uint32_t back = bits<uint32_t>(join<Scalar>(parts.weight, parts.low));
  test::expect(back == want, "join(split(%08x)): expected %08x, got %08x", u, want, back);
  const float held = bits<float>(want);
  const bool tie = (want & 0xffffu) == 0x8000u, infinite = std::isinf(held);
  const bool right = infinite ? weight == want
                     : tie    ? weight == want + 0x8000u
                              : weight == bits<uint32_t>(expected_nearest<kBFloat16>(held));
  test::expect(right, "split(%08x): got weight %08x", u, weight);
}

void check_split(test::Random& random) {
  for (uint32_t code = 0; code < 0x10000u; ++code) {
    const float w = value_of<kBFloat16>(code);
    if (!std::isfinite(w)) {  // is its own master, whatever lies beside it
      for (uint32_t low : {0u, 1u, 0x7fffu, 0x8000u, 0xffffu})
        test::expect(bits<uint32_t>(join<Scalar>(w, low)) == code << 16, "join(%04x, %04x)", code, low);
      continue;
    }
    for (uint32_t low : {0u, 1u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu}) {
      const bool below_zero = (code & 0x7fffu) == 0 && low >= 0x8000u;
      const uint32_t want = below_zero ? code << 16 : (code << 16) + low - (low >= 0x8000u ? 0x10000u : 0u);
      const uint32_t master = bits<uint32_t>(join<Scalar>(w, low));
      test::expect(master == want, "join(%04x, %04x): expected %08x, got %08x", code, low, want, master);
      check_master(bits<float>(master));
    }
  }
  for (int trial = 0; trial < 1000000; ++trial) {
    const float master = random.any_float();
    if (!test::is_nan(master)) check_master(master);
  }
  for (float special : {HUGE_VALF, -HUGE_VALF, 0x1.fffffep127f, -0x1.fffffep127f, 0x1.fefffep127f, 0x1.ffp127f})
    check_master(special);
}

}  // namespace

int main() {
  test::Random random{3};
  for (uint32_t code = 0; code < 0x10000u; ++code) {
    const float x = value_of<kFloat16>(code), wide = widen_half<Scalar>(code);
    test::expect(bits<uint32_t>(wide) == bits<uint32_t>(x), "widen_half(%04x): expected %a, got %a", code, double(x),
                 double(wide));
    const uint32_t back = narrow_half<Scalar>(wide);
    test::expect(back == code, "narrow_half(widen_half(%04x)): got %04x", code, back);
  }
  check_type<kBFloat16>(random);
  check_type<kFloat16>(random);
  check_state_bits();
  check_split(random);
  return test::report("rounding");
}
