// What AVX-512 BF16 is used for beside the kernels for AVX-512.
#include "kernels.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 11
// GCC 12 says so of its own reductions.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,popcnt")
#define FUSED_LOSSES_ISA avx512bf16
#define FUSED_LOSSES_AVX512
#include "candidates.h"

static void search(const fused_losses::CandidateSearch& search) {
  fused_losses::avx512bf16::CandidateSearcher(search).run();
}
void (*const fused_losses::search_bf16)(const CandidateSearch&) = search;
#else
void (*const fused_losses::search_bf16)(const CandidateSearch&) = nullptr;
#endif
