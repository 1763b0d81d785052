// All kernels of layers of one instruction set. Included once by each cpu/layers_*.cpp; lies in that file's own
// namespace.
#include "cpu/activation.h"
#include "cpu/dropout.h"

namespace pyzo::cpu::PYZO_ISA {

constexpr Layers kLayers = {
    activation, activation_backward, coded_activation, coded_activation_backward, output_activation_backward, dropout};

}  // namespace pyzo::cpu::PYZO_ISA
