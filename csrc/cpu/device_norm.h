#pragma once
// Norms on the CPU: torch's threads over rows, or over blocks of rows where sums over rows are wanted.
#include <torch/csrc/stable/ops.h>

#include <cstring>

#include "cpu/layers.h"
#include "ops/norm.h"

namespace pyzo {

constexpr int64_t kNormGrain = 16384;      // elements a thread must have to be worth waking
constexpr int64_t kNormBlock = 32;         // rows of a block, at least
constexpr int64_t kNormBlocksAtMost = 64;  // however many threads there are: sums must not depend on them

struct CpuNorm {
  static int64_t norm_blocks(const NormArgs& a) {
    return std::max<int64_t>(1, std::min(a.rows / kNormBlock, kNormBlocksAtMost));
  }

  // Numbers: three tables, and two sums of each block.
  static int64_t norm_scratch(const NormArgs& a, bool sums) {
    return cpu::norm_stride(a.columns) * (3 + (sums ? 2 * norm_blocks(a) : 0));
  }

  static void norm(const Tensor&, const NormArgs& a, const NormForward& f, void* scratch) {
    const cpu::Layers& layers = cpu::layers(a.input);
    if (a.weight || a.bias) layers.norm_tables(a, scratch);
    torch::stable::parallel_for(0, a.rows, grain(a),
                                [&](int64_t begin, int64_t end) { layers.norm(a, f, scratch, begin, end); });
  }

  static void norm_backward(const Tensor&, const NormArgs& a, const NormBackward& b, void* scratch) {
    const cpu::Layers& layers = cpu::layers(a.input);
    if (a.weight || a.bias) layers.norm_tables(a, scratch);
    if (!b.dweight && !b.dbias) {
      torch::stable::parallel_for(0, a.rows, grain(a), [&](int64_t begin, int64_t end) {
        layers.norm_backward(a, b, scratch, nullptr, nullptr, begin, end);
      });
      return;
    }
    const int64_t bytes = cpu::norm_stride(a.columns) * (a.input == kFloat64 ? 8 : 4), blocks = norm_blocks(a);
    char* const sums = static_cast<char*>(scratch) + 3 * bytes;
    const auto at = [&](int64_t block, int which) { return sums + (2 * block + which) * bytes; };
    torch::stable::parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
      for (int64_t block = first; block < last; ++block) {
        std::memset(at(block, 0), 0, size_t(2 * bytes));
        layers.norm_backward(a, b, scratch, b.dweight ? at(block, 0) : nullptr, b.dbias ? at(block, 1) : nullptr,
                             block * a.rows / blocks, (block + 1) * a.rows / blocks);
      }
    });
    const int64_t stride = 2 * cpu::norm_stride(a.columns);
    if (b.dweight) layers.norm_sum(at(0, 0), blocks, stride, a.weight_dtype, b.dweight, a.columns);
    if (b.dbias) layers.norm_sum(at(0, 1), blocks, stride, a.bias_dtype, b.dbias, a.columns);
  }

 private:
  static int64_t grain(const NormArgs& a) { return std::max<int64_t>(1, kNormGrain / a.columns); }
};

}  // namespace pyzo
