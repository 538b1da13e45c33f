// The products of a few rows with weights of 8 or 4 bits: checks, and the choice of a kernel.
#include <algorithm>

#include "common.cuh"
#include "ops.h"
#include "quant_linear.h"

namespace llava_engine {
namespace {

// f(format) with the format as a constant.
template <typename F>
void by_format(int64_t format, F&& f) {
  switch (format) {
    case kInt8:
      return f(std::integral_constant<Format, kInt8>{});
    case kFp8:
      return f(std::integral_constant<Format, kFp8>{});
    case kNf4:
      return f(std::integral_constant<Format, kNf4>{});
    default:
      STD_TORCH_CHECK(false, "no such format of weights: ", format);
  }
}

void check_weight(int64_t format, const Tensor& weight, const Tensor& scales, int64_t outputs,
                  int64_t inputs) {
  STD_TORCH_CHECK(inputs > 0 && inputs % kBlock == 0 && outputs % kUnitRows == 0,
                  "quantised weights need a multiple of 64 inputs and of 16 outputs");
  if (format == kNf4) {
    STD_TORCH_CHECK(inputs <= kBlock * kBlockGroup, "rows in NF4 have at most 16384 inputs");
    check_column(weight, ScalarType::Byte, outputs / kUnitRows * unit_bytes(inputs), "weight");
    check_column(scales, ScalarType::Float, kBlockGroup, "scales");
  } else {
    check_column(weight, format == kInt8 ? ScalarType::Char : ScalarType::Float8_e4m3fn,
                 outputs * inputs, "weight");
    check_column(scales, ScalarType::Float, outputs, "scales");
  }
  STD_TORCH_CHECK(aligned(weight), "weight must be aligned to 16 bytes");
}

// epilogue_of(a number of the element type, the first of its rows of x): what becomes of the sums.
template <typename F>
void run(const Tensor& x, const Tensor* norm_weight, double eps, int64_t format,
         const Tensor& weight, const Tensor& scales, int64_t outputs, F&& epilogue_of) {
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
  check_weight(format, weight, scales, outputs, inputs);
  const auto by_type_of_x = [&](auto zero) {
    using T = decltype(zero);
    for (int64_t start = 0; start < tokens; start += kQuantTokens) {
      const int count = static_cast<int>(std::min<int64_t>(kQuantTokens, tokens - start));
      const QuantProduct<T> product{data<T>(x) + start * inputs,
                                    norm_weight != nullptr ? data<T>(*norm_weight) : nullptr,
                                    static_cast<float>(eps),
                                    data<uint8_t>(weight),
                                    data<float>(scales),
                                    count,
                                    static_cast<int>(inputs),
                                    static_cast<int>(outputs / kUnitRows),
                                    start + count < tokens,
                                    0,
                                    0};
      by_format(format, [&](auto which) {
        launch_quant<decltype(which)::value>(x, product, epilogue_of(zero, start));
      });
    }
  };
  if (type == ScalarType::Half) return by_type_of_x(__half{});
  by_type_of_x(__nv_bfloat16{});
}

}  // namespace

void quant_linear_add(Tensor residual, Tensor x, int64_t format, Tensor weight, Tensor scales) {
  STD_TORCH_CHECK(residual.dim() == 2, "residual must be a matrix");
  const int64_t outputs = residual.size(1);
  check_column(residual, x.scalar_type(), x.size(0) * outputs, "residual");
  STD_TORCH_CHECK(aligned(residual), "residual must be aligned to 16 bytes");
  run(x, nullptr, 0.0, format, weight, scales, outputs, [&](auto zero, int64_t start) {
    using T = decltype(zero);
    return AddToResidual<T>{data<T>(residual) + start * outputs, static_cast<int>(outputs)};
  });
}

void quant_norm_linear_silu_mul(Tensor out, Tensor x, Tensor norm_weight, double eps,
                                int64_t format, Tensor gate_up, Tensor scales) {
  STD_TORCH_CHECK(out.dim() == 2, "out must be a matrix");
  const int64_t wide = out.size(1);
  check_column(out, x.scalar_type(), x.size(0) * wide, "out");
  run(x, &norm_weight, eps, format, gate_up, scales, 2 * wide, [&](auto zero, int64_t start) {
    using T = decltype(zero);
    return SiluMul<T>{data<T>(out) + start * wide, static_cast<int>(wide)};
  });
}

void quant_norm_qkv_rope_append(Tensor q, Tensor k_cache, Tensor v_cache, Tensor x,
                                Tensor norm_weight, double eps, int64_t format, Tensor qkv,
                                Tensor scales, Tensor cos_sin, Tensor positions,
                                Tensor slot_mapping) {
  const RopeSizes sizes =
      check_rope(q, k_cache, v_cache, x.scalar_type(), x.size(0), cos_sin, positions, slot_mapping);
  const int64_t outputs = (sizes.q_heads + 2 * sizes.kv_heads) * sizes.dim;
  run(x, &norm_weight, eps, format, qkv, scales, outputs, [&](auto zero, int64_t start) {
    using T = decltype(zero);
    return rotate_and_append<T>(sizes, q, k_cache, v_cache, cos_sin, positions, slot_mapping,
                                start);
  });
}

}  // namespace llava_engine
