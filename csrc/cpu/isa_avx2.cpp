// The kernels for AVX2, FMA and F16C. The pragma, not a compiler flag, switches them on for this file alone.
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")
#define LAYERSKIP_AVX2
#include "blocks.inl"
#include "kernels.inl"

namespace layerskip {
const Kernels* Avx2Kernels() { return kTables; }
const BlockKernels& Avx2BlockKernels() { return kBlockTable; }
}  // namespace layerskip
#endif
