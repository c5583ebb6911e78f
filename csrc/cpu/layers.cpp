#include "layers.h"

#include <algorithm>

namespace layerskip {

namespace {

constexpr int64_t kRowsPerAttentionTask = 16;

int64_t Groups(int64_t n) { return (n + kGroup - 1) / kGroup; }

void NormRows(const Team& team, const Kernels& kernels, const void* weight, int64_t size, float eps, int64_t rows,
              const float* x, float* out) {
  const Range mine = team.Share(rows);
  for (int64_t r = mine.begin; r < mine.end; ++r) kernels.rms_norm(x + r * size, weight, size, eps, out + r * size);
  team.Barrier();
}

// This thread's columns of out [rows, n].
Range LinearShare(const Team& team, const Kernels& kernels, const float* x, int64_t rows, int64_t k, WeightView weight,
                  const void* bias, int64_t n, bool round, float* out) {
  const Range groups = team.Share(Groups(n));
  kernels.linear(x, rows, k, weight, bias, n, groups.begin, groups.end, round, out);
  return {groups.begin * kGroup, std::min(groups.end * kGroup, n)};
}

const void* Offset(const Kernels& kernels, const void* base, int64_t elements) {
  return base == nullptr ? nullptr : static_cast<const char*>(base) + elements * kernels.element_size;
}

}  // namespace

Workspace::Workspace(const Shape& shape, int64_t rows, int64_t last_position)
    : max_chunks(last_position / kChunk + 1),
      hidden(rows * shape.hidden_size),
      normed(rows * shape.hidden_size),
      q(rows * shape.q_size()),
      k(rows * shape.kv_size()),
      v(rows * shape.kv_size()),
      partials(rows * shape.num_heads * max_chunks * (2 + shape.head_dim)),
      attention(rows * shape.q_size()),
      projected(rows * shape.hidden_size),
      gate(rows * shape.intermediate_size),
      up(rows * shape.intermediate_size) {}

RowsBySequence::RowsBySequence(const int32_t* sequences, int64_t count, int64_t num_sequences)
    : rows(count), starts(num_sequences + 1, 0) {
  for (int64_t r = 0; r < count; ++r) ++starts[sequences[r] + 1];
  for (int64_t b = 0; b < num_sequences; ++b) starts[b + 1] += starts[b];
  std::vector<int64_t> next(starts.begin(), starts.end() - 1);
  for (int64_t r = 0; r < count; ++r) rows[next[sequences[r]]++] = static_cast<int32_t>(r);
}

void NormQkvRopeAppend(const Team& team, const Kernels& kernels, const Shape& shape, const LayerWeights& w, float eps,
                       const float* cos, const float* sin, int64_t rows, const int64_t* positions, const int64_t* slots,
                       void* k_pages, void* v_pages, int64_t page_size, Workspace& ws) {
  const int64_t hidden = shape.hidden_size, q_size = shape.q_size(), kv_size = shape.kv_size();
  NormRows(team, kernels, w.attn_norm, hidden, eps, rows, ws.hidden, ws.normed);
  LinearShare(team, kernels, ws.normed, rows, hidden, w.wq, w.qkv_bias, q_size, true, ws.q);
  LinearShare(team, kernels, ws.normed, rows, hidden, w.wk, Offset(kernels, w.qkv_bias, q_size), kv_size, true, ws.k);
  LinearShare(team, kernels, ws.normed, rows, hidden, w.wv, Offset(kernels, w.qkv_bias, q_size + kv_size), kv_size,
              true, ws.v);
  team.Barrier();
  const int64_t half = shape.head_dim / 2;
  const Range heads = team.Share(rows * shape.num_heads);
  for (int64_t i = heads.begin; i < heads.end; ++i) {
    const int64_t at = positions[i / shape.num_heads] * half;
    kernels.rope(cos + at, sin + at, shape.head_dim, ws.q + i * shape.head_dim);
  }
  const Range mine = team.Share(rows);
  for (int64_t r = mine.begin; r < mine.end; ++r) {
    const int64_t at = positions[r] * half;
    float* k_row = ws.k + r * kv_size;
    for (int64_t g = 0; g < shape.kv_heads; ++g)
      kernels.rope(cos + at, sin + at, shape.head_dim, k_row + g * shape.head_dim);
    if (slots[r] >= 0)
      kernels.append(k_row, ws.v + r * kv_size, slots[r], shape.kv_heads, shape.head_dim, page_size, k_pages, v_pages);
  }
  team.Barrier();
}

void PagedAttention(const Team& team, const Kernels& kernels, const Shape& shape, int64_t rows,
                    const int64_t* positions, const RowsBySequence& by_sequence, const void* k_pages,
                    const void* v_pages, int64_t page_size, const int32_t* block_table, int64_t max_blocks, float scale,
                    Workspace& ws) {
  // Tasks are dealt to the threads in turn; who computes one does not change its bits. A thread begins one when it
  // knows its next.
  int64_t turn = 0;
  ChunkTask mine{};
  const auto finish = [&](const ChunkTask* next) {
    mine.next = next;
    if (mine.num_rows > 0) kernels.attend_chunk(mine);
  };
  for (size_t b = 0; b + 1 < by_sequence.starts.size(); ++b) {
    ChunkTask task{};
    task.pages = {k_pages, v_pages, block_table + b * max_blocks, shape.kv_heads, shape.head_dim, page_size};
    task.num_heads = shape.num_heads;
    task.q = ws.q;
    task.positions = positions;
    task.scale = scale;
    task.partials = ws.partials;
    task.max_chunks = ws.max_chunks;
    for (int64_t r = by_sequence.starts[b]; r < by_sequence.starts[b + 1]; r += kRowsPerAttentionTask) {
      task.rows = by_sequence.rows.data() + r;
      task.num_rows = std::min(kRowsPerAttentionTask, by_sequence.starts[b + 1] - r);
      int64_t last = 0;
      for (int64_t i = 0; i < task.num_rows; ++i) last = std::max(last, positions[task.rows[i]]);
      for (task.chunk = 0; task.chunk <= last / kChunk; ++task.chunk)
        for (task.kv_head = 0; task.kv_head < shape.kv_heads; ++task.kv_head) {
          if (turn++ % team.size != team.rank) continue;
          finish(&task);
          mine = task;
        }
    }
  }
  finish(nullptr);
  team.Barrier();
  const Range heads = team.Share(rows * shape.num_heads);
  for (int64_t i = heads.begin; i < heads.end; ++i) {
    const int64_t chunks = positions[i / shape.num_heads] / kChunk + 1;
    float* partials = ws.partials + i * ws.max_chunks * (2 + shape.head_dim);
    kernels.merge_chunks(partials, chunks, shape.head_dim, ws.attention + i * shape.head_dim);
  }
  team.Barrier();
}

void LinearResidual(const Team& team, const Kernels& kernels, int64_t rows, const float* input, int64_t input_size,
                    WeightView weight, const void* bias, int64_t output_size, float* projected, float* x) {
  const Range mine = LinearShare(team, kernels, input, rows, input_size, weight, bias, output_size, true, projected);
  for (int64_t r = 0; r < rows; ++r) {
    float* y = projected + r * output_size + mine.begin;
    float* x_row = x + r * output_size + mine.begin;
    kernels.add_residual(x_row, mine.end - mine.begin, y);
    std::copy(y, y + (mine.end - mine.begin), x_row);
  }
  team.Barrier();
}

void NormGateUpSilu(const Team& team, const Kernels& kernels, const Shape& shape, const void* norm, WeightView w_gate,
                    WeightView w_up, float eps, int64_t rows, Workspace& ws) {
  const int64_t hidden = shape.hidden_size, size = shape.intermediate_size;
  NormRows(team, kernels, norm, hidden, eps, rows, ws.hidden, ws.normed);
  LinearShare(team, kernels, ws.normed, rows, hidden, w_up, nullptr, size, true, ws.up);
  const Range mine = LinearShare(team, kernels, ws.normed, rows, hidden, w_gate, nullptr, size, true, ws.gate);
  for (int64_t r = 0; r < rows; ++r)
    kernels.silu_mul(ws.up + r * size + mine.begin, mine.end - mine.begin, ws.gate + r * size + mine.begin);
  team.Barrier();
}

Head::Head(const void* norm, WeightView weight, int64_t hidden_size, int64_t vocab_size, float eps, int64_t rows,
           float* logits)
    : tokens(rows),
      norm_(norm),
      weight_(weight),
      hidden_size_(hidden_size),
      vocab_size_(vocab_size),
      eps_(eps),
      logits_(logits),
      normed_(rows * hidden_size),
      maxima_(rows * at::get_num_threads()) {}

void Head::Run(const Team& team, const Kernels& kernels, const float* hidden) {
  const auto rows = static_cast<int64_t>(tokens.size());
  NormRows(team, kernels, norm_, hidden_size_, eps_, rows, hidden, normed_);
  const Range mine =
      LinearShare(team, kernels, normed_, rows, hidden_size_, weight_, nullptr, vocab_size_, false, logits_);
  for (int64_t r = 0; r < rows && mine.begin < mine.end; ++r) {
    Maximum& maximum = maxima_[team.rank * rows + r];
    maximum = kernels.argmax(logits_ + r * vocab_size_ + mine.begin, mine.end - mine.begin);
    maximum.index += mine.begin;
    if (maximum.has_nan) has_nan = true;
  }
  team.Barrier();
  // Threads own ascending columns: a later one wins only with a larger value, so the lowest index wins a tie.
  const Range judged = team.Share(rows);
  const int64_t groups = Groups(vocab_size_);
  for (int64_t r = judged.begin; r < judged.end; ++r) {
    tokens[r] = -1;
    float best = 0.0f;
    for (int64_t t = 0; t < team.size; ++t) {
      const Range columns = Team{t, team.size}.Share(groups);
      const Maximum& next = maxima_[t * rows + r];
      if (columns.begin == columns.end || (tokens[r] >= 0 && !(next.value > best))) continue;
      tokens[r] = next.index;
      best = next.value;
    }
  }
  team.Barrier();
}

Move::Move(const ModelView& model, const CacheView& cache, Rows rows, int64_t num_sequences, int64_t stop)
    : model_(model),
      cache_(cache),
      rows_(std::move(rows)),
      ws_(model.shape, rows_.size(), *std::max_element(rows_.positions.begin(), rows_.positions.end())) {
  int64_t count = 0;
  while (count < rows_.size() && rows_.depths[count] < stop) {
    const int64_t first = rows_.depths[count];
    while (count < rows_.size() && rows_.depths[count] == first) ++count;
    const bool more = count < rows_.size() && rows_.depths[count] < stop;
    stages_.push_back({first, more ? rows_.depths[count] : stop, count,
                       RowsBySequence(rows_.sequences.data(), count, num_sequences)});
  }
}

void Move::Run(const Team& team) {
  const Kernels& kernels = *model_.kernels;
  const Shape& shape = model_.shape;
  const int64_t hidden_bytes = shape.hidden_size * kernels.element_size;
  const Range mine = team.Share(rows_.size());
  for (int64_t r = mine.begin; r < mine.end; ++r) {
    float* row = ws_.hidden + r * shape.hidden_size;
    if (rows_.depths[r] == 0) {
      kernels.embed(model_.embedding, rows_.tokens[r], shape.hidden_size, row);
    } else {
      kernels.widen(cache_.hidden + rows_.slots[r] * hidden_bytes, shape.hidden_size, row);
    }
  }
  team.Barrier();
  for (const Stage& stage : stages_) {
    for (int64_t layer = stage.first; layer < stage.last; ++layer) {
      const LayerWeights& w = model_.layers[layer];
      char* k_pages = cache_.k + layer * cache_.layer_bytes;
      char* v_pages = cache_.v + layer * cache_.layer_bytes;
      NormQkvRopeAppend(team, kernels, shape, w, model_.eps, model_.cos, model_.sin, stage.count,
                        rows_.positions.data(), rows_.slots.data(), k_pages, v_pages, cache_.page_size, ws_);
      PagedAttention(team, kernels, shape, stage.count, rows_.positions.data(), stage.by_sequence, k_pages, v_pages,
                     cache_.page_size, cache_.block_table, cache_.max_blocks, model_.scale, ws_);
      LinearResidual(team, kernels, stage.count, ws_.attention, shape.q_size(), w.wo, w.out_bias, shape.hidden_size,
                     ws_.projected, ws_.hidden);
      NormGateUpSilu(team, kernels, shape, w.mlp_norm, w.w_gate, w.w_up, model_.eps, stage.count, ws_);
      LinearResidual(team, kernels, stage.count, ws_.gate, shape.intermediate_size, w.w_down, nullptr,
                     shape.hidden_size, ws_.projected, ws_.hidden);
    }
  }
  for (int64_t r = mine.begin; r < mine.end; ++r)
    kernels.narrow(ws_.hidden + r * shape.hidden_size, shape.hidden_size,
                   cache_.hidden + rows_.slots[r] * hidden_bytes);
  team.Barrier();
}

}  // namespace layerskip
