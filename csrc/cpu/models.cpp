// The models that passes know by a number: reading their hundreds of tensors at every call would take as long as
// several layers, for the weights that streamed by have driven them out of the caches.
#include <memory>
#include <unordered_map>

#include "checks.h"
#include "fork_safe_mutex.h"
#include "operands.h"
#include "ops.h"

namespace layerskip {

namespace {

struct KeptModels {
  ForkSafeMutex mutex;  // guards the others
  std::unordered_map<int64_t, std::shared_ptr<const KeptModel>> by_number;
  int64_t last = 0;
};

KeptModels& Models() {
  static auto* models = new KeptModels;  // outlives all users
  return *models;
}

}  // namespace

int64_t keep_model(TensorList weights, int64_t num_kv_heads, int64_t head_dim, at::IntArrayRef ints,
                   at::ArrayRef<double> floats) {
  auto kept = std::make_shared<KeptModel>(
      KeptModel{weights.vec(), CheckedModel(weights, num_kv_heads, head_dim, ints, floats)});
  KeptModels& models = Models();
  const ForkSafeLock lock(models.mutex);
  models.by_number[++models.last] = std::move(kept);
  return models.last;
}

void forget_model(int64_t model) {
  std::shared_ptr<const KeptModel> kept;  // dies after the lock
  KeptModels& models = Models();
  const ForkSafeLock lock(models.mutex);
  const auto found = models.by_number.find(model);
  if (found == models.by_number.end()) return;
  kept = std::move(found->second);
  models.by_number.erase(found);
}

std::shared_ptr<const KeptModel> ModelFor(int64_t model, const Tensor& k_cache, const Tensor& hidden_cache) {
  std::shared_ptr<const KeptModel> kept;
  {
    KeptModels& models = Models();
    const ForkSafeLock lock(models.mutex);
    const auto found = models.by_number.find(model);
    TORCH_CHECK_VALUE(found != models.by_number.end(), "model ", model, " is not known; keep_model gives its number");
    kept = found->second;
  }
  const ModelView& view = kept->view;
  const LayerSizes& sizes = view.sizes;
  CheckTensor("k_cache", k_cache, kept->dtype(), {kAny, kAny, sizes.kv_heads, sizes.head_dim, kAny});
  TORCH_CHECK_VALUE(view.num_cached <= k_cache.size(0) && k_cache.size(0) <= view.num_layers(), "k_cache has ",
                    k_cache.size(0), " layers, the model ", view.num_layers(), ", of which ", view.num_cached,
                    " need pages");
  CheckTensor("hidden_cache", hidden_cache, kept->dtype(), {kAny, kAny, sizes.hidden_size});
  return kept;
}

}  // namespace layerskip
