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
#define FUSED_LOSSES_AVX512_BF16
#include "candidates.h"
#include "dispatch.h"

namespace fused_losses {
namespace avx512bf16 {

static void backward(Backward& door) { backward_stored_as<BFloat16>(door); }
static void search(const CandidateSearch& search) { CandidateSearcher(search).run(); }
static constexpr KernelsOfBFloat16 kernels{backward, search};

}  // namespace avx512bf16
}  // namespace fused_losses

const fused_losses::KernelsOfBFloat16* const fused_losses::kernels_avx512bf16 = &fused_losses::avx512bf16::kernels;
#else
const fused_losses::KernelsOfBFloat16* const fused_losses::kernels_avx512bf16 = nullptr;
#endif
