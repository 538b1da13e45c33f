// Rows in 8 bits (e4m3), each with its own scale, alone and behind RMSNorm. One block per row, which
// is read once and then stays in registers.
#include <cuda_fp8.h>

#include <algorithm>

#include "common.cuh"
#include "ops.h"

namespace llava_engine {
namespace {

constexpr float kLargest = 448.0f;  // of e4m3
constexpr float kTiny = 0x1p-100f;  // a row without anything as large counts as zero
constexpr int kMostThreads = 1024;

// The largest absolute value of a block of whole warps, in every thread; NaN if there is one. As
// bits, absolute values are ordered as they are as numbers, and NaN lies above infinity. Called once
// per kernel.
template <int N>
__device__ inline float block_largest(const float (&values)[N]) {
  __shared__ unsigned largest[kWarp];
  unsigned x = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) x = max(x, __float_as_uint(values[i]) & 0x7fffffffu);
  const int lane = threadIdx.x % kWarp;
  x = __reduce_max_sync(kAllLanes, x);
  if (lane == 0) largest[threadIdx.x / kWarp] = x;
  __syncthreads();
  x = lane < blockDim.x / kWarp ? largest[lane] : 0;
  return __uint_as_float(__reduce_max_sync(kAllLanes, x));
}

template <int N>
__device__ inline void store_fp8(__nv_fp8_storage_t* to, const float* values, float inverse) {
  if constexpr (N == 1) {
    *to = __nv_cvt_float_to_fp8(values[0] * inverse, __NV_SATFINITE, __NV_E4M3);
  } else {
    Pack<__nv_fp8x2_storage_t, N / 2> pack;
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      pack.values[i / 2] = __nv_cvt_float2_to_fp8x2(
          make_float2(values[i] * inverse, values[i + 1] * inverse), __NV_SATFINITE, __NV_E4M3);
    }
    *reinterpret_cast<Pack<__nv_fp8x2_storage_t, N / 2>*>(to) = pack;
  }
}

enum Kind { kPlain, kNorm, kAddNorm };

// Each thread has V pieces of N elements, blockDim pieces apart.
template <typename T, int N, int V, Kind kKind>
__global__ void quantize_kernel(__nv_fp8_storage_t* __restrict__ out, float* __restrict__ scales,
                                T* __restrict__ residual, const T* __restrict__ x,
                                const T* __restrict__ weight, int columns, float eps) {
  launch_dependents();
  Pack<T, N> weights[V];  // asked for before the predecessor has ended
  if constexpr (kKind != kPlain) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int i = (v * blockDim.x + threadIdx.x) * N;
      if (i < columns) weights[v] = *reinterpret_cast<const Pack<T, N>*>(weight + i);
    }
  }
  wait_for_predecessor();
  const int64_t base = static_cast<int64_t>(blockIdx.x) * columns;
  float values[V * N];
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const int i = (v * blockDim.x + threadIdx.x) * N;
    float piece[N] = {};
    if (i < columns) {
      load(x + base + i, piece);
      if constexpr (kKind == kAddNorm) {
        float before[N];
        load(residual + base + i, before);
#pragma unroll
        for (int j = 0; j < N; ++j) piece[j] = rounded<T>(piece[j] + before[j]);
        store(residual + base + i, piece);
      }
    }
#pragma unroll
    for (int j = 0; j < N; ++j) values[v * N + j] = piece[j];
  }
  if constexpr (kKind != kPlain) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < V * N; ++i) sum += values[i] * values[i];
    const float normal = rsqrtf(block_sum(sum) / columns + eps);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      if ((v * blockDim.x + threadIdx.x) * N >= columns) continue;  // there the weight is garbage
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float scaled = rounded<T>(values[v * N + j] * normal);
        values[v * N + j] = rounded<T>(scaled * to_float(weights[v].values[j]));
      }
    }
  }
  const float largest = block_largest(values);
  const float scale = largest < kTiny ? 1.0f : largest / kLargest;
  const float inverse = 1.0f / scale;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const int i = (v * blockDim.x + threadIdx.x) * N;
    if (i < columns) store_fp8<N>(out + base + i, values + v * N, inverse);
  }
  if (threadIdx.x == 0) scales[blockIdx.x] = scale;
}

template <Kind kKind>
void run(Tensor& out, Tensor& scales, Tensor* residual, const Tensor& x, const Tensor* weight,
         double eps) {
  STD_TORCH_CHECK(x.dim() == 2 && out.dim() == 2, "x and out must be [T, n]");
  const ScalarType type = x.scalar_type();
  const int64_t rows = x.size(0), columns = x.size(1);
  check_column(out, ScalarType::Float8_e4m3fn, rows * columns, "out");
  check_column(scales, ScalarType::Float, rows, "scales");
  check_column(x, type, rows * columns, "x");
  if (kKind != kPlain) check_column(*weight, type, columns, "weight");
  if (kKind == kAddNorm) check_column(*residual, type, rows * columns, "residual");
  if (rows == 0 || columns == 0) return;
  const bool vectors = columns % kVector == 0 && aligned(out) && aligned(x) &&
                       (kKind == kPlain || aligned(*weight)) &&
                       (kKind != kAddNorm || aligned(*residual));
  const Launch to(x);
  by_type(x, [&](auto zero) {
    using T = decltype(zero);
    const auto launch = [&](auto kernel, int pieces, int elements) {
      const int threads = ceil_div<int64_t>(columns, pieces * elements);
      STD_TORCH_CHECK(threads <= kMostThreads, "the row does not fit a block's registers");
      launch_chained(kernel, rows, ceil_div(threads, kWarp) * kWarp, 0, to.stream(),
                     data<__nv_fp8_storage_t>(out), data<float>(scales),
                     kKind == kAddNorm ? data<T>(*residual) : nullptr, data<T>(x),
                     kKind != kPlain ? data<T>(*weight) : nullptr, static_cast<int>(columns),
                     static_cast<float>(eps));
    };
    if (!vectors) {
      launch(quantize_kernel<T, 1, 32, kKind>, 32, 1);
    } else if (columns <= 2 * kVector * kMostThreads) {
      launch(quantize_kernel<T, kVector, 2, kKind>, 2, kVector);
    } else {
      launch(quantize_kernel<T, kVector, 4, kKind>, 4, kVector);
    }
  });
}

}  // namespace

void quantize_rows(Tensor out, Tensor scales, Tensor x) {
  run<kPlain>(out, scales, nullptr, x, nullptr, 0.0);
}

void rms_norm_fp8(Tensor out, Tensor scales, Tensor x, Tensor weight, double eps) {
  run<kNorm>(out, scales, nullptr, x, &weight, eps);
}

void add_rms_norm_fp8(Tensor out, Tensor scales, Tensor residual, Tensor x, Tensor weight,
                      double eps) {
  run<kAddNorm>(out, scales, &residual, x, &weight, eps);
}

}  // namespace llava_engine
