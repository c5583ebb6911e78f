// The kernels of rule 8 for AVX-VNNI: 256 bits, on processors without AVX-512.
#if defined(__x86_64__)
#pragma GCC target("avxvnni,avx2,fma,f16c")
#define LAYERSKIP_AVX2
#define LAYERSKIP_VNNI
#include "blocks.inl"

namespace layerskip {
const BlockKernels& AvxVnniBlockKernels() { return kBlockTable; }
}  // namespace layerskip
#endif
