// Memory in huge pages: decoding streams hundreds of megabytes per token, and with 4 KiB pages the page walks alone
// cost a quarter of the bandwidth (docs/performance.md). It goes back to the system when it is freed, which holes in
// the heap do not.
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "ops.h"

namespace layerskip {

Tensor empty_huge(int64_t num_bytes) {
  constexpr int64_t kMost = int64_t{1} << 47;  // the addresses that a process has
  TORCH_CHECK_VALUE(0 <= num_bytes && num_bytes <= kMost, "num_bytes must be in 0..", kMost, ", got ", num_bytes);
#if defined(__linux__)
  constexpr int64_t kHugePage = int64_t{1} << 21;
  if (num_bytes >= kHugePage / 8) {
    // One page more than needed, so that the tensor can begin at a huge page; untouched pages take no memory.
    const int64_t mapped = (num_bytes + kHugePage - 1) / kHugePage * kHugePage + kHugePage;
    void* base = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TORCH_CHECK(base != MAP_FAILED, "no memory for ", num_bytes, " bytes");
    const auto address = reinterpret_cast<uintptr_t>(base);
    void* start = reinterpret_cast<void*>((address + kHugePage - 1) / kHugePage * kHugePage);
    madvise(start, mapped - kHugePage, MADV_HUGEPAGE);  // a wish: without it the memory is as good, only slower
    return at::from_blob(start, {num_bytes}, [base, mapped](void*) { munmap(base, mapped); }, at::kByte);
  }
#endif
  return at::empty({num_bytes}, at::kByte);
}

}  // namespace layerskip
