// The pass with the rule sgd.
#include "cuda/pass.cuh"

namespace pyzo::cuda {

int pass_sgd(const Launch& launch, Dtype dtype, Dtype state, CUstream_st* stream) {
  return launch_rule<kSgd>(launch, dtype, state, stream);
}

}  // namespace pyzo::cuda
