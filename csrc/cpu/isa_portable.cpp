// The kernels in plain C++: any machine, and the yardstick for the others.
#define LAYERSKIP_PORTABLE
#include "blocks.inl"
#include "kernels.inl"

namespace layerskip {
const Kernels* PortableKernels() { return kTables; }
const BlockKernels& PortableBlockKernels() { return kBlockTable; }
}  // namespace layerskip
