// The fused ops on tensors: checks, then one parallel region around the phases of layers.h.
#include "ops.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include "checks.h"
#include "layers.h"

namespace layerskip {

namespace {

// A tensor of the model's dtype, widened to the fp32 values the kernels work on.
Buffer Widened(const Kernels& kernels, const Tensor& tensor) {
  Buffer buffer(tensor.numel());
  kernels.widen(tensor.const_data_ptr(), tensor.numel(), buffer);
  return buffer;
}

Tensor Narrowed(const Kernels& kernels, const float* values, at::IntArrayRef sizes, at::ScalarType dtype) {
  Tensor tensor = at::empty(sizes, dtype);
  kernels.narrow(values, tensor.numel(), tensor.mutable_data_ptr());
  return tensor;
}

Tensor Elementwise(const Tensor& x, void (*Kernels::*op)(const float*, int64_t, float*)) {
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat, "x must be float32, got ", x.scalar_type());
  const Tensor input = x.contiguous();
  Tensor out = at::empty_like(input);
  const ContractFloatMode mode;
  (KernelsFor(Dtype::kFloat32).*op)(input.const_data_ptr<float>(), input.numel(), out.mutable_data_ptr<float>());
  return out;
}

// [T, in] -> [T, out] plus the residual [T, out]: both residual ops.
Tensor ResidualOp(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, const Tensor& residual) {
  const at::ScalarType dtype = residual.scalar_type();
  CheckTensor("residual", residual, dtype, {kAny, kAny});
  const int64_t rows = residual.size(0), size = residual.size(1);
  CheckTensor("the first argument", input, dtype, {rows, kAny});
  const int64_t input_size = input.size(1);
  const WeightView view = CheckPacked("the weight", weight, dtype, size, input_size);
  const void* bias_data = CheckBias("out_bias", bias, dtype, size);
  const Kernels& kernels = KernelsFor(ModelDtype(dtype));
  Buffer x = Widened(kernels, input), y = Widened(kernels, residual), projected(rows * size);
  InParallel(
      [&](Team& team) { LinearResidual(team, kernels, rows, x, input_size, view, bias_data, size, projected, y); });
  return Narrowed(kernels, y, residual.sizes(), dtype);
}

}  // namespace

Tensor exp(const Tensor& x) { return Elementwise(x, &Kernels::exp); }
Tensor log(const Tensor& x) { return Elementwise(x, &Kernels::log); }
Tensor silu(const Tensor& x) { return Elementwise(x, &Kernels::silu); }
Tensor inverse_sqrt(const Tensor& x) { return Elementwise(x, &Kernels::inverse_sqrt); }

Tensor pack_weight(const Tensor& weight) {
  const at::ScalarType dtype = weight.scalar_type();
  const bool is_int8 = dtype == at::kChar;
  CheckTensor("weight", weight, dtype, {kAny, kAny});
  const Kernels& kernels = KernelsFor(is_int8 ? Dtype::kFloat32 : ModelDtype(dtype));
  const int64_t n = weight.size(0), k = weight.size(1) - (is_int8 ? kScaleRows : 0);
  TORCH_CHECK_VALUE(k >= 0, "an int8 weight holds ", kScaleRows, " bytes of scales in each row; use quantize_int8");
  const int64_t groups = (n + kGroup - 1) / kGroup;
  Tensor packed = empty_huge(groups * weight.size(1) * kGroup * weight.element_size()).view(dtype);
  packed = packed.view({groups, weight.size(1), kGroup});
  const WeightView view{weight.const_data_ptr(), is_int8};
  InParallel([&](Team& team) {
    team.ForEach(groups, 64,
                 [&](int64_t begin, int64_t end) { kernels.pack(view, n, k, begin, end, packed.mutable_data_ptr()); });
  });
  return packed;
}

Tensor select_rows(const Tensor& weight, const Tensor& rows) {
  const at::ScalarType dtype = weight.scalar_type();
  const bool is_int8 = dtype == at::kChar;
  CheckTensor("weight", weight, dtype, {kAny, kAny, kGroup});
  CheckTensor("rows", rows, at::kLong, {kAny});
  const int64_t* row = rows.const_data_ptr<int64_t>();
  CheckRange("rows", row, rows.numel(), 0, weight.size(0) * kGroup);
  const Kernels& kernels = KernelsFor(is_int8 ? Dtype::kFloat32 : ModelDtype(dtype));
  const int64_t k = weight.size(1) - (is_int8 ? kScaleRows : 0);
  Tensor selected = at::zeros({(rows.numel() + kGroup - 1) / kGroup, weight.size(1), kGroup}, weight.options());
  for (int64_t i = 0; i < rows.numel(); ++i)
    kernels.copy_row({weight.const_data_ptr(), is_int8}, row[i], k, i, selected.mutable_data_ptr());
  return selected;
}

Tensor embed_tokens(const Tensor& tokens, const Tensor& embedding, int64_t hidden_size) {
  CheckTensor("tokens", tokens, at::kLong, {kAny});
  CheckTensor("embedding", embedding, embedding.scalar_type(), {kAny, hidden_size, kGroup});
  const int64_t* ids = tokens.const_data_ptr<int64_t>();
  CheckRange("tokens", ids, tokens.numel(), 0, embedding.size(0) * kGroup);
  const Kernels& kernels = KernelsFor(ModelDtype(embedding.scalar_type()));
  Buffer out(tokens.numel() * hidden_size);
  for (int64_t i = 0; i < tokens.numel(); ++i)
    kernels.embed(embedding.const_data_ptr(), ids[i], hidden_size, out + i * hidden_size);
  return Narrowed(kernels, out, {tokens.numel(), hidden_size}, embedding.scalar_type());
}

Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t out_features) {
  const at::ScalarType dtype = x.scalar_type();
  CheckTensor("x", x, dtype, {kAny, kAny});
  const WeightView view = CheckPacked("weight", weight, dtype, out_features, x.size(1));
  const void* bias_data = CheckBias("bias", bias, dtype, out_features);
  const Kernels& kernels = KernelsFor(ModelDtype(dtype));
  const int64_t rows = x.size(0), groups = weight.size(0);
  const Buffer input = Widened(kernels, x);
  Buffer out(rows * out_features);
  InParallel([&](Team& team) {
    team.ForEach(groups, 4, [&](int64_t begin, int64_t end) {
      kernels.linear(input, rows, x.size(1), view, bias_data, out_features, begin, end, true, out);
    });
  });
  return Narrowed(kernels, out, {rows, out_features}, dtype);
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  const at::ScalarType dtype = x.scalar_type();
  CheckTensor("x", x, dtype, {kAny, kAny});
  CheckTensor("weight", weight, dtype, {x.size(1)});
  const Kernels& kernels = KernelsFor(ModelDtype(dtype));
  const int64_t size = x.size(1);
  Buffer rows = Widened(kernels, x);
  const ContractFloatMode mode;
  for (int64_t r = 0; r < x.size(0); ++r)
    kernels.rms_norm(rows + r * size, weight.const_data_ptr(), size, static_cast<float>(eps), rows + r * size);
  return Narrowed(kernels, rows, x.sizes(), dtype);
}

Tensor norm_qkv_rope_append(const Tensor& hidden, const Tensor& norm_weight, const Tensor& wq, const Tensor& wk,
                            const Tensor& wv, const OptionalTensor& qkv_bias, const Tensor& cos, const Tensor& sin,
                            const Tensor& positions, const Tensor& slot_mapping, Tensor k_pages, Tensor v_pages,
                            int64_t num_heads, double eps) {
  const at::ScalarType dtype = hidden.scalar_type();
  CheckTensor("hidden", hidden, dtype, {kAny, kAny});
  CheckTensor("k_pages", k_pages, dtype, {kAny, kAny, kAny, kAny});
  const int64_t rows = hidden.size(0), pages = k_pages.size(0), page_size = k_pages.size(3);
  const Shape shape{hidden.size(1), 0, num_heads, k_pages.size(1), k_pages.size(2)};
  CheckTensor("v_pages", v_pages, dtype, {pages, shape.kv_heads, page_size, shape.head_dim});
  CheckTensor("norm_weight", norm_weight, dtype, {shape.hidden_size});
  LayerWeights weights{};
  weights.attn_norm = norm_weight.const_data_ptr();
  weights.wq = CheckPacked("wq", wq, dtype, shape.q_size(), shape.hidden_size);
  weights.wk = CheckPacked("wk", wk, dtype, shape.kv_size(), shape.hidden_size);
  weights.wv = CheckPacked("wv", wv, dtype, shape.kv_size(), shape.hidden_size);
  weights.qkv_bias = CheckBias("qkv_bias", qkv_bias, dtype, shape.q_size() + 2 * shape.kv_size());
  CheckTensor("cos", cos, at::kFloat, {kAny, shape.head_dim / 2});
  CheckTensor("sin", sin, at::kFloat, {cos.size(0), shape.head_dim / 2});
  CheckTensor("positions", positions, at::kLong, {rows});
  CheckTensor("slot_mapping", slot_mapping, at::kLong, {rows});
  CheckRange("positions", positions.const_data_ptr<int64_t>(), rows, 0, cos.size(0));
  CheckRange("slot_mapping", slot_mapping.const_data_ptr<int64_t>(), rows, -1, pages * page_size);
  const Kernels& kernels = KernelsFor(ModelDtype(dtype));
  Workspace ws(shape, rows, 0);
  kernels.widen(hidden.const_data_ptr(), hidden.numel(), ws.hidden);
  InParallel([&](Team& team) {
    NormQkvRopeAppend(team, kernels, shape, weights, static_cast<float>(eps), cos.const_data_ptr<float>(),
                      sin.const_data_ptr<float>(), rows, positions.const_data_ptr<int64_t>(),
                      slot_mapping.const_data_ptr<int64_t>(), k_pages.mutable_data_ptr(), v_pages.mutable_data_ptr(),
                      page_size, ws);
  });
  return Narrowed(kernels, ws.q, {rows, num_heads, shape.head_dim}, dtype);
}

Tensor paged_attention(const Tensor& q, const Tensor& k_pages, const Tensor& v_pages, const Tensor& block_table,
                       const Tensor& query_start_loc, const Tensor& positions, double scale) {
  const at::ScalarType dtype = q.scalar_type();
  CheckTensor("q", q, dtype, {kAny, kAny, kAny});
  const int64_t rows = q.size(0);
  CheckTensor("k_pages", k_pages, dtype, {kAny, kAny, q.size(2), kAny});
  const int64_t pages = k_pages.size(0), page_size = k_pages.size(3);
  const Shape shape{0, 0, q.size(1), k_pages.size(1), q.size(2)};
  TORCH_CHECK_VALUE(shape.num_heads % shape.kv_heads == 0, "q has ", shape.num_heads, " heads, expected a multiple of ",
                    shape.kv_heads, ", the KV heads");
  CheckTensor("v_pages", v_pages, dtype, {pages, shape.kv_heads, page_size, shape.head_dim});
  CheckTensor("positions", positions, at::kLong, {rows});
  CheckStarts(query_start_loc, rows);
  const int64_t sequences = query_start_loc.numel() - 1;
  CheckTensor("block_table", block_table, at::kInt, {sequences, kAny});
  const int32_t* starts = query_start_loc.const_data_ptr<int32_t>();
  const int64_t* position = positions.const_data_ptr<int64_t>();
  std::vector<int32_t> sequence_of_row(rows);
  int64_t last = 0;
  for (int64_t b = 0; b < sequences; ++b) {
    for (int32_t r = starts[b]; r < starts[b + 1]; ++r) {
      TORCH_CHECK_VALUE(position[r] >= 0, "positions[", r, "] is ", position[r], ", expected 0 or more");
      CheckPages(block_table, b, position[r], page_size, pages);
      sequence_of_row[r] = static_cast<int32_t>(b);
      last = std::max(last, position[r]);
    }
  }
  const Kernels& kernels = KernelsFor(ModelDtype(dtype));
  Workspace ws(shape, rows, last);
  kernels.widen(q.const_data_ptr(), q.numel(), ws.q);
  const AttentionPlan plan(sequence_of_row.data(), position, rows, sequences);
  InParallel([&](Team& team) {
    PagedAttention(team, kernels, shape, rows, position, plan, k_pages.const_data_ptr(), v_pages.const_data_ptr(),
                   page_size, block_table.const_data_ptr<int32_t>(), block_table.size(1), static_cast<float>(scale),
                   ws);
  });
  return Narrowed(kernels, ws.attention, {rows, shape.q_size()}, dtype);
}

Tensor out_residual(const Tensor& attention, const Tensor& wo, const OptionalTensor& out_bias, const Tensor& residual) {
  return ResidualOp(attention, wo, out_bias, residual);
}

Tensor down_residual(const Tensor& activation, const Tensor& w_down, const Tensor& residual) {
  return ResidualOp(activation, w_down, std::nullopt, residual);
}

Tensor norm_gate_up_silu(const Tensor& hidden, const Tensor& norm_weight, const Tensor& w_gate, const Tensor& w_up,
                         int64_t intermediate_size, double eps) {
  const at::ScalarType dtype = hidden.scalar_type();
  CheckTensor("hidden", hidden, dtype, {kAny, kAny});
  const int64_t rows = hidden.size(0);
  const Shape shape{hidden.size(1), intermediate_size, 0, 0, 0};
  CheckTensor("norm_weight", norm_weight, dtype, {shape.hidden_size});
  const WeightView gate = CheckPacked("w_gate", w_gate, dtype, intermediate_size, shape.hidden_size);
  const WeightView up = CheckPacked("w_up", w_up, dtype, intermediate_size, shape.hidden_size);
  const Kernels& kernels = KernelsFor(ModelDtype(dtype));
  Workspace ws(shape, rows, 0);
  kernels.widen(hidden.const_data_ptr(), hidden.numel(), ws.hidden);
  InParallel([&](Team& team) {
    NormGateUpSilu(team, kernels, shape, norm_weight.const_data_ptr(), gate, up, static_cast<float>(eps), rows, ws);
  });
  return Narrowed(kernels, ws.gate, {rows, intermediate_size}, dtype);
}

std::tuple<Tensor, Tensor> norm_head_argmax(const Tensor& hidden, const Tensor& norm_weight, const Tensor& lm_head,
                                            int64_t vocab_size, double eps) {
  const at::ScalarType dtype = hidden.scalar_type();
  CheckTensor("hidden", hidden, dtype, {kAny, kAny});
  const int64_t rows = hidden.size(0), hidden_size = hidden.size(1);
  CheckTensor("norm_weight", norm_weight, dtype, {hidden_size});
  const WeightView view = CheckPacked("lm_head", lm_head, dtype, vocab_size, hidden_size);
  const Kernels& kernels = KernelsFor(ModelDtype(dtype));
  const Buffer x = Widened(kernels, hidden);
  Tensor logits = at::empty({rows, vocab_size}, at::kFloat), tokens = at::empty({rows}, at::kLong);
  Head head(norm_weight.const_data_ptr(), view, hidden_size, vocab_size, static_cast<float>(eps), rows,
            logits.mutable_data_ptr<float>());
  InParallel([&](Team& team) { head.Run(team, kernels, x); });
  CheckNoNan(head.has_nan);
  std::copy(head.tokens.begin(), head.tokens.end(), tokens.mutable_data_ptr<int64_t>());
  return {tokens, logits};
}

std::tuple<Tensor, Tensor> accept_draft(const Tensor& tokens, const Tensor& targets, const Tensor& query_start_loc,
                                        const Tensor& num_drafts) {
  CheckTensor("tokens", tokens, at::kLong, {kAny});
  CheckTensor("targets", targets, at::kLong, {kAny});
  CheckStarts(query_start_loc, tokens.numel());
  const int64_t sequences = query_start_loc.numel() - 1;
  CheckTensor("num_drafts", num_drafts, at::kLong, {sequences});
  const int32_t* starts = query_start_loc.const_data_ptr<int32_t>();
  const int64_t* drafts = num_drafts.const_data_ptr<int64_t>();
  CheckDraftCounts(drafts, starts, sequences);
  int64_t judged = 0;
  for (int64_t b = 0; b < sequences; ++b) judged += JudgedRows(drafts[b]);
  CheckTensor("targets", targets, at::kLong, {judged});
  Tensor num_accepted = at::empty({sequences}, at::kLong), next_tokens = at::empty({sequences}, at::kLong);
  const int64_t* target = targets.const_data_ptr<int64_t>();
  for (int64_t b = 0; b < sequences; ++b) {
    const int64_t* draft = tokens.const_data_ptr<int64_t>() + starts[b + 1] - std::max<int64_t>(drafts[b], 0);
    int64_t accepted = std::min<int64_t>(drafts[b], 0);
    while (accepted < drafts[b] && draft[accepted] == target[accepted]) ++accepted;
    num_accepted.mutable_data_ptr<int64_t>()[b] = accepted;
    next_tokens.mutable_data_ptr<int64_t>()[b] = accepted < 0 ? -1 : target[accepted];
    target += JudgedRows(drafts[b]);
  }
  return {num_accepted, next_tokens};
}

std::string instruction_set() { return InstructionSetName(CurrentInstructionSet()); }

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (int i = 0; i < kNumInstructionSets; ++i) {
    const auto set = static_cast<InstructionSet>(i);
    if (IsSupported(set)) names.emplace_back(InstructionSetName(set));
  }
  return names;
}

void set_instruction_set(const std::string& name) {
  for (int i = 0; i < kNumInstructionSets; ++i) {
    const auto set = static_cast<InstructionSet>(i);
    if (name == InstructionSetName(set) && IsSupported(set)) return SetInstructionSet(set);
  }
  TORCH_CHECK_VALUE(false, "instruction set '", name, "' is not supported here; supported: ", instruction_sets());
}

}  // namespace layerskip
