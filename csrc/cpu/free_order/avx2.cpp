// The AVX2 kernels with one segment to a dot product and all else in whatever order the compiler likes: what the
// contract's order costs is measured against them (benchmarks/bench_steps.py). Only built with LAYERSKIP_FREE_ORDER=1.
#pragma GCC optimize("associative-math", "no-signed-zeros", "reciprocal-math")
#define LAYERSKIP_FREE_ORDER
#define Avx2Kernels FreeOrderAvx2Kernels
#include "../isa_avx2.cpp"
