// All kernels of layers of one instruction set. Included once by each cpu/layers_*.cpp; lies in that file's own
// namespace.
#include "cpu/activation.h"
#include "cpu/dropout.h"
#include "cpu/gate.h"
#include "cpu/norm.h"

namespace pyzo::cpu::PYZO_ISA {

constexpr Layers kLayers = {activation,
                            activation_backward,
                            coded_activation,
                            coded_activation_backward,
                            output_activation_backward,
                            dropout,
                            gate,
                            gate_backward,
                            norm_tables,
                            norm,
                            norm_backward,
                            norm_sum};

}  // namespace pyzo::cpu::PYZO_ISA
