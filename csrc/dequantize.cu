// Rows of quantised weights in 16 bits, for products of many rows by cuBLAS: of models whose heads the
// ones of quant_matmul.cuh do not take.
#include <cuda_fp8.h>

#include <algorithm>

#include "common.cuh"
#include "ops.h"
#include "quant_linear.h"

namespace llava_engine {
namespace {

constexpr int kPart = 16;  // weights of a thread
constexpr int kThreads = 256;

template <typename T>
__device__ inline void store_part(T* to, const float (&values)[kPart]) {
  store(to, *reinterpret_cast<const float(*)[kVector]>(values));
  store(to + kVector, *reinterpret_cast<const float(*)[kVector]>(values + kVector));
}

// A block's row of `out`, and this thread's part of it. The matrix's first row is `first`.
template <Format kFormat, typename T>
__global__ void __launch_bounds__(kThreads)
    dequantize_8_kernel(T* out, const uint8_t* weight, const float* scales, int first, int inputs) {
  launch_dependents();
  wait_for_predecessor();  // which may still read what `out` held
  const int column = (blockIdx.y * kThreads + threadIdx.x) * kPart;
  if (column >= inputs) return;
  const int64_t row = first + blockIdx.x;
  const float scale = scales[row];
  const uint4 words = __ldcs(reinterpret_cast<const uint4*>(weight + row * inputs + column));
  const uint8_t* bytes = reinterpret_cast<const uint8_t*>(&words);
  float values[kPart];
#pragma unroll
  for (int i = 0; i < kPart; ++i) {
    if constexpr (kFormat == kInt8) {
      const float product = __fmul_rn(static_cast<int8_t>(bytes[i]), scale);
      values[i] = __fmul_rn(product, kInt8Step);
    } else {
      const __half wide = __nv_cvt_fp8_to_halfraw(bytes[i], __NV_E4M3);
      values[i] = __half2float(wide) * scale;
    }
  }
  store_part(out + static_cast<int64_t>(blockIdx.x) * inputs + column, values);
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    dequantize_nf4_kernel(T* out, const uint8_t* weight, const float* code, int apart, int first,
                          int inputs) {
  launch_dependents();
  __shared__ float levels[16];
  if (threadIdx.x < 16) levels[threadIdx.x] = nf4_level(threadIdx.x);
  __syncthreads();
  wait_for_predecessor();  // which may still read what `out` held
  const int column = (blockIdx.y * kThreads + threadIdx.x) * kPart, block = column / kBlock;
  if (column >= inputs) return;
  const int row = first + blockIdx.x;
  const int pair = row / (2 * apart) * apart + row % apart;
  const int second = row / apart % 2, g = pair % kUnitPairs;
  const uint8_t* unit = weight + pair / kUnitPairs * unit_bytes(inputs);
  const float4 of_row = reinterpret_cast<const float4*>(unit)[2 * g + second];
  const uint8_t* step = unit + kHeadBytes + block / 2 * kStepBytes;
  const uint8_t index = step[2 * kCodeBytes + 4 * g + 2 * (block % 2) + second];
  const bool near = block + static_cast<int>(of_row.w) < kBlockGroup;
  const float scale = __fadd_rn(__fmul_rn(code[index], near ? of_row.x : of_row.y), of_row.z);
  const int lane = 4 * g + column / kPart % 4;
  const uint8_t* from = step + block % 2 * kCodeBytes + lane * 16 + second * 8;
  const uint2 words = *reinterpret_cast<const uint2*>(from);
  const uint8_t* bytes = reinterpret_cast<const uint8_t*>(&words);
  float values[kPart];
#pragma unroll
  for (int i = 0; i < kPart / 2; ++i) {
    values[2 * i] = levels[bytes[i] >> 4] * scale;
    values[2 * i + 1] = levels[bytes[i] & 15] * scale;
  }
  store_part(out + static_cast<int64_t>(blockIdx.x) * inputs + column, values);
}

}  // namespace

void dequantize_rows(Tensor out, Tensor weight, Tensor scales, int64_t apart, int64_t first_row) {
  STD_TORCH_CHECK(out.dim() == 2, "out must be a matrix");
  const ScalarType type = out.scalar_type();
  const int64_t rows = out.size(0), inputs = out.size(1);
  STD_TORCH_CHECK(type == ScalarType::Half || type == ScalarType::BFloat16,
                  "weights are dequantised to float16 and bfloat16");
  STD_TORCH_CHECK(inputs > 0 && inputs % kBlock == 0 && apart > 0 && first_row >= 0,
                  "quantised weights need a multiple of 64 inputs");
  check_column(out, type, rows * inputs, "out");
  check_dense(weight, "weight");
  STD_TORCH_CHECK(aligned(out) && aligned(weight), "out and weight must be aligned to 16 bytes");
  by_format(weight, [&](auto which) {
    constexpr Format kFormat = decltype(which)::value;
    const int64_t all = kFormat == kNf4 ? weight.numel() / unit_bytes(inputs) * kUnitRows
                                        : weight.numel() / inputs;
    STD_TORCH_CHECK(first_row + rows <= all, "there are not so many rows");
    check_column(scales, ScalarType::Float, kFormat == kNf4 ? kBlockGroup : all, "scales");
    if (rows == 0) return;
    const Launch to(out);
    const int first = static_cast<int>(first_row), columns = static_cast<int>(inputs);
    const dim3 blocks(static_cast<unsigned>(rows), ceil_div(columns, kThreads * kPart));
    const auto by_type_of_out = [&](auto zero) {
      using T = decltype(zero);
      if constexpr (kFormat == kNf4) {
        launch_chained(dequantize_nf4_kernel<T>, blocks, kThreads, 0, to.stream(), data<T>(out),
                       data<uint8_t>(weight), data<float>(scales), static_cast<int>(apart), first,
                       columns);
      } else {
        launch_chained(dequantize_8_kernel<kFormat, T>, blocks, kThreads, 0, to.stream(),
                       data<T>(out), data<uint8_t>(weight), data<float>(scales), first, columns);
      }
    };
    if (type == ScalarType::Half) return by_type_of_out(__half{});
    by_type_of_out(__nv_bfloat16{});
  });
}

}  // namespace llava_engine
