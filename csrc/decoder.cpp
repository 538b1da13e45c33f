// All layers of the decoder in one call: Python would give up its lock some three hundred times, and
// wait for it again beside every thread that computes.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "aten.h"
#include "ops.h"

namespace llava_engine {
namespace {

using torch::headeronly::ScalarType;
using Scales = std::optional<Tensor>;

constexpr int64_t kHeadDim = 128;  // which matmul_rope_append takes
// Rows from which products are ours (bench/NOTES.md): in float8; in 16 bits that of gate and up,
// whose SiLU then costs nothing; and the others, too. Below, cuBLAS is as fast or faster.
constexpr int64_t kFp8Rows = 128, kGateUpRows = 512, kManyRows = 960;
// Quantised weights are multiplied with all that is folded in up to so many rows (in 8 bits and in
// 4), for more by the products of many rows. Where those do not take them, the first serve up to
// kFewQuantRows, and then cuBLAS in 16 bits, a tile of rows at a time, which is still in the L2 cache
// when it is read.
constexpr int64_t kQuantRows = 8, kNf4Rows = 16, kFewQuantRows = 32, kTileBytes = 32 << 20;

// A layer's tensors, in the order of kernels/decoder.py.
struct Layer {
  enum Part { kInputNorm, kQkv, kOut, kPostNorm, kGateUp, kDown, kParts };
  enum Product { kQkvProduct, kOutProduct, kGateUpProduct, kDownProduct, kProducts };
};

// The rows of a product's input, in the model's type or in float8 with scales.
struct Rows {
  Tensor values;
  Scales scales;
};

Tensor empty(const Tensor& like, std::vector<int64_t> sizes) {
  return torch::stable::new_empty(like, sizes);
}

Tensor empty(const Tensor& like, std::vector<int64_t> sizes, ScalarType type) {
  return torch::stable::new_empty(like, sizes, type);
}

Rows fp8_rows(const Tensor& like, int64_t columns) {
  return {empty(like, {like.size(0), columns}, ScalarType::Float8_e4m3fn),
          empty(like, {like.size(0)}, ScalarType::Float)};
}

// The matrices of all layers, and what their sizes say.
struct Weights {
  const std::vector<Tensor>& parts;
  const std::vector<Tensor>& scales;  // of each product, where any is quantised
  const std::vector<Tensor>& fp8;  // of each product values and scales, or nothing
  int64_t q_heads, kv_heads, dim, wide;
  double eps;
  bool all_quantised;

  const Tensor& part(int64_t layer, Layer::Part which) const {
    return parts[layer * Layer::kParts + which];
  }
  const Tensor& scales_of(int64_t layer, Layer::Product product) const {
    return scales[layer * Layer::kProducts + product];
  }
  // How far apart two rows are that are finished together (kernels/quant_linear.py).
  int64_t apart(Layer::Product product) const {
    return product == Layer::kQkvProduct ? dim / 2 : product == Layer::kGateUpProduct ? wide : 1;
  }
};

bool is_quantised(const Tensor& weight) { return weight.element_size() == 1; }

int64_t outputs_of(const Tensor& weight) {
  constexpr int64_t kUnitRows = 16;  // of packed weights
  return weight.size(0) * (weight.scalar_type() == ScalarType::Byte ? kUnitRows : 1);
}

// Rows on their way through the layers, and where their products go. How many they are says how they
// are multiplied.
class Residual {
 public:
  Residual(const Weights& weights, const Tensor& residual)
      : weights_(weights), residual_(residual), rows_(residual.size(0)) {
    const int64_t hidden = residual.size(1), dim = weights.dim, heads = weights.q_heads;
    x_ = empty(residual, {rows_, hidden});
    // With scales some weight is quantised; unless all are, cuBLAS has them.
    const bool takes = (weights.scales.empty() || weights.all_quantised) && dim == kHeadDim &&
                       matmul_takes(x_, weights.part(0, Layer::kQkv));
    if (!weights.fp8.empty() && rows_ >= kFp8Rows && dim == kHeadDim) {
      normal_ = fp8_rows(residual, hidden);
      in_fp8_ = matmul_takes(normal_.values, weights.fp8[0]);
    }
    const bool packed = weights.part(0, Layer::kQkv).scalar_type() == ScalarType::Byte;
    const int64_t few = !takes ? kFewQuantRows : packed ? kNf4Rows : kQuantRows;
    fused_ = weights.all_quantised && rows_ <= few;
    ours_ = in_fp8_ || (takes && !fused_ && (weights.all_quantised || rows_ >= kManyRows));
    gate_up_ours_ = ours_ || (takes && !fused_ && rows_ >= kGateUpRows);
    activated_ = empty(residual, {rows_, weights.wide});
    gate_up_ = empty(residual, {gate_up_ours_ || fused_ ? 0 : rows_, 2 * weights.wide});
    pending_ = empty(residual, {ours_ || fused_ ? 0 : rows_, hidden});
    active_.values = activated_;
    if (!in_fp8_) normal_ = {x_, {}};
    if (in_fp8_) {
      heads_ = fp8_rows(residual, heads * dim);
      active_ = fp8_rows(residual, weights.wide);
    }
  }

  // Up to the attention, which `attend`(q, attended) is; the keys and values go to the caches.
  template <typename F>
  void attend(int64_t layer, const Tensor& k_cache, const Tensor& v_cache, const Tensor& cos_sin,
              const Tensor& positions, const Tensor& slot_mapping, F&& attend) {
    const int64_t dim = weights_.dim, q_heads = weights_.q_heads, kv_heads = weights_.kv_heads;
    if (!attended_.has_value()) {
      attended_ = empty(residual_, {rows_, q_heads, dim});
      // With our products queries alone, and nothing that is to be added later.
      const bool alone = ours_ || fused_;
      qkv_ = empty(residual_, {rows_, alone ? q_heads : q_heads + 2 * kv_heads, dim});
    }
    const Tensor q = torch::stable::narrow(*qkv_, 1, 0, q_heads);
    if (fused_) {
      quant_norm_qkv_rope_append(q, k_cache, v_cache, residual_,
                                 weights_.part(layer, Layer::kInputNorm), weights_.eps,
                                 weights_.part(layer, Layer::kQkv),
                                 weights_.scales_of(layer, Layer::kQkvProduct), cos_sin, positions,
                                 slot_mapping);
      attend(q, *attended_);
      return;
    }
    normalise(weights_.part(layer, Layer::kInputNorm));
    if (ours_) {
      matmul_rope_append(q, k_cache, v_cache, normal_.values,
                         matrix(layer, Layer::kQkv, Layer::kQkvProduct), normal_.scales,
                         scales(layer, Layer::kQkvProduct), cos_sin, positions, slot_mapping);
    } else {
      multiply(torch::stable::view(*qkv_, {rows_, qkv_->size(1) * dim}), x_, layer, Layer::kQkv,
               Layer::kQkvProduct);
      rope_append(q, torch::stable::narrow(*qkv_, 1, q_heads, kv_heads),
                  torch::stable::narrow(*qkv_, 1, q_heads + kv_heads, kv_heads), cos_sin,
                  positions, slot_mapping, k_cache, v_cache);
    }
    attend(q, *attended_);
  }

  // What follows the attention.
  void finish(int64_t layer) {
    const Tensor attended =
        torch::stable::view(*attended_, {rows_, weights_.q_heads * weights_.dim});
    if (fused_) {
      quant_linear_add(residual_, attended, weights_.part(layer, Layer::kOut),
                       weights_.scales_of(layer, Layer::kOutProduct));
      quant_norm_linear_silu_mul(activated_, residual_, weights_.part(layer, Layer::kPostNorm),
                                 weights_.eps, weights_.part(layer, Layer::kGateUp),
                                 weights_.scales_of(layer, Layer::kGateUpProduct));
      quant_linear_add(residual_, activated_, weights_.part(layer, Layer::kDown),
                       weights_.scales_of(layer, Layer::kDownProduct));
      return;
    }
    if (!in_fp8_) heads_.values = attended;
    add_product(layer, attended, heads_, Layer::kOut, Layer::kOutProduct);
    normalise(weights_.part(layer, Layer::kPostNorm));
    if (gate_up_ours_) {
      matmul_silu_mul(activated_, normal_.values,
                      matrix(layer, Layer::kGateUp, Layer::kGateUpProduct), normal_.scales,
                      scales(layer, Layer::kGateUpProduct));
    } else {
      multiply(gate_up_, x_, layer, Layer::kGateUp, Layer::kGateUpProduct);
      silu_mul(activated_, gate_up_);
    }
    add_product(layer, activated_, active_, Layer::kDown, Layer::kDownProduct);
  }

  // Some of the rows, where they stand between the two.
  Residual some(const Tensor& rows) const {
    Residual few(weights_, index_select(residual_, rows));
    few.attended_ = index_select(*attended_, rows);
    return few;
  }

  void norm_to(const Tensor& out, const Tensor& weight) {
    if (is_pending_) {
      add_rms_norm(out, residual_, pending_, weight, weights_.eps);
    } else {
      rms_norm(out, residual_, weight, weights_.eps);
    }
    is_pending_ = false;
  }

 private:
  const Tensor& matrix(int64_t layer, Layer::Part which, Layer::Product product) const {
    return in_fp8_ ? weights_.fp8[(layer * Layer::kProducts + product) * 2]
                   : weights_.part(layer, which);
  }

  Scales scales(int64_t layer, Layer::Product product) const {
    if (in_fp8_) return weights_.fp8[(layer * Layer::kProducts + product) * 2 + 1];
    if (weights_.all_quantised) return weights_.scales_of(layer, product);
    return {};
  }

  void normalise(const Tensor& weight) {
    if (in_fp8_) {
      rms_norm_fp8(normal_.values, *normal_.scales, residual_, weight, weights_.eps);
    } else {
      norm_to(x_, weight);
    }
  }

  void add_product(int64_t layer, const Tensor& from, const Rows& from_rows, Layer::Part which,
                   Layer::Product product) {
    if (in_fp8_) quantize_rows(from_rows.values, *from_rows.scales, from);
    if (ours_) {
      matmul_add(residual_, from_rows.values, matrix(layer, which, product), {}, from_rows.scales,
                 scales(layer, product));
    } else {
      multiply(pending_, from, layer, which, product);
      is_pending_ = true;
    }
  }

  // By cuBLAS.
  void multiply(const Tensor& out, const Tensor& from, int64_t layer, Layer::Part which,
                Layer::Product product) {
    const Tensor& weight = weights_.part(layer, which);
    if (!is_quantised(weight)) return linear_out(out, from, weight, {});
    constexpr int64_t kWhole = 128;  // rows that cuBLAS's tiles have
    const int64_t inputs = from.size(1), outputs = out.size(1), most = kTileBytes / 2;
    const int64_t step = std::max(most / inputs / kWhole * kWhole, kWhole);
    if (!tile_.has_value()) tile_ = empty(residual_, {std::max(most, kWhole * inputs)});
    for (int64_t start = 0; start < outputs; start += step) {
      const int64_t count = std::min(step, outputs - start);
      const Tensor tile = torch::stable::view(
          torch::stable::narrow(*tile_, 0, 0, count * inputs), {count, inputs});
      dequantize_rows(tile, weight, weights_.scales_of(layer, product), weights_.apart(product),
                      start);
      Tensor columns = out;
      linear_out(torch::stable::narrow(columns, 1, start, count), from, tile, {});
    }
  }

  const Weights& weights_;
  Tensor residual_;
  int64_t rows_;
  bool in_fp8_ = false;
  bool fused_;  // products, norms and what follows them, with weights as they are
  bool ours_, gate_up_ours_;
  bool is_pending_ = false;  // whether `pending_` is still to be added to the residual
  Tensor x_, activated_, gate_up_, pending_;
  std::optional<Tensor> qkv_, attended_, tile_;
  Rows normal_, heads_, active_;
};

}  // namespace

void decoder_layers(Tensor out, Tensor residual, std::vector<Tensor> k_caches,
                    std::vector<Tensor> v_caches, std::vector<Tensor> weights,
                    std::vector<Tensor> scales, std::vector<Tensor> fp8, Tensor final_norm,
                    Tensor cos_sin, Tensor positions, Tensor slot_mapping, Tensor block_table,
                    Tensor query_start, Tensor context_lens, std::optional<Tensor> wanted,
                    Tensor workspace, int64_t max_query_len, double scale, double eps) {
  const int64_t layers = static_cast<int64_t>(k_caches.size());
  STD_TORCH_CHECK(residual.dim() == 2 && layers > 0, "there must be rows and layers");
  STD_TORCH_CHECK(v_caches.size() == k_caches.size() &&
                      weights.size() == static_cast<size_t>(layers * Layer::kParts) &&
                      (scales.empty() ||
                       scales.size() == static_cast<size_t>(layers * Layer::kProducts)) &&
                      (fp8.empty() ||
                       fp8.size() == static_cast<size_t>(layers * 2 * Layer::kProducts)),
                  "caches, weights and float8 weights are not those of so many layers");
  if (residual.size(0) == 0) return;
  const int64_t dim = cos_sin.size(1);
  const int64_t kv_heads = k_caches[0].size(1);
  bool all_quantised = !scales.empty();
  for (size_t i = 0; i < weights.size(); ++i) {
    const auto part = static_cast<Layer::Part>(i % Layer::kParts);
    const bool norm = part == Layer::kInputNorm || part == Layer::kPostNorm;
    all_quantised = all_quantised && (norm || is_quantised(weights[i]));
  }
  const Weights all{weights,
                    scales,
                    fp8,
                    outputs_of(weights[Layer::kQkv]) / dim - 2 * kv_heads,
                    kv_heads,
                    dim,
                    outputs_of(weights[Layer::kGateUp]) / 2,
                    eps,
                    all_quantised};
  Residual every(all, residual);
  const auto attend = [&](int64_t layer) {
    every.attend(layer, k_caches[layer], v_caches[layer], cos_sin, positions, slot_mapping,
                  [&](const Tensor& q, const Tensor& attended) {
                    paged_attention(attended, q, k_caches[layer], v_caches[layer], block_table,
                                    query_start, context_lens, workspace, max_query_len, scale);
                  });
  };
  for (int64_t layer = 0; layer < layers - 1; ++layer) {
    attend(layer);
    every.finish(layer);
  }
  attend(layers - 1);
  const auto finish = [&](Residual& rows) {
    rows.finish(layers - 1);
    rows.norm_to(out, final_norm);
  };
  if (!wanted.has_value()) return finish(every);
  // The others have left their keys and values, which is all that is ever asked of them.
  if (wanted->size(0) == 0) return;
  Residual some = every.some(*wanted);
  finish(some);
}

}  // namespace llava_engine
