// The cache ops for CPU tensors: the bodies that the CUDA kernels run, on the threads that all ops run on.
#include "../cuda/cache_ops.h"

#include "parallel.h"

namespace layerskip {

namespace {

struct Cpu {
  explicit Cpu(const Tensor&) {}

  template <class Op>
  void Run(const Op& op) const {
    InParallel([&](Team& team) {
      team.ForEach(op.NumBlocks(), 4, [&](int64_t begin, int64_t end) { RunBlocks(op, begin, end); });
    });
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(layerskip, CPU, m) { CacheOps<Cpu>::Register(m); }

}  // namespace layerskip
