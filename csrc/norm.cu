// RMSNorm, alone and with the residual addition before it: one block per row, one pass over device
// memory. The row waits in shared memory, in its own type, while its sum of squares is taken.
#include <algorithm>

#include "common.cuh"
#include "ops.h"

namespace llava_engine {
namespace {

// Not __restrict__: out may be x.
template <typename T, int N, bool kAdd>
__global__ void rms_norm_kernel(T* out, T* residual, const T* x, const T* weight, int hidden,
                                float eps) {
  launch_dependents();
  wait_for_predecessor();
  extern __shared__ __align__(16) char shared[];
  T* row = reinterpret_cast<T*>(shared);
  const int64_t base = static_cast<int64_t>(blockIdx.x) * hidden;
  const int step = blockDim.x * N;
  float sum = 0.0f;
  for (int i = threadIdx.x * N; i < hidden; i += step) {
    float values[N];
    load(x + base + i, values);
    if constexpr (kAdd) {
      float before[N];
      load(residual + base + i, before);
#pragma unroll
      for (int j = 0; j < N; ++j) values[j] = rounded<T>(values[j] + before[j]);
      store(residual + base + i, values);
    }
#pragma unroll
    for (int j = 0; j < N; ++j) sum += values[j] * values[j];
    store(row + i, values);
  }
  const float scale = rsqrtf(block_sum(sum) / hidden + eps);
  for (int i = threadIdx.x * N; i < hidden; i += step) {
    float values[N], weights[N];
    load(row + i, values);  // what this thread itself put there
    load(weight + i, weights);
#pragma unroll
    for (int j = 0; j < N; ++j) values[j] = rounded<T>(values[j] * scale) * weights[j];
    store(out + base + i, values);
  }
}

template <typename T, int N, bool kAdd>
void launch(const Launch& to, Tensor& out, Tensor* residual, const Tensor& x, const Tensor& weight,
            float eps) {
  const int64_t rows = x.size(0);
  const int hidden = static_cast<int>(x.size(1));
  const int threads = std::min(1024, ceil_div(ceil_div(hidden, N), kWarp) * kWarp);
  launch_chained(rms_norm_kernel<T, N, kAdd>, rows, threads, hidden * sizeof(T), to.stream(),
                 data<T>(out), kAdd ? data<T>(*residual) : nullptr, data<T>(x), data<T>(weight),
                 hidden, eps);
}

template <bool kAdd>
void run(Tensor& out, Tensor* residual, const Tensor& x, const Tensor& weight, double eps) {
  STD_TORCH_CHECK(x.dim() == 2 && out.dim() == 2, "x and out must be [T, H]");
  const ScalarType type = x.scalar_type();
  const int64_t rows = x.size(0), hidden = x.size(1);
  check_column(out, type, rows * hidden, "out");
  check_column(x, type, rows * hidden, "x");
  check_column(weight, type, hidden, "weight");
  if (kAdd) check_column(*residual, type, rows * hidden, "residual");
  if (rows == 0) return;
  const bool vectors = hidden % kVector == 0 && aligned(out) && aligned(x) && aligned(weight) &&
                       (!kAdd || aligned(*residual));
  const Launch to(x);
  by_type(x, [&](auto zero) {
    using T = decltype(zero);
    STD_TORCH_CHECK(hidden * sizeof(T) <= 48 << 10, "the row does not fit shared memory");
    const float e = static_cast<float>(eps);
    if (vectors) {
      launch<T, kVector, kAdd>(to, out, residual, x, weight, e);
    } else {
      launch<T, 1, kAdd>(to, out, residual, x, weight, e);
    }
  });
}

}  // namespace

void rms_norm(Tensor out, Tensor x, Tensor weight, double eps) {
  run<false>(out, nullptr, x, weight, eps);
}

void add_rms_norm(Tensor out, Tensor residual, Tensor x, Tensor weight, double eps) {
  run<true>(out, &residual, x, weight, eps);
}

}  // namespace llava_engine
