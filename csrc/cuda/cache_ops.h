// The cache's data movement as torch ops, for any device: checks at the edge, then the bodies of page_ops.h.
//
// Sizes, dtypes and devices are checked here, before anything runs. Slots, pages, positions and counts are data and
// may live on a device, so the bodies check those, one by one, into `error`. What each op means is said in
// layerskip_kernels/cache_ops.py.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <cstdint>
#include <tuple>
#include <vector>

#include "page_ops.h"

namespace layerskip {

using at::Tensor;

// ---- checks ----

// -1 among the sizes: any.
inline void CheckCacheTensor(const char* name, const Tensor& tensor, at::ScalarType dtype, at::Device device,
                             const std::vector<int64_t>& sizes) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == dtype, name, " must be ", dtype, ", got ", tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.device() == device, name, " must be on ", device, " as k is, got ", tensor.device());
  bool equal = tensor.dim() == static_cast<int64_t>(sizes.size());
  for (size_t i = 0; equal && i < sizes.size(); ++i) equal = sizes[i] == -1 || sizes[i] == tensor.size(i);
  TORCH_CHECK_VALUE(equal, name, " must have the shape ", c10::IntArrayRef(sizes), " (-1: any), got ", tensor.sizes());
  TORCH_CHECK_VALUE(tensor.is_contiguous(), name, " must be contiguous; call .contiguous() first");
}

inline void CheckModelDtype(const char* name, at::ScalarType dtype) {
  TORCH_CHECK_TYPE(dtype == at::kBFloat16 || dtype == at::kHalf || dtype == at::kFloat, name,
                   " must be bfloat16, float16 or float32, got ", dtype);
}

inline int64_t* CheckError(const Tensor& error, at::Device device) {
  CheckCacheTensor("error", error, at::kLong, device, {1});
  return error.mutable_data_ptr<int64_t>();
}

// k [..., P, G, K, S] with v [..., P, G, S, K] beside it: their sizes, `lead` dimensions before P.
struct PageSizes {
  int64_t num_pages, num_heads, head_dim, page_size;
};

inline PageSizes CheckPages(const Tensor& k, const Tensor& v, int64_t lead) {
  const char* shape = lead == 0 ? "[P, G, K, S]" : "[L, P, G, K, S]";
  TORCH_CHECK_VALUE(k.dim() == lead + 4 && k.numel() > 0, "k must have the shape ", shape, ", none of them 0, got ",
                    k.sizes());
  CheckModelDtype("k", k.scalar_type());
  std::vector<int64_t> sizes = k.sizes().vec();
  CheckCacheTensor("k", k, k.scalar_type(), k.device(), sizes);
  std::swap(sizes[lead + 2], sizes[lead + 3]);
  CheckCacheTensor("v", v, k.scalar_type(), k.device(), sizes);
  return {k.size(lead), k.size(lead + 1), k.size(lead + 2), k.size(lead + 3)};
}

// A move takes its ends without const, and writes only to one of them.
inline char* Bytes(const Tensor& tensor, bool written) {
  return static_cast<char*>(written ? tensor.mutable_data_ptr() : const_cast<void*>(tensor.const_data_ptr()));
}

inline CacheView CheckCache(const Tensor& k, const Tensor& v, const Tensor& hidden, bool written) {
  const PageSizes sizes = CheckPages(k, v, 1);
  CheckCacheTensor("hidden", hidden, k.scalar_type(), k.device(), {sizes.num_pages, sizes.page_size, -1});
  const int64_t bytes = k.element_size();
  return {Bytes(k, written),
          Bytes(v, written),
          Bytes(hidden, written),
          k.size(0),
          sizes.num_pages,
          sizes.num_heads * sizes.head_dim * sizes.page_size * bytes,
          hidden.size(1) * hidden.size(2) * bytes};
}

inline bool IsAligned16(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && bytes % 16 == 0;
}

// ---- the ops ----

// Device: made from a tensor on the device that works; Run(op) runs all blocks of an op of page_ops.h there.
template <class Device>
struct CacheOps {
  static void append_kv(const Tensor& k, const Tensor& v, const Tensor& slot_mapping, const Tensor& k_pages,
                        const Tensor& v_pages, const Tensor& error) {
    const PageSizes sizes = CheckPages(k_pages, v_pages, 0);
    const at::Device device = k_pages.device();
    CheckCacheTensor("slot_mapping", slot_mapping, at::kLong, device, {-1});
    const std::vector<int64_t> rows = {slot_mapping.size(0), sizes.num_heads, sizes.head_dim};
    CheckCacheTensor("the rows of k", k, k_pages.scalar_type(), device, rows);
    CheckCacheTensor("the rows of v", v, k_pages.scalar_type(), device, rows);
    if (k.element_size() == 2)
      Append<uint16_t>(k, v, slot_mapping, k_pages, v_pages, sizes, CheckError(error, device));
    else
      Append<uint32_t>(k, v, slot_mapping, k_pages, v_pages, sizes, CheckError(error, device));
  }

  static void copy_pages(const Tensor& sources, const Tensor& targets, const Tensor& k, const Tensor& v,
                         const Tensor& hidden, const Tensor& error) {
    CheckCacheTensor("sources", sources, at::kInt, k.device(), {-1});
    CheckCacheTensor("targets", targets, at::kInt, k.device(), {sources.size(0)});
    Move(sources, &targets, nullptr, k, v, hidden, Direction::kPageToPage, error);
  }

  static void swap_out(const Tensor& pages, const Tensor& k, const Tensor& v, const Tensor& hidden,
                       const Tensor& records, const Tensor& error) {
    Move(pages, nullptr, &records, k, v, hidden, Direction::kPageToRecord, error);
  }

  static void swap_in(const Tensor& pages, const Tensor& records, const Tensor& k, const Tensor& v,
                      const Tensor& hidden, const Tensor& error) {
    Move(pages, nullptr, &records, k, v, hidden, Direction::kRecordToPage, error);
  }

  static std::tuple<Tensor, Tensor> gather_kv(const Tensor& pages, int64_t length, const Tensor& k, const Tensor& v,
                                              const Tensor& error) {
    const PageSizes sizes = CheckPages(k, v, 1);
    CheckCacheTensor("pages", pages, at::kInt, k.device(), {-1});
    TORCH_CHECK_VALUE(length >= 0, "length must be 0 or more, got ", length);
    const Tensor k_out = at::empty({k.size(0), length, sizes.num_heads, sizes.head_dim}, k.options());
    const Tensor v_out = at::empty_like(k_out);
    if (k.element_size() == 2)
      Gather<uint16_t>(pages, k, v, k_out, v_out, sizes, CheckError(error, k.device()));
    else
      Gather<uint32_t>(pages, k, v, k_out, v_out, sizes, CheckError(error, k.device()));
    return {k_out, v_out};
  }

  static Tensor make_slot_mapping(const Tensor& block_table, const Tensor& positions, const Tensor& query_start_loc,
                                  int64_t num_pages, int64_t page_size, const Tensor& error) {
    const at::Device device = block_table.device();
    CheckCacheTensor("block_table", block_table, at::kInt, device, {-1, -1});
    CheckCacheTensor("positions", positions, at::kLong, device, {-1});
    CheckCacheTensor("query_start_loc", query_start_loc, at::kInt, device, {block_table.size(0) + 1});
    TORCH_CHECK_VALUE(num_pages >= 1 && page_size >= 1, "num_pages and page_size must be at least 1, got ", num_pages,
                      " and ", page_size);
    const Tensor slots = at::empty_like(positions);
    Device(positions).Run(MakeSlotMapping{block_table.const_data_ptr<int32_t>(), positions.const_data_ptr<int64_t>(),
                                          query_start_loc.const_data_ptr<int32_t>(), slots.mutable_data_ptr<int64_t>(),
                                          positions.size(0), block_table.size(0), block_table.size(1), num_pages,
                                          page_size, CheckError(error, device)});
    return slots;
  }

  static void commit_lengths(const Tensor& num_accepted, const Tensor& num_drafts, const Tensor& lengths,
                             int64_t max_length, const Tensor& error) {
    const at::Device device = lengths.device();
    CheckCacheTensor("lengths", lengths, at::kLong, device, {-1});
    CheckCacheTensor("num_accepted", num_accepted, at::kLong, device, {lengths.size(0)});
    CheckCacheTensor("num_drafts", num_drafts, at::kLong, device, {lengths.size(0)});
    Device(lengths).Run(CommitLengths{num_accepted.const_data_ptr<int64_t>(), num_drafts.const_data_ptr<int64_t>(),
                                      lengths.mutable_data_ptr<int64_t>(), lengths.size(0), max_length,
                                      CheckError(error, device)});
  }

  static void Register(torch::Library& m) {
    m.impl("append_kv", &append_kv);
    m.impl("copy_pages", &copy_pages);
    m.impl("swap_out", &swap_out);
    m.impl("swap_in", &swap_in);
    m.impl("gather_kv", &gather_kv);
    m.impl("make_slot_mapping", &make_slot_mapping);
    m.impl("commit_lengths", &commit_lengths);
  }

 private:
  template <class T>
  static const T* Bits(const Tensor& tensor) {
    return static_cast<const T*>(tensor.const_data_ptr());
  }

  template <class T>
  static T* MutableBits(const Tensor& tensor) {
    return static_cast<T*>(tensor.mutable_data_ptr());
  }

  template <class T>
  static void Append(const Tensor& k, const Tensor& v, const Tensor& slots, const Tensor& k_pages,
                     const Tensor& v_pages, const PageSizes& sizes, int64_t* error) {
    Device(k_pages).Run(AppendKv<T>{Bits<T>(k), Bits<T>(v), slots.const_data_ptr<int64_t>(), MutableBits<T>(k_pages),
                                    MutableBits<T>(v_pages), k.size(0), sizes.num_pages, sizes.num_heads,
                                    sizes.head_dim, sizes.page_size, error});
  }

  template <class T>
  static void Gather(const Tensor& pages, const Tensor& k, const Tensor& v, const Tensor& k_out, const Tensor& v_out,
                     const PageSizes& sizes, int64_t* error) {
    Device(k).Run(GatherKv<T>{Bits<T>(k), Bits<T>(v), pages.const_data_ptr<int32_t>(), MutableBits<T>(k_out),
                              MutableBits<T>(v_out), k_out.size(1), pages.size(0), k.size(0), sizes.num_pages,
                              sizes.num_heads, sizes.head_dim, sizes.page_size, error});
  }

  // Either `targets` or `records` is there.
  static void Move(const Tensor& pages, const Tensor* targets, const Tensor* records, const Tensor& k, const Tensor& v,
                   const Tensor& hidden, Direction direction, const Tensor& error) {
    const CacheView cache = CheckCache(k, v, hidden, direction != Direction::kPageToRecord);
    CheckCacheTensor("pages", pages, at::kInt, k.device(), {-1});
    if (records != nullptr) {
      CheckCacheTensor("records", *records, k.scalar_type(), at::kCPU,
                       {pages.size(0), cache.RecordBytes() / k.element_size()});
      TORCH_CHECK_VALUE(k.is_cpu() || records->is_pinned(), "records must be in pinned host memory, which ", k.device(),
                        " can reach; allocate it with pin_memory=True");
    }
    char* first_record = records == nullptr ? nullptr : Bytes(*records, direction == Direction::kPageToRecord);
    const int32_t* target_pages = targets == nullptr ? nullptr : targets->const_data_ptr<int32_t>();
    const bool wide = IsAligned16(cache.k, cache.kv_bytes) && IsAligned16(cache.v, cache.kv_bytes) &&
                      IsAligned16(cache.hidden, cache.hidden_bytes) && IsAligned16(first_record, 0);
    if (wide)
      Device(k).Run(MovePages<Word<16>>{cache, pages.const_data_ptr<int32_t>(), target_pages, first_record, direction,
                                        pages.size(0), CheckError(error, k.device())});
    else
      Device(k).Run(MovePages<Word<2>>{cache, pages.const_data_ptr<int32_t>(), target_pages, first_record, direction,
                                       pages.size(0), CheckError(error, k.device())});
  }
};

}  // namespace layerskip
