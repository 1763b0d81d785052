// The pass with the rule adam.
#include "cuda/pass.cuh"

namespace pyzo::cuda {

int pass_adam(const Launch& launch, Dtype dtype, Dtype state, CUstream_st* stream) {
  return launch_rule<kAdam>(launch, dtype, state, stream);
}

}  // namespace pyzo::cuda
