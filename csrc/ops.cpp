// Definitions of all operators, and those that ask about the build or the machine.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/stableivalue_conversions.h>

#include <string>

#include "cpu/isa.h"

// Present under a CUDA torch only. Weak, so that one binary loads under every torch.
extern "C" __attribute__((weak)) int aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace pyzo {
namespace {

// Instruction sets this machine can run, best first, the one in use marked by a star.
std::string isas() {
  std::string out;
  int count;
  const cpu::Isa* const* all = cpu::all_isas(count);
  for (int i = 0; i < count; ++i)
    if (all[i]->supported())
      out += std::string(out.empty() ? "" : " ") + all[i]->name + (all[i] == &cpu::isa() ? "*" : "");
  return out;
}

bool select_isa(std::string name) { return cpu::select_isa(name.c_str()); }

bool cuda_stream_bound() { return &aoti_torch_get_current_cuda_stream != nullptr; }

}  // namespace

STABLE_TORCH_LIBRARY(pyzo, m) {
#define PYZO_OP(name, schema) m.def(schema);
#define PYZO_HOST_OP(name, schema) m.def(schema);
#include "ops.inc"
#undef PYZO_OP
#undef PYZO_HOST_OP
}

STABLE_TORCH_LIBRARY_IMPL(pyzo, CompositeExplicitAutograd, m) {
#define PYZO_OP(name, schema)
#define PYZO_HOST_OP(name, schema) m.impl(#name, TORCH_BOX(&name));
#include "ops.inc"
#undef PYZO_OP
#undef PYZO_HOST_OP
}

}  // namespace pyzo
