// core/elementary.h: its errors against libm in double precision, limits and special values, and the vector lanes of
// one instruction set against the scalar lane. Compiled once for each, as test_lanes.cpp is; exits with 77 where the
// machine lacks the instructions. `all` as argument: every input, in minutes if compiled with -mavx2 -mfma (without,
// some compilers emulate the scalar lane's fma); no argument: a dense sample.
// `values N`: writes the results for N inputs instead, for tests/test_elementary.py.
#if PYZO_LANES > 4
#include <immintrin.h>
#endif

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <thread>

#if PYZO_LANES == 8 && defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#elif PYZO_LANES == 8
#pragma GCC target("avx2,fma,f16c")
#elif PYZO_LANES == 16 && defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"))), \
                             apply_to = function)
#elif PYZO_LANES == 16
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif

#include "core/elementary.h"
#include "cpu/lanes.h"
#include "expect.h"

namespace {

using namespace pyzo;
using Lanes = cpu::PYZO_ISA::Lanes;
constexpr uint32_t kWidth = Lanes::kWidth;
constexpr uint32_t kSign = 0x80000000u, kInfinity = 0x7f800000u;

template <class L>
struct Functions {
  using F = typename L::F;
  static F exp(F x) { return pyzo::exp<L>(x); }
  static F expm1(F x) { return pyzo::expm1<L>(x); }
  static F log(F x) { return pyzo::log<L>(x); }
  static F log1p(F x) { return pyzo::log1p<L>(x); }
  static F tanh(F x) { return pyzo::tanh<L>(x); }
  static F sigmoid(F x) { return pyzo::sigmoid<L>(x); }
  static F erf(F x) { return pyzo::erf<L>(x); }
  static F below(F x) { return normal_distribution<L>(x).below; }
  static F density(F x) { return normal_distribution<L>(x).density; }
};

double ideal_sigmoid(double x) { return x < 0 ? std::exp(x) / (1 + std::exp(x)) : 1 / (1 + std::exp(-x)); }
double ideal_below(double x) { return 0.5 * std::erfc(-x * M_SQRT1_2); }
double ideal_density(double x) { return std::exp(-0.5 * x * x) * (0.5 * M_2_SQRTPI * M_SQRT1_2); }

struct Function {
  const char* name;
  Lanes::F (*vector)(Lanes::F);
  float (*scalar)(float);
  double (*ideal)(double);
  double normal_bound, subnormal_bound;  // in units of the last place, of normal and of subnormal results
  double largest;                        // of the magnitudes of results that are numbers
};

#define PYZO_FUNCTION(name, ideal, ...) {#name, Functions<Lanes>::name, Functions<Scalar>::name, ideal, __VA_ARGS__}
const Function kFunctions[] = {
    PYZO_FUNCTION(exp, std::exp, 0.92, 0.86, INFINITY),
    PYZO_FUNCTION(expm1, std::expm1, 1.60, 0, INFINITY),
    PYZO_FUNCTION(log, std::log, 0.93, 0, 104),
    PYZO_FUNCTION(log1p, std::log1p, 0.93, 0, 104),
    PYZO_FUNCTION(tanh, std::tanh, 1.59, 0, 1),
    PYZO_FUNCTION(sigmoid, ideal_sigmoid, 2.79, 0.86, 1),
    PYZO_FUNCTION(erf, std::erf, 1.70, 0.84, 1),
    PYZO_FUNCTION(below, ideal_below, 3.78, 1.95, 1),
    PYZO_FUNCTION(density, ideal_density, 1.51, 1.08, 0.4),
};

// Of the last place of a float32 that is the nearest to y, a number.
double unit(double y) {
  const uint64_t exponent = bits<uint64_t>(y) >> 52 & 0x7ffu, least = 1023 - 126;
  return bits<double>(((exponent < least ? least : exponent) - 23) << 52);
}

struct Worst {
  double normal = 0, subnormal = 0;
  uint32_t normal_at = 0, subnormal_at = 0;
  int64_t lanes = 0, limits = 0;  // how often: other bits than the scalar lane; a wrong NaN, sign or infinity
  uint32_t lanes_at = 0, limits_at = 0;
  void join(const Worst& o) {
    if (o.normal > normal) normal = o.normal, normal_at = o.normal_at;
    if (o.subnormal > subnormal) subnormal = o.subnormal, subnormal_at = o.subnormal_at;
    if (o.lanes) lanes += o.lanes, lanes_at = o.lanes_at;
    if (o.limits) limits += o.limits, limits_at = o.limits_at;
  }
};

void look(const Function& f, const uint32_t inputs[kWidth], const double ideals[kWidth], Worst& worst) {
  Lanes::F x;
  for (uint32_t l = 0; l < kWidth; ++l) x[l] = bits<float>(inputs[l]);
  const Lanes::F results = f.vector(x);
  for (uint32_t l = 0; l < kWidth; ++l) {
    const float got = results[l];
    if (!test::same(got, f.scalar(x[l]))) ++worst.lanes, worst.lanes_at = inputs[l];
    const double ideal = ideals[l];
    const bool overflows = std::fabs(ideal) >= 0x1.ffffffp127;  // rounds to infinity
    if (ideal != ideal || overflows || test::is_nan(got)) {
      if (!test::same(got, float(ideal))) ++worst.limits, worst.limits_at = inputs[l];
      continue;
    }
    if (std::signbit(got) != std::signbit(ideal) || std::fabs(double(got)) > f.largest)
      ++worst.limits, worst.limits_at = inputs[l];
    const double error = std::fabs(double(got) - ideal) / unit(ideal);  // infinite where got is
    if (std::fabs(ideal) < 0x1p-126 ? error > worst.subnormal : error > worst.normal) {
      if (std::fabs(ideal) < 0x1p-126)
        worst.subnormal = error, worst.subnormal_at = inputs[l];
      else
        worst.normal = error, worst.normal_at = inputs[l];
    }
  }
}

constexpr uint32_t kBlock = 64;
static_assert(kBlock % kWidth == 0);

// Of `kBlock` inputs `step` patterns apart. Neighbours lie on a straight line: there the parabola through three values
// gives the others, unless at two more it is off by 1e-4 units.
void find_ideals(const Function& f, const uint32_t inputs[kBlock], uint64_t step, double ideals[kBlock]) {
  const auto direct = [&](uint32_t i) { return f.ideal(double(bits<float>(inputs[i]))); };
  constexpr uint32_t kFirst = 0, kMiddle = kBlock / 2, kLast = kBlock - 1;
  const double low = direct(kFirst), middle = direct(kMiddle), high = direct(kLast);
  constexpr double kLeft = kMiddle - kFirst, kRight = kLast - kMiddle;
  const double left = (middle - low) / kLeft, right = (high - middle) / kRight;
  const double bend = (right - left) / (kLeft + kRight), slope = right - bend * kRight;
  const auto parabola = [&](uint32_t i) {
    const double t = double(i) - kMiddle;
    return middle + t * (slope + t * bend);
  };
  bool good = step == 1 && std::fabs(low) < 0x1p127 && std::fabs(high) < 0x1p127;
  for (const uint32_t i : {kBlock / 5, 4 * kBlock / 5}) {
    if (!good) break;
    const double ideal = direct(i);
    good = std::fabs(parabola(i) - ideal) <= 1e-4 * unit(ideal);
  }
  for (uint32_t i = 0; i < kBlock; ++i) ideals[i] = good ? parabola(i) : direct(i);
  ideals[kFirst] = low;  // with the sign of a zero
}

// Every `step`th pattern, each thread its share of them.
Worst sweep(const Function& f, uint64_t step) {
  constexpr unsigned kMost = 64;
  const unsigned found = std::thread::hardware_concurrency(), n = found == 0 ? 1 : found < kMost ? found : kMost;
  Worst part[kMost];
  std::thread running[kMost];
  for (unsigned t = 0; t < n; ++t)
    running[t] = std::thread([&f, &part, t, n, step] {
      Worst mine;
      for (uint64_t i = t * kBlock * step; i < uint64_t(1) << 32; i += n * kBlock * step) {
        uint32_t inputs[kBlock];
        double ideals[kBlock];
        for (uint32_t l = 0; l < kBlock; ++l) inputs[l] = uint32_t(i + l * step);
        find_ideals(f, inputs, step, ideals);
        for (uint32_t l = 0; l < kBlock; l += kWidth) look(f, inputs + l, ideals + l, mine);
      }
      part[t] = mine;
    });
  Worst worst;
  for (unsigned t = 0; t < n; ++t) running[t].join(), worst.join(part[t]);
  return worst;
}

// Where functions change from one formula to the other, overflow, underflow, saturate or have a pole.
constexpr float kTurns[] = {0.0f,   0x1p-149f, 0x1p-126f, 0x1p-25f, 0.25f,  0.3465736f, 0.5f,
                            0.55f,  0.75f,     1.0f,      1.5f,     3.95f,  4.2f,       9.0f,
                            9.5f,   12.955f,   14.2f,     14.42f,   17.4f,  18.0f,      80.0f,
                            87.34f, 88.7228f,  89.0f,     103.97f,  104.0f, 0x1p126f,   0x1.fffffep127f};

Worst around_turns(const Function& f) {
  Worst worst;
  for (const float turn : kTurns)
    for (const uint32_t sign : {0u, kSign})
      for (int32_t i = -256; i < 256; i += int32_t(kWidth)) {
        uint32_t inputs[kWidth];
        double ideals[kWidth];
        for (uint32_t l = 0; l < kWidth; ++l) {
          const int32_t at = int32_t(bits<uint32_t>(turn)) + i + int32_t(l);
          inputs[l] = (at < 0 ? 0u : uint32_t(at)) | sign;
          ideals[l] = f.ideal(double(bits<float>(inputs[l])));
        }
        look(f, inputs, ideals, worst);
      }
  return worst;
}

void check(const Function& f, bool all) {
  Worst worst = sweep(f, all ? 1 : 2053);
  if (!all) worst.join(around_turns(f));
  std::printf("%-8s %.4f (at %08x), subnormal results %.4f (at %08x)\n", f.name, worst.normal, worst.normal_at,
              worst.subnormal, worst.subnormal_at);
  test::expect(worst.normal <= f.normal_bound, "%s: error above %.2f", f.name, f.normal_bound);
  test::expect(worst.subnormal <= f.subnormal_bound, "%s: error of subnormals above %.2f", f.name, f.subnormal_bound);
  test::expect(worst.lanes == 0, "%s: %" PRId64 " lanes differ from the scalar lane, last at %08x", f.name, worst.lanes,
               worst.lanes_at);
  test::expect(worst.limits == 0, "%s: %" PRId64 " results of the wrong kind or sign or too large, last at %08x",
               f.name, worst.limits, worst.limits_at);
}

void check_special() {
  const float inf = INFINITY, nan = NAN;
  const struct {
    const char* name;
    float at_zero, at_minus_zero, at_infinity, at_minus_infinity;
  } rows[] = {
      {"exp", 1, 1, inf, 0},         {"expm1", 0, -0.0f, inf, -1}, {"log", -inf, -inf, inf, nan},
      {"log1p", 0, -0.0f, inf, nan}, {"tanh", 0, -0.0f, 1, -1},    {"sigmoid", 0.5f, 0.5f, 1, 0},
      {"erf", 0, -0.0f, 1, -1},      {"below", 0.5f, 0.5f, 1, 0},  {"density", 0.398942280f, 0.398942280f, 0, 0}};
  for (const Function& f : kFunctions)
    for (const auto& row : rows) {
      if (std::strcmp(f.name, row.name)) continue;
      const float inputs[] = {0.0f, -0.0f, inf, -inf, nan, bits<float>(0xff800001u)};
      const float wanted[] = {row.at_zero, row.at_minus_zero, row.at_infinity, row.at_minus_infinity, nan, nan};
      for (int i = 0; i < 6; ++i)
        test::expect(test::same(f.scalar(inputs[i]), wanted[i]), "%s(%g): expected %g, got %g", f.name,
                     double(inputs[i]), double(wanted[i]), double(f.scalar(inputs[i])));
    }
  test::expect(test::same(pyzo::log<Scalar>(1.0f), 0.0f), "log(1): expected 0");
  test::expect(test::same(pyzo::log1p<Scalar>(-1.0f), -inf), "log1p(-1): expected -infinity");
  test::expect(test::is_nan(pyzo::log<Scalar>(-1.0f)), "log(-1): expected NaN");
  test::expect(test::is_nan(pyzo::log1p<Scalar>(-1.0000001f)), "log1p below -1: expected NaN");
}

// One less the sigmoid of x is the sigmoid of -x.
void check_complement() {
  test::Random random{6};
  for (int trial = 0; trial < 100000; ++trial) {
    const float x = trial % 2 ? random.any_float() : bits<float>(0x40000000u + (random.word() & 0x83ffffffu));
    const float got = sigmoids<Scalar>(x).complement, want = pyzo::sigmoid<Scalar>(-x);
    test::expect(test::same(got, want), "complement of sigmoid(%a): expected %a, got %a", double(x), double(want),
                 double(got));
  }
}

// The operations of the lanes that these functions need, where they are specified.
void check_lanes() {
  test::Random random{5};
  for (int trial = 0; trial < 100000; ++trial) {
    Lanes::F a, b, c, d;
    for (uint32_t l = 0; l < kWidth; ++l)
      a[l] = random.any_float(), b[l] = random.below(8) ? random.any_float() : a[l], c[l] = random.any_float(),
      d[l] = random.any_float();
    const Lanes::F chosen = Lanes::if_less(a, b, c, d), most = Lanes::at_most(a, b), least = Lanes::at_least(a, b);
    const Lanes::F size = Lanes::abs(a);
    for (uint32_t l = 0; l < kWidth; ++l) {
      const uint32_t exponent = 64 + uint32_t(random.below(127));
      const float x = bits<float>((random.word() & 0x807fffffu) | exponent << 23);
      const Lanes::F one_over = Lanes::reciprocal(Lanes::splat(x));
      test::expect(test::same(one_over[l], 1.0f / x) && test::same(Scalar::reciprocal(x), 1.0f / x),
                   "reciprocal(%a): got %a", double(x), double(one_over[l]));
      test::expect(test::same(chosen[l], a[l] < b[l] ? c[l] : d[l]), "if_less, lane %u", l);
      test::expect(bits<uint32_t>(float(size[l])) == (bits<uint32_t>(float(a[l])) & ~kSign), "abs, lane %u", l);
      test::expect(test::same(most[l], Scalar::at_most(a[l], b[l])), "at_most, lane %u", l);
      test::expect(test::same(least[l], Scalar::at_least(a[l], b[l])), "at_least, lane %u", l);
      if (test::is_nan(a[l])) test::expect(test::is_nan(most[l]) && test::is_nan(least[l]), "a bound hides NaN");
    }
  }
}

// Results for the inputs of patterns i * 2654435769 mod 2^32, i < n, function after function.
int write_values(uint32_t n) {
  for (const Function& f : kFunctions)
    for (uint32_t i = 0; i < n; ++i) {
      const float result = f.scalar(bits<float>(i * 2654435769u));
      if (std::fwrite(&result, sizeof result, 1, stdout) != 1) return 1;
    }
  return 0;
}

__attribute__((noinline)) int run(int argc, char** argv) {
  if (argc == 3 && !std::strcmp(argv[1], "values")) return write_values(uint32_t(std::atoi(argv[2])));
  const bool all = argc == 2 && !std::strcmp(argv[1], "all");
  check_special();
  check_complement();
  check_lanes();
  std::printf("largest errors in units of the last place, %s\n", all ? "all inputs" : "a sample of inputs");
  for (const Function& f : kFunctions) check(f, all);
  return test::report("elementary");
}

}  // namespace

int main(int argc, char** argv) {
#if PYZO_LANES == 8
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) return 77;
#elif PYZO_LANES == 16
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
    return 77;
#endif
  return run(argc, argv);
}
#if PYZO_LANES > 4 && defined(__clang__)
#pragma clang attribute pop
#endif
