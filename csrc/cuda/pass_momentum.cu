// The pass with the rule momentum.
#include "cuda/pass.cuh"

namespace pyzo::cuda {

int pass_momentum(const Launch& launch, Dtype dtype, Dtype state, CUstream_st* stream) {
  return launch_rule<kMomentum>(launch, dtype, state, stream);
}

}  // namespace pyzo::cuda
