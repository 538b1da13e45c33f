// Rows in 8 bits (e4m3), each with its own scale, alone and behind RMSNorm. One block per row,
// which is read once and then stays in registers.
#include <cuda_fp8.h>

#include <algorithm>

#include "common.cuh"
#include "ops.h"

namespace llava_engine {
namespace {

constexpr float kLargest = 448.0f;  // of e4m3
constexpr float kTiny = 0x1p-100f;  // a row without anything as large counts as zero
constexpr int kMostThreads = 1024;

enum Kind { kPlain, kNorm };

// A thread's part of a row, in the row's own type: what is normalised is rounded to that anyway. It
// has V pieces of N elements, as many pieces apart as the block has threads.
template <typename T, int N, int V>
struct Part {
  Pack<T, N> pieces[V] = {};  // zeros beyond the row's end

  __device__ static int column(int v) { return (v * blockDim.x + threadIdx.x) * N; }

  __device__ void load(const T* row, int columns) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      if (column(v) < columns) {
        pieces[v] = *reinterpret_cast<const Pack<T, N>*>(row + column(v));
      }
    }
  }

  // Puts f(element, its like in the other part) in each element's place.
  template <typename F>
  __device__ void combine(const Part& other, F&& f) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        pieces[v].values[j] = from_float<T>(
            f(to_float(pieces[v].values[j]), to_float(other.pieces[v].values[j])));
      }
    }
  }

  __device__ float squares() const {
    float sum = 0.0f;
#pragma unroll
    for (int v = 0; v < V; ++v) {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float x = to_float(pieces[v].values[j]);
        sum += x * x;
      }
    }
    return sum;
  }

  // The largest absolute value, as bits, which are ordered as the numbers are; NaN is above all.
  __device__ unsigned largest() const {
    unsigned bits = 0;
#pragma unroll
    for (int v = 0; v < V; ++v) {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        bits = max(bits, __float_as_uint(to_float(pieces[v].values[j])) & 0x7fffffffu);
      }
    }
    return bits;
  }

  __device__ void store_fp8(__nv_fp8_storage_t* row, int columns, float factor) const {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      if (column(v) >= columns) continue;
      const T* values = pieces[v].values;
      if constexpr (N == 1) {
        row[column(v)] =
            __nv_cvt_float_to_fp8(to_float(values[0]) * factor, __NV_SATFINITE, __NV_E4M3);
      } else {
        Pack<__nv_fp8x2_storage_t, N / 2> made;
#pragma unroll
        for (int j = 0; j < N; j += 2) {
          const float2 two{to_float(values[j]) * factor, to_float(values[j + 1]) * factor};
          made.values[j / 2] = __nv_cvt_float2_to_fp8x2(two, __NV_SATFINITE, __NV_E4M3);
        }
        *reinterpret_cast<Pack<__nv_fp8x2_storage_t, N / 2>*>(row + column(v)) = made;
      }
    }
  }
};

// The maximum over a block of whole warps, in every thread. Called once per kernel.
__device__ inline unsigned block_max(unsigned x) {
  __shared__ unsigned largest[kWarp];
  const int lane = threadIdx.x % kWarp;
  x = __reduce_max_sync(kAllLanes, x);
  if (lane == 0) largest[threadIdx.x / kWarp] = x;
  __syncthreads();
  return __reduce_max_sync(kAllLanes, lane < blockDim.x / kWarp ? largest[lane] : 0);
}

// x is not __restrict__, or it might be read before the kernel that writes it has ended.
template <typename T, int N, int V, Kind kKind>
__global__ void __launch_bounds__(kMostThreads)
    quantize_kernel(__nv_fp8_storage_t* out, float* scales, const T* x,
                    const T* __restrict__ weight, int columns, float eps) {
  launch_dependents();
  Part<T, N, V> weights;
  if constexpr (kKind != kPlain) weights.load(weight, columns);  // written by no kernel
  wait_for_predecessor();
  const int64_t base = static_cast<int64_t>(blockIdx.x) * columns;
  Part<T, N, V> row;
  row.load(x + base, columns);
  if constexpr (kKind != kPlain) {
    const float normal = rsqrtf(block_sum(row.squares()) / columns + eps);
    row.combine(weights, [=](float a, float b) { return rounded<T>(a * normal) * b; });
  }
  const float largest = __uint_as_float(block_max(row.largest()));
  const float scale = largest < kTiny ? 1.0f : largest / kLargest;
  row.store_fp8(out + base, columns, 1.0f / scale);
  if (threadIdx.x == 0) scales[blockIdx.x] = scale;
}

template <Kind kKind>
void run(Tensor& out, Tensor& scales, const Tensor& x, const Tensor* weight, double eps) {
  STD_TORCH_CHECK(x.dim() == 2 && out.dim() == 2, "x and out must be [T, n]");
  const ScalarType type = x.scalar_type();
  const int64_t rows = x.size(0), columns = x.size(1);
  check_column(out, ScalarType::Float8_e4m3fn, rows * columns, "out");
  check_column(scales, ScalarType::Float, rows, "scales");
  check_column(x, type, rows * columns, "x");
  if (kKind != kPlain) check_column(*weight, type, columns, "weight");
  if (rows == 0 || columns == 0) return;
  const bool vectors = columns % kVector == 0 && aligned(out) && aligned(x) &&
                       (kKind == kPlain || aligned(*weight));
  const Launch to(x);
  by_type(x, [&](auto zero) {
    using T = decltype(zero);
    const auto launch = [&](auto kernel, int pieces, int elements) {
      const int threads = ceil_div<int64_t>(columns, pieces * elements);
      STD_TORCH_CHECK(threads <= kMostThreads, "the row does not fit a block's registers");
      launch_chained(kernel, rows, ceil_div(threads, kWarp) * kWarp, 0, to.stream(),
                     data<__nv_fp8_storage_t>(out), data<float>(scales), data<T>(x),
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
  run<kPlain>(out, scales, x, nullptr, 0.0);
}

void rms_norm_fp8(Tensor out, Tensor scales, Tensor x, Tensor weight, double eps) {
  run<kNorm>(out, scales, x, &weight, eps);
}

}  // namespace llava_engine
