#pragma once
// The operators of zeroth-order steps. A Device has static functions pass, mask_bits, noise, philox, begin_step,
// estimate and choose that take raw pointers and the tensor whose device (and stream) is meant.
#include <torch/csrc/stable/library.h>

#include "body/pass.h"
#include "ops/check.h"

namespace pyzo {

// Columns of the table of a pass: one line per tensor, int64, on the CPU.
enum TableColumn : int64_t { kKey, kBase, kInner, kStride, kRow, kTableColumns };

struct PassTensors {
  std::vector<TensorArgs> tensors;
  std::vector<Dtype> dtypes;  // of the weights
  Dtype state;                // of the states
};

// What mask_bits_ does for one tensor.
struct MaskArgs {
  const void* weights;
  Dtype dtype;
  uint8_t* packed;
  int64_t n, row;
};

// The lines of a table of `count` tensors.
inline const int64_t* check_table(const Tensor& table, size_t count) {
  STD_TORCH_CHECK(table.scalar_type() == ScalarType::Long && !table.is_cuda() && table.is_contiguous() &&
                      table.dim() == 2 && table.size(0) == int64_t(count) && table.size(1) == kTableColumns,
                  "table: expected a contiguous int64 tensor [", count, ", ", int64_t(kTableColumns), "] on cpu, got ",
                  describe(table));
  return static_cast<const int64_t*>(table.data_ptr());
}

inline void check_row(const std::string& name, int64_t row, int64_t rows) {
  STD_TORCH_CHECK(0 <= row && row < rows, name, ": expected a row of control in [0, ", rows, "), got ", row);
}

// The packed mask of `of`, or, where that is an option, no bytes.
inline void check_bits(const Tensor& bits, const std::string& name, const Tensor& of, const std::string& of_name,
                       const Tensor& control, bool optional) {
  check_same_device(bits, control, name);
  const int64_t bytes = mask_bytes(of.numel());
  STD_TORCH_CHECK(bits.scalar_type() == ScalarType::Byte && bits.is_contiguous() &&
                      (bits.numel() == bytes || (optional && bits.numel() == 0)),
                  name, ": expected a contiguous uint8 tensor of ", bytes, " bytes", optional ? " or none" : "",
                  ", a bit for each element of ", of_name, ", which is ", describe(of), ", got ", describe(bits));
}

// The dtype of the states, which are `states` lists as long as dst and as large as its tensors.
inline Dtype check_states(const std::vector<Tensor>& state, const std::vector<Tensor>& dst, int64_t states,
                          const Tensor& control) {
  STD_TORCH_CHECK(int64_t(state.size()) == states * int64_t(dst.size()), "state: expected ", states,
                  " tensors for each of the ", dst.size(), " of dst, got ", state.size());
  for (size_t i = 0; i < state.size(); ++i) {
    const Tensor& s = state[i];
    const std::string name = at("state", i);
    const size_t of = i % dst.size();
    STD_TORCH_CHECK((s.scalar_type() == ScalarType::Float || s.scalar_type() == ScalarType::BFloat16) &&
                        s.scalar_type() == state[0].scalar_type() && s.is_contiguous() && s.numel() == dst[of].numel(),
                    name, ": expected a contiguous float32 or bfloat16 tensor as all states, of the size of ",
                    at("dst", of), ", which is ", describe(dst[of]), ", got ", describe(s));
    check_same_device(s, control, name);
  }
  return state.empty() || state[0].scalar_type() == ScalarType::Float ? kFloat32 : kBFloat16;
}

inline PassTensors check_tensors(const std::vector<Tensor>& src, const std::vector<Tensor>& dst,
                                 const std::vector<Tensor>& state, int64_t states, const std::vector<Tensor>& bits,
                                 const Tensor& table, const Tensor& control, int64_t rows) {
  const int64_t count = int64_t(dst.size());
  STD_TORCH_CHECK(src.empty() || src.size() == dst.size(),
                  "src: expected no tensors (in place) or as many as dst, which has ", count, ", got ", src.size());
  STD_TORCH_CHECK(bits.empty() || bits.size() == dst.size(), "bits: expected no tensors or as many as dst, which has ",
                  count, ", got ", bits.size());
  const int64_t* line = check_table(table, dst.size());
  PassTensors out;
  out.state = check_states(state, dst, states, control);
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
    check_row(name, line[kRow], rows);
    if (!bits.empty()) check_bits(bits[i], at("bits", size_t(i)), dst[i], name, control, true);
    if (n == 0) continue;
    TensorArgs t = {from.data_ptr(), dst[i].data_ptr(), {}, n, uint64_t(line[kKey]), shard, line[kRow], nullptr};
    if (!bits.empty() && bits[i].numel() > 0) t.bits = static_cast<const uint8_t*>(bits[i].data_ptr());
    for (int64_t k = 0; k < states; ++k) t.state[k] = state[size_t(k * count + i)].data_ptr();
    out.tensors.push_back(t);
    out.dtypes.push_back(dtype);
  }
  check_overlap({{"dst", dst}, {"state", state}}, {{"src", src}, {"bits", bits}}, "dst");
  return out;
}

template <class Device>
void pass_(std::vector<Tensor> src, std::vector<Tensor> dst, std::vector<Tensor> state, std::vector<Tensor> bits,
           std::vector<Tensor> indices, Tensor table, Tensor control, int64_t distribution, int64_t undo,
           double undo_sign, int64_t rule, int64_t directions, double update_sign, bool chosen, bool retract,
           int64_t perturb, double perturb_sign, bool stochastic, bool masked) {
  const Control c = check_control(control);
  check_range("distribution", distribution, 0, 2);
  check_range("undo", undo, -1, c.directions);
  check_range("rule", rule, 0, kRules);
  check_range("directions", directions, 0, c.directions + 1);
  check_range("perturb", perturb, -1, c.directions);
  STD_TORCH_CHECK(states_of(int(rule)) == 0 || (update_sign == 1.0 && !chosen && !retract),
                  "rule: expected one without state where an update may be taken back, got ", rule);
  // A pass without update needs no states, and may be given them.
  const int64_t states = directions > 0 || !state.empty() ? states_of(int(rule)) : 0;
  STD_TORCH_CHECK(indices.empty(), "indices: expected no tensors, got ", indices.size());  // the next commit's
  const PassTensors work = check_tensors(src, dst, state, states, bits, table, control, c.rows);
  const bool nothing = undo < 0 && directions == 0 && perturb < 0 && src.empty();  // only the checks were asked for
  if (nothing || work.tensors.empty()) return;
  Device::pass(control,
               PassArgs{c, int(distribution), int(undo), float(undo_sign), int(rule), int(directions),
                        float(update_sign), chosen, retract, int(perturb), float(perturb_sign), stochastic, masked},
               work);
}

template <class Device>
void mask_bits_(std::vector<Tensor> weights, std::vector<Tensor> bits, Tensor table, Tensor control) {
  const Control c = check_control(control);
  STD_TORCH_CHECK(bits.size() == weights.size(), "bits: expected as many tensors as weights, which has ",
                  weights.size(), ", got ", bits.size());
  const int64_t* line = check_table(table, weights.size());
  std::vector<MaskArgs> work;
  for (size_t i = 0; i < weights.size(); ++i, line += kTableColumns) {
    const std::string name = at("weights", i);
    const Dtype dtype = check_weights(weights[i], name);
    check_same_device(weights[i], control, name);
    check_row(name, line[kRow], c.rows);
    check_bits(bits[i], at("bits", i), weights[i], name, control, false);
    const int64_t n = weights[i].numel();
    if (n > 0) work.push_back({weights[i].data_ptr(), dtype, static_cast<uint8_t*>(bits[i].data_ptr()), n, line[kRow]});
  }
  check_overlap({{"bits", bits}}, {{"weights", weights}});
  if (!work.empty()) Device::mask_bits(control, c, work);
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

inline const double* check_losses(const Tensor& losses, const Tensor& control, int64_t least, int64_t most) {
  check_same_device(losses, control, "losses");
  STD_TORCH_CHECK(losses.scalar_type() == ScalarType::Double && losses.is_contiguous() && losses.dim() == 1 &&
                      least <= losses.numel() && losses.numel() <= most,
                  "losses: expected a contiguous float64 vector of ", least, " to ", most, " losses, got ",
                  describe(losses));
  return static_cast<const double*>(losses.data_ptr());
}

template <class Device>
void estimate_(Tensor control, Tensor losses, int64_t kind, int64_t q, int64_t scaling) {
  const Control c = check_control(control);
  check_range("kind", kind, 0, kEstimates);
  check_range("scaling", scaling, 0, kScalings);
  check_range("q", q, 1, c.directions + 1);
  STD_TORCH_CHECK(scaling != kStd || (kind == kOneSided && q >= 2),
                  "scaling: expected the deviation of a one-sided estimate with q >= 2, got kind ", kind, " and q ", q);
  const double* values = check_losses(losses, control, losses_of(int(kind), q), 1 + 2 * c.directions);
  Device::estimate(control, c, values, losses.numel(), int(kind), q, int(scaling));
}

template <class Device>
void choose_(Tensor control, Tensor losses) {
  const Control c = check_control(control);
  Device::choose(control, c, check_losses(losses, control, 3, 3));
}

}  // namespace pyzo
