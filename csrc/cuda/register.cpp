// The CUDA device: launches on torch's current stream, and the registration of the operators.
#include "cuda/device_activation.h"
#include "cuda/device_dropout.h"
#include "cuda/device_gate.h"
#include "cuda/device_norm.h"
#include "cuda/launch.h"
#include "cuda/stream.h"
#include "ops.h"

namespace pyzo {
namespace {

// Calls run(dtype, tensors) for the tensors of each dtype that occurs.
template <class Args, class Run>
void by_dtype(const std::vector<Args>& tensors, const std::vector<Dtype>& dtypes, const Run& run) {
  for (const Dtype dtype : {kFloat32, kBFloat16, kFloat16}) {
    std::vector<Args> same;
    for (size_t i = 0; i < tensors.size(); ++i)
      if (dtypes[i] == dtype) same.push_back(tensors[i]);
    if (!same.empty()) run(dtype, same);
  }
}

struct CudaPass {
  static void pass(const Tensor& control, const PassArgs& args, const PassTensors& work) {
    by_dtype(work.tensors, work.dtypes, [&](Dtype dtype, const std::vector<TensorArgs>& same) {
      on_stream(control, [&](CUstream_st* stream) {
        return cuda::pass(args, same.data(), same.size(), dtype, work.state, stream);
      });
    });
  }

  static void pass_indexed(const Tensor& control, const PassArgs& args, const PassTensors& work) {
    by_dtype(work.indexed, work.dtypes, [&](Dtype dtype, const std::vector<IndexedArgs>& same) {
      on_stream(control, [&](CUstream_st* stream) {
        return cuda::pass_indexed(args, same.data(), same.size(), dtype, work.state, stream);
      });
    });
  }

  static void pass_rows(const Tensor& control, const PassArgs& args, const LookedUp& work) {
    by_dtype(work.rows, work.dtypes, [&](Dtype dtype, const std::vector<RowsArgs>& same) {
      on_stream(control,
                [&](CUstream_st* stream) { return cuda::pass_rows(args, same.data(), same.size(), dtype, stream); });
    });
  }

  static void mask_bits(const Tensor& control, Control c, const std::vector<MaskArgs>& work) {
    std::vector<TensorArgs> tensors;
    std::vector<Dtype> dtypes;
    for (const MaskArgs& m : work) {
      TensorArgs t = {};
      t.src = m.weights, t.dst = m.packed, t.n = m.n, t.row = m.row;
      tensors.push_back(t), dtypes.push_back(m.dtype);
    }
    by_dtype(tensors, dtypes, [&](Dtype dtype, const std::vector<TensorArgs>& same) {
      on_stream(control,
                [&](CUstream_st* stream) { return cuda::mask_bits(c, same.data(), same.size(), dtype, stream); });
    });
  }

  static void noise(const Tensor& out, Source source, Shard shard, int distribution, Dtype dtype) {
    on_stream(out, [&](CUstream_st* stream) {
      return cuda::noise(source, shard, distribution, dtype, out.data_ptr(), out.numel(), stream);
    });
  }

  static void philox(const Tensor& out, uint64_t seed, uint64_t high, uint64_t block) {
    on_stream(out, [&](CUstream_st* stream) {
      return cuda::philox(static_cast<uint32_t*>(out.data_ptr()), out.size(0), seed, high, block, stream);
    });
  }

  static void begin_step(const Tensor& control, Control c) {
    on_stream(control, [&](CUstream_st* stream) { return cuda::begin_step(c, stream); });
  }

  static void estimate(const Tensor& control, Control c, const double* losses, int64_t count, int kind, int64_t q,
                       int scaling) {
    on_stream(control, [&](CUstream_st* stream) { return cuda::estimate(c, losses, count, kind, q, scaling, stream); });
  }

  static void choose(const Tensor& control, Control c, const double* losses) {
    on_stream(control, [&](CUstream_st* stream) { return cuda::choose(c, losses, stream); });
  }
};

struct Cuda : CudaPass, CudaActivation, CudaDropout, CudaGate, CudaNorm {};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyzo, CUDA, m) {
#define PYZO_OP(name, schema) m.impl(#name, TORCH_BOX(&name<Cuda>));
#define PYZO_HOST_OP(name, schema)
#include "ops.inc"
#undef PYZO_OP
#undef PYZO_HOST_OP
}

}  // namespace pyzo
