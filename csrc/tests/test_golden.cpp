// The golden hashes of tests/golden.txt (first argument), for every instruction set this machine has.
#include <cstring>
#include <fstream>
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

// The step that golden.txt documents: weights are noise of seed 1, rounded to the dtype, in the same shard.
void check_pass(const cpu::Isa& isa, const std::string& line, int distribution, Dtype dtype, bool stochastic,
                const Field& f) {
  std::vector<char> weights(size_t(f.n * size_of(dtype)));
  isa.noise({1, f.source.key}, f.shard, kNormal, dtype, weights.data(), 0, f.n);
  std::vector<int64_t> words(size_t((Control::kLines + 1) * Control::width(2)));
  const Control control = {words.data(), 2, 1};
  words[Control::kRunSeed] = int64_t(f.source.seed);
  control.row(0)[Control::kLr] = 0.5, control.row(0)[Control::kEps] = 0.01, control.row(0)[Control::kWeightDecay] = 0.1;
  begin_step(control);
  const double losses[] = {1.0, 0.75, 0.5, 0.625};
  estimate_two_sided(control, losses, 2);
  const PassArgs args = {control, distribution, 1, 1.0f, 2, 0, 1.0f, stochastic};
  isa.pass(args, {weights.data(), weights.data(), f.n, f.source.key, f.shard, 0}, dtype, 0, f.n);
  compare(isa.name, line, f.hash, hash_of(dtype, weights.data(), f.n));
}

void check_noise(const cpu::Isa& isa, const std::string& line, int distribution, Dtype dtype, const Field& f) {
  std::vector<char> out(size_t(f.n * size_of(dtype)));
  isa.noise(f.source, f.shard, distribution, dtype, out.data(), 0, f.n);
  compare(isa.name, line, f.hash, hash_of(dtype, out.data(), f.n));
}

void check_line(const cpu::Isa& isa, const std::string& line) {
  std::istringstream in(line);
  std::string kind, distribution, dtype, rounding;
  in >> kind;
  if (kind == "seed") {
    uint64_t run, step, direction, want;
    in >> run >> step >> direction >> std::hex >> want;
    compare("seed", line, want, direction_seed(run, step, direction));
  } else if (kind == "pass") {
    in >> distribution >> dtype >> rounding;
    check_pass(isa, line, distribution_of(distribution), dtype_of(dtype), rounding == "stochastic", Field(in));
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
