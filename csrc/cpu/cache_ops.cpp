// The cache ops for CPU tensors: the bodies that the CUDA kernels run, on torch's threads.
#include "../cuda/cache_ops.h"

#include <ATen/Parallel.h>

namespace layerskip {

namespace {

struct Cpu {
  explicit Cpu(const Tensor&) {}

  template <class Op>
  void Run(const Op& op) const {
    at::parallel_for(0, op.NumBlocks(), 1, [&op](int64_t begin, int64_t end) { RunBlocks(op, begin, end); });
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(layerskip, CPU, m) { CacheOps<Cpu>::Register(m); }

}  // namespace layerskip
