// The kernels for AVX-512 F, BW, DQ and VL.
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 sees its own _mm512_undefined_ps()
#define LAYERSKIP_AVX512
#include "blocks.inl"
#include "kernels.inl"

namespace layerskip {
const Kernels* Avx512Kernels() { return kTables; }
const BlockKernels& Avx512BlockKernels() { return kBlockTable; }
}  // namespace layerskip
#endif
