// As avx512.cpp, for AVX-512 with BF16.
#pragma GCC optimize("associative-math", "no-signed-zeros", "reciprocal-math")
#define LAYERSKIP_FREE_ORDER
#define Avx512Bf16Kernels FreeOrderAvx512Bf16Kernels
#define PairsAreFoldedInOrder FreeOrderPairsAreFoldedInOrder
#include "../isa_avx512_bf16.cpp"
