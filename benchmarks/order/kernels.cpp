// The linear layers of one instruction set, for bench_order.py: in the contract's order or, with FREE_ORDER, with one
// segment to a dot product and whatever order the compiler likes for the rest.
//
//     -DKERNELS='"isa_avx2.cpp"' -DTABLES=Avx2Kernels [-DFREE_ORDER]
#include "contract.h"
#if defined(FREE_ORDER)
namespace layerskip {
inline constexpr int kOneSegment = 1;
}
#define kSegments kOneSegment
#endif
#include KERNELS

struct Matrix {
  const void* weight;  // packed bf16 [n, k]
  int64_t n, k;
};

// One thread's columns of the products of fp32 rows x [rows, k] with each of some matrices; all go to the same out
// [rows, n].
extern "C" __attribute__((visibility("default"))) void products(const Matrix* matrices, int64_t count, const float* x,
                                                                int64_t rows, int64_t part, int64_t parts, float* out) {
  const layerskip::Kernels& kernels = layerskip::TABLES()[static_cast<int>(layerskip::Dtype::kBFloat16)];
  for (const Matrix* m = matrices; m < matrices + count; ++m) {
    const int64_t groups = (m->n + 15) / 16;
    kernels.linear(x, rows, m->k, m->weight, nullptr, m->n, groups * part / parts, groups * (part + 1) / parts,
                   /*round=*/true, out);
  }
}
