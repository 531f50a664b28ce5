// The kernels in plain C++, for whatever the compiler targets.
#define FUSED_LOSSES_ISA baseline
#include "kernels_page.h"

const fused_losses::Kernels* const fused_losses::kernels_baseline = &fused_losses::baseline::kernels;
