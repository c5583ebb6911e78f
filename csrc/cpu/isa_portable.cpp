// The kernels in plain C++: any machine, and the yardstick for the others.
#define LAYERSKIP_PORTABLE
#include "kernels.inl"

namespace layerskip {
const Kernels* PortableKernels() { return kTables; }
}  // namespace layerskip
