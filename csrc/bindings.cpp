// Every op of this package: the C++ table of contents. Names, arguments and meaning are those of
// layerskip_kernels/ops/reference; fakes are in layerskip_kernels/ops/fakes.py, in this order.
#include <Python.h>
#include <torch/library.h>

#include "cpu/kernels.h"
#include "cpu/ops.h"
#include "cpu/parallel.h"

TORCH_LIBRARY(layerskip, m) {
  m.def("exp(Tensor x) -> Tensor");
  m.def("log(Tensor x) -> Tensor");
  m.def("silu(Tensor x) -> Tensor");
  m.def("gelu(Tensor x) -> Tensor");
  m.def("tanh(Tensor x) -> Tensor");
  m.def("inverse_sqrt(Tensor x) -> Tensor");
  m.def("pack_weight(Tensor weight) -> Tensor");
  m.def("select_rows(Tensor weight, Tensor rows) -> Tensor");
  m.def(
      "embed_tokens(Tensor tokens, Tensor embedding, int hidden_size, ScalarType dtype, float multiplier=1.0) -> "
      "Tensor");
  m.def("linear(Tensor x, Tensor weight, Tensor? bias, int out_features) -> Tensor");
  m.def("rms_norm(Tensor x, Tensor weight, float eps, float offset=0.0) -> Tensor");

  m.def(
      "norm_qkv_rope_append(Tensor hidden, Tensor? norm_weight, Tensor wq, Tensor wk, Tensor wv, Tensor? qkv_bias, "
      "Tensor? cos, Tensor? sin, Tensor positions, Tensor slot_mapping, Tensor(a!) k_pages, Tensor(b!) v_pages, "
      "int num_heads, float eps, float norm_offset=0.0, Tensor? q_norm=None, Tensor? k_norm=None) -> Tensor");
  m.def(
      "paged_attention(Tensor q, Tensor k_pages, Tensor v_pages, Tensor block_table, Tensor query_start_loc, "
      "Tensor positions, float scale, int window=0, float cap=0.0) -> Tensor");
  m.def(
      "out_residual(Tensor attention, Tensor wo, Tensor? out_bias, Tensor residual, Tensor? post_norm=None, "
      "float eps=0.0, float norm_offset=0.0, float multiplier=1.0) -> Tensor");
  m.def(
      "norm_gate_up_act(Tensor hidden, Tensor? norm_weight, Tensor w_gate, Tensor w_up, int intermediate_size, "
      "float eps, float norm_offset=0.0, Tensor? gate_up_bias=None, bool use_gelu=False) -> Tensor");
  m.def(
      "down_residual(Tensor activation, Tensor w_down, Tensor residual, Tensor? down_bias=None, "
      "Tensor? post_norm=None, float eps=0.0, float norm_offset=0.0, float multiplier=1.0) -> Tensor");
  m.def(
      "norm_head_argmax(Tensor hidden, Tensor norm_weight, Tensor lm_head, int vocab_size, float eps, "
      "float norm_offset=0.0, float multiplier=1.0, float cap=0.0) -> (Tensor tokens, Tensor logits)");
  m.def(
      "accept_draft(Tensor tokens, Tensor targets, Tensor query_start_loc, Tensor num_drafts, Tensor judged) -> "
      "(Tensor num_accepted, Tensor next_tokens)");

  m.def("philox(Tensor counters, int seed) -> Tensor");
  m.def("gumbel(Tensor words) -> Tensor");
  m.def("edit_logits(Tensor logits, Tensor sequences, Tensor positions, Tensor preceding, Tensor[] edits) -> Tensor");
  m.def("filter_logits(Tensor scores, Tensor temperatures, Tensor top_ks, Tensor top_ps, Tensor min_ps) -> Tensor");
  m.def("gumbel_argmax(Tensor scores, Tensor positions, Tensor seeds, Tensor samples, Tensor noisy) -> Tensor");
  m.def(
      "rejection_sample(Tensor draft_scores, Tensor scores, Tensor drafts, Tensor positions, Tensor seeds, "
      "Tensor samples) -> Tensor");

  m.def("keep_model(Tensor[] weights, int num_kv_heads, int head_dim, int[] ints, float[] floats) -> int");
  m.def("forget_model(int model) -> ()", &layerskip::forget_model);
  m.def(
      "run_layers(int model, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!) hidden_cache, Tensor tokens, "
      "Tensor positions, Tensor depths, Tensor query_start_loc, Tensor block_table, int stop) -> ()");
  m.def(
      "draft_pass(int model, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!) hidden_cache, Tensor tokens, "
      "Tensor positions, Tensor num_drafts, Tensor block_table, Tensor? draft_head, Tensor? draft_ids, "
      "Tensor[] sampling, Tensor[] stops, int exit_layer, int max_drafts, bool keep_scores, "
      "int[] adapter_exits, int[] adapters, Tensor(d!)[] adapter_k, Tensor(e!)[] adapter_v) -> "
      "(Tensor drafts, Tensor num_drafted, Tensor confidences, Tensor scores)");
  m.def(
      "verify_pass(int model, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!) hidden_cache, Tensor tokens, "
      "Tensor positions, Tensor depths, Tensor query_start_loc, Tensor num_drafts, Tensor judged, "
      "Tensor block_table, int[] adapter_exits, int[] adapters, Tensor(d!)[] adapter_k, "
      "Tensor(e!)[] adapter_v) -> (Tensor num_accepted, Tensor next_tokens, Tensor logits)");
  m.def(
      "decode_pass(int model, int drafting, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!) hidden_cache, "
      "Tensor tokens, Tensor positions, Tensor num_drafts, Tensor block_table, Tensor? draft_head, Tensor? draft_ids, "
      "Tensor[] stops, Tensor ends, int exit_layer, int max_drafts, int num_cycles, int[] adapter_exits, "
      "int[] adapters, Tensor(d!)[] adapter_k, Tensor(e!)[] adapter_v) -> (Tensor drafts, Tensor num_drafted, "
      "Tensor confidences, Tensor num_accepted, Tensor next_tokens, Tensor seconds)");

  // Data movement in the cache, described in layerskip_kernels/ops/cache_ops.py; implemented in csrc/cuda/cache_ops.h.
  m.def(
      "copy_pages(Tensor sources, Tensor targets, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!) hidden_cache, "
      "Tensor(d!) error) -> ()");
  m.def("gather_kv(Tensor pages, Tensor k_cache, Tensor v_cache, Tensor(a!) k, Tensor(b!) v, Tensor(c!) error) -> ()");
  m.def(
      "scatter_kv(Tensor pages, int start, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, "
      "Tensor(c!) error) -> ()");

  m.def("empty_huge(int num_bytes) -> Tensor", &layerskip::empty_huge);
  m.def("pass_threads() -> int", &layerskip::pass_threads);
  m.def("instruction_set() -> str", &layerskip::instruction_set);
  m.def("instruction_sets() -> str[]", &layerskip::instruction_sets);
  m.def("set_instruction_set(str name) -> ()", &layerskip::set_instruction_set);
}

TORCH_LIBRARY_IMPL(layerskip, CPU, m) {
  using layerskip::InContractMode;  // from the first line, so that an op's own conversions round as its kernels do
  m.impl("exp", &InContractMode<&layerskip::exp>::Run);
  m.impl("log", &InContractMode<&layerskip::log>::Run);
  m.impl("silu", &InContractMode<&layerskip::silu>::Run);
  m.impl("gelu", &InContractMode<&layerskip::gelu>::Run);
  m.impl("tanh", &InContractMode<&layerskip::tanh>::Run);
  m.impl("inverse_sqrt", &InContractMode<&layerskip::inverse_sqrt>::Run);
  m.impl("pack_weight", &InContractMode<&layerskip::pack_weight>::Run);
  m.impl("select_rows", &InContractMode<&layerskip::select_rows>::Run);
  m.impl("embed_tokens", &InContractMode<&layerskip::embed_tokens>::Run);
  m.impl("linear", &InContractMode<&layerskip::linear>::Run);
  m.impl("rms_norm", &InContractMode<&layerskip::rms_norm>::Run);
  m.impl("norm_qkv_rope_append", &InContractMode<&layerskip::norm_qkv_rope_append>::Run);
  m.impl("paged_attention", &InContractMode<&layerskip::paged_attention>::Run);
  m.impl("out_residual", &InContractMode<&layerskip::out_residual>::Run);
  m.impl("norm_gate_up_act", &InContractMode<&layerskip::norm_gate_up_act>::Run);
  m.impl("down_residual", &InContractMode<&layerskip::down_residual>::Run);
  m.impl("norm_head_argmax", &InContractMode<&layerskip::norm_head_argmax>::Run);
  m.impl("accept_draft", &InContractMode<&layerskip::accept_draft>::Run);
  m.impl("philox", &InContractMode<&layerskip::philox>::Run);
  m.impl("gumbel", &InContractMode<&layerskip::gumbel>::Run);
  m.impl("edit_logits", &InContractMode<&layerskip::edit_logits>::Run);
  m.impl("filter_logits", &InContractMode<&layerskip::filter_logits>::Run);
  m.impl("gumbel_argmax", &InContractMode<&layerskip::gumbel_argmax>::Run);
  m.impl("rejection_sample", &InContractMode<&layerskip::rejection_sample>::Run);
  m.impl("keep_model", &InContractMode<&layerskip::keep_model>::Run);
  m.impl("run_layers", &InContractMode<&layerskip::run_layers>::Run);
  m.impl("draft_pass", &InContractMode<&layerskip::draft_pass>::Run);
  m.impl("verify_pass", &InContractMode<&layerskip::verify_pass>::Run);
  m.impl("decode_pass", &InContractMode<&layerskip::decode_pass>::Run);
}

// `import layerskip_kernels._C` loads this library, and that registers the ops; the module itself is empty.
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
