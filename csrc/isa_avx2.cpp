// The kernels for AVX2, FMA and F16C (x86-64-v3).
#include "kernels.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,popcnt")
#define FUSED_LOSSES_ISA avx2
#define FUSED_LOSSES_AVX2
#include "kernels_page.h"

const fused_losses::Kernels* const fused_losses::kernels_avx2 = &fused_losses::avx2::kernels;
#else
const fused_losses::Kernels* const fused_losses::kernels_avx2 = nullptr;
#endif
