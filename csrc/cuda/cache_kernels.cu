// One kernel for every op of page_ops.h: a thread block per block of work, a thread per lane.
#include <algorithm>
#include <cstdint>

#include "cache_kernels.h"

namespace layerskip {

namespace {

// Eight warps: a head of 128 dimensions in a page of 16 positions gives each thread eight elements.
constexpr int kThreads = 256;
constexpr int64_t kMaxGrid = INT32_MAX;

template <class Op>
__global__ void __launch_bounds__(kThreads) Run(const Op op) {
  for (int64_t block = blockIdx.x; block < op.NumBlocks(); block += gridDim.x) op(block, threadIdx.x, kThreads);
}

}  // namespace

template <class Op>
cudaError_t Launch(const Op& op, cudaStream_t stream) {
  const int64_t blocks = std::min(op.NumBlocks(), kMaxGrid);
  if (blocks == 0) return cudaSuccess;  // an empty grid is an error to CUDA
  Run<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(op);
  return cudaGetLastError();
}

template cudaError_t Launch(const CopyPages<Word<2>>&, cudaStream_t);
template cudaError_t Launch(const CopyPages<Word<16>>&, cudaStream_t);
template cudaError_t Launch(const MoveKv<uint16_t, true>&, cudaStream_t);
template cudaError_t Launch(const MoveKv<uint16_t, false>&, cudaStream_t);
template cudaError_t Launch(const MoveKv<uint32_t, true>&, cudaStream_t);
template cudaError_t Launch(const MoveKv<uint32_t, false>&, cudaStream_t);

}  // namespace layerskip
