// The pass with the rule sign.
#include "cuda/pass.cuh"

namespace pyzo::cuda {

int pass_sign(const Launch& launch, Dtype dtype, Dtype state, CUstream_st* stream) {
  return launch_rule<kSign>(launch, dtype, state, stream);
}

}  // namespace pyzo::cuda
