#include "layers.h"

#include <algorithm>

namespace layerskip {

namespace {

constexpr int64_t kRowsPerAttentionTask = 16;
constexpr int64_t kFewRows = 4;

int64_t Groups(int64_t n) { return (n + kGroup - 1) / kGroup; }

// Groups of columns that a thread takes at a time: with few rows what one pass over the weights keeps in registers,
// with more twice as many, because each piece prepares its rows anew.
int64_t PieceGroups(int64_t rows) { return rows <= kFewRows ? 4 : 8; }

// Few rows are normed by every thread for itself, which takes less time than to wait for one another. How many rows of
// room NormRows needs for `rows` of them or fewer.
int64_t NormedRows(int64_t rows) { return std::max(rows, std::min(rows, kFewRows) * NumThreads()); }

// rms_norm of all rows into `out`, which has room for NormedRows(rows); returns what this thread is to read.
const float* NormRows(Team& team, const Kernels& kernels, const void* weight, int64_t size, float eps, int64_t rows,
                      const float* x, float* out) {
  const auto norm = [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) kernels.rms_norm(x + r * size, weight, size, eps, out + r * size);
  };
  if (rows <= kFewRows) {
    out += team.rank * rows * size;
    norm(0, rows);
  } else {
    team.ForEach(rows, 1, norm);
  }
  return out;
}

const void* Offset(const Kernels& kernels, const void* base, int64_t elements) {
  return base == nullptr ? nullptr : static_cast<const char*>(base) + elements * kernels.element_size;
}

// Rule 6: the larger value, and among equals the lower index; anything beats nothing (index -1).
bool Beats(const Maximum& a, const Maximum& b) {
  if (a.index < 0 || b.index < 0) return b.index < 0;
  return a.value > b.value || (a.value == b.value && a.index < b.index);
}

// One head's chunks of one row become its output.
void MergeHead(const Kernels& kernels, const Shape& shape, int64_t position, int64_t head, Workspace& ws) {
  float* partials = ws.partials + head * ws.max_chunks * (2 + shape.head_dim);
  kernels.merge_chunks(partials, position / kChunk + 1, shape.head_dim, ws.attention + head * shape.head_dim);
}

}  // namespace

Workspace::Workspace(const Shape& shape, int64_t rows, int64_t last_position)
    : max_chunks(last_position / kChunk + 1),
      hidden(rows * shape.hidden_size),
      normed(NormedRows(rows) * shape.hidden_size),
      q(rows * shape.q_size()),
      k(rows * shape.kv_size()),
      v(rows * shape.kv_size()),
      partials(rows * shape.num_heads * max_chunks * (2 + shape.head_dim)),
      attention(rows * shape.q_size()),
      projected(rows * shape.hidden_size),
      gate(rows * shape.intermediate_size),
      up(rows * shape.intermediate_size) {}

AttentionPlan::AttentionPlan(const int32_t* sequences, const int64_t* positions, int64_t count, int64_t num_sequences)
    : rows(count), max_chunks(0) {
  std::vector<int64_t> starts(num_sequences + 1, 0);
  for (int64_t r = 0; r < count; ++r) ++starts[sequences[r] + 1];
  for (int64_t b = 0; b < num_sequences; ++b) starts[b + 1] += starts[b];
  std::vector<int64_t> next(starts.begin(), starts.end() - 1);
  for (int64_t r = 0; r < count; ++r) rows[next[sequences[r]]++] = static_cast<int32_t>(r);
  for (int64_t b = 0; b < num_sequences; ++b) {
    for (int64_t first = starts[b]; first < starts[b + 1]; first += kRowsPerAttentionTask) {
      const int64_t some = std::min(kRowsPerAttentionTask, starts[b + 1] - first);
      int64_t chunks = 0;
      for (int64_t i = first; i < first + some; ++i) chunks = std::max(chunks, positions[rows[i]] / kChunk + 1);
      for (int64_t chunk = 0; chunk < chunks; ++chunk) tasks.push_back({static_cast<int32_t>(b), first, some, chunk});
      max_chunks = std::max(max_chunks, chunks);
    }
  }
}

void NormQkvRopeAppend(Team& team, const Kernels& kernels, const Shape& shape, const LayerWeights& w, float eps,
                       const float* cos, const float* sin, int64_t rows, const int64_t* positions, const int64_t* slots,
                       void* k_pages, void* v_pages, int64_t page_size, Workspace& ws) {
  const int64_t hidden = shape.hidden_size, q_size = shape.q_size(), kv_size = shape.kv_size();
  const float* normed = NormRows(team, kernels, w.attn_norm, hidden, eps, rows, ws.hidden, ws.normed);
  const struct {
    WeightView weight;
    int64_t bias_at, size;
    float* out;
  } parts[] = {{w.wq, 0, q_size, ws.q}, {w.wk, q_size, kv_size, ws.k}, {w.wv, q_size + kv_size, kv_size, ws.v}};
  team.ForEach(Groups(q_size) + 2 * Groups(kv_size), PieceGroups(rows), [&](int64_t begin, int64_t end) {
    for (const auto& part : parts) {
      const int64_t groups = Groups(part.size), first = std::max<int64_t>(begin, 0), last = std::min(end, groups);
      if (first < last)
        kernels.linear(normed, rows, hidden, part.weight, Offset(kernels, w.qkv_bias, part.bias_at), part.size, first,
                       last, true, part.out);
      begin -= groups;
      end -= groups;
    }
  });
  const int64_t half = shape.head_dim / 2;
  team.ForEach(rows, 1, [&](int64_t r, int64_t) {
    const float *cos_r = cos + positions[r] * half, *sin_r = sin + positions[r] * half;
    float *q_row = ws.q + r * q_size, *k_row = ws.k + r * kv_size;
    for (int64_t at = 0; at < q_size; at += shape.head_dim) kernels.rope(cos_r, sin_r, shape.head_dim, q_row + at);
    for (int64_t at = 0; at < kv_size; at += shape.head_dim) kernels.rope(cos_r, sin_r, shape.head_dim, k_row + at);
    if (slots[r] >= 0)
      kernels.append(k_row, ws.v + r * kv_size, slots[r], shape.kv_heads, shape.head_dim, page_size, k_pages, v_pages);
  });
}

void PagedAttention(Team& team, const Kernels& kernels, const Shape& shape, int64_t rows, const int64_t* positions,
                    const AttentionPlan& plan, const void* k_pages, const void* v_pages, int64_t page_size,
                    const int32_t* block_table, int64_t max_blocks, float scale, Workspace& ws) {
  const int64_t num_tasks = static_cast<int64_t>(plan.tasks.size()) * shape.kv_heads;
  const auto task_at = [&](int64_t i) {
    const AttentionPlan::Task& from = plan.tasks[i / shape.kv_heads];
    ChunkTask task{};
    task.pages = {k_pages,        v_pages,        block_table + from.sequence * max_blocks,
                  shape.kv_heads, shape.head_dim, page_size};
    task.kv_head = i % shape.kv_heads;
    task.chunk = from.chunk;
    task.rows = plan.rows.data() + from.first;
    task.num_rows = from.count;
    task.num_heads = shape.num_heads;
    task.q = ws.q;
    task.positions = positions;
    task.scale = scale;
    task.partials = ws.partials;
    task.max_chunks = ws.max_chunks;
    return task;
  };
  const int64_t heads_per_kv = shape.num_heads / shape.kv_heads;
  team.ForEach(num_tasks, 1, [&](int64_t i, int64_t) {
    ChunkTask task = task_at(i);
    const ChunkTask next = task_at(std::min(i + 1, num_tasks - 1));
    task.next = &next;
    kernels.attend_chunk(task);
    for (int64_t r = 0; plan.max_chunks == 1 && r < task.num_rows; ++r) {
      const int64_t row = task.rows[r], first = row * shape.num_heads + task.kv_head * heads_per_kv;
      for (int64_t head = first; head < first + heads_per_kv; ++head)
        MergeHead(kernels, shape, positions[row], head, ws);
    }
  });
  if (plan.max_chunks == 1) return;
  team.ForEach(rows * shape.num_heads, 1,
               [&](int64_t head, int64_t) { MergeHead(kernels, shape, positions[head / shape.num_heads], head, ws); });
}

void LinearResidual(Team& team, const Kernels& kernels, int64_t rows, const float* input, int64_t input_size,
                    WeightView weight, const void* bias, int64_t output_size, float* projected, float* x) {
  team.ForEach(Groups(output_size), PieceGroups(rows), [&](int64_t begin, int64_t end) {
    kernels.linear(input, rows, input_size, weight, bias, output_size, begin, end, true, projected);
    const int64_t column = begin * kGroup, columns = std::min(end * kGroup, output_size) - column;
    for (int64_t r = 0; r < rows; ++r) {
      float* y = projected + r * output_size + column;
      float* x_row = x + r * output_size + column;
      kernels.add_residual(x_row, columns, y);
      std::copy_n(y, columns, x_row);
    }
  });
}

void NormGateUpSilu(Team& team, const Kernels& kernels, const Shape& shape, const void* norm, WeightView w_gate,
                    WeightView w_up, float eps, int64_t rows, Workspace& ws) {
  const int64_t hidden = shape.hidden_size, size = shape.intermediate_size;
  const float* normed = NormRows(team, kernels, norm, hidden, eps, rows, ws.hidden, ws.normed);
  team.ForEach(Groups(size), PieceGroups(rows), [&](int64_t begin, int64_t end) {
    kernels.linear(normed, rows, hidden, w_up, nullptr, size, begin, end, true, ws.up);
    kernels.linear(normed, rows, hidden, w_gate, nullptr, size, begin, end, true, ws.gate);
    const int64_t column = begin * kGroup, columns = std::min(end * kGroup, size) - column;
    for (int64_t r = 0; r < rows; ++r)
      kernels.silu_mul(ws.up + r * size + column, columns, ws.gate + r * size + column);
  });
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
      normed_(NormedRows(rows) * hidden_size),
      maxima_(rows * NumThreads(), Maximum{0.0f, -1, false}) {}

void Head::Run(Team& team, const Kernels& kernels, const float* hidden) {
  const auto rows = static_cast<int64_t>(tokens.size());
  const float* normed = NormRows(team, kernels, norm_, hidden_size_, eps_, rows, hidden, normed_);
  team.ForEach(Groups(vocab_size_), PieceGroups(rows), [&](int64_t begin, int64_t end) {
    kernels.linear(normed, rows, hidden_size_, weight_, nullptr, vocab_size_, begin, end, false, logits_);
    const int64_t column = begin * kGroup, columns = std::min(end * kGroup, vocab_size_) - column;
    for (int64_t r = 0; r < rows; ++r) {
      Maximum maximum = kernels.argmax(logits_ + r * vocab_size_ + column, columns);
      maximum.index += column;
      if (maximum.has_nan) has_nan = true;
      Maximum& best = maxima_[team.rank * rows + r];
      if (Beats(maximum, best)) best = maximum;
    }
  });
  team.ForEach(rows, 1, [&](int64_t r, int64_t) {
    Maximum best = maxima_[r];
    for (int64_t t = 1; t < team.size; ++t)
      if (Beats(maxima_[t * rows + r], best)) best = maxima_[t * rows + r];
    tokens[r] = best.index;
  });
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
                       AttentionPlan(rows_.sequences.data(), rows_.positions.data(), count, num_sequences)});
  }
}

void Move::Run(Team& team) {
  const Kernels& kernels = *model_.kernels;
  const Shape& shape = model_.shape;
  const int64_t hidden_bytes = shape.hidden_size * kernels.element_size;
  team.ForEach(rows_.size(), 1, [&](int64_t r, int64_t) {
    float* row = ws_.hidden + r * shape.hidden_size;
    if (rows_.depths[r] == 0) {
      kernels.embed(model_.embedding, rows_.tokens[r], shape.hidden_size, row);
    } else {
      kernels.widen(cache_.hidden + rows_.slots[r] * hidden_bytes, shape.hidden_size, row);
    }
  });
  for (const Stage& stage : stages_) {
    for (int64_t layer = stage.first; layer < stage.last; ++layer) {
      const LayerWeights& w = model_.layers[layer];
      char* k_pages = cache_.k + layer * cache_.layer_bytes;
      char* v_pages = cache_.v + layer * cache_.layer_bytes;
      NormQkvRopeAppend(team, kernels, shape, w, model_.eps, model_.cos, model_.sin, stage.count,
                        rows_.positions.data(), rows_.slots.data(), k_pages, v_pages, cache_.page_size, ws_);
      PagedAttention(team, kernels, shape, stage.count, rows_.positions.data(), stage.attention, k_pages, v_pages,
                     cache_.page_size, cache_.block_table, cache_.max_blocks, model_.scale, ws_);
      LinearResidual(team, kernels, stage.count, ws_.attention, shape.q_size(), w.wo, w.out_bias, shape.hidden_size,
                     ws_.projected, ws_.hidden);
      NormGateUpSilu(team, kernels, shape, w.mlp_norm, w.w_gate, w.w_up, model_.eps, stage.count, ws_);
      LinearResidual(team, kernels, stage.count, ws_.gate, shape.intermediate_size, w.w_down, nullptr,
                     shape.hidden_size, ws_.projected, ws_.hidden);
    }
  }
  team.ForEach(rows_.size(), 1, [&](int64_t r, int64_t) {
    kernels.narrow(ws_.hidden + r * shape.hidden_size, shape.hidden_size,
                   cache_.hidden + rows_.slots[r] * hidden_bytes);
  });
}

}  // namespace layerskip
