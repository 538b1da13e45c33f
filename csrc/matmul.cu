// Products of many rows on Hopper, with what follows them: the kernels are matmul.cuh's, and with a
// quantised weight quant_matmul.cuh's. Other GPUs, types and shapes have torch's products (see
// decoder.cpp).
#include "matmul.h"

#include <cuda_fp8.h>

#include "ops.h"

namespace llava_engine {
namespace {

int attribute(const Tensor& tensor, cudaDeviceAttr which) {
  int value = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, tensor.get_device_index()));
  return value;
}

bool rows_aligned(const Tensor& matrix) {
  return aligned(matrix) && matrix.stride(1) == 1 && matrix.stride(0) * matrix.element_size() % 16 == 0;
}

// f(element type of x, element type of out): fills in the rest of the work.
template <typename F>
void by_types(const Tensor& x, const Tensor& out, F&& f) {
  const bool half = out.scalar_type() == ScalarType::Half;
  if (x.scalar_type() == ScalarType::Float8_e4m3fn) {
    return half ? f(__nv_fp8_e4m3{}, __half{}) : f(__nv_fp8_e4m3{}, __nv_bfloat16{});
  }
  return half ? f(__half{}, __half{}) : f(__nv_bfloat16{}, __nv_bfloat16{});
}

// Of weights that are quantised and x that is not.
bool is_mixed(const Tensor& x, const Tensor& weight) {
  return x.element_size() == 2 && weight.element_size() == 1;
}

int64_t outputs_of(const Tensor& weight) {
  return weight.size(0) * (weight.scalar_type() == ScalarType::Byte ? kUnitRows : 1);
}

// Checks what all have in common and starts the work: `complete` adds what is the result's own.
template <typename F>
void matmul(Result result, const Tensor& out, int64_t outputs, const Tensor& x,
            const Tensor& weight, const std::optional<Tensor>& x_scales,
            const std::optional<Tensor>& weight_scales, F&& complete) {
  STD_TORCH_CHECK(matmul_takes(x, weight), "x and weight are not what the products of many rows take");
  STD_TORCH_CHECK(out.is_cuda() && out.stride(-1) == 1 && aligned(out) &&
                      out.stride(0) % kVector == 0 && out.size(0) == x.size(0),
                  "out must have aligned rows, as many as x");
  const bool is_fp8 = x.scalar_type() == ScalarType::Float8_e4m3fn, mixed = is_mixed(x, weight);
  STD_TORCH_CHECK(x_scales.has_value() == is_fp8 && weight_scales.has_value() == (is_fp8 || mixed),
                  "scales belong to float8, and a quantised weight has its own");
  STD_TORCH_CHECK(is_fp8 ? out.scalar_type() == ScalarType::Half ||
                               out.scalar_type() == ScalarType::BFloat16
                         : out.scalar_type() == x.scalar_type(),
                  "out has the wrong type");
  if (is_fp8) {
    check_column(*x_scales, ScalarType::Float, x.size(0), "x_scales");
    check_column(*weight_scales, ScalarType::Float, weight.size(0), "weight_scales");
  }
  if (mixed) {
    const bool packed = weight.scalar_type() == ScalarType::Byte;
    check_column(*weight_scales, ScalarType::Float, packed ? kBlockGroup : weight.size(0),
                 "weight_scales");
  }
  if (x.size(0) == 0) return;
  by_types(x, out, [&](auto in, auto zero) {
    using In = decltype(in);
    using Out = decltype(zero);
    Work<Out> work{};
    work.result = result;
    work.outputs = static_cast<int>(outputs);
    work.out = data<Out>(out);
    work.out_stride = out.stride(0);
    if (is_fp8) {
      work.x_scales = data<float>(*x_scales);
      work.weight_scales = data<float>(*weight_scales);
      work.scale_unit = 1.0f;
    }
    complete(work);
    if (!mixed) return run_matmul<In>(x, weight, work);
    if constexpr (sizeof(In) == 2) {
      by_format(weight, [&](auto format) {
        run_quant_matmul<decltype(format)::value>(x, weight, *weight_scales, work);
      });
    }
  });
}

template <typename Out>
void add_bias(Work<Out>& work, const std::optional<Tensor>& bias, const Tensor& out) {
  if (!bias.has_value()) return;
  check_column(*bias, out.scalar_type(), work.outputs, "bias");
  work.bias = data<Out>(*bias);
}

}  // namespace

bool matmul_takes(const Tensor& x, const Tensor& weight) {
  if (!x.is_cuda() || !weight.is_cuda() || weight.get_device_index() != x.get_device_index() ||
      x.dim() != 2 || weight.dim() != 2 || outputs_of(weight) % kVector != 0 || !rows_aligned(x) || !rows_aligned(weight) ||
      attribute(x, cudaDevAttrComputeCapabilityMajor) != 9) {
    return false;
  }
  const ScalarType type = x.scalar_type(), of_weight = weight.scalar_type();
  const int64_t inputs = x.size(1);
  const bool takes_x = type == ScalarType::Half || type == ScalarType::BFloat16;
  if (is_mixed(x, weight)) {
    const bool packed = of_weight == ScalarType::Byte;
    return takes_x && inputs > 0 && inputs % kBlock == 0 && weight.is_contiguous() &&
           (packed ? weight.size(1) == unit_bytes(static_cast<int>(inputs)) &&
                         inputs <= kBlock * kBlockGroup
                   : weight.size(1) == inputs && (of_weight == ScalarType::Char ||
                                                  of_weight == ScalarType::Float8_e4m3fn));
  }
  return (takes_x || type == ScalarType::Float8_e4m3fn) && type == of_weight &&
         weight.size(1) == inputs;
}

void matmul_store(Tensor out, Tensor x, Tensor weight, std::optional<Tensor> bias,
                  int64_t activation) {
  STD_TORCH_CHECK(out.dim() == 2 && out.size(1) == weight.size(0), "out must be [rows, outputs]");
  STD_TORCH_CHECK(activation >= 0 && activation <= 2, "there is no such activation");
  matmul(Result::kStore, out, weight.size(0), x, weight, {}, {}, [&](auto& work) {
    work.activation = static_cast<Activation>(activation);
    add_bias(work, bias, out);
  });
}

void matmul_add(Tensor residual, Tensor x, Tensor weight, std::optional<Tensor> bias,
                std::optional<Tensor> x_scales, std::optional<Tensor> weight_scales) {
  STD_TORCH_CHECK(residual.dim() == 2 && residual.size(1) == outputs_of(weight),
                  "residual must be [rows, outputs]");
  matmul(Result::kAdd, residual, residual.size(1), x, weight, x_scales, weight_scales,
         [&](auto& work) { add_bias(work, bias, residual); });
}

void matmul_silu_mul(Tensor out, Tensor x, Tensor gate_up, std::optional<Tensor> x_scales,
                     std::optional<Tensor> weight_scales) {
  STD_TORCH_CHECK(out.dim() == 2 && 2 * out.size(1) == outputs_of(gate_up) &&
                      out.size(1) % kVector == 0,
                  "out must be [rows, half of the outputs]");
  matmul(Result::kSiluMul, out, out.size(1), x, gate_up, x_scales, weight_scales, [](auto&) {});
}

void matmul_rope_append(Tensor q, Tensor k_cache, Tensor v_cache, Tensor x, Tensor qkv,
                        std::optional<Tensor> x_scales, std::optional<Tensor> weight_scales,
                        Tensor cos_sin, Tensor positions, Tensor slot_mapping) {
  STD_TORCH_CHECK(q.dim() == 3 && k_cache.dim() == 4 && q.size(2) == kTileRows &&
                      k_cache.size(3) == kTileRows && q.stride(1) == kTileRows,
                  "heads must be dense and have ", kTileRows, " dimensions");
  const int64_t heads = q.size(1) + 2 * k_cache.size(1);
  STD_TORCH_CHECK(outputs_of(qkv) == heads * kTileRows, "qkv has the wrong number of rows");
  check_column(positions, ScalarType::Long, x.size(0), "positions");
  check_column(slot_mapping, ScalarType::Long, x.size(0), "slot_mapping");
  check_dense(cos_sin, "cos_sin");
  check_type(cos_sin, ScalarType::Float, "cos_sin");
  STD_TORCH_CHECK(cos_sin.size(1) == kTileRows, "cos_sin must be [positions, dimensions]");
  for (const Tensor* cache : {&k_cache, &v_cache}) {
    check_dense(*cache, "cache");
    check_type(*cache, q.scalar_type(), "cache");
  }
  STD_TORCH_CHECK(v_cache.numel() == k_cache.numel(), "the caches differ in size");
  matmul(Result::kRopeAppend, q, heads * kTileRows, x, qkv, x_scales, weight_scales,
         [&](auto& work) {
           using Out = std::remove_pointer_t<decltype(work.out)>;
           work.cos_sin = data<float>(cos_sin);
           work.positions = data<int64_t>(positions);
           work.slots = data<int64_t>(slot_mapping);
           work.k_cache = data<Out>(k_cache);
           work.v_cache = data<Out>(v_cache);
           work.q_heads = static_cast<int>(q.size(1));
           work.kv_heads = static_cast<int>(k_cache.size(1));
           work.block_size = static_cast<int>(k_cache.size(2));
         });
}

}  // namespace llava_engine
