// Which instruction set's kernels run: the best one this machine has, or the one asked for.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace layerskip {

const Kernels* PortableKernels();
#if defined(__x86_64__)
const Kernels* Avx2Kernels();
const Kernels* Avx512Kernels();
const Kernels* Avx512Bf16Kernels();  // of bf16 alone
bool PairsAreFoldedInOrder();
#endif
#if defined(LAYERSKIP_FREE_ORDER_BUILD)
const Kernels* FreeOrderAvx2Kernels();
const Kernels* FreeOrderAvx512Kernels();
const Kernels* FreeOrderAvx512Bf16Kernels();
#endif

namespace {

#if defined(LAYERSKIP_FREE_ORDER_BUILD)
std::atomic<bool> free_order{false};
#endif

const Kernels& Table(InstructionSet set, Dtype dtype) {
  const auto i = static_cast<int>(dtype);
  const bool pairs = set == InstructionSet::kAvx512Bf16 && dtype == Dtype::kBFloat16;
#if defined(LAYERSKIP_FREE_ORDER_BUILD)
  if (free_order) {
    if (pairs) return *FreeOrderAvx512Bf16Kernels();
    return set >= InstructionSet::kAvx512 ? FreeOrderAvx512Kernels()[i] : FreeOrderAvx2Kernels()[i];
  }
#endif
#if defined(__x86_64__)
  if (pairs) return *Avx512Bf16Kernels();
  if (set >= InstructionSet::kAvx512) return Avx512Kernels()[i];
  if (set == InstructionSet::kAvx2) return Avx2Kernels()[i];
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
  constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512_bf16"};
  return kNames[static_cast<int>(set)];
}

bool IsSupported(InstructionSet set) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (set == InstructionSet::kAvx2) return avx2;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (set == InstructionSet::kAvx512) return avx512;
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

#if defined(LAYERSKIP_FREE_ORDER_BUILD)
void SetFreeOrder(bool on) {
  if (on && !IsSupported(InstructionSet::kAvx2)) throw std::invalid_argument("kernels of free order need AVX2");
  free_order = on;
}
#endif

const Kernels& KernelsFor(Dtype dtype) { return Table(CurrentInstructionSet(), dtype); }

}  // namespace layerskip
