// Binds the cache ops to torch for CUDA tensors. `import layerskip_kernels._cuda` loads this library, and that
// registers them; the module itself is empty. Nothing here asks for a device, so it loads without a driver.
#include "cache_ops.h"

#include <Python.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "cache_kernels.h"

namespace layerskip {

namespace {

// A tensor's device, made current, and the stream torch works on there.
class Cuda {
 public:
  explicit Cuda(const Tensor& tensor)
      : guard_(tensor.device()),
        stream_(c10::impl::VirtualGuardImpl(tensor.device().type()).getStream(tensor.device())) {}

  template <class Op>
  void Run(const Op& op) const {
    const cudaError_t error = Launch(op, static_cast<cudaStream_t>(stream_.native_handle()));
    TORCH_CHECK(error == cudaSuccess, "launching a cache op failed: ", cudaGetErrorString(error));
  }

 private:
  c10::DeviceGuard guard_;
  c10::Stream stream_;
};

}  // namespace

TORCH_LIBRARY_IMPL(layerskip, CUDA, m) { CacheOps<Cuda>::Register(m); }

}  // namespace layerskip

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__cuda() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
