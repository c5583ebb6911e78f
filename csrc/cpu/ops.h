// The CPU implementations behind bindings.cpp; what each computes is said in layerskip_kernels/ops/reference.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace layerskip {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using TensorList = at::TensorList;

Tensor exp(const Tensor& x);
Tensor log(const Tensor& x);
Tensor silu(const Tensor& x);
Tensor gelu(const Tensor& x);
Tensor tanh(const Tensor& x);
Tensor inverse_sqrt(const Tensor& x);
Tensor pack_weight(const Tensor& weight);
Tensor select_rows(const Tensor& weight, const Tensor& rows);
Tensor embed_tokens(const Tensor& tokens, const Tensor& embedding, int64_t hidden_size, at::ScalarType dtype,
                    double multiplier);
Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t out_features);
Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps, double offset);

Tensor norm_qkv_rope_append(const Tensor& hidden, const OptionalTensor& norm_weight, const Tensor& wq, const Tensor& wk,
                            const Tensor& wv, const OptionalTensor& qkv_bias, const OptionalTensor& cos,
                            const OptionalTensor& sin, const Tensor& positions, const Tensor& slot_mapping,
                            Tensor k_pages, Tensor v_pages, int64_t num_heads, double eps, double norm_offset,
                            const OptionalTensor& q_norm, const OptionalTensor& k_norm);
Tensor paged_attention(const Tensor& q, const Tensor& k_pages, const Tensor& v_pages, const Tensor& block_table,
                       const Tensor& query_start_loc, const Tensor& positions, double scale, int64_t window,
                       double cap);
Tensor out_residual(const Tensor& attention, const Tensor& wo, const OptionalTensor& out_bias, const Tensor& residual,
                    const OptionalTensor& post_norm, double eps, double norm_offset, double multiplier);
Tensor norm_gate_up_act(const Tensor& hidden, const OptionalTensor& norm_weight, const Tensor& w_gate,
                        const Tensor& w_up, int64_t intermediate_size, double eps, double norm_offset,
                        const OptionalTensor& gate_up_bias, bool use_gelu);
Tensor down_residual(const Tensor& activation, const Tensor& w_down, const Tensor& residual,
                     const OptionalTensor& down_bias, const OptionalTensor& post_norm, double eps, double norm_offset,
                     double multiplier);
std::tuple<Tensor, Tensor> norm_head_argmax(const Tensor& hidden, const Tensor& norm_weight, const Tensor& lm_head,
                                            int64_t vocab_size, double eps, double norm_offset, double multiplier,
                                            double cap);
std::tuple<Tensor, Tensor> accept_draft(const Tensor& tokens, const Tensor& targets, const Tensor& query_start_loc,
                                        const Tensor& num_drafts, const Tensor& judged);

Tensor philox(const Tensor& counters, int64_t seed);
Tensor gumbel(const Tensor& words);
Tensor edit_logits(const Tensor& logits, const Tensor& sequences, const Tensor& positions, const Tensor& preceding,
                   TensorList edits);
Tensor filter_logits(const Tensor& scores, const Tensor& temperatures, const Tensor& top_ks, const Tensor& top_ps,
                     const Tensor& min_ps);
Tensor gumbel_argmax(const Tensor& scores, const Tensor& positions, const Tensor& seeds, const Tensor& samples,
                     const Tensor& noisy);
Tensor rejection_sample(const Tensor& draft_scores, const Tensor& scores, const Tensor& drafts, const Tensor& positions,
                        const Tensor& seeds, const Tensor& samples);

int64_t keep_model(TensorList weights, int64_t num_kv_heads, int64_t head_dim, at::IntArrayRef ints,
                   at::ArrayRef<double> floats);
void forget_model(int64_t kept);
void run_layers(int64_t kept, Tensor k_cache, Tensor v_cache, Tensor hidden_cache, const Tensor& tokens,
                const Tensor& positions, const Tensor& depths, const Tensor& query_start_loc, const Tensor& block_table,
                int64_t stop);
std::tuple<Tensor, Tensor, Tensor, Tensor> draft_pass(int64_t kept, Tensor k_cache, Tensor v_cache, Tensor hidden_cache,
                                                      const Tensor& tokens, const Tensor& positions,
                                                      const Tensor& num_drafts, const Tensor& block_table,
                                                      const OptionalTensor& draft_head, const OptionalTensor& draft_ids,
                                                      TensorList sampling, TensorList stops, int64_t exit_layer,
                                                      int64_t max_drafts, bool keep_scores,
                                                      at::IntArrayRef adapter_exits, at::IntArrayRef adapters,
                                                      TensorList adapter_k, TensorList adapter_v);
std::tuple<Tensor, Tensor, Tensor> verify_pass(int64_t kept, Tensor k_cache, Tensor v_cache, Tensor hidden_cache,
                                               const Tensor& tokens, const Tensor& positions, const Tensor& depths,
                                               const Tensor& query_start_loc, const Tensor& num_drafts,
                                               const Tensor& judged, const Tensor& block_table,
                                               at::IntArrayRef adapter_exits, at::IntArrayRef adapters,
                                               TensorList adapter_k, TensorList adapter_v);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> decode_pass(
    int64_t kept, int64_t drafting, Tensor k_cache, Tensor v_cache, Tensor hidden_cache, const Tensor& tokens,
    const Tensor& positions, const Tensor& num_drafts, const Tensor& block_table, const OptionalTensor& draft_head,
    const OptionalTensor& draft_ids, TensorList stops, const Tensor& ends, int64_t exit_layer, int64_t max_drafts,
    int64_t num_cycles, at::IntArrayRef adapter_exits, at::IntArrayRef adapters, TensorList adapter_k,
    TensorList adapter_v);

Tensor empty_huge(int64_t num_bytes);
int64_t pass_threads();
std::string instruction_set();
std::vector<std::string> instruction_sets();
void set_instruction_set(const std::string& name);

}  // namespace layerskip
