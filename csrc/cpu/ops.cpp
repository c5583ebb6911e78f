// The fused ops on tensors: checks, then one parallel region around the phases of layers.h.
#include "ops.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
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
  (KernelsFor(Dtype::kFloat32).*op)(input.const_data_ptr<float>(), input.numel(), out.mutable_data_ptr<float>());
  return out;
}

NormConstants Constants(double eps, double offset) { return {static_cast<float>(eps), static_cast<float>(offset)}; }

// cos and sin [max_positions, rotary_dim / 2]: both, or neither.
RopeTables CheckRope(const OptionalTensor& cos, const OptionalTensor& sin, int64_t head_dim) {
  TORCH_CHECK_VALUE(cos.has_value() == sin.has_value(), "cos and sin must be given together");
  if (!cos.has_value()) return {nullptr, nullptr, 0};
  CheckTensor("cos", *cos, at::kFloat, {kAny, kAny});
  CheckTensor("sin", *sin, at::kFloat, {cos->size(0), cos->size(1)});
  TORCH_CHECK_VALUE(2 * cos->size(1) <= head_dim, "cos holds ", cos->size(1), " frequencies, more than half of ",
                    head_dim, ", the length of a head");
  return {cos->const_data_ptr<float>(), sin->const_data_ptr<float>(), 2 * cos->size(1)};
}

// [T, in] -> [T, out] plus the residual [T, out]: both residual ops.
Tensor ResidualOp(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, const Tensor& residual,
                  const OptionalTensor& post_norm, NormConstants norm, double multiplier) {
  const at::ScalarType dtype = residual.scalar_type();
  CheckTensor("residual", residual, dtype, {kAny, kAny});
  const int64_t rows = residual.size(0), size = residual.size(1);
  CheckTensor("the first argument", input, dtype, {rows, kAny});
  const int64_t input_size = input.size(1);
  const WeightView view = CheckPacked("the weight", weight, dtype, size, input_size);
  const LinearView linear{view,
                          CheckOptional("the bias", bias, dtype, size),
                          input_size,
                          size,
                          CheckOptional("post_norm", post_norm, dtype, size),
                          norm,
                          static_cast<float>(multiplier)};
  const Kernels& kernels = KernelsFor(ModelDtype(dtype));
  Buffer x = Widened(kernels, input), y = Widened(kernels, residual), projected(rows * size);
  IntegerSizes integer_sizes;
  integer_sizes.Add(view, input_size);
  const IntegerBuffer integers(integer_sizes, rows);
  InParallel([&](Team& team) { LinearResidual(team, kernels, rows, x, linear, integers, projected, y); });
  return Narrowed(kernels, y, residual.sizes(), dtype);
}

}  // namespace

Tensor exp(const Tensor& x) { return Elementwise(x, &Kernels::exp); }
Tensor log(const Tensor& x) { return Elementwise(x, &Kernels::log); }
Tensor silu(const Tensor& x) { return Elementwise(x, &Kernels::silu); }
Tensor gelu(const Tensor& x) { return Elementwise(x, &Kernels::gelu); }
Tensor tanh(const Tensor& x) { return Elementwise(x, &Kernels::tanh); }
Tensor inverse_sqrt(const Tensor& x) { return Elementwise(x, &Kernels::inverse_sqrt); }

Tensor embed_tokens(const Tensor& tokens, const Tensor& embedding, int64_t hidden_size, at::ScalarType dtype,
                    double multiplier) {
  CheckTensor("tokens", tokens, at::kLong, {kAny});
  CheckSize("hidden_size", hidden_size);
  TORCH_CHECK_VALUE(embedding.dim() == 3 && embedding.size(0) > 0, "embedding must be packed, got ", embedding.sizes());
  const int64_t rows = embedding.size(0) * kGroup;
  const WeightView view = CheckPacked("embedding", embedding, dtype, rows, hidden_size);
  const int64_t* ids = tokens.const_data_ptr<int64_t>();
  CheckRange("tokens", ids, tokens.numel(), 0, rows);
  const Kernels& kernels = KernelsFor(ModelDtype(dtype));
  Buffer out(tokens.numel() * hidden_size);
  for (int64_t i = 0; i < tokens.numel(); ++i) Embed(kernels, view, ids[i], hidden_size, out + i * hidden_size);
  kernels.multiply(static_cast<float>(multiplier), tokens.numel() * hidden_size, out);
  return Narrowed(kernels, out, {tokens.numel(), hidden_size}, dtype);
}

Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t out_features) {
  const at::ScalarType dtype = x.scalar_type();
  CheckTensor("x", x, dtype, {kAny, kAny});
  const WeightView view = CheckPacked("weight", weight, dtype, out_features, x.size(1));
  const void* bias_data = CheckOptional("bias", bias, dtype, out_features);
  const Kernels& kernels = KernelsFor(ModelDtype(dtype));
  const int64_t rows = x.size(0), groups = weight.size(0);
  const Buffer wide = Widened(kernels, x);
  Buffer out(rows * out_features);
  IntegerSizes integer_sizes;
  integer_sizes.Add(view, x.size(1));
  const IntegerBuffer integers(integer_sizes, rows);
  InParallel([&](Team& team) {
    const LinearInput input(team, wide, rows, x.size(1), {view}, integers);
    team.ForEach(groups, 4, [&](int64_t begin, int64_t end) {
      Linear(kernels, input, view, bias_data, out_features, begin, end, true, out);
    });
  });
  return Narrowed(kernels, out, {rows, out_features}, dtype);
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps, double offset) {
  const at::ScalarType dtype = x.scalar_type();
  CheckTensor("x", x, dtype, {kAny, kAny});
  CheckTensor("weight", weight, dtype, {x.size(1)});
  const Kernels& kernels = KernelsFor(ModelDtype(dtype));
  const int64_t size = x.size(1);
  Buffer rows = Widened(kernels, x);
  for (int64_t r = 0; r < x.size(0); ++r)
    kernels.rms_norm(rows + r * size, weight.const_data_ptr(), size, Constants(eps, offset), rows + r * size);
  return Narrowed(kernels, rows, x.sizes(), dtype);
}

Tensor norm_qkv_rope_append(const Tensor& hidden, const OptionalTensor& norm_weight, const Tensor& wq, const Tensor& wk,
                            const Tensor& wv, const OptionalTensor& qkv_bias, const OptionalTensor& cos,
                            const OptionalTensor& sin, const Tensor& positions, const Tensor& slot_mapping,
                            Tensor k_pages, Tensor v_pages, int64_t num_heads, double eps, double norm_offset,
                            const OptionalTensor& q_norm, const OptionalTensor& k_norm) {
  const at::ScalarType dtype = hidden.scalar_type();
  CheckTensor("hidden", hidden, dtype, {kAny, kAny});
  CheckPagesOf(k_pages, v_pages, dtype, false);
  CheckSize("num_heads", num_heads);
  const int64_t rows = hidden.size(0), pages = k_pages.size(0), page_size = k_pages.size(3);
  const LayerSizes sizes{hidden.size(1), 0, num_heads, k_pages.size(1), k_pages.size(2), Constants(eps, norm_offset)};
  LayerWeights weights{};
  weights.attn_norm = CheckOptional("norm_weight", norm_weight, dtype, sizes.hidden_size);
  weights.wq = CheckPacked("wq", wq, dtype, sizes.q_size(), sizes.hidden_size);
  weights.wk = CheckPacked("wk", wk, dtype, sizes.kv_size(), sizes.hidden_size);
  weights.wv = CheckPacked("wv", wv, dtype, sizes.kv_size(), sizes.hidden_size);
  weights.qkv_bias = CheckOptional("qkv_bias", qkv_bias, dtype, sizes.q_size() + 2 * sizes.kv_size());
  const QkNorms norms = CheckQkNorms(q_norm, k_norm, dtype, sizes.q_size(), sizes.kv_size(), sizes.head_dim);
  weights.q_norm = norms.q;
  weights.k_norm = norms.k;
  weights.norms_heads = norms.heads;
  const RopeTables rope = CheckRope(cos, sin, sizes.head_dim);
  CheckTensor("positions", positions, at::kLong, {rows});
  CheckTensor("slot_mapping", slot_mapping, at::kLong, {rows});
  CheckRange("positions", positions.const_data_ptr<int64_t>(), rows, 0, rope.cos == nullptr ? kMaxSize : cos->size(0));
  CheckRange("slot_mapping", slot_mapping.const_data_ptr<int64_t>(), rows, -1, pages * page_size);
  const Kernels& kernels = KernelsFor(ModelDtype(dtype));
  IntegerSizes integers;
  for (const WeightView weight : {weights.wq, weights.wk, weights.wv}) integers.Add(weight, sizes.hidden_size);
  Workspace ws(sizes, rows, 0, integers);
  kernels.widen(hidden.const_data_ptr(), hidden.numel(), ws.hidden);
  const RowSlots row_slots{rows, positions.const_data_ptr<int64_t>(), slot_mapping.const_data_ptr<int64_t>()};
  const LayerPages layer_pages{k_pages.mutable_data_ptr(), v_pages.mutable_data_ptr(), page_size};
  InParallel([&](Team& team) { NormQkvRopeAppend(team, kernels, sizes, weights, rope, row_slots, layer_pages, ws); });
  return Narrowed(kernels, ws.q, {rows, num_heads, sizes.head_dim}, dtype);
}

Tensor paged_attention(const Tensor& q, const Tensor& k_pages, const Tensor& v_pages, const Tensor& block_table,
                       const Tensor& query_start_loc, const Tensor& positions, double scale, int64_t window,
                       double cap) {
  const at::ScalarType dtype = q.scalar_type();
  CheckTensor("q", q, dtype, {kAny, kAny, kAny});
  const int64_t rows = q.size(0);
  CheckPagesOf(k_pages, v_pages, dtype, false);
  CheckTensor("k_pages", k_pages, dtype, {kAny, kAny, q.size(2), kAny});
  const int64_t pages = k_pages.size(0), page_size = k_pages.size(3);
  const LayerSizes sizes{0, 0, q.size(1), k_pages.size(1), q.size(2)};
  CheckSize("the heads of q", sizes.num_heads);
  TORCH_CHECK_VALUE(sizes.num_heads % sizes.kv_heads == 0, "q has ", sizes.num_heads, " heads, expected a multiple of ",
                    sizes.kv_heads, ", the KV heads");
  CheckTensor("positions", positions, at::kLong, {rows});
  TORCH_CHECK_VALUE(window >= 0, "window must be 0 (none) or more, got ", window);
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
  Workspace ws(sizes, rows, last);
  kernels.widen(q.const_data_ptr(), q.numel(), ws.q);
  const AttentionTasks tasks(sequence_of_row.data(), position, rows, sequences, window);
  const ScoreRules rules{static_cast<float>(scale), static_cast<float>(cap), window};
  const LayerPages layer_pages{const_cast<void*>(k_pages.const_data_ptr()), const_cast<void*>(v_pages.const_data_ptr()),
                               page_size};
  const BlockTable table{block_table.const_data_ptr<int32_t>(), block_table.size(1)};
  InParallel([&](Team& team) {
    PagedAttention(team, kernels, sizes, tasks, {rows, position, nullptr}, layer_pages, table, rules, ws);
  });
  return Narrowed(kernels, ws.attention, {rows, sizes.q_size()}, dtype);
}

Tensor out_residual(const Tensor& attention, const Tensor& wo, const OptionalTensor& out_bias, const Tensor& residual,
                    const OptionalTensor& post_norm, double eps, double norm_offset, double multiplier) {
  return ResidualOp(attention, wo, out_bias, residual, post_norm, Constants(eps, norm_offset), multiplier);
}

Tensor down_residual(const Tensor& activation, const Tensor& w_down, const Tensor& residual,
                     const OptionalTensor& down_bias, const OptionalTensor& post_norm, double eps, double norm_offset,
                     double multiplier) {
  return ResidualOp(activation, w_down, down_bias, residual, post_norm, Constants(eps, norm_offset), multiplier);
}

Tensor norm_gate_up_act(const Tensor& hidden, const OptionalTensor& norm_weight, const Tensor& w_gate,
                        const Tensor& w_up, int64_t intermediate_size, double eps, double norm_offset,
                        const OptionalTensor& gate_up_bias, bool use_gelu) {
  const at::ScalarType dtype = hidden.scalar_type();
  CheckTensor("hidden", hidden, dtype, {kAny, kAny});
  const int64_t rows = hidden.size(0);
  const LayerSizes sizes{hidden.size(1), intermediate_size, 0, 0, 0, Constants(eps, norm_offset)};
  LayerWeights weights{};
  weights.mlp_norm = CheckOptional("norm_weight", norm_weight, dtype, sizes.hidden_size);
  weights.w_gate = CheckPacked("w_gate", w_gate, dtype, intermediate_size, sizes.hidden_size);
  weights.w_up = CheckPacked("w_up", w_up, dtype, intermediate_size, sizes.hidden_size);
  weights.gate_up_bias = CheckOptional("gate_up_bias", gate_up_bias, dtype, 2 * intermediate_size);
  const Kernels& kernels = KernelsFor(ModelDtype(dtype));
  IntegerSizes integers;
  for (const WeightView weight : {weights.w_gate, weights.w_up}) integers.Add(weight, sizes.hidden_size);
  Workspace ws(sizes, rows, 0, integers);
  kernels.widen(hidden.const_data_ptr(), hidden.numel(), ws.hidden);
  InParallel([&](Team& team) { NormGateUpAct(team, kernels, sizes, weights, use_gelu, rows, ws); });
  return Narrowed(kernels, ws.gate, {rows, intermediate_size}, dtype);
}

std::tuple<Tensor, Tensor> norm_head_argmax(const Tensor& hidden, const Tensor& norm_weight, const Tensor& lm_head,
                                            int64_t vocab_size, double eps, double norm_offset, double multiplier,
                                            double cap) {
  const at::ScalarType dtype = hidden.scalar_type();
  CheckTensor("hidden", hidden, dtype, {kAny, kAny});
  const int64_t rows = hidden.size(0), hidden_size = hidden.size(1);
  CheckTensor("norm_weight", norm_weight, dtype, {hidden_size});
  const WeightView view = CheckPacked("lm_head", lm_head, dtype, vocab_size, hidden_size);
  const Kernels& kernels = KernelsFor(ModelDtype(dtype));
  const Buffer x = Widened(kernels, hidden);
  Tensor logits = at::empty({rows, vocab_size}, at::kFloat), tokens = at::empty({rows}, at::kLong);
  const LogitRules rules{Constants(eps, norm_offset), static_cast<float>(multiplier), static_cast<float>(cap)};
  Head head(norm_weight.const_data_ptr(), view, hidden_size, vocab_size, rules, rows, logits.mutable_data_ptr<float>());
  InParallel([&](Team& team) { head.Run(team, kernels, x); });
  CheckNoNan(head.has_nan);
  std::copy(head.tokens.begin(), head.tokens.end(), tokens.mutable_data_ptr<int64_t>());
  return {tokens, logits};
}

std::tuple<Tensor, Tensor> accept_draft(const Tensor& tokens, const Tensor& targets, const Tensor& query_start_loc,
                                        const Tensor& num_drafts, const Tensor& judged) {
  CheckTensor("tokens", tokens, at::kLong, {kAny});
  CheckTensor("targets", targets, at::kLong, {kAny});
  CheckStarts(query_start_loc, tokens.numel());
  const int64_t sequences = query_start_loc.numel() - 1;
  const int32_t* starts = query_start_loc.const_data_ptr<int32_t>();
  const DraftCounts counts = CheckedDraftCounts(num_drafts, judged, starts, sequences);
  int64_t num_targets = 0;
  for (int64_t b = 0; b < sequences; ++b) num_targets += counts.JudgedRows(b);
  CheckTensor("targets", targets, at::kLong, {num_targets});
  Tensor num_accepted = at::zeros({sequences}, at::kLong), next_tokens = at::full({sequences}, -1, at::kLong);
  const int64_t* target = targets.const_data_ptr<int64_t>();
  for (int64_t b = 0; b < sequences; ++b) {
    if (!counts.judged[b]) continue;
    const int64_t* draft = tokens.const_data_ptr<int64_t>() + starts[b + 1] - counts.drafts[b];
    int64_t accepted = 0;
    while (accepted < counts.drafts[b] && draft[accepted] == target[accepted]) ++accepted;
    num_accepted.mutable_data_ptr<int64_t>()[b] = accepted;
    next_tokens.mutable_data_ptr<int64_t>()[b] = target[accepted];
    target += counts.JudgedRows(b);
  }
  return {num_accepted, next_tokens};
}

// The threads that the next decoding step of one sequence gets.
int64_t pass_threads() {
  return ThreadCount::Shared().Choose(PassKind::kVerifyFewRows, static_cast<int>(NumThreads()));
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
