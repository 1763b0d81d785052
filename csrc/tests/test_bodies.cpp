// Noise and pass of every instruction set this machine has against the scalar core, element by element, over shards and
// sizes.
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <vector>

#include "core/normal.h"
#include "core/rademacher.h"
#include "cpu/isa.h"
#include "expect.h"

namespace {

using namespace pyzo;

float scalar_noise(int distribution, Source s, uint64_t index) {
  if (distribution == kNormal) {
    float z[4];
    normal4<Scalar>(field_words<Scalar>(s, kNormalStream, index / kNormalPerCounter, 0u), z);
    return z[index % kNormalPerCounter];
  }
  const Words<uint32_t> w = field_words<Scalar>(s, kRademacherStream, index / kRademacherPerCounter, 0u);
  const uint32_t words[4] = {w.x, w.y, w.z, w.w};
  return sign_at_top<Scalar>(words[index % 128 / 32] << (31 - index % 32));
}

uint32_t scalar_rounding(Source s, uint64_t index) {
  const Words<uint32_t> w = field_words<Scalar>(s, kRoundingStream, index / kRoundingPerCounter, 0u);
  const uint32_t words[4] = {w.x, w.y, w.z, w.w};
  return words[index % 8 / 2] >> 16 * (index % 2) & 0xffffu;
}

template <Dtype T>
struct Storage {
  using Code = uint16_t;
  static float load(Code c) { return T == kFloat16 ? widen_half<Scalar>(c) : bits<float>(uint32_t(c) << 16); }
  static Code store(float x) { return Code(T == kFloat16 ? narrow_half<Scalar>(x) : bits<uint32_t>(x) >> 16); }
};
template <>
struct Storage<kFloat32> {
  using Code = uint32_t;
  static float load(Code c) { return bits<float>(c); }
  static Code store(float x) { return bits<uint32_t>(x); }
};

template <Dtype T, bool kUndo, bool kUpdate, bool kPerturb>
float scalar_element(bool stochastic, float w, float undo, float g, float perturb, uint32_t random,
                     const PassLanes<Scalar>& s) {
  if constexpr (kUpdate && T != kFloat32)
    if (stochastic) return pass_element<Scalar, T, kUndo, kUpdate, kPerturb, true>(w, undo, g, perturb, random, s);
  return pass_element<Scalar, T, kUndo, kUpdate, kPerturb, false>(w, undo, g, perturb, random, s);
}

template <Dtype T>
typename Storage<T>::Code scalar_pass(const PassArgs& a, const TensorArgs& t, typename Storage<T>::Code code,
                                      int64_t i) {
  const uint64_t index = t.shard.global(i);
  const auto z = [&](int64_t j) { return scalar_noise(a.distribution, {a.control.seed(j), t.key}, index); };
  const PassLanes<Scalar> s{PassScalars(a, t.row)};
  const float undo = a.undo < 0 ? 0.0f : z(a.undo), perturb = a.perturb < 0 ? 0.0f : z(a.perturb);
  const bool update = updates(a);
  float g = 0.0f;
  for (int j = 0; update && j < a.directions; ++j) {
    const float c = a.control.coefficient(t.row, j);
    g = j == 0 ? c * z(j) : soft_fma(c, z(j), g);
  }
  const uint32_t random = scalar_rounding({a.control.rounding_seed(), t.key}, index);
  const float w = Storage<T>::load(code);
  const auto apply = [&]<bool kUndo, bool kUpdate, bool kPerturb>() {
    return Storage<T>::store(scalar_element<T, kUndo, kUpdate, kPerturb>(a.stochastic, w, undo, g, perturb, random, s));
  };
  switch ((a.undo >= 0) * 4 + update * 2 + (a.perturb >= 0)) {
    case 0:
      return apply.template operator()<false, false, false>();
    case 1:
      return apply.template operator()<false, false, true>();
    case 2:
      return apply.template operator()<false, true, false>();
    case 3:
      return apply.template operator()<false, true, true>();
    case 4:
      return apply.template operator()<true, false, false>();
    case 5:
      return apply.template operator()<true, false, true>();
    case 6:
      return apply.template operator()<true, true, false>();
    default:
      return apply.template operator()<true, true, true>();
  }
}

const Shard kShards[] = {
    {0, 0, 0}, {5, 0, 0},        {1021, 0, 0},    {(int64_t(1) << 34) - 7, 0, 0},     {(int64_t(1) << 39) - 129, 0, 0},
    {3, 1, 2}, {1000, 77, 1000}, {2, 1024, 1500}, {(int64_t(1) << 40) + 1, 333, 4096}};

template <Dtype T>
void check_noise(const cpu::Isa& isa, test::Random& random) {
  for (const Shard& shard : kShards)
    for (int distribution : {kNormal, kRademacher})
      for (int64_t n : {1, 3, 64, 1031, 2600}) {
        const Source source = {random.next(), random.next() >> 8};
        const int64_t begin = random.below(n);
        std::vector<typename Storage<T>::Code> out(size_t(n + 1), typename Storage<T>::Code(0x5a5a));
        isa.noise(source, shard, distribution, T, out.data(), begin, n);
        for (int64_t i = 0; i <= n; ++i) {
          const bool inside = begin <= i && i < n;
          const auto want =
              inside ? Storage<T>::store(round_nearest<Scalar, T>(scalar_noise(distribution, source, shard.global(i))))
                     : 0x5a5a;
          test::expect(out[size_t(i)] == want,
                       "%s noise, dtype %d, distribution %d, base %" PRId64 ", inner %" PRId64 ", element %" PRId64
                       ": expected %08x, got %08x",
                       isa.name, int(T), distribution, shard.base, shard.inner, i, unsigned(want),
                       unsigned(out[size_t(i)]));
        }
      }
}

template <Dtype T>
void check_pass(const cpu::Isa& isa, test::Random& random) {
  using Code = typename Storage<T>::Code;
  constexpr int64_t kDirections = 3, kRows = 2;
  for (int trial = 0; trial < 300; ++trial) {
    std::vector<int64_t> words(size_t((Control::kLines + kRows) * Control::width(kDirections)));
    const Control control = {words.data(), kDirections, kRows};
    words[Control::kRunSeed] = int64_t(random.next());
    begin_step(control);
    words[Control::kOk] = random.below(8) != 0;
    for (int64_t r = 0; r < kRows; ++r) {
      double* row = control.row(r);
      row[Control::kLr] = random.below(4) ? 0.01 * double(r + 1) : 0.0;
      row[Control::kEps] = 1e-3 * double(r + 1), row[Control::kWeightDecay] = random.below(2) ? 0.1 : 0.0;
      for (int64_t j = 0; j < kDirections; ++j)
        row[Control::kCoefficients + j] = double(random.below(2001) - 1000) / 500;
    }
    const PassArgs a = {control,
                        int(random.below(2)),
                        int(random.below(kDirections + 1)) - 1,
                        random.below(2) ? 1.0f : -1.0f,
                        int(random.below(kDirections + 1)),
                        int(random.below(kDirections + 1)) - 1,
                        random.below(2) ? 1.0f : -1.0f,
                        random.below(2) != 0};
    const int64_t n = 1 + random.below(2200), begin = random.below(n), row = random.below(kRows);
    const Shard& shard = kShards[random.below(sizeof kShards / sizeof *kShards)];
    std::vector<Code> from(static_cast<size_t>(n)), to(size_t(n), Code(0x5a5a));
    for (Code& c : from) {
      const float x = std::ldexp(float(random.word()) - 0x1p31f, int(random.below(24)) - 45);
      c = random.below(8) ? Storage<T>::store(round_nearest<Scalar, T>(x)) : Code(random.word());
    }
    const TensorArgs t = {from.data(), to.data(), n, random.next() >> 8, shard, row};
    isa.pass(a, t, T, begin, n);
    for (int64_t i = 0; i < n; ++i) {
      const Code want = i < begin ? Code(0x5a5a) : scalar_pass<T>(a, t, from[size_t(i)], i);
      test::expect(
          to[size_t(i)] == want,
          "%s pass, dtype %d, undo %d, directions %d, perturb %d, stochastic %d, from %08x: expected %08x, got %08x",
          isa.name, int(T), a.undo, a.directions, a.perturb, int(a.stochastic), unsigned(from[size_t(i)]),
          unsigned(want), unsigned(to[size_t(i)]));
    }
  }
}

}  // namespace

int main() {
  int count;
  const cpu::Isa* const* all = cpu::all_isas(count);
  for (int i = 0; i < count; ++i) {
    std::printf("%s: %s\n", all[i]->name, all[i]->supported() ? "checked" : "not on this machine");
    if (!all[i]->supported()) continue;
    test::Random random{5};
    check_noise<kFloat32>(*all[i], random), check_noise<kBFloat16>(*all[i], random),
        check_noise<kFloat16>(*all[i], random);
    check_pass<kFloat32>(*all[i], random), check_pass<kBFloat16>(*all[i], random),
        check_pass<kFloat16>(*all[i], random);
  }
  return test::report("bodies");
}
