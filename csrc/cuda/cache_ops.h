// The cache's data movement as torch ops, for any device: checks at the edge, then the bodies of page_ops.h.
//
// Sizes, dtypes and devices are checked here, before anything runs. Pages are data and may live on a device, so the
// bodies check those, one by one, into `error`. What each op means is said in layerskip_kernels/ops/cache_ops.py.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <cstdint>
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

// k [L, P, G, K, S] with v [L, P, G, S, K] beside it: their sizes.
struct CacheSizes {
  int64_t num_layers, num_pages, num_heads, head_dim, page_size;
};

inline CacheSizes CheckKv(const Tensor& k, const Tensor& v) {
  TORCH_CHECK_VALUE(k.dim() == 5 && k.numel() > 0, "k must have the shape [L, P, G, K, S], none of them 0, got ",
                    k.sizes());
  CheckModelDtype("k", k.scalar_type());
  std::vector<int64_t> sizes = k.sizes().vec();
  CheckCacheTensor("k", k, k.scalar_type(), k.device(), sizes);
  std::swap(sizes[3], sizes[4]);
  CheckCacheTensor("v", v, k.scalar_type(), k.device(), sizes);
  return {k.size(0), k.size(1), k.size(2), k.size(3), k.size(4)};
}

inline CacheView CheckCache(const Tensor& k, const Tensor& v, const Tensor& hidden) {
  const CacheSizes sizes = CheckKv(k, v);
  CheckCacheTensor("hidden", hidden, k.scalar_type(), k.device(), {sizes.num_pages, sizes.page_size, -1});
  const int64_t bytes = k.element_size();
  return {static_cast<char*>(k.mutable_data_ptr()),
          static_cast<char*>(v.mutable_data_ptr()),
          static_cast<char*>(hidden.mutable_data_ptr()),
          sizes.num_layers,
          sizes.num_pages,
          sizes.num_heads * sizes.head_dim * sizes.page_size * bytes,
          sizes.page_size * hidden.size(2) * bytes};
}

// Positions of a sequence outside the cache, [L, length, G, K]: on its device or in host memory that it reaches.
inline void CheckPositions(const char* name, const Tensor& positions, const Tensor& cache, const CacheSizes& sizes,
                           int64_t length) {
  CheckCacheTensor(name, positions, cache.scalar_type(), positions.is_cpu() ? positions.device() : cache.device(),
                   {sizes.num_layers, length, sizes.num_heads, sizes.head_dim});
  TORCH_CHECK_VALUE(positions.device() == cache.device() || positions.numel() == 0 || positions.is_pinned(), name,
                    " must be in pinned host memory, which ", cache.device(),
                    " can reach; allocate it with pin_memory=True");
}

inline bool IsAligned16(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && bytes % 16 == 0;
}

// ---- the ops ----

// Device: made from a tensor on the device that works; Run(op) runs all blocks of an op of page_ops.h there.
template <class Device>
struct CacheOps {
  static void copy_pages(const Tensor& sources, const Tensor& targets, const Tensor& k, const Tensor& v,
                         const Tensor& hidden, const Tensor& error) {
    const CacheView cache = CheckCache(k, v, hidden);
    CheckCacheTensor("sources", sources, at::kInt, k.device(), {-1});
    CheckCacheTensor("targets", targets, at::kInt, k.device(), {sources.size(0)});
    const bool wide = IsAligned16(cache.k, cache.kv_bytes) && IsAligned16(cache.v, cache.kv_bytes) &&
                      IsAligned16(cache.hidden, cache.hidden_bytes);
    if (wide)
      Copy<Word<16>>(cache, sources, targets, CheckError(error, k.device()));
    else
      Copy<Word<2>>(cache, sources, targets, CheckError(error, k.device()));
  }

  static void gather_kv(const Tensor& pages, const Tensor& k_cache, const Tensor& v_cache, const Tensor& k,
                        const Tensor& v, const Tensor& error) {
    Move<true>(pages, 0, k_cache, v_cache, k, v, error);
  }

  static void scatter_kv(const Tensor& pages, int64_t start, const Tensor& k, const Tensor& v, const Tensor& k_cache,
                         const Tensor& v_cache, const Tensor& error) {
    Move<false>(pages, start, k_cache, v_cache, k, v, error);
  }

  static void Register(torch::Library& m) {
    m.impl("copy_pages", &copy_pages);
    m.impl("gather_kv", &gather_kv);
    m.impl("scatter_kv", &scatter_kv);
  }

 private:
  template <class W>
  static void Copy(const CacheView& cache, const Tensor& sources, const Tensor& targets, int64_t* error) {
    const int32_t *from = sources.const_data_ptr<int32_t>(), *to = targets.const_data_ptr<int32_t>();
    Device(sources).Run(CopyPages<W>{cache, from, to, sources.size(0), error});
  }

  template <bool kOut>
  static void Move(const Tensor& pages, int64_t start, const Tensor& k_cache, const Tensor& v_cache, const Tensor& k,
                   const Tensor& v, const Tensor& error) {
    const CacheSizes sizes = CheckKv(k_cache, v_cache);
    CheckCacheTensor("pages", pages, at::kInt, k_cache.device(), {-1});
    CheckPositions("the positions of k", k, k_cache, sizes, -1);
    CheckPositions("the positions of v", v, k_cache, sizes, k.size(1));
    TORCH_CHECK_VALUE(0 <= start && start <= k.size(1), "start must be in 0..", k.size(1), ", got ", start);
    int64_t* record = CheckError(error, k_cache.device());
    if (k.element_size() == 2)
      MoveAs<uint16_t, kOut>(pages, start, k_cache, v_cache, k, v, sizes, record);
    else
      MoveAs<uint32_t, kOut>(pages, start, k_cache, v_cache, k, v, sizes, record);
  }

  // Only one of the two ends is written; the op takes both without const.
  template <class T>
  static T* Bits(const Tensor& tensor, bool written) {
    return static_cast<T*>(written ? tensor.mutable_data_ptr() : const_cast<void*>(tensor.const_data_ptr()));
  }

  template <class T, bool kOut>
  static void MoveAs(const Tensor& pages, int64_t start, const Tensor& k_cache, const Tensor& v_cache, const Tensor& k,
                     const Tensor& v, const CacheSizes& sizes, int64_t* error) {
    Device(k_cache).Run(MoveKv<T, kOut>{Bits<T>(k_cache, !kOut), Bits<T>(v_cache, !kOut),
                                        pages.const_data_ptr<int32_t>(), Bits<T>(k, kOut), Bits<T>(v, kOut), start,
                                        k.size(1), pages.size(0), sizes.num_layers, sizes.num_pages, sizes.num_heads,
                                        sizes.head_dim, sizes.page_size, error});
  }
};

}  // namespace layerskip
