// silu(gate) * up between a layer's two MLP products.
#include "common.cuh"
#include "ops.h"

namespace llava_engine {
namespace {

constexpr int kThreads = 256;

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

}  // namespace llava_engine
