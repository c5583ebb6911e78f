// The kernels of rule 8 for AVX-512 with VNNI.
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 sees its own _mm512_undefined_ps()
#define LAYERSKIP_AVX512
#define LAYERSKIP_VNNI
#include "blocks.inl"

namespace layerskip {
const BlockKernels& Avx512VnniBlockKernels() { return kBlockTable; }
}  // namespace layerskip
#endif
