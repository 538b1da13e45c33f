// All layers of the decoder in one call: Python would give up its lock some three hundred times, and
// wait for it again beside every thread that computes.
#include <torch/csrc/stable/ops.h>

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

}  // namespace

void decoder_layers(Tensor out, Tensor residual, std::vector<Tensor> k_caches,
                    std::vector<Tensor> v_caches, std::vector<Tensor> weights,
                    std::vector<Tensor> fp8, Tensor final_norm, Tensor cos_sin, Tensor positions,
                    Tensor slot_mapping, Tensor block_table, Tensor query_start,
                    Tensor context_lens, Tensor workspace, int64_t max_query_len, double scale,
                    double eps) {
  const int64_t layers = static_cast<int64_t>(k_caches.size());
  STD_TORCH_CHECK(residual.dim() == 2 && layers > 0, "there must be rows and layers");
  STD_TORCH_CHECK(v_caches.size() == k_caches.size() &&
                      weights.size() == static_cast<size_t>(layers * Layer::kParts) &&
                      (fp8.empty() ||
                       fp8.size() == static_cast<size_t>(layers * 2 * Layer::kProducts)),
                  "caches, weights and float8 weights are not those of so many layers");
  const int64_t rows = residual.size(0), hidden = residual.size(1);
  if (rows == 0) return;
  const int64_t dim = cos_sin.size(1), kv_heads = k_caches[0].size(1);
  const int64_t q_heads = weights[Layer::kOut].size(1) / dim;
  const int64_t wide = weights[Layer::kDown].size(1);

  Tensor x = empty(residual, {rows, hidden});
  const bool takes = dim == kHeadDim && matmul_takes(x, weights[Layer::kQkv]);
  const bool in_fp8 = takes && !fp8.empty() && rows >= kFp8Rows;
  const bool ours = in_fp8 || (takes && rows >= kManyRows);
  const bool gate_up_ours = ours || (takes && rows >= kGateUpRows);
  Tensor attended = empty(residual, {rows, q_heads, dim});
  Tensor attended_rows = torch::stable::view(attended, {rows, q_heads * dim});
  Tensor activated = empty(residual, {rows, wide});
  // With our products queries alone, and nothing that is to be added later.
  Tensor qkv = empty(residual, {rows, ours ? q_heads : q_heads + 2 * kv_heads, dim});
  Tensor q = torch::stable::narrow(qkv, 1, 0, q_heads);
  Tensor gate_up = empty(residual, {gate_up_ours ? 0 : rows, 2 * wide});
  Tensor pending = empty(residual, {ours ? 0 : rows, hidden});
  bool is_pending = false;
  Rows normal{x, {}}, heads{attended_rows, {}}, active{activated, {}};
  if (in_fp8) {
    normal = fp8_rows(residual, hidden);
    heads = fp8_rows(residual, q_heads * dim);
    active = fp8_rows(residual, wide);
  }

  const auto normalise = [&](const Tensor& weight) {
    if (in_fp8) {
      rms_norm_fp8(normal.values, *normal.scales, residual, weight, eps);
    } else if (is_pending) {
      add_rms_norm(x, residual, pending, weight, eps);
    } else {
      rms_norm(x, residual, weight, eps);
    }
    is_pending = false;
  };
  const auto add_product = [&](const Tensor& from, const Rows& from_rows, const Tensor& weight,
                               const Scales& weight_scales) {
    if (in_fp8) quantize_rows(from_rows.values, *from_rows.scales, from);
    if (ours) {
      matmul_add(residual, from_rows.values, weight, {}, from_rows.scales, weight_scales);
    } else {
      linear_out(pending, from, weight, {});
      is_pending = true;
    }
  };

  for (int64_t layer = 0; layer < layers; ++layer) {
    const Tensor* part = weights.data() + layer * Layer::kParts;
    const auto weight_of = [&](Layer::Part which, Layer::Product product) {
      return in_fp8 ? fp8[(layer * Layer::kProducts + product) * 2] : part[which];
    };
    const auto scales_of = [&](Layer::Product product) {
      return in_fp8 ? Scales(fp8[(layer * Layer::kProducts + product) * 2 + 1]) : Scales();
    };
    normalise(part[Layer::kInputNorm]);
    if (ours) {
      matmul_rope_append(q, k_caches[layer], v_caches[layer], normal.values,
                         weight_of(Layer::kQkv, Layer::kQkvProduct), normal.scales,
                         scales_of(Layer::kQkvProduct), cos_sin, positions, slot_mapping);
    } else {
      linear_out(torch::stable::view(qkv, {rows, qkv.size(1) * dim}), x, part[Layer::kQkv], {});
      rope_append(q, torch::stable::narrow(qkv, 1, q_heads, kv_heads),
                  torch::stable::narrow(qkv, 1, q_heads + kv_heads, kv_heads), cos_sin, positions,
                  slot_mapping, k_caches[layer], v_caches[layer]);
    }
    paged_attention(attended, q, k_caches[layer], v_caches[layer], block_table, query_start,
                    context_lens, workspace, max_query_len, scale);
    add_product(attended_rows, heads, weight_of(Layer::kOut, Layer::kOutProduct),
                scales_of(Layer::kOutProduct));
    normalise(part[Layer::kPostNorm]);
    if (gate_up_ours) {
      matmul_silu_mul(activated, normal.values, weight_of(Layer::kGateUp, Layer::kGateUpProduct),
                      normal.scales, scales_of(Layer::kGateUpProduct));
    } else {
      linear_out(gate_up, x, part[Layer::kGateUp], {});
      silu_mul(activated, gate_up);
    }
    add_product(activated, active, weight_of(Layer::kDown, Layer::kDownProduct),
                scales_of(Layer::kDownProduct));
  }
  if (is_pending) {
    add_rms_norm(out, residual, pending, final_norm, eps);
  } else {
    rms_norm(out, residual, final_norm, eps);
  }
}

}  // namespace llava_engine
