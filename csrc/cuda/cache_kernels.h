// Launches the ops of page_ops.h on a CUDA device. Torch-free: pointers and sizes in the op, and a stream.
#pragma once

#include <cuda_runtime_api.h>

#include "page_ops.h"

namespace layerskip {

// Asynchronous: what the kernel refuses is in the op's error record once the stream has run it. Returns the launch's
// own error. All pointers of the op must be the device's, or of pinned host memory.
template <class Op>
cudaError_t Launch(const Op& op, cudaStream_t stream);

}  // namespace layerskip
