// The vector lanes of one instruction set against the scalar lane, function by function. Compiled once for each, with
// PYZO_ISA and PYZO_LANES defined as in cpu/isa_*.cpp; exits with 77 where the machine lacks the instructions.
#if PYZO_LANES > 4
#include <immintrin.h>
#endif

#include <cmath>
#include <cstdint>
#include <initializer_list>

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

#include "body/pass.h"
#include "core/normal.h"
#include "cpu/lanes.h"
#include "expect.h"

namespace {

using namespace pyzo;
using Lanes = cpu::PYZO_ISA::Lanes;
using F = Lanes::F;
using U = Lanes::U;
constexpr int kWidth = Lanes::kWidth;

constexpr uint32_t kSpecial[] = {0,          1,          2,          0x007fffff, 0x00800000, 0x33000000,
                                 0x33800000, 0x387fffff, 0x38800000, 0x38800001, 0x3f800000, 0x3f801000,
                                 0x3f808000, 0x477fe000, 0x477fefff, 0x477ff000, 0x47800000, 0x7f7fffff,
                                 0x7f7f8000, 0x7f800000, 0x7fc00000, 0x7f800001};

// Patterns of every kind: special ones with either sign, all of the range, near one.
U draw(test::Random& random) {
  U u;
  for (int l = 0; l < kWidth; ++l) {
    const uint32_t word = random.word();
    switch (random.below(4)) {
      case 0:
        u[l] = kSpecial[random.below(sizeof kSpecial / sizeof *kSpecial)] | (word & 0x80000000u);
        break;
      case 1:
        u[l] = (word & 0x807fffffu) | uint32_t(102 + random.below(42)) << 23;
        break;
      default:
        u[l] = word;
    }
  }
  return u;
}

void compare(const char* name, U got, U want) {
  for (int l = 0; l < kWidth; ++l)
    test::expect(got[l] == want[l], "%s, lane %d: expected %08x, got %08x", name, l, want[l], got[l]);
}

void compare(const char* name, F got, F want) {  // NaN by arithmetic has no particular payload
  for (int l = 0; l < kWidth; ++l)
    test::expect(test::same(got[l], want[l]), "%s, lane %d: expected %a, got %a", name, l, double(want[l]),
                 double(got[l]));
}

template <class Vector, class One>
Vector each(const One& one) {
  Vector v;
  for (int l = 0; l < kWidth; ++l) v[l] = one(l);
  return v;
}

template <Dtype T>
void check_storage(U a, U random) {
  const F x = Lanes::as_f(a);
  const U bits16 = random & Lanes::splat(0xffffu);
  compare("round_stochastic", round_stochastic<Lanes, T>(x, bits16),
          each<F>([&](int l) { return round_stochastic<Scalar, T>(x[l], bits16[l]); }));
  compare("round_nearest", round_nearest<Lanes, T>(x), each<F>([&](int l) { return round_nearest<Scalar, T>(x[l]); }));
  // What passes call is the same for numbers, infinities and the NaN that arithmetic makes.
  F usual = each<F>([&](int l) { return x[l] == x[l] ? x[l] : bits<float>((a[l] & 0x80000000u) | 0x7fc00000u); });
  compare("to_storage", to_storage<Lanes, T>(usual),
          each<F>([&](int l) { return round_nearest<Scalar, T>(usual[l]); }));
  compare("round_stochastic without payloads", round_stochastic<Lanes, T, false>(usual, bits16),
          each<F>([&](int l) { return round_stochastic<Scalar, T>(usual[l], bits16[l]); }));

  uint16_t codes[kWidth + 2], back[kWidth + 2] = {};
  for (int l = 0; l < kWidth; ++l) codes[l + 1] = uint16_t(random[l]);
  const F loaded = Lanes::load<T>(codes, 1);  // unaligned
  compare("load", Lanes::as_u(loaded), each<U>([&](int l) {
            return bits<uint32_t>(T == kFloat16 ? widen_half<Scalar>(codes[l + 1])
                                                : bits<float>(uint32_t(codes[l + 1]) << 16));
          }));
  Lanes::store<T>(back, 1, loaded);
  for (int l = 0; l < kWidth; ++l)
    test::expect(back[l + 1] == codes[l + 1], "load and store: expected %04x, got %04x", codes[l + 1], back[l + 1]);
  test::expect(back[0] == 0 && back[kWidth + 1] == 0, "store wrote outside its %d elements", kWidth);
  uint16_t pair[2 * kWidth + 1] = {};
  Lanes::store2<T>(pair, 1, loaded, Lanes::load<T>(back, 0));
  for (int l = 0; l < kWidth; ++l)
    test::expect(pair[l + 1] == codes[l + 1] && pair[kWidth + l + 1] == back[l],
                 "store2: expected %04x and %04x, got %04x and %04x", codes[l + 1], back[l], pair[l + 1],
                 pair[kWidth + l + 1]);
}

void check_parts(U a, U b, U c) {
  const F w = Lanes::as_f(a & Lanes::splat(0xffff0000u)), master = Lanes::as_f(b);
  const U low = c & Lanes::splat(0xffffu);
  compare("join", Lanes::as_u(join<Lanes>(w, low)),
          each<U>([&](int l) { return bits<uint32_t>(join<Scalar>(w[l], low[l])); }));
  const F old = join<Lanes>(w, low);
  const F v = c[0] & 1 ? master : old;
  const Parts<Lanes> got = split_changed<Lanes>(v, old, {w, low});
  const auto want = [&](int l) { return split_changed<Scalar>(v[l], old[l], {w[l], low[l]}); };
  compare("split", Lanes::as_u(got.weight), each<U>([&](int l) { return bits<uint32_t>(want(l).weight); }));
  compare("split, low bits", got.low, each<U>([&](int l) { return want(l).low; }));
}

void check_functions(test::Random& random) {
  const U a = draw(random), b = draw(random), c = draw(random);
  const F x = Lanes::as_f(a), y = Lanes::as_f(b), z = Lanes::as_f(c);
  compare("fma", Lanes::fma(x, y, z), each<F>([&](int l) { return soft_fma(x[l], y[l], z[l]); }));
  compare("float_of", Lanes::float_of(Lanes::as_i(a)), each<F>([&](int l) { return Scalar::float_of(int32_t(a[l])); }));
  const F near = Lanes::as_f((a & Lanes::splat(0x80ffffffu)) | Lanes::splat(0x43000000u));
  compare("sign_at_top", Lanes::sign_at_top(a), each<F>([&](int l) { return Scalar::sign_at_top(a[l]); }));
  compare("truncate", Lanes::as_u(Lanes::truncate(near)),
          each<U>([&](int l) { return uint32_t(Scalar::truncate(near[l])); }));
  const F root = Lanes::as_f((a & Lanes::splat(0x3fffffffu)) | Lanes::splat(0x20000000u));  // [2^-63, 2)
  compare("sqrt", Lanes::sqrt(root), each<F>([&](int l) { return std::sqrt(root[l]); }));
  compare("min", Lanes::as_u(Lanes::min(Lanes::as_i(a), Lanes::as_i(b))),
          each<U>([&](int l) { return uint32_t(Scalar::min(int32_t(a[l]), int32_t(b[l]))); }));
  compare("positive_one", Lanes::positive_one(x), each<F>([&](int l) { return Scalar::positive_one(x[l]); }));
  compare("if_changed", Lanes::as_u(Lanes::if_changed(x, y)),
          each<U>([&](int l) { return bits<uint32_t>(Scalar::if_changed(x[l], y[l])); }));
  const U small = a & Lanes::splat(0x7fffffffu), other = b & Lanes::splat(0x7fffffffu);
  compare("below", Lanes::below(small, other, a, b),
          each<U>([&](int l) { return Scalar::below(small[l], other[l], a[l], b[l]); }));
  for (uint32_t m : {0xD2511F53u, 0xCD9E8D57u, 0xffffffffu}) {
    U low;
    uint32_t one;
    compare("mul_hi_lo", Lanes::mul_hi_lo(m, a, low), each<U>([&](int l) { return Scalar::mul_hi_lo(m, a[l], one); }));
    compare("mul_hi_lo, low", low, each<U>([&](int l) { return m * a[l]; }));
  }
  check_storage<kBFloat16>(a, b);
  check_storage<kFloat16>(a, b);
  check_parts(a, b, c);
  // Numbers that are not negative: subnormal ones, zero and infinity too.
  const F positive = Lanes::as_f(small);
  compare("sqrt_any", Lanes::sqrt_any(positive), each<F>([&](int l) { return std::sqrt(positive[l]); }));
  compare("divide", Lanes::divide(x, y), each<F>([&](int l) { return x[l] / y[l]; }));
  for (const U limit : {other, small, small + Lanes::splat(1u) - (small >> 30)})  // equal and next to equal, too
    compare("if_below", Lanes::if_below(small, limit, x, y),
            each<F>([&](int l) { return Scalar::if_below(small[l], limit[l], x[l], y[l]); }));
  const U random16 = b & Lanes::splat(0xffffu);
  for (int i = 0; i < kMaxStates; ++i)
    compare("state_bits", state_bits<Lanes>(random16, i),
            each<U>([&](int l) { return state_bits<Scalar>(random16[l], i); }));
}

template <int kRule>
void check_rule(const char* name, test::Random& random) {
  constexpr int kStates = RuleOf<Lanes, kRule>::type::kStates;
  const auto some = [&](double a, double b) { return random.below(2) ? a : b; };
  const int64_t age = 1 + random.below(3);
  const Group group = {.lr = some(0.25, 1.0 / 3),
                       .eps = 0.0,
                       .weight_decay = some(0.0, 0.1),
                       .beta1 = some(0.0, 0.9),
                       .beta2 = some(0.5, 0.999),
                       .dampening = some(0.0, 0.3),
                       .rule_eps = some(0.0, 1e-8),
                       .option = random.below(2) != 0,
                       .age = age,
                       .correction1 = 1.0 - power(0.9, age),
                       .correction2 = 1.0 - power(0.999, age)};
  const typename RuleOf<Lanes, kRule>::type lanes(group);
  const typename RuleOf<Scalar, kRule>::type scalar(group);
  const F w = Lanes::as_f(draw(random)), g = Lanes::as_f(draw(random));
  F state[kMaxStates] = {Lanes::as_f(draw(random)), Lanes::as_f(draw(random) & Lanes::splat(0x7fffffffu))};
  const F old[kMaxStates] = {state[0], state[1]};
  F want_state[kMaxStates];
  const F want = each<F>([&](int l) {
    float one[kMaxStates] = {old[0][l], old[1][l]};
    const float v = scalar(w[l], g[l], one);
    for (int i = 0; i < kMaxStates; ++i) want_state[i][l] = one[i];
    return v;
  });
  compare(name, lanes(w, g, state), want);
  for (int i = 0; i < kStates; ++i) compare(name, state[i], want_state[i]);
}

// A counter per lane, and the order in which transpose() leaves the items.
void check_field(test::Random& random) {
  const Source source = {random.next(), random.next() >> 8};
  const uint64_t block = random.next() / kWidth * kWidth;
  const U offset = Lanes::counter_offsets();
  const Words<U> w = field_words<Lanes>(source, kNormalStream, block, offset);
  F z[4];
  normal4<Lanes>(w, z);
  for (int l = 0; l < kWidth; ++l) {
    const Words<uint32_t> one = field_words<Scalar>(source, kNormalStream, block + offset[l], 0u);
    test::expect(one.x == w.x[l] && one.y == w.y[l] && one.z == w.z[l] && one.w == w.w[l], "philox, lane %d", l);
    test::expect(Lanes::lane_of(int(offset[l])) == l, "lane of counter %d", int(offset[l]));
    float want[4];
    normal4<Scalar>(one, want);
    for (int k = 0; k < 4; ++k)
      test::expect(test::same(z[k][l], want[k]), "normal4, lane %d, %d: expected %a, got %a", l, k, double(want[k]),
                   double(z[k][l]));
  }
  F items[4];  // item k of counter j is 4 j + k
  for (int k = 0; k < 4; ++k)
    items[k] = Lanes::float_of(Lanes::as_i(offset * Lanes::splat(4u) + Lanes::splat(uint32_t(k))));
  Lanes::transpose(items);
  for (int i = 0; i < 4 * kWidth; ++i)
    test::expect(items[i / kWidth][i % kWidth] == float(i), "transpose: expected %d, got %g", i,
                 double(items[i / kWidth][i % kWidth]));
}

__attribute__((noinline)) int run() {
  test::Random random{11};
  for (int trial = 0; trial < 40000; ++trial) check_functions(random);
  for (int trial = 0; trial < 20000; ++trial) {
    check_rule<kSgd>("sgd", random);
    check_rule<kSign>("sign", random);
    check_rule<kMomentum>("momentum", random);
    check_rule<kAdam>("adam", random);
  }
  for (int trial = 0; trial < 4000; ++trial) check_field(random);
  return test::report("lanes");
}

}  // namespace

int main() {
#if PYZO_LANES == 8
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) return 77;
#elif PYZO_LANES == 16
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
    return 77;
#endif
  return run();
}
#if PYZO_LANES > 4 && defined(__clang__)
#pragma clang attribute pop
#endif
