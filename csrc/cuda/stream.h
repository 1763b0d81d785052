#pragma once
// Launching on torch's current stream, with error checks.
#include <torch/csrc/stable/accelerator.h>

#include "cuda/launch.h"
#include "ops/check.h"

// Present under a CUDA torch only. Weak, so that one binary loads under every torch.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace pyzo {

// Selects the device of a tensor and calls launch(stream) on its current stream.
template <class Launch>
inline void on_stream(const Tensor& t, const Launch& launch) {
  STD_TORCH_CHECK(&aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA: the stream of ", describe(t),
                  " is unknown");
  torch::stable::accelerator::DeviceGuard guard(t.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  const int error = launch(static_cast<CUstream_st*>(stream));
  STD_TORCH_CHECK(error == 0, "CUDA: ", cuda::error_text(error));
}

}  // namespace pyzo
