// The kernels for AVX-512 (x86-64-v4: F, BW, CD, DQ, VL).
#include "kernels.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#pragma GCC target("avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,popcnt")
#define FUSED_LOSSES_ISA avx512
#define FUSED_LOSSES_AVX512
#include "kernels_page.h"

const fused_losses::Kernels* const fused_losses::kernels_avx512 = &fused_losses::avx512::kernels;
#else
const fused_losses::Kernels* const fused_losses::kernels_avx512 = nullptr;
#endif
