#pragma once
// The operators of zeroth-order steps. A Device has static functions pass, pass_indexed, mask_bits, noise, philox,
// begin_step, estimate and choose that take raw pointers and the tensor whose device (and stream) is meant.
#include <torch/csrc/stable/library.h>

#include "ops/pass_tensors.h"

namespace pyzo {

// What mask_bits_ does for one tensor.
struct MaskArgs {
  const void* weights;
  Dtype dtype;
  uint8_t* packed;
  int64_t n, row;
};

template <class Device>
void pass_(const TensorList& src, const TensorList& dst, const TensorList& state, const TensorList& bits,
           const TensorList& indices, const TensorList& low, const Tensor& table, const Tensor& control,
           int64_t distribution, int64_t undo, double undo_sign, int64_t rule, int64_t directions, double update_sign,
           bool chosen, bool retract, int64_t perturb, double perturb_sign, bool stochastic, bool masked, bool trial) {
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
  const PassTensors work = check_tensors({src, dst, state, bits, indices, low}, states, table, control, c.rows);
  STD_TORCH_CHECK(low.empty() || directions == 0 || (undo < 0 && perturb < 0 && !retract),
                  "low: expected no tensors in an update that undoes, perturbs or retracts besides, got ", low.size());
  const bool nothing = undo < 0 && directions == 0 && perturb < 0 && src.empty();  // only the checks were asked for
  if (nothing || work.dtypes.empty()) return;
  const PassArgs args = {
      c,      int(distribution), int(undo),    float(undo_sign),    int(rule),  int(directions), float(update_sign),
      chosen, retract,           int(perturb), float(perturb_sign), stochastic, masked,          trial};
  if (indices.empty())
    Device::pass(control, args, work);
  else
    Device::pass_indexed(control, args, work);
}

template <class Device>
void mask_bits_(const TensorList& weights, const TensorList& bits, const Tensor& table, const Tensor& control) {
  const Control c = check_control(control);
  STD_TORCH_CHECK(bits.size() == weights.size(), "bits: expected as many tensors as weights, which has ",
                  weights.size(), ", got ", bits.size());
  const int64_t* line = check_table(table, weights.size());
  std::vector<MaskArgs> work;
  for (size_t i = 0; i < weights.size(); ++i, line += kTableColumns) {
    const Name name = at("weights", i);
    const Dtype dtype = check_weights(weights[i], name);
    check_same_device(weights[i], control, name);
    check_row(name, line[kRow], c.rows);
    check_bits(bits[i], at("bits", i), weights[i].numel(), name, control, false);
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
