// The golden hashes of tests/golden.txt (first argument), for every instruction set this machine has.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <fstream>
#include <iterator>
#include <sstream>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "expect.h"

namespace {

using namespace pyzo;

int distribution_of(const std::string& s) { return s == "normal" ? kNormal : kRademacher; }
Dtype dtype_of(const std::string& s) { return s == "float32" ? kFloat32 : s == "bfloat16" ? kBFloat16 : kFloat16; }
int64_t size_of(Dtype t) { return t == kFloat32 ? 4 : 2; }

uint64_t hash_of(Dtype t, const void* data, int64_t n) {
  return t == kFloat32 ? test::golden_hash<uint32_t>(data, n) : test::golden_hash<uint16_t>(data, n);
}

void compare(const char* isa, const std::string& line, uint64_t want, uint64_t got) {
  test::expect(got == want, "%s: %s: got %016" PRIx64, isa, line.c_str(), got);
}

struct Field {
  Source source;
  Shard shard;
  int64_t n;
  uint64_t hash;
  explicit Field(std::istringstream& in) {
    in >> source.seed >> source.key >> shard.base >> shard.inner >> shard.stride >> n >> std::hex >> hash;
  }
};

// What the first words of a line "pass" say.
struct Steps {
  int rule;
  bool option, stochastic;
  Dtype state, dtype;
  int64_t keep;
  int distribution;
  explicit Steps(std::istringstream& in) {
    std::string name, state_name, distribution_name, dtype_name, rounding;
    in >> name >> option >> state_name >> keep >> distribution_name >> dtype_name >> rounding;
    const char* const rules[] = {"sgd", "sign", "momentum", "adam"};
    rule = int(std::find(std::begin(rules), std::end(rules), name) - std::begin(rules));
    test::expect(rule < kRules, "golden.txt: expected a rule, got %s", name.c_str());
    state = state_name == "bfloat16" ? kBFloat16 : kFloat32;
    dtype = dtype_of(dtype_name), distribution = distribution_of(distribution_name);
    stochastic = rounding == "stochastic";
  }
};

// The steps that golden.txt documents: weights are noise of seed 1, rounded to the dtype, in the same shard.
void check_pass(const cpu::Isa& isa, const std::string& line, std::istringstream& in) {
  const Steps s(in);
  const Field f(in);
  std::vector<char> weights(size_t(f.n * size_of(s.dtype)));
  isa.noise({1, f.source.key}, f.shard, kNormal, s.dtype, weights.data(), 0, f.n);
  std::vector<char> states[kMaxStates];
  TensorArgs t = {weights.data(), weights.data(), {}, f.n, f.source.key, f.shard, 0, nullptr};
  for (int k = 0; k < states_of(s.rule); ++k) {
    states[k].resize(size_t(f.n * size_of(s.state)));
    t.state[k] = states[k].data();
  }
  std::vector<int64_t> words(size_t((Control::kLines + 1) * Control::width(2)));
  const Control control = {words.data(), 2, 1};
  words[Control::kRunSeed] = int64_t(f.source.seed);
  double* row = control.row(0);
  row[Control::kLr] = 0.5, row[Control::kEps] = 0.01, row[Control::kWeightDecay] = 0.1;
  row[Control::kBeta1] = 0.9, row[Control::kBeta2] = 0.99, row[Control::kDampening] = 0.25;
  row[Control::kRuleEps] = 1e-3, row[Control::kOption] = s.option;
  row[Control::kThreshold] = HUGE_VAL;
  control.row_words(0)[Control::kKeep] = s.keep, control.row_words(0)[Control::kRefresh] = 1;
  PassArgs a = {};
  a.control = control, a.distribution = s.distribution, a.rule = s.rule;
  a.undo = 1, a.undo_sign = 1.0f, a.directions = 2, a.update_sign = 1.0f, a.perturb = 0, a.perturb_sign = 1.0f;
  a.stochastic = s.stochastic, a.masked = s.keep < int64_t(kKeepAll);
  const double losses[] = {1.0, 0.75, 0.5, 0.625};
  for (int step = 0; step < (states_of(s.rule) > 0 ? 2 : 1); ++step) {
    begin_step(control);
    estimate(control, losses, 4, kTwoSided, 2, kPlain);
    isa.pass(a, t, s.dtype, s.state, 0, f.n);
  }
  compare(isa.name, line, f.hash, hash_of(s.dtype, weights.data(), f.n));
  for (int k = 0; k < states_of(s.rule); ++k) {
    uint64_t want = 0;
    in >> std::hex >> want;
    compare(isa.name, line, want, hash_of(s.state, states[k].data(), f.n));
  }
}

void check_noise(const cpu::Isa& isa, const std::string& line, int distribution, Dtype dtype, const Field& f) {
  std::vector<char> out(size_t(f.n * size_of(dtype)));
  isa.noise(f.source, f.shard, distribution, dtype, out.data(), 0, f.n);
  compare(isa.name, line, f.hash, hash_of(dtype, out.data(), f.n));
}

void check_line(const cpu::Isa& isa, const std::string& line) {
  std::istringstream in(line);
  std::string kind, dtype;
  in >> kind;
  if (kind == "seed") {
    uint64_t run, step, direction, want;
    in >> run >> step >> direction >> std::hex >> want;
    compare("seed", line, want, direction_seed(run, step, direction));
  } else if (kind == "pass") {
    check_pass(isa, line, in);
  } else {
    in >> dtype;
    check_noise(isa, line, distribution_of(kind), dtype_of(dtype), Field(in));
  }
}

}  // namespace

int main(int argc, char** argv) {
  std::ifstream file(argc > 1 ? argv[1] : "tests/golden.txt");
  std::vector<std::string> lines;
  for (std::string line; std::getline(file, line);)
    if (!line.empty() && line[0] != '#') lines.push_back(line);
  test::expect(lines.size() >= 12, "golden.txt: expected at least 12 lines, got %zu", lines.size());
  int count;
  const cpu::Isa* const* all = cpu::all_isas(count);
  for (int i = 0; i < count; ++i) {
    std::printf("%s: %s\n", all[i]->name, all[i]->supported() ? "checked" : "not on this machine");
    if (!all[i]->supported()) continue;
    for (const std::string& line : lines) check_line(*all[i], line);
  }
  return test::report("golden hashes");
}
