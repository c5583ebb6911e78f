#include "layers.h"

#include <algorithm>

namespace layerskip {

namespace {

constexpr int64_t kRowsPerAttentionTask = 16;

int64_t Groups(int64_t n) { return (n + kGroup - 1) / kGroup; }

// Groups of columns that a thread takes at a time: with few rows what one pass over the weights keeps in registers,
// with more twice as many, because each piece prepares its rows anew.
int64_t PieceGroups(int64_t rows) { return rows <= kFewRows ? 4 : 8; }

// rms_norm of all rows; returns what this thread is to read: `x` itself where there is no norm.
const float* NormRows(Team& team, const Kernels& kernels, const void* weight, int64_t size, NormConstants constants,
                      int64_t rows, const float* x, const PreparedRows& memory) {
  if (weight == nullptr) return x;
  float* out = reinterpret_cast<float*>(memory.Of(rows, team.rank));
  const auto norm = [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) kernels.rms_norm(x + r * size, weight, size, constants, out + r * size);
  };
  if (rows <= kFewRows) {
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

IntegerSizes SizesOf(WeightView weight, int64_t inputs) {
  IntegerSizes sizes;
  sizes.Add(weight, inputs);
  return sizes;
}

// The first chunk of which a row sees anything.
int64_t FirstChunk(int64_t position, int64_t window) {
  return window == 0 ? 0 : std::max<int64_t>(0, position + 1 - window) / kChunk;
}

// One head's chunks of one row become its output.
void MergeHead(const Kernels& kernels, const LayerSizes& sizes, int64_t position, int64_t window, int64_t head,
               Workspace& ws) {
  const int64_t first = FirstChunk(position, window);
  float* partials = ws.partials + (head * ws.max_chunks + first) * (2 + sizes.head_dim);
  kernels.merge_chunks(partials, position / kChunk + 1 - first, sizes.head_dim, ws.attention + head * sizes.head_dim);
}

}  // namespace

Workspace::Workspace(const LayerSizes& sizes, int64_t rows, int64_t last_position, const IntegerSizes& integer_sizes)
    : max_chunks(last_position / kChunk + 1),
      hidden(rows * sizes.hidden_size),
      q(rows * sizes.q_size()),
      k(rows * sizes.kv_size()),
      v(rows * sizes.kv_size()),
      partials(rows * sizes.num_heads * max_chunks * (2 + sizes.head_dim)),
      attention(rows * sizes.q_size()),
      projected(rows * sizes.hidden_size),
      gate(rows * sizes.intermediate_size),
      up(rows * sizes.intermediate_size),
      normed(PreparedFloats(rows, sizes.hidden_size)),
      integers(integer_sizes, rows) {}

AttentionTasks::AttentionTasks(const int32_t* sequences, const int64_t* positions, int64_t count, int64_t num_sequences,
                               int64_t window)
    : rows(count), max_chunks(0) {
  std::vector<int64_t> starts(num_sequences + 1, 0);
  for (int64_t r = 0; r < count; ++r) ++starts[sequences[r] + 1];
  for (int64_t b = 0; b < num_sequences; ++b) starts[b + 1] += starts[b];
  std::vector<int64_t> next(starts.begin(), starts.end() - 1);
  for (int64_t r = 0; r < count; ++r) rows[next[sequences[r]]++] = static_cast<int32_t>(r);
  for (int64_t b = 0; b < num_sequences; ++b) {
    for (int64_t first = starts[b]; first < starts[b + 1]; first += kRowsPerAttentionTask) {
      const int64_t some = std::min(kRowsPerAttentionTask, starts[b + 1] - first);
      int64_t chunks = 0, first_chunk = positions[rows[first]] / kChunk;
      for (int64_t i = first; i < first + some; ++i) {
        chunks = std::max(chunks, positions[rows[i]] / kChunk + 1);
        first_chunk = std::min(first_chunk, FirstChunk(positions[rows[i]], window));
      }
      for (int64_t chunk = first_chunk; chunk < chunks; ++chunk)
        tasks.push_back({static_cast<int32_t>(b), first, some, chunk});
      max_chunks = std::max(max_chunks, chunks);
    }
  }
}

void NormQkvRopeAppend(Team& team, const Kernels& kernels, const LayerSizes& sizes, const LayerWeights& w,
                       const RopeTables& rope, const RowSlots& rows, const LayerPages& pages, Workspace& ws) {
  const int64_t hidden = sizes.hidden_size, q_size = sizes.q_size(), kv_size = sizes.kv_size();
  const float* normed = NormRows(team, kernels, w.attn_norm, hidden, sizes.norm, rows.count, ws.hidden, ws.normed);
  const LinearInput input(team, normed, rows.count, hidden, {w.wq, w.wk, w.wv}, ws.integers);
  const struct {
    WeightView weight;
    int64_t bias_at, size;
    float* out;
  } parts[] = {{w.wq, 0, q_size, ws.q}, {w.wk, q_size, kv_size, ws.k}, {w.wv, q_size + kv_size, kv_size, ws.v}};
  team.ForEach(Groups(q_size) + 2 * Groups(kv_size), PieceGroups(rows.count), [&](int64_t begin, int64_t end) {
    for (const auto& part : parts) {
      const int64_t groups = Groups(part.size), first = std::max<int64_t>(begin, 0), last = std::min(end, groups);
      if (first < last)
        Linear(kernels, input, part.weight, Offset(kernels, w.qkv_bias, part.bias_at), part.size, first, last, true,
               part.out);
      begin -= groups;
      end -= groups;
    }
  });
  // Of one row's q or k: the norm, then the rotation of each head.
  const auto turn = [&](float* row, int64_t size, const void* norm, int64_t position) {
    const int64_t normed_at_once = w.norms_heads ? sizes.head_dim : size, half = rope.rotary_dim / 2;
    for (int64_t at = 0; norm != nullptr && at < size; at += normed_at_once)
      kernels.rms_norm(row + at, norm, normed_at_once, sizes.norm, row + at);
    for (int64_t at = 0; rope.cos != nullptr && at < size; at += sizes.head_dim)
      kernels.rope(rope.cos + position * half, rope.sin + position * half, rope.rotary_dim, row + at);
  };
  team.ForEach(rows.count, 1, [&](int64_t r, int64_t) {
    float *q_row = ws.q + r * q_size, *k_row = ws.k + r * kv_size;
    turn(q_row, q_size, w.q_norm, rows.positions[r]);
    turn(k_row, kv_size, w.k_norm, rows.positions[r]);
    if (rows.slots[r] >= 0)
      kernels.append(k_row, ws.v + r * kv_size, rows.slots[r], sizes.kv_heads, sizes.head_dim, pages.page_size, pages.k,
                     pages.v);
  });
}

void Embed(const Kernels& kernels, WeightView embedding, int64_t token, int64_t hidden_size, float* out) {
  if (embedding.type == WeightType::kDense) {
    kernels.embed(embedding.data, token, hidden_size, out);
  } else {
    DequantiseRow(embedding, token, hidden_size, out);
    kernels.finish(nullptr, 1, hidden_size, 0, Groups(hidden_size), true, out);
  }
}

void PagedAttention(Team& team, const Kernels& kernels, const LayerSizes& sizes, const AttentionTasks& tasks,
                    const RowSlots& rows, const LayerPages& pages, const BlockTable& block_table,
                    const ScoreRules& rules, Workspace& ws) {
  const int64_t num_tasks = static_cast<int64_t>(tasks.tasks.size()) * sizes.kv_heads;
  const auto task_at = [&](int64_t i) {
    const AttentionTasks::Task& from = tasks.tasks[i / sizes.kv_heads];
    return ChunkTask{.pages = {pages.k, pages.v, block_table.pages + from.sequence * block_table.max_blocks,
                               sizes.kv_heads, sizes.head_dim, pages.page_size},
                     .kv_head = i % sizes.kv_heads,
                     .chunk = from.chunk,
                     .rows = tasks.rows.data() + from.first,
                     .num_rows = from.count,
                     .num_heads = sizes.num_heads,
                     .q = ws.q,
                     .positions = rows.positions,
                     .scale = rules.scale,
                     .cap = rules.cap,
                     .window = rules.window,
                     .partials = ws.partials,
                     .max_chunks = ws.max_chunks,
                     .next = nullptr};
  };
  const int64_t heads_per_kv = sizes.num_heads / sizes.kv_heads;
  team.ForEach(num_tasks, 1, [&](int64_t i, int64_t) {
    ChunkTask task = task_at(i);
    const ChunkTask next = task_at(std::min(i + 1, num_tasks - 1));
    task.next = &next;
    kernels.attend_chunk(task);
    for (int64_t r = 0; tasks.max_chunks == 1 && r < task.num_rows; ++r) {
      const int64_t row = task.rows[r], first = row * sizes.num_heads + task.kv_head * heads_per_kv;
      for (int64_t head = first; head < first + heads_per_kv; ++head)
        MergeHead(kernels, sizes, rows.positions[row], rules.window, head, ws);
    }
  });
  if (tasks.max_chunks == 1) return;
  team.ForEach(rows.count * sizes.num_heads, 1, [&](int64_t head, int64_t) {
    MergeHead(kernels, sizes, rows.positions[head / sizes.num_heads], rules.window, head, ws);
  });
}

void LinearResidual(Team& team, const Kernels& kernels, int64_t rows, const float* input, const LinearView& linear,
                    const IntegerBuffer& integers, float* projected, float* x) {
  const LinearInput linear_input(team, input, rows, linear.inputs, {linear.weight}, integers);
  const int64_t size = linear.outputs;
  const auto add = [&](int64_t r, int64_t column, int64_t columns) {
    float *y = projected + r * size + column, *x_row = x + r * size + column;
    if (linear.multiplier != 1.0f) kernels.multiply(linear.multiplier, columns, y);
    kernels.add_residual(x_row, columns, y);
    std::copy_n(y, columns, x_row);
  };
  team.ForEach(Groups(size), PieceGroups(rows), [&](int64_t begin, int64_t end) {
    Linear(kernels, linear_input, linear.weight, linear.bias, size, begin, end, true, projected);
    const int64_t column = begin * kGroup, columns = std::min(end * kGroup, size) - column;
    for (int64_t r = 0; linear.post_norm == nullptr && r < rows; ++r) add(r, column, columns);
  });
  if (linear.post_norm == nullptr) return;
  team.ForEach(rows, 1, [&](int64_t r, int64_t) {  // the norm needs whole rows
    float* y = projected + r * size;
    kernels.rms_norm(y, linear.post_norm, size, linear.norm, y);
    add(r, 0, size);
  });
}

void NormGateUpAct(Team& team, const Kernels& kernels, const LayerSizes& sizes, const LayerWeights& w, bool gelu,
                   int64_t rows, Workspace& ws) {
  const int64_t hidden = sizes.hidden_size, size = sizes.intermediate_size;
  const float* normed = NormRows(team, kernels, w.mlp_norm, hidden, sizes.norm, rows, ws.hidden, ws.normed);
  const LinearInput input(team, normed, rows, hidden, {w.w_gate, w.w_up}, ws.integers);
  const void *gate_bias = w.gate_up_bias, *up_bias = Offset(kernels, w.gate_up_bias, size);
  const auto activate = gelu ? kernels.gelu_mul : kernels.silu_mul;
  team.ForEach(Groups(size), PieceGroups(rows), [&](int64_t begin, int64_t end) {
    Linear(kernels, input, w.w_up, up_bias, size, begin, end, true, ws.up);
    Linear(kernels, input, w.w_gate, gate_bias, size, begin, end, true, ws.gate);
    const int64_t column = begin * kGroup, columns = std::min(end * kGroup, size) - column;
    for (int64_t r = 0; r < rows; ++r) activate(ws.up + r * size + column, columns, ws.gate + r * size + column);
  });
}

Head::Head(const void* norm, WeightView weight, int64_t hidden_size, int64_t vocab_size, const LogitRules& rules,
           int64_t rows, float* logits)
    : tokens(rows),
      norm_(norm),
      weight_(weight),
      hidden_size_(hidden_size),
      vocab_size_(vocab_size),
      rules_(rules),
      logits_(logits),
      normed_(PreparedFloats(rows, hidden_size)),
      integers_(SizesOf(weight, hidden_size), rows),
      maxima_(rows * NumThreads(), Maximum{0.0f, -1, false}) {}

void Head::Run(Team& team, const Kernels& kernels, const float* hidden) {
  const auto rows = static_cast<int64_t>(tokens.size());
  const float* normed = NormRows(team, kernels, norm_, hidden_size_, rules_.norm, rows, hidden, normed_);
  const LinearInput input(team, normed, rows, hidden_size_, {weight_}, integers_);
  team.ForEach(Groups(vocab_size_), PieceGroups(rows), [&](int64_t begin, int64_t end) {
    Linear(kernels, input, weight_, nullptr, vocab_size_, begin, end, false, logits_);
    const int64_t column = begin * kGroup, columns = std::min(end * kGroup, vocab_size_) - column;
    const bool rescaled = rules_.multiplier != 1.0f || rules_.cap != 0.0f;
    for (int64_t r = 0; r < rows; ++r) {
      float* logits = logits_ + r * vocab_size_ + column;
      if (rescaled) kernels.scale_logits(rules_.multiplier, rules_.cap, columns, logits);
      Maximum maximum = kernels.argmax(logits, columns);
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

SortedRows SortedRows::First(int64_t count) const {
  const auto first = [count](const auto& all) { return std::decay_t<decltype(all)>(all.begin(), all.begin() + count); };
  return {first(tokens), first(positions), first(slots), first(given), first(sequences), first(depths)};
}

Move::Move(const ModelView& model, const CacheView& cache, SortedRows rows, int64_t num_sequences, int64_t stop,
           bool keeps)
    : model_(model),
      cache_(cache),
      rows_(std::move(rows)),
      keeps_(keeps),
      ws_(model.sizes, rows_.size(), *std::max_element(rows_.positions.begin(), rows_.positions.end()),
          model.integers) {
  int64_t count = 0;
  while (count < rows_.size() && rows_.depths[count] < stop) {
    const int64_t first = rows_.depths[count];
    while (count < rows_.size() && rows_.depths[count] == first) ++count;
    const bool more = count < rows_.size() && rows_.depths[count] < stop;
    stages_.push_back({first, more ? rows_.depths[count] : stop, count, {}});
    for (const int64_t window : model.windows)
      stages_.back().attention.emplace_back(rows_.sequences.data(), rows_.positions.data(), count, num_sequences,
                                            window);
  }
}

void Move::Run(Team& team) {
  const Kernels& kernels = model_.kernels();
  const LayerSizes& sizes = model_.sizes;
  const int64_t hidden_bytes = sizes.hidden_size * kernels.element_size;
  team.ForEach(rows_.size(), 1, [&](int64_t r, int64_t) {
    float* row = ws_.hidden + r * sizes.hidden_size;
    if (rows_.depths[r] == 0) {
      Embed(kernels, model_.embedding, rows_.tokens[r], sizes.hidden_size, row);
      if (model_.embedding_multiplier != 1.0f) kernels.multiply(model_.embedding_multiplier, sizes.hidden_size, row);
    } else {
      kernels.widen(cache_.hidden + rows_.slots[r] * hidden_bytes, sizes.hidden_size, row);
    }
  });
  for (const Stage& stage : stages_) {
    const RowSlots rows{stage.count, rows_.positions.data(), rows_.slots.data()};
    for (int64_t layer = stage.first; layer < stage.last; ++layer) {
      const LayerWeights& w = model_.layers[layer];
      const auto add = [&](WeightView weight, const void* bias, int64_t inputs, const void* post_norm,
                           const float* input) {
        const LinearView linear{
            weight, bias, inputs, sizes.hidden_size, post_norm, sizes.norm, model_.residual_multiplier};
        LinearResidual(team, kernels, stage.count, input, linear, ws_.integers, ws_.projected, ws_.hidden);
      };
      if (w.attends) {
        const LayerKind& kind = model_.kinds[layer];
        const LayerPages pages{cache_.k + layer * cache_.layer_bytes, cache_.v + layer * cache_.layer_bytes,
                               cache_.page_size};
        const ScoreRules rules{model_.scale, model_.score_cap, model_.windows[kind.window_index]};
        NormQkvRopeAppend(team, kernels, sizes, w, kind.rope, rows, pages, ws_);
        PagedAttention(team, kernels, sizes, stage.attention[kind.window_index], rows, pages,
                       {cache_.block_table, cache_.max_blocks}, rules, ws_);
        add(w.wo, w.out_bias, sizes.q_size(), w.attn_post_norm, ws_.attention);
      }
      NormGateUpAct(team, kernels, sizes, w, model_.gelu, stage.count, ws_);
      add(w.w_down, w.down_bias, sizes.intermediate_size, w.mlp_post_norm, ws_.gate);
    }
  }
  if (!keeps_) return;
  team.ForEach(rows_.size(), 1, [&](int64_t r, int64_t) {
    kernels.narrow(ws_.hidden + r * sizes.hidden_size, sizes.hidden_size,
                   cache_.hidden + rows_.slots[r] * hidden_bytes);
  });
}

}  // namespace layerskip
