// Rows of quantised weights in 16 bits, for products of many rows by cuBLAS.
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

// Of the rows from `first` on, in their natural order: weight and scales are those of row 0.
template <Format kFormat, typename T>
__global__ void __launch_bounds__(kThreads)
    dequantize_8_kernel(T* out, const uint8_t* weight, const float* scales, int64_t first,
                        int parts_of_row, int64_t parts) {
  launch_dependents();
  wait_for_predecessor();  // which may still read what `out` held
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= parts) return;
  const float scale = scales[first + at / parts_of_row];
  const uint4 words = __ldcs(reinterpret_cast<const uint4*>(weight) + first * parts_of_row + at);
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
  store_part(out + at * kPart, values);
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    dequantize_nf4_kernel(T* out, const uint8_t* weight, const float* code, int apart,
                          int64_t first, int parts_of_row, int64_t unit_size, int64_t parts) {
  launch_dependents();
  __shared__ float levels[16];
  if (threadIdx.x < 16) levels[threadIdx.x] = nf4_level(threadIdx.x);
  __syncthreads();
  wait_for_predecessor();  // which may still read what `out` held
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= parts) return;
  const int row = static_cast<int>(first + at / parts_of_row);
  const int part = static_cast<int>(at % parts_of_row), block = part * kPart / kBlock;
  const int pair = row / (2 * apart) * apart + row % apart;
  const int second = row / apart % 2, g = pair % kUnitPairs;
  const uint8_t* unit = weight + pair / kUnitPairs * unit_size;
  const float4 of_row = reinterpret_cast<const float4*>(unit)[2 * g + second];
  const uint8_t* step = unit + kHeadBytes + block / 2 * kStepBytes;
  const uint8_t index = step[2 * kCodeBytes + 4 * g + 2 * (block % 2) + second];
  const bool near = block + static_cast<int>(of_row.w) < kBlockGroup;
  const float scale =
      __fadd_rn(__fmul_rn(code[index], near ? of_row.x : of_row.y), of_row.z);
  const uint8_t* from = step + block % 2 * kCodeBytes + (4 * g + part % 4) * 16 + second * 8;
  const uint2 words = *reinterpret_cast<const uint2*>(from);
  const uint8_t* bytes = reinterpret_cast<const uint8_t*>(&words);
  float values[kPart];
#pragma unroll
  for (int i = 0; i < kPart / 2; ++i) {
    values[2 * i] = levels[bytes[i] >> 4] * scale;
    values[2 * i + 1] = levels[bytes[i] & 15] * scale;
  }
  store_part(out + at * kPart, values);
}

}  // namespace

void dequantize_rows(Tensor out, int64_t format, Tensor weight, Tensor scales, int64_t apart,
                     int64_t first_row) {
  STD_TORCH_CHECK(out.dim() == 2, "out must be a matrix");
  const ScalarType type = out.scalar_type();
  const int64_t rows = out.size(0), inputs = out.size(1);
  STD_TORCH_CHECK(type == ScalarType::Half || type == ScalarType::BFloat16,
                  "weights are dequantised to float16 and bfloat16");
  STD_TORCH_CHECK(inputs > 0 && inputs % kBlock == 0 && apart > 0 && first_row >= 0,
                  "quantised weights need a multiple of 64 inputs");
  check_column(out, type, rows * inputs, "out");
  check_dense(weight, "weight");
  check_dense(scales, "scales");
  check_type(scales, ScalarType::Float, "scales");
  STD_TORCH_CHECK(aligned(out) && aligned(weight), "out and weight must be aligned to 16 bytes");
  const int64_t all = format == kNf4 ? weight.numel() / unit_bytes(inputs) * kUnitRows
                                     : weight.numel() / inputs;
  STD_TORCH_CHECK(first_row + rows <= all, "there are not so many rows");
  check_type(weight,
             format == kNf4    ? ScalarType::Byte
             : format == kInt8 ? ScalarType::Char
                               : ScalarType::Float8_e4m3fn,
             "weight");
  STD_TORCH_CHECK(scales.numel() == (format == kNf4 ? kBlockGroup : all),
                  "scales has the wrong length");
  if (rows == 0) return;
  const Launch to(out);
  const int parts_of_row = static_cast<int>(inputs / kPart);
  const int64_t parts = rows * parts_of_row;
  const unsigned blocks = static_cast<unsigned>(ceil_div<int64_t>(parts, kThreads));
  const auto by_type_of_out = [&](auto zero) {
    using T = decltype(zero);
    if (format == kNf4) {
      launch_chained(dequantize_nf4_kernel<T>, blocks, kThreads, 0, to.stream(), data<T>(out),
                     data<uint8_t>(weight), data<float>(scales), static_cast<int>(apart),
                     first_row, parts_of_row, unit_bytes(inputs), parts);
      return;
    }
    const auto kernel =
        format == kInt8 ? dequantize_8_kernel<kInt8, T> : dequantize_8_kernel<kFp8, T>;
    launch_chained(kernel, blocks, kThreads, 0, to.stream(), data<T>(out), data<uint8_t>(weight),
                   data<float>(scales), first_row, parts_of_row, parts);
  };
  if (type == ScalarType::Half) return by_type_of_out(__half{});
  by_type_of_out(__nv_bfloat16{});
}

}  // namespace llava_engine
