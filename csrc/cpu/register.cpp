// The CPU device: torch's threads over the tiles of a pass, and the registration of the operators.
#include <torch/csrc/stable/ops.h>

#include "cpu/device_activation.h"
#include "cpu/device_dropout.h"
#include "cpu/device_gate.h"
#include "cpu/device_norm.h"
#include "cpu/isa.h"
#include "ops.h"

namespace pyzo {
namespace {

constexpr int64_t kGrain = 16;        // tiles a thread must have to be worth waking
constexpr int64_t kIndexedGrain = 2;  // of listed elements, which wait for memory

int64_t tiles(int64_t n) { return (n + cpu::kTile - 1) / cpu::kTile; }

// Cuts items of these sizes into tiles and gives each thread a run of tiles: work(item, begin, end) for elements.
template <class Item, class Work>
void over_tiles(const std::vector<Item>& items, int64_t grain, const Work& work) {
  std::vector<int64_t> first;  // tile number at which each item begins
  first.reserve(items.size() + 1);
  first.push_back(0);
  for (const Item& item : items) first.push_back(first.back() + tiles(item.n));
  torch::stable::parallel_for(0, first.back(), grain, [&](int64_t begin, int64_t end) {
    size_t i = size_t(std::upper_bound(first.begin(), first.end(), begin) - first.begin()) - 1;
    for (; begin < end; ++i) {
      const int64_t stop = std::min(end, first[i + 1]);
      work(i, (begin - first[i]) * cpu::kTile, std::min((stop - first[i]) * cpu::kTile, items[i].n));
      begin = stop;
    }
  });
}

struct CpuPass {
  static void pass(const Tensor&, const PassArgs& args, const PassTensors& work) {
    const cpu::Isa& isa = cpu::isa();
    over_tiles(work.tensors, kGrain, [&](size_t i, int64_t begin, int64_t end) {
      isa.pass(args, work.tensors[i], work.dtypes[i], work.state, begin, end);
    });
  }

  static void pass_indexed(const Tensor&, const PassArgs& args, const PassTensors& work) {
    const cpu::Isa& isa = cpu::isa();
    over_tiles(work.indexed, kIndexedGrain, [&](size_t i, int64_t begin, int64_t end) {
      isa.pass_indexed(args, work.indexed[i], work.dtypes[i], work.state, begin, end);
    });
  }

  static void pass_rows(const Tensor&, const PassArgs& args, const LookedUp& work) {
    const cpu::Isa& isa = cpu::isa();
    over_tiles(work.rows, kGrain, [&](size_t i, int64_t begin, int64_t end) {
      isa.pass_rows(args, work.rows[i], work.dtypes[i], begin, end);
    });
  }

  static void mask_bits(const Tensor&, Control c, const std::vector<MaskArgs>& work) {
    const cpu::Isa& isa = cpu::isa();
    over_tiles(work, kGrain, [&](size_t i, int64_t begin, int64_t end) {
      const MaskArgs& m = work[i];
      isa.mask_bits(m.weights, m.dtype, largest_kept(c.threshold(m.row)), m.packed, begin, end);
    });
  }

  static void noise(const Tensor& out, Source source, Shard shard, int distribution, Dtype dtype) {
    const int64_t n = out.numel();
    void* data = out.data_ptr();
    const cpu::Isa& isa = cpu::isa();
    torch::stable::parallel_for(0, tiles(n), kGrain, [&](int64_t begin, int64_t end) {
      isa.noise(source, shard, distribution, dtype, data, begin * cpu::kTile, std::min(end * cpu::kTile, n));
    });
  }

  static void philox(const Tensor& out, uint64_t seed, uint64_t high, uint64_t block) {
    uint32_t* words = static_cast<uint32_t*>(out.data_ptr());
    for (int64_t i = 0; i < out.size(0); ++i, words += 4) philox_at(words, seed, high, block + uint64_t(i));
  }

  static void begin_step(const Tensor&, Control c) { pyzo::begin_step(c); }

  static void estimate(const Tensor&, Control c, const double* losses, int64_t count, int kind, int64_t q,
                       int scaling) {
    pyzo::estimate(c, losses, count, kind, q, scaling);
  }

  static void choose(const Tensor&, Control c, const double* losses) { pyzo::choose(c, losses); }
};

struct Cpu : CpuPass, CpuActivation, CpuDropout, CpuGate, CpuNorm {};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyzo, CPU, m) {
#define PYZO_OP(name, schema) m.impl(#name, TORCH_BOX(&name<Cpu>));
#define PYZO_HOST_OP(name, schema)
#include "ops.inc"
#undef PYZO_OP
#undef PYZO_HOST_OP
}

}  // namespace pyzo
