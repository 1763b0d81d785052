#pragma once
// The operators: check the arguments, describe the work without torch, hand it to the device. Written once for all
// devices. A Device has static functions pass, noise, philox, begin_step and estimate_two_sided that take raw pointers
// and the tensor whose device (and stream) is meant.
#include <torch/csrc/stable/library.h>

#include "body/pass.h"
#include "check.h"

namespace pyzo {

// Columns of the table of a pass: one line per tensor, int64, on the CPU.
enum TableColumn : int64_t { kKey, kBase, kInner, kStride, kRow, kTableColumns };

struct PassTensors {
  std::vector<TensorArgs> tensors;
  std::vector<Dtype> dtypes;
};

inline PassTensors check_tensors(const std::vector<Tensor>& src, const std::vector<Tensor>& dst, const Tensor& table,
                                 const Tensor& control, int64_t rows) {
  const int64_t count = int64_t(dst.size());
  STD_TORCH_CHECK(src.empty() || src.size() == dst.size(),
                  "src: expected no tensors (in place) or as many as dst, which has ", count, ", got ", src.size());
  STD_TORCH_CHECK(table.scalar_type() == ScalarType::Long && !table.is_cuda() && table.is_contiguous() &&
                      table.dim() == 2 && table.size(0) == count && table.size(1) == kTableColumns,
                  "table: expected a contiguous int64 tensor [", count, ", ", int64_t(kTableColumns), "] on cpu, got ",
                  describe(table));
  const int64_t* line = static_cast<const int64_t*>(table.data_ptr());
  PassTensors out;
  for (int64_t i = 0; i < count; ++i, line += kTableColumns) {
    const std::string name = at("dst", size_t(i));
    const Tensor& from = src.empty() ? dst[i] : src[i];
    const Dtype dtype = check_weights(dst[i], name);
    check_same_device(dst[i], control, name);
    const int64_t n = dst[i].numel();
    if (!src.empty()) {
      check_same_device(from, control, at("src", size_t(i)));
      STD_TORCH_CHECK(check_weights(from, at("src", size_t(i))) == dtype && from.numel() == n, at("src", size_t(i)),
                      ": expected the dtype and size of ", name, ", which is ", describe(dst[i]), ", got ",
                      describe(from));
    }
    const Shard shard = {line[kBase], line[kInner], line[kStride]};
    check_shard(name, shard, n);
    STD_TORCH_CHECK(uint64_t(line[kKey]) >> 56 == 0, name, ": expected a key below 2^56, got ", uint64_t(line[kKey]));
    STD_TORCH_CHECK(0 <= line[kRow] && line[kRow] < rows, name, ": expected a row of control in [0, ", rows, "), got ",
                    line[kRow]);
    if (n == 0) continue;
    out.tensors.push_back({from.data_ptr(), dst[i].data_ptr(), n, uint64_t(line[kKey]), shard, line[kRow]});
    out.dtypes.push_back(dtype);
  }
  check_overlap(src, dst);
  return out;
}

template <class Device>
void pass_(std::vector<Tensor> src, std::vector<Tensor> dst, Tensor table, Tensor control, int64_t distribution,
           int64_t undo, double undo_sign, int64_t directions, int64_t perturb, double perturb_sign, bool stochastic) {
  const Control c = check_control(control);
  check_range("distribution", distribution, 0, 2);
  check_range("undo", undo, -1, c.directions);
  check_range("directions", directions, 0, c.directions + 1);
  check_range("perturb", perturb, -1, c.directions);
  const PassTensors work = check_tensors(src, dst, table, control, c.rows);
  const bool nothing = undo < 0 && directions == 0 && perturb < 0 && src.empty();  // only the checks were asked for
  if (nothing || work.tensors.empty()) return;
  Device::pass(control,
               PassArgs{c, int(distribution), int(undo), float(undo_sign), int(directions), int(perturb),
                        float(perturb_sign), stochastic},
               work);
}

template <class Device>
void noise_(Tensor out, int64_t seed, int64_t key, int64_t base, int64_t inner, int64_t stride, int64_t distribution) {
  const Dtype dtype = check_weights(out, "out");
  const Shard shard = {base, inner, stride};
  check_range("key", key, 0, int64_t(1) << 56);
  check_range("distribution", distribution, 0, 2);
  check_shard("out", shard, out.numel());
  if (out.numel() > 0) Device::noise(out, {uint64_t(seed), uint64_t(key)}, shard, int(distribution), dtype);
}

template <class Device>
void philox_(Tensor out, int64_t seed, int64_t high, int64_t block) {
  STD_TORCH_CHECK(out.scalar_type() == ScalarType::Int && out.is_contiguous() && out.dim() == 2 && out.size(1) == 4,
                  "out: expected a contiguous int32 tensor [n, 4], got ", describe(out));
  if (out.numel() > 0) Device::philox(out, uint64_t(seed), uint64_t(high), uint64_t(block));
}

template <class Device>
void begin_step_(Tensor control) {
  Device::begin_step(control, check_control(control));
}

template <class Device>
void estimate_two_sided_(Tensor control, Tensor losses) {
  const Control c = check_control(control);
  check_same_device(losses, control, "losses");
  STD_TORCH_CHECK(losses.scalar_type() == ScalarType::Double && losses.is_contiguous() && losses.dim() == 1 &&
                      losses.numel() > 0 && losses.numel() % 2 == 0 && losses.numel() <= 2 * c.directions,
                  "losses: expected a contiguous float64 vector of l+ and l- for 1 to ", c.directions,
                  " directions, got ", describe(losses));
  Device::estimate_two_sided(control, c, static_cast<const double*>(losses.data_ptr()), losses.numel() / 2);
}

}  // namespace pyzo
