// What stands between a layer's two MLP products: silu(gate) * up in the decoder, quick-GELU in the
// vision tower.
#include "common.cuh"
#include "ops.h"

namespace llava_engine {
namespace {

constexpr int kThreads = 256;
constexpr int kItems = 2;  // loads that a thread of quick_gelu_kernel has in flight

template <typename T, int N>
__global__ void silu_mul_kernel(T* __restrict__ out, const T* __restrict__ gate_up, int wide) {
  launch_dependents();
  wait_for_predecessor();
  const int64_t row = blockIdx.x;
  const int i = (blockIdx.y * kThreads + threadIdx.x) * N;
  if (i >= wide) return;
  float gate[N], up[N];
  load(gate_up + row * 2 * wide + i, gate);
  load(gate_up + (row * 2 + 1) * wide + i, up);
#pragma unroll
  for (int j = 0; j < N; ++j) {
    up[j] *= rounded<T>(gate[j] / (1.0f + expf(-gate[j])));
  }
  store(out + row * wide + i, up);
}

// x * sigmoid(1.702 x). The quick exponential and division are exact enough for 16 bits alone.
template <typename T>
__device__ float quick_gelu(float x) {
  if constexpr (sizeof(T) == 2) {
    return __fdividef(x, 1.0f + __expf(-1.702f * x));
  } else {
    return x / (1.0f + expf(-1.702f * x));
  }
}

// Not __restrict__: out may be x.
template <typename T, int N>
__global__ void quick_gelu_kernel(T* out, const T* x, int64_t count) {
  launch_dependents();
  wait_for_predecessor();
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kItems * kThreads + threadIdx.x) * N;
  float values[kItems][N];
#pragma unroll
  for (int item = 0; item < kItems; ++item) {
    const int64_t i = first + item * kThreads * N;
    if (i < count) load(x + i, values[item]);
  }
#pragma unroll
  for (int item = 0; item < kItems; ++item) {
    const int64_t i = first + item * kThreads * N;
    if (i >= count) return;
#pragma unroll
    for (int j = 0; j < N; ++j) values[item][j] = quick_gelu<T>(values[item][j]);
    store(out + i, values[item]);
  }
}

}  // namespace

void silu_mul(Tensor out, Tensor gate_up) {
  STD_TORCH_CHECK(out.dim() == 2 && gate_up.dim() == 2, "out must be [T, I], gate_up [T, 2 * I]");
  const int64_t rows = out.size(0), wide = out.size(1);
  check_dense(out, "out");
  check_column(gate_up, out.scalar_type(), rows * 2 * wide, "gate_up");
  if (rows == 0) return;
  const bool vectors = wide % kVector == 0 && aligned(out) && aligned(gate_up);
  const Launch to(out);
  by_type(out, [&](auto zero) {
    using T = decltype(zero);
    const int64_t items = vectors ? wide / kVector : wide;
    const dim3 grid(rows, ceil_div<int64_t>(items, kThreads));
    const auto kernel = vectors ? silu_mul_kernel<T, kVector> : silu_mul_kernel<T, 1>;
    launch_chained(kernel, grid, kThreads, 0, to.stream(), data<T>(out), data<T>(gate_up), wide);
  });
}

void quick_gelu(Tensor out, Tensor x) {
  const int64_t count = x.numel();
  check_dense(x, "x");
  check_column(out, x.scalar_type(), count, "out");
  if (count == 0) return;
  const bool vectors = count % kVector == 0 && aligned(out) && aligned(x);
  const Launch to(x);
  by_type(x, [&](auto zero) {
    using T = decltype(zero);
    const int64_t items = vectors ? count / kVector : count;
    const auto kernel = vectors ? quick_gelu_kernel<T, kVector> : quick_gelu_kernel<T, 1>;
    launch_chained(kernel, ceil_div<int64_t>(items, kItems * kThreads), kThreads, 0, to.stream(),
                   data<T>(out), data<T>(x), count);
  });
}

}  // namespace llava_engine
