// All kernels for one instruction set: this file is compiled once for each, with its flags.
#include "bn_act.cpp"
#include "conv_thin.cpp"
#include "conv_winograd.cpp"
#include "gan_loss.cpp"

#define FASTGAN_JOIN(a, b) a##b
#define FASTGAN_TABLE(isa) FASTGAN_JOIN(kernels_, isa)
#define FASTGAN_STRING(x) #x
#define FASTGAN_NAME(isa) FASTGAN_STRING(isa)

namespace fastgan {

extern const Kernels FASTGAN_TABLE(FASTGAN_ISA);
const Kernels FASTGAN_TABLE(FASTGAN_ISA) = {
    FASTGAN_NAME(FASTGAN_ISA),
    FASTGAN_ISA::winograd::scratch,
    FASTGAN_ISA::winograd::fprop,
    FASTGAN_ISA::winograd::dgrad,
    FASTGAN_ISA::winograd::wgrad,
    FASTGAN_ISA::thin::scratch,
    FASTGAN_ISA::thin::fprop,
    FASTGAN_ISA::thin::dgrad,
    FASTGAN_ISA::thin::wgrad,
    FASTGAN_ISA::bn::bn_stats,
    FASTGAN_ISA::bn::bn_merge,
    FASTGAN_ISA::bn::bn_apply,
    FASTGAN_ISA::bn::bn_backward,
    FASTGAN_ISA::bn::act_backward,
    FASTGAN_ISA::gan_loss::gan_loss_forward,
};

}  // namespace fastgan
