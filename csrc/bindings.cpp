// Every op of this package: the C++ table of contents. Names, arguments and meaning are those of
// layerskip_kernels/reference.py; fakes stand in layerskip_kernels/ops.py.
#include <Python.h>
#include <torch/library.h>

#include "cpu/ops.h"

TORCH_LIBRARY(layerskip, m) {
  m.def("exp(Tensor x) -> Tensor");
  m.def("log(Tensor x) -> Tensor");
  m.def("silu(Tensor x) -> Tensor");
  m.def("inverse_sqrt(Tensor x) -> Tensor");
  m.def("pack_weight(Tensor weight) -> Tensor");
  m.def("select_rows(Tensor weight, Tensor rows) -> Tensor");
  m.def("embed_tokens(Tensor tokens, Tensor embedding, int hidden_size) -> Tensor");
  m.def("linear(Tensor x, Tensor weight, Tensor? bias, int out_features) -> Tensor");
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");

  m.def(
      "norm_qkv_rope_append(Tensor hidden, Tensor norm_weight, Tensor wq, Tensor wk, Tensor wv, Tensor? qkv_bias, "
      "Tensor cos, Tensor sin, Tensor positions, Tensor slot_mapping, Tensor(a!) k_pages, Tensor(b!) v_pages, "
      "int num_heads, float eps) -> Tensor");
  m.def(
      "paged_attention(Tensor q, Tensor k_pages, Tensor v_pages, Tensor block_table, Tensor query_start_loc, "
      "Tensor positions, float scale) -> Tensor");
  m.def("out_residual(Tensor attention, Tensor wo, Tensor? out_bias, Tensor residual) -> Tensor");
  m.def(
      "norm_gate_up_silu(Tensor hidden, Tensor norm_weight, Tensor w_gate, Tensor w_up, int intermediate_size, "
      "float eps) -> Tensor");
  m.def("down_residual(Tensor activation, Tensor w_down, Tensor residual) -> Tensor");
  m.def(
      "norm_head_argmax(Tensor hidden, Tensor norm_weight, Tensor lm_head, int vocab_size, float eps) -> "
      "(Tensor tokens, Tensor logits)");
  m.def(
      "accept_draft(Tensor tokens, Tensor targets, Tensor query_start_loc, Tensor num_drafts) -> "
      "(Tensor num_accepted, Tensor next_tokens)");

  m.def("philox(Tensor counters, int seed) -> Tensor");
  m.def("gumbel(Tensor words) -> Tensor");
  m.def("filter_logits(Tensor scores, Tensor temperatures, Tensor top_ks, Tensor top_ps, Tensor min_ps) -> Tensor");
  m.def("gumbel_argmax(Tensor scores, Tensor positions, Tensor seeds, Tensor samples, Tensor noisy) -> Tensor");
  m.def(
      "rejection_sample(Tensor draft_scores, Tensor scores, Tensor drafts, Tensor positions, Tensor seeds, "
      "Tensor samples) -> Tensor");

  m.def(
      "run_layers(Tensor[] weights, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!) hidden_cache, Tensor tokens, "
      "Tensor positions, Tensor depths, Tensor query_start_loc, Tensor block_table, int stop, int num_heads, "
      "int intermediate_size, int vocab_size, float eps, float scale) -> ()");
  m.def(
      "draft_step(Tensor[] weights, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!) hidden_cache, Tensor tokens, "
      "Tensor positions, Tensor num_drafts, Tensor block_table, Tensor? draft_head, Tensor? draft_ids, int exit_layer, "
      "int max_drafts, int num_heads, int intermediate_size, int vocab_size, float eps, float scale) -> Tensor");
  m.def(
      "verify_step(Tensor[] weights, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!) hidden_cache, Tensor tokens, "
      "Tensor positions, Tensor depths, Tensor query_start_loc, Tensor num_drafts, Tensor block_table, "
      "int num_heads, int intermediate_size, int vocab_size, float eps, float scale) -> "
      "(Tensor num_accepted, Tensor next_tokens, Tensor logits)");

  m.def("empty_huge(int num_bytes) -> Tensor", &layerskip::empty_huge);
  m.def("instruction_set() -> str", &layerskip::instruction_set);
  m.def("instruction_sets() -> str[]", &layerskip::instruction_sets);
  m.def("set_instruction_set(str name) -> ()", &layerskip::set_instruction_set);
}

TORCH_LIBRARY_IMPL(layerskip, CPU, m) {
  m.impl("exp", &layerskip::exp);
  m.impl("log", &layerskip::log);
  m.impl("silu", &layerskip::silu);
  m.impl("inverse_sqrt", &layerskip::inverse_sqrt);
  m.impl("pack_weight", &layerskip::pack_weight);
  m.impl("select_rows", &layerskip::select_rows);
  m.impl("embed_tokens", &layerskip::embed_tokens);
  m.impl("linear", &layerskip::linear);
  m.impl("rms_norm", &layerskip::rms_norm);
  m.impl("norm_qkv_rope_append", &layerskip::norm_qkv_rope_append);
  m.impl("paged_attention", &layerskip::paged_attention);
  m.impl("out_residual", &layerskip::out_residual);
  m.impl("norm_gate_up_silu", &layerskip::norm_gate_up_silu);
  m.impl("down_residual", &layerskip::down_residual);
  m.impl("norm_head_argmax", &layerskip::norm_head_argmax);
  m.impl("accept_draft", &layerskip::accept_draft);
  m.impl("philox", &layerskip::philox);
  m.impl("gumbel", &layerskip::gumbel);
  m.impl("filter_logits", &layerskip::filter_logits);
  m.impl("gumbel_argmax", &layerskip::gumbel_argmax);
  m.impl("rejection_sample", &layerskip::rejection_sample);
  m.impl("run_layers", &layerskip::run_layers);
  m.impl("draft_step", &layerskip::draft_step);
  m.impl("verify_step", &layerskip::verify_step);
}

// `import layerskip_kernels._C` loads this library, and that registers the ops; the module itself is empty.
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
