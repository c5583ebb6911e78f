// Which instruction set's kernels run: the best one this machine has, or the one asked for.
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace layerskip {

const Kernels* PortableKernels();
const BlockKernels& PortableBlockKernels();
#if defined(__x86_64__)
const Kernels* Avx2Kernels();
const BlockKernels& Avx2BlockKernels();
const BlockKernels& AvxVnniBlockKernels();
const Kernels* Avx512Kernels();
const BlockKernels& Avx512BlockKernels();
const BlockKernels& Avx512VnniBlockKernels();
const Kernels* Avx512Bf16Kernels();  // of bf16 alone
bool PairsAreFoldedInOrder();
#endif

namespace {

const Kernels& Table(InstructionSet set, Dtype dtype) {
  const auto i = static_cast<int>(dtype);
  const bool pairs = set == InstructionSet::kAvx512Bf16 && dtype == Dtype::kBFloat16;
#if defined(__x86_64__)
  if (pairs) return *Avx512Bf16Kernels();
  if (set >= InstructionSet::kAvx512) return Avx512Kernels()[i];
  if (set >= InstructionSet::kAvx2) return Avx2Kernels()[i];
#endif
  return PortableKernels()[i];
}

InstructionSet InitialInstructionSet() {
  const char* asked = std::getenv("LAYERSKIP_ISA");
  for (int i = kNumInstructionSets - 1; i >= 0; --i) {
    const auto set = static_cast<InstructionSet>(i);
    if (!IsSupported(set)) continue;
    if (asked == nullptr || std::strcmp(asked, InstructionSetName(set)) == 0) return set;
  }
  throw std::invalid_argument(
      std::string("LAYERSKIP_ISA is '") + asked +
      "', which this machine lacks; unset it, or see `layerskip doctor` for the supported sets");
}

std::atomic<InstructionSet>& Current() {
  static std::atomic<InstructionSet> current{InitialInstructionSet()};
  return current;
}

}  // namespace

const char* InstructionSetName(InstructionSet set) {
  constexpr const char* kNames[] = {"portable", "avx2", "avx_vnni", "avx512", "avx512_vnni", "avx512_bf16"};
  return kNames[static_cast<int>(set)];
}

#if defined(__x86_64__)
namespace {
// GCC's __builtin_cpu_supports does not know the name: bit 4 of eax of leaf 7.1.
bool HasAvxVnni() {
  unsigned int eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax & (1u << 4)) != 0;
}
}  // namespace
#endif

bool IsSupported(InstructionSet set) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (set == InstructionSet::kAvx2) return avx2;
  if (set == InstructionSet::kAvxVnni) return avx2 && HasAvxVnni();
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (set == InstructionSet::kAvx512) return avx512;
  if (set == InstructionSet::kAvx512Vnni) return avx512 && __builtin_cpu_supports("avx512vnni");
  if (set == InstructionSet::kAvx512Bf16) {
    static const bool supported = avx512 && __builtin_cpu_supports("avx512vbmi") &&
                                  __builtin_cpu_supports("avx512bf16") && PairsAreFoldedInOrder();
    return supported;
  }
#endif
  return set == InstructionSet::kPortable;
}

InstructionSet CurrentInstructionSet() { return Current(); }

void SetInstructionSet(InstructionSet set) {
  if (!IsSupported(set))
    throw std::invalid_argument(std::string("this machine has no ") + InstructionSetName(set) + " instructions");
  Current() = set;
}

const Kernels& KernelsFor(Dtype dtype) { return Table(CurrentInstructionSet(), dtype); }

const BlockKernels& CurrentBlockKernels() {
  const InstructionSet set = CurrentInstructionSet();
#if defined(__x86_64__)
  const bool vnni = set == InstructionSet::kAvx512Vnni || IsSupported(InstructionSet::kAvx512Vnni);
  if (set >= InstructionSet::kAvx512Vnni && vnni) return Avx512VnniBlockKernels();
  if (set >= InstructionSet::kAvx512) return Avx512BlockKernels();
  if (set == InstructionSet::kAvxVnni) return AvxVnniBlockKernels();
  if (set == InstructionSet::kAvx2) return Avx2BlockKernels();
#endif
  return PortableBlockKernels();
}

}  // namespace layerskip
