// Weights as the kernels read them: packed once when a model is made, and rows of them copied.
#include <ATen/ops/zeros.h>

#include "checks.h"
#include "ops.h"
#include "parallel.h"

namespace layerskip {

Tensor pack_weight(const Tensor& weight) {
  const at::ScalarType dtype = weight.scalar_type();
  const bool in_blocks = dtype == at::kByte;
  if (in_blocks) {
    CheckTensor("weight", weight, dtype, {kAny, kAny, kAny});
  } else {
    CheckTensor("weight", weight, dtype, {kAny, kAny});
  }
  const int64_t n = weight.size(0), groups = (n + kGroup - 1) / kGroup;
  WeightView view{weight.const_data_ptr(), SegmentType(dtype)};
  int64_t k = weight.size(1);
  std::vector<int64_t> sizes = {groups, k, kGroup};
  if (view.type != WeightType::kDense) {
    k -= kScaleBytes / weight.element_size();
    TORCH_CHECK_VALUE(k >= 0 && k % kBlock == 0, "a weight of ", dtype, " holds whole blocks of ", kBlock, " and ",
                      kScaleBytes, " bytes of scales in each row, got ", weight.size(1),
                      " numbers; use quantise_int8 or quantise_int15");
  } else if (in_blocks) {
    const BlockLayout* layout = LayoutOfFileBytes(weight.size(2));
    TORCH_CHECK_VALUE(layout != nullptr, "weight has blocks of ", weight.size(2), " bytes, which no known type has");
    view.type = layout->type;
    k *= layout->size;
    sizes[2] = layout->image_bytes * kGroup;
  }
  Tensor packed = empty_huge(sizes[0] * sizes[1] * sizes[2] * weight.element_size()).view(dtype).view(sizes);
  void* to = packed.mutable_data_ptr();
  const Kernels* dense = view.type == WeightType::kDense ? &KernelsFor(ModelDtype(dtype)) : nullptr;
  InParallel([&](Team& team) {
    team.ForEach(groups, 64, [&](int64_t begin, int64_t end) {
      if (dense != nullptr) {
        dense->pack(view.data, n, k, begin, end, to);
      } else {
        PackQuantised(view, n, k, begin, end, to);
      }
    });
  });
  return packed;
}

Tensor select_rows(const Tensor& weight, const Tensor& rows) {
  const at::ScalarType dtype = weight.scalar_type();
  CheckTensor("weight", weight, dtype, {kAny, kAny, kAny});
  CheckTensor("rows", rows, at::kLong, {kAny});
  const int64_t* row = rows.const_data_ptr<int64_t>();
  CheckRange("rows", row, rows.numel(), 0, weight.size(0) * kGroup);
  int64_t k = weight.size(1);
  const bool by_segment = SegmentType(dtype) != WeightType::kDense;
  if (by_segment) k = std::max<int64_t>(0, k - kScaleBytes / weight.element_size());
  if (const BlockLayout* layout = LayoutOfPackedBytes(weight.size(2)); dtype == at::kByte && layout != nullptr)
    k *= layout->size;
  const bool is_dense = dtype != at::kByte && !by_segment;
  const WeightView view = CheckPacked("weight", weight, dtype, std::max<int64_t>(1, weight.size(0) * kGroup), k);
  const int64_t groups = (rows.numel() + kGroup - 1) / kGroup;
  Tensor selected = at::zeros({groups, weight.size(1), weight.size(2)}, weight.options());
  for (int64_t i = 0; i < rows.numel(); ++i) {
    if (is_dense) {
      KernelsFor(ModelDtype(dtype)).copy_row(view.data, row[i], k, i, selected.mutable_data_ptr());
    } else {
      CopyQuantisedRow(view, row[i], k, i, selected.mutable_data_ptr());
    }
  }
  return selected;
}

}  // namespace layerskip
