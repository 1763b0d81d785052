// Noise, passes (over tensors, lists and looked-up rows) and packed masks of every instruction set this machine has
// against the scalar core, element by element, over rules, dtypes of weights and states, masks, low bits, shards and
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

// The 16 bits of an element in the rounding or the mask stream.
uint32_t scalar_bits(Source s, Stream stream, uint64_t index) {
  const Words<uint32_t> w = field_words<Scalar>(s, stream, index / kBitsPerCounter, 0u);
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

// The codes of one element: its weight, its states and its low bits.
template <Dtype T, Dtype S>
struct Element {
  typename Storage<T>::Code weight;
  typename Storage<S>::Code state[kMaxStates];
  uint16_t low;
};

template <Dtype T, Dtype S, int kRule>
Element<T, S> scalar_pass(const PassArgs& a, const TensorArgs& t, Element<T, S> x, int64_t i) {
  const uint64_t index = t.shard.global(i);
  if (a.masked) {
    const float threshold = a.control.threshold(t.row), w = Storage<T>::load(x.weight);
    if (scalar_bits({a.control.mask_seed(t.row), t.key}, kMaskStream, index) >= a.control.keep(t.row)) return x;
    if (!t.in_place() && threshold < HUGE_VALF && !(std::fabs(w) <= threshold)) return x;
    if (t.bits && (t.bits[i / 8] >> i % 8 & 1) == 0) return x;
  }
  const auto z = [&](int64_t j) { return scalar_noise(a.distribution, {a.control.seed(j), t.key}, index); };
  const PassLanes<Scalar, kRule> s(a, t.row);
  const Parts<Scalar> old = {Storage<T>::load(x.weight), x.low};
  const float before = splits(a, t) ? join<Scalar>(old.weight, old.low) : old.weight;
  float w = before;
  if (a.undo >= 0) w = add_noise<Scalar, T>(w, z(a.undo), s.undo_scale);
  if (updates(a)) {
    float g = 0.0f, state[kMaxStates] = {};
    for (int j = 0; j < a.directions; ++j) {
      const float c = a.control.coefficient(t.row, j);
      g = j == 0 ? c * z(j) : soft_fma(c, z(j), g);
    }
    uint32_t random = scalar_bits({a.control.rounding_seed(), t.key}, kRoundingStream, index);
    if (a.retract) random = 0xffffu - random;
    constexpr int kStates = RuleOf<Scalar, kRule>::type::kStates;
    for (int k = 0; k < kStates; ++k) state[k] = Storage<S>::load(x.state[k]);
    const auto update = [&](auto weight) {
      return a.stochastic ? update_element<Scalar, weight.value, S, true>(w, g, state, random, s)
                          : update_element<Scalar, weight.value, S, false>(w, g, state, random, s);
    };
    w = splits(a, t) ? update(DtypeTag<kFloat32>{}) : update(DtypeTag<T>{});
    for (int k = 0; k < kStates; ++k) x.state[k] = Storage<S>::store(state[k]);
  }
  if (a.perturb >= 0) w = add_noise<Scalar, T>(w, z(a.perturb), s.perturb_scale);
  if (splits(a, t)) {
    const Parts<Scalar> parts = split_changed<Scalar>(w, before, old);
    x.weight = Storage<T>::store(parts.weight);
    if (!a.trial) x.low = uint16_t(parts.low);
  } else {
    x.weight = Storage<T>::store(Scalar::if_changed(w, before));
  }
  return x;
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

// A step in the middle of a run, with something in every word that a pass reads.
void fill_control(Control control, test::Random& random) {
  control.words[Control::kRunSeed] = int64_t(random.next());
  for (int64_t r = 0; r < control.rows; ++r) control.row_words(r)[Control::kRefresh] = random.below(3);
  begin_step(control);
  control.words[Control::kOk] = random.below(8) != 0;
  control.choice() = double(random.below(3) - 1);
  for (int64_t r = 0; r < control.rows; ++r) {
    double* row = control.row(r);
    const int64_t age = 1 + random.below(3);
    row[Control::kLr] = random.below(4) ? 0.01 * double(r + 1) : 0.0;
    row[Control::kEps] = 1e-3 * double(r + 1);
    row[Control::kWeightDecay] = random.below(2) ? 0.1 : 0.0;
    row[Control::kBeta1] = 0.9, row[Control::kBeta2] = 0.99;
    row[Control::kDampening] = random.below(2) ? 0.3 : 0.0;
    row[Control::kRuleEps] = random.below(2) ? 1e-8 : 0.0;
    row[Control::kOption] = double(random.below(2));
    control.row_words(r)[Control::kAge] = age;
    row[Control::kCorrection1] = 1.0 - power(0.9, age), row[Control::kCorrection2] = 1.0 - power(0.99, age);
    control.row_words(r)[Control::kKeep] = random.below(3) ? random.below(kKeepAll) : int64_t(kKeepAll);
    row[Control::kThreshold] = random.below(3) ? HUGE_VAL : std::ldexp(1.0, int(random.below(24)) - 16);
    for (int64_t j = 0; j < control.directions; ++j)
      row[Control::kCoefficients + j] = double(random.below(2001) - 1000) / 500;
  }
}

// Codes of many magnitudes, one in eight any pattern at all.
template <Dtype T>
std::vector<typename Storage<T>::Code> some_codes(int64_t n, test::Random& random) {
  std::vector<typename Storage<T>::Code> codes(static_cast<size_t>(n));
  for (auto& code : codes) {
    const float x = std::ldexp(float(random.word()) - 0x1p31f, int(random.below(24)) - 45);
    code = random.below(8) ? Storage<T>::store(round_nearest<Scalar, T>(x)) : typename Storage<T>::Code(random.word());
  }
  return codes;
}

constexpr int64_t kDirections = 3, kRows = 2;

// Any pass by the rule.
template <int kRule>
PassArgs some_pass(Control control, test::Random& random) {
  const auto direction = [&] { return int(random.below(kDirections + 1)) - 1; };
  const auto sign = [&] { return random.below(2) ? 1.0f : -1.0f; };
  const auto either = [&] { return random.below(2) != 0; };
  PassArgs a = {};
  a.control = control, a.distribution = int(random.below(2)), a.rule = kRule;
  a.undo = direction(), a.undo_sign = sign(), a.perturb = direction(), a.perturb_sign = sign();
  a.directions = int(random.below(kDirections + 1)), a.update_sign = 1.0f;
  if (RuleOf<Scalar, kRule>::type::kStates == 0) a.update_sign = sign(), a.chosen = either(), a.retract = either();
  a.stochastic = either(), a.masked = either();
  return a;
}

template <Dtype S>
std::vector<typename Storage<S>::Code> some_state(int k, int64_t n, test::Random& random) {
  auto codes = some_codes<S>(n, random);
  if (k == 1)  // second moments are not negative
    for (auto& code : codes) code &= typename Storage<S>::Code(~(1ull << (8 * sizeof code - 1)));
  return codes;
}

// Low bits for n weights, and a pass that may have them; or none.
template <Dtype T>
std::vector<uint16_t> some_low(int64_t n, PassArgs& a, test::Random& random) {
  if (T != kBFloat16 || random.below(3) != 0) return {};
  a.undo = a.perturb = -1, a.retract = false, a.trial = random.below(2) != 0;
  std::vector<uint16_t> low(static_cast<size_t>(n));
  for (uint16_t& bits : low) bits = random.below(4) ? uint16_t(random.word()) : 0;
  return low;
}

const Shard& some_shard(test::Random& random) { return kShards[random.below(sizeof kShards / sizeof *kShards)]; }

template <Dtype T, Dtype S, int kRule>
void check_pass(const cpu::Isa& isa, test::Random& random) {
  constexpr int kStates = RuleOf<Scalar, kRule>::type::kStates;
  for (int trial = 0; trial < 150; ++trial) {
    std::vector<int64_t> words(size_t((Control::kLines + kRows) * Control::width(kDirections)));
    const Control control = {words.data(), kDirections, kRows};
    fill_control(control, random);
    PassArgs a = some_pass<kRule>(control, random);

    const int64_t n = 1 + random.below(2200), begin = random.below(n), row = random.below(kRows);
    const Shard& shard = some_shard(random);
    const auto from = some_codes<T>(n, random);
    auto to = some_codes<T>(n, random);
    const auto untouched = to;
    std::vector<typename Storage<S>::Code> state[kMaxStates], old_state[kMaxStates];
    std::vector<uint8_t> packed(size_t(mask_bytes(n)));
    for (uint8_t& byte : packed) byte = uint8_t(random.word());
    TensorArgs t = {from.data(),        to.data(), {},  n,
                    random.next() >> 8, shard,     row, random.below(2) ? packed.data() : nullptr};
    for (int k = 0; k < kStates; ++k) {
      old_state[k] = state[k] = some_state<S>(k, n, random);
      t.state[k] = state[k].data();
    }
    std::vector<uint16_t> low = some_low<T>(n, a, random);
    const std::vector<uint16_t> old_low = low;
    if (!low.empty()) t.low = low.data();
    isa.pass(a, t, T, S, begin, n);
    for (int64_t i = 0; i < n; ++i) {
      Element<T, S> x = {i < begin ? untouched[size_t(i)] : from[size_t(i)], {}, 0};
      for (int k = 0; k < kStates; ++k) x.state[k] = old_state[k][size_t(i)];
      if (t.low) x.low = old_low[size_t(i)];
      const Element<T, S> want = i < begin ? x : scalar_pass<T, S, kRule>(a, t, x, i);
      test::expect(to[size_t(i)] == want.weight,
                   "%s pass, rule %d, dtype %d, undo %d, directions %d, perturb %d, stochastic %d, masked %d, from "
                   "%08x: expected %08x, got %08x",
                   isa.name, kRule, int(T), a.undo, a.directions, a.perturb, int(a.stochastic), int(a.masked),
                   unsigned(x.weight), unsigned(want.weight), unsigned(to[size_t(i)]));
      for (int k = 0; k < kStates; ++k)
        test::expect(state[k][size_t(i)] == want.state[k],
                     "%s pass, rule %d, state %d of dtype %d, stochastic %d, masked %d, from %08x: expected %08x, got "
                     "%08x",
                     isa.name, kRule, k, int(S), int(a.stochastic), int(a.masked), unsigned(x.state[k]),
                     unsigned(want.state[k]), unsigned(state[k][size_t(i)]));
      if (t.low)
        test::expect(low[size_t(i)] == want.low,
                     "%s pass, rule %d, masked %d, trial %d, from %08x and %04x: expected low %04x, got %04x", isa.name,
                     kRule, int(a.masked), int(a.trial), unsigned(x.weight), unsigned(x.low), unsigned(want.low),
                     unsigned(low[size_t(i)]));
    }
  }
}

// A pass over a list against the scalar pass of its elements; what is not listed stays.
template <Dtype T, Dtype S, int kRule>
void check_indexed(const cpu::Isa& isa, test::Random& random) {
  constexpr int kStates = RuleOf<Scalar, kRule>::type::kStates;
  for (int trial = 0; trial < 100; ++trial) {
    std::vector<int64_t> words(size_t((Control::kLines + kRows) * Control::width(kDirections)));
    const Control control = {words.data(), kDirections, kRows};
    fill_control(control, random);
    PassArgs a = some_pass<kRule>(control, random);

    const int64_t size = 1 + random.below(4000), one_in = 1 + random.below(4), row = random.below(kRows);
    std::vector<int64_t> indices;
    for (int64_t i = 0; i < size; ++i)
      if (random.below(one_in) == 0) indices.push_back(i);
    const int64_t n = int64_t(indices.size()), begin = n > 0 ? random.below(n) : 0;
    const auto from = some_codes<T>(n, random);
    auto to = some_codes<T>(size, random);
    auto want = to;
    std::vector<typename Storage<S>::Code> state[kMaxStates], want_state[kMaxStates];
    const bool in_place = random.below(2) != 0;
    IndexedArgs t = {
        {in_place ? nullptr : from.data(), to.data(), {}, n, random.next() >> 8, some_shard(random), row, nullptr},
        indices.data(),
        size};
    for (int k = 0; k < kStates; ++k) {
      want_state[k] = state[k] = some_state<S>(k, n, random);
      t.state[k] = state[k].data();
    }
    std::vector<uint16_t> low = some_low<T>(n, a, random), want_low = low;
    if (!low.empty()) t.low = low.data();
    isa.pass_indexed(a, t, T, S, begin, n);
    for (int64_t i = begin; i < n; ++i) {
      const size_t at = size_t(indices[size_t(i)]);
      Element<T, S> x = {in_place ? want[at] : from[size_t(i)], {}, 0};
      for (int k = 0; k < kStates; ++k) x.state[k] = want_state[k][size_t(i)];
      if (t.low) x.low = want_low[size_t(i)];
      x = scalar_pass<T, S, kRule>(a, t, x, int64_t(at));
      want[at] = x.weight;
      for (int k = 0; k < kStates; ++k) want_state[k][size_t(i)] = x.state[k];
      if (t.low) want_low[size_t(i)] = x.low;
    }
    const char* const what = "%s pass over a list, rule %d, dtype %d, distribution %d, %d: expected %08x, got %08x";
    for (size_t i = 0; i < to.size(); ++i)
      test::expect(to[i] == want[i], what, isa.name, kRule, int(T), a.distribution, int(i), unsigned(want[i]),
                   unsigned(to[i]));
    for (size_t i = 0; i < low.size(); ++i)
      test::expect(low[i] == want_low[i], what, isa.name, kRule, int(T), a.distribution, int(i), unsigned(want_low[i]),
                   unsigned(low[i]));
    for (int k = 0; k < kStates; ++k)
      for (size_t i = 0; i < state[k].size(); ++i)
        test::expect(state[k][i] == want_state[k][i], what, isa.name, kRule, int(S), a.distribution, int(i),
                     unsigned(want_state[k][i]), unsigned(state[k][i]));
  }
}

// A pass over looked-up rows against the scalar pass of their elements in the matrix, from elsewhere: magnitudes count.
template <Dtype T, int kRule>
void check_rows(const cpu::Isa& isa, test::Random& random) {
  for (int trial = 0; trial < 100; ++trial) {
    std::vector<int64_t> words(size_t((Control::kLines + kRows) * Control::width(kDirections)));
    const Control control = {words.data(), kDirections, kRows};
    fill_control(control, random);
    PassArgs a = some_pass<kRule>(control, random);
    a.undo = -1, a.retract = false;

    const int64_t width = random.below(2) ? 1 + random.below(1100) : 128 * (1 + random.below(6)),
                  size = 1 + random.below(9), row = random.below(kRows);
    std::vector<int64_t> ids(size_t(1 + random.below(6)));
    for (int64_t& id : ids) id = random.below(size);
    const int64_t n = int64_t(ids.size()) * width, begin = random.below(n);
    const auto from = some_codes<T>(n, random);
    auto to = from;
    std::vector<uint8_t> packed(size_t(mask_bytes(size * width)));
    for (uint8_t& byte : packed) byte = uint8_t(random.word());
    const uint8_t* const bits = random.below(2) ? packed.data() : nullptr;
    const RowsArgs t = {
        {to.data(), to.data(), {}, n, random.next() >> 8, some_shard(random), row, bits}, ids.data(), size, width};
    isa.pass_rows(a, t, T, begin, n);
    TensorArgs matrix = t;
    matrix.src = from.data();
    for (int64_t i = 0; i < n; ++i) {
      const int64_t local = ids[size_t(i / width)] * width + i % width;
      Element<T, kFloat32> want = {from[size_t(i)], {}};
      if (i >= begin) want = scalar_pass<T, kFloat32, kRule>(a, matrix, want, local);
      test::expect(to[size_t(i)] == want.weight,
                   "%s pass over rows of %d, rule %d, dtype %d, distribution %d, masked %d, element %d: expected %08x, "
                   "got %08x",
                   isa.name, int(width), kRule, int(T), a.distribution, int(a.masked), int(i), unsigned(want.weight),
                   unsigned(to[size_t(i)]));
    }
  }
}

template <Dtype T>
void check_mask_bits(const cpu::Isa& isa, test::Random& random) {
  for (int trial = 0; trial < 200; ++trial) {
    const int64_t n = 1 + random.below(100), begin = 16 * random.below(n / 16 + 1);
    const float threshold = random.below(4) ? std::ldexp(1.0f, int(random.below(24)) - 16) : random.below(2) - 1.0f;
    const auto from = some_codes<T>(n, random);
    std::vector<uint8_t> packed(size_t(mask_bytes(n)), 0xa5);
    if (begin < n) isa.mask_bits(from.data(), T, largest_kept(threshold), packed.data(), begin, n);
    for (int64_t i = begin; i < (n + 7) / 8 * 8; ++i) {
      const bool want = i < n && std::fabs(Storage<T>::load(from[size_t(i)])) <= threshold;
      test::expect(begin >= n || mask_bit(packed.data(), i) == want,
                   "%s mask, dtype %d, threshold %g: element %d of %d", isa.name, int(T), double(threshold), int(i),
                   int(n));
    }
  }
}

template <Dtype T, Dtype S, int kRule>
void check_both(const cpu::Isa& isa, test::Random& random) {
  check_pass<T, S, kRule>(isa, random);
  check_indexed<T, S, kRule>(isa, random);
}

template <Dtype T>
void check_rules(const cpu::Isa& isa, test::Random& random) {
  check_rows<T, kSgd>(isa, random);
  check_rows<T, kSign>(isa, random);
  check_both<T, kFloat32, kSgd>(isa, random);
  check_both<T, kFloat32, kSign>(isa, random);
  check_both<T, kFloat32, kMomentum>(isa, random);
  check_both<T, kBFloat16, kMomentum>(isa, random);
  check_both<T, kFloat32, kAdam>(isa, random);
  check_both<T, kBFloat16, kAdam>(isa, random);
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
    check_mask_bits<kFloat32>(*all[i], random), check_mask_bits<kBFloat16>(*all[i], random),
        check_mask_bits<kFloat16>(*all[i], random);
    check_rules<kFloat32>(*all[i], random), check_rules<kBFloat16>(*all[i], random),
        check_rules<kFloat16>(*all[i], random);
  }
  return test::report("bodies");
}
