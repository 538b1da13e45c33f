// The products of a few rows with weights of 8 or 4 bits: checks, and the choice of a kernel.
#include <algorithm>

#include "common.cuh"
#include "ops.h"
#include "quant_linear.h"

namespace llava_engine {
namespace {

void check_weight(const Tensor& weight, const Tensor& scales, int64_t outputs, int64_t inputs) {
  STD_TORCH_CHECK(inputs > 0 && inputs % kBlock == 0 && outputs % kUnitRows == 0,
                  "quantised weights need a multiple of 64 inputs and of 16 outputs");
  const ScalarType type = weight.scalar_type();
  by_format(weight, [](auto) {});
  if (type == ScalarType::Byte) {
    STD_TORCH_CHECK(inputs <= kBlock * kBlockGroup, "rows in NF4 have at most 16384 inputs");
    check_column(weight, type, outputs / kUnitRows * unit_bytes(inputs), "weight");
    check_column(scales, ScalarType::Float, kBlockGroup, "scales");
  } else {
    check_column(weight, type, outputs * inputs, "weight");
    check_column(scales, ScalarType::Float, outputs, "scales");
  }
  STD_TORCH_CHECK(aligned(weight) && aligned(scales),
                  "weight and scales must be aligned to 16 bytes");
}

// rows_of(a number of the element type): the epilogues.
template <typename F>
void run(const Tensor& x, const Tensor* norm_weight, double eps, const Tensor& weight,
         const Tensor& scales, int64_t outputs, F&& rows_of) {
  STD_TORCH_CHECK(x.dim() == 2, "x must be a matrix");
  const ScalarType type = x.scalar_type();
  const int64_t tokens = x.size(0), inputs = x.size(1);
  STD_TORCH_CHECK(type == ScalarType::Half || type == ScalarType::BFloat16,
                  "products of a few rows take float16 and bfloat16");
  check_column(x, type, tokens * inputs, "x");
  STD_TORCH_CHECK(aligned(x), "x must be aligned to 16 bytes");
  if (norm_weight != nullptr) {
    check_column(*norm_weight, type, inputs, "norm_weight");
    STD_TORCH_CHECK(aligned(*norm_weight), "norm_weight must be aligned to 16 bytes");
  }
  check_weight(weight, scales, outputs, inputs);
  if (tokens == 0) return;
  const auto by_type_of_x = [&](auto zero) {
    using T = decltype(zero);
    const QuantProduct<T> product{data<T>(x),
                                  norm_weight != nullptr ? data<T>(*norm_weight) : nullptr,
                                  static_cast<float>(eps),
                                  data<uint8_t>(weight),
                                  data<float>(scales),
                                  static_cast<int>(tokens),
                                  static_cast<int>(inputs),
                                  static_cast<int>(outputs / kUnitRows)};
    by_format(weight,
              [&](auto which) { launch_quant<decltype(which)::value>(x, product, rows_of(zero)); });
  };
  if (type == ScalarType::Half) return by_type_of_x(__half{});
  by_type_of_x(__nv_bfloat16{});
}

}  // namespace

void quant_linear_add(Tensor residual, Tensor x, Tensor weight, Tensor scales) {
  STD_TORCH_CHECK(residual.dim() == 2, "residual must be a matrix");
  const int64_t outputs = residual.size(1);
  check_column(residual, x.scalar_type(), x.size(0) * outputs, "residual");
  STD_TORCH_CHECK(aligned(residual), "residual must be aligned to 16 bytes");
  run(x, nullptr, 0.0, weight, scales, outputs, [&](auto zero) {
    using T = decltype(zero);
    return AddToResidualRows<T>{data<T>(residual), static_cast<int>(outputs)};
  });
}

void quant_norm_linear_silu_mul(Tensor out, Tensor x, Tensor norm_weight, double eps,
                                Tensor gate_up, Tensor scales) {
  STD_TORCH_CHECK(out.dim() == 2, "out must be a matrix");
  const int64_t wide = out.size(1);
  check_column(out, x.scalar_type(), x.size(0) * wide, "out");
  run(x, &norm_weight, eps, gate_up, scales, 2 * wide, [&](auto zero) {
    using T = decltype(zero);
    return SiluMulRows<T>{data<T>(out), static_cast<int>(wide)};
  });
}

void quant_norm_qkv_rope_append(Tensor q, Tensor k_cache, Tensor v_cache, Tensor x,
                                Tensor norm_weight, double eps, Tensor qkv,
                                Tensor scales, Tensor cos_sin, Tensor positions,
                                Tensor slot_mapping) {
  const RopeSizes sizes =
      check_rope(q, k_cache, v_cache, x.scalar_type(), x.size(0), cos_sin, positions, slot_mapping);
  const int64_t outputs = (sizes.q_heads + 2 * sizes.kv_heads) * sizes.dim;
  run(x, &norm_weight, eps, qkv, scales, outputs, [&](auto zero) {
    using T = decltype(zero);
    return RotateAndAppendRows<T>{
        rotate_and_append<T>(sizes, q, k_cache, v_cache, cos_sin, positions, slot_mapping)};
  });
}

}  // namespace llava_engine
