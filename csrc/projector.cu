// The projector: two products through cuBLAS, the second straight into the embedding rows, and the
// exact GELU between them in place. cuBLASLt's own GELU epilogue is the tanh form, so it cannot
// serve; the bias is in the products' epilogues.
#include <torch/csrc/stable/ops.h>

#include <array>

#include "common.cuh"
#include "ops.h"

namespace llava_engine {
namespace {

constexpr int kThreads = 256;

template <typename T, int N>
__global__ void gelu_kernel(T* x, int64_t count) {
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * N;
  if (i >= count) return;
  float values[N];
  load(x + i, values);
#pragma unroll
  for (int j = 0; j < N; ++j) {
    values[j] = values[j] * 0.5f * (1.0f + erff(values[j] * 0.70710678118654752440f));
  }
  store(x + i, values);
}

// out = input @ weight.T + bias
void linear_out(const Tensor& out, const Tensor& input, const Tensor& weight,
                const std::optional<Tensor>& bias) {
  std::array<StableIValue, 4> stack{
      torch::stable::detail::from(input), torch::stable::detail::from(weight),
      torch::stable::detail::from(bias), torch::stable::detail::from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::linear", "out", stack.data(), TORCH_ABI_VERSION));
  // The result is `out` once more; taking it over gives its reference back.
  torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace

void project(Tensor out, Tensor features, Tensor w1, std::optional<Tensor> b1, Tensor w2,
             std::optional<Tensor> b2) {
  STD_TORCH_CHECK(features.dim() == 2 && w1.dim() == 2, "features and w1 must be matrices");
  check_dense(out, "out");
  if (features.size(0) == 0) return;
  Tensor middle = torch::stable::new_empty(features, {features.size(0), w1.size(0)});
  linear_out(middle, features, w1, b1);
  const Launch to(out);
  by_type(middle, [&](auto zero) {
    using T = decltype(zero);
    const int64_t count = middle.numel();
    const bool vectors = count % kVector == 0;
    const int64_t items = vectors ? count / kVector : count;
    const auto kernel = vectors ? gelu_kernel<T, kVector> : gelu_kernel<T, 1>;
    kernel<<<ceil_div<int64_t>(items, kThreads), kThreads, 0, to.stream()>>>(data<T>(middle),
                                                                            count);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  linear_out(out, middle, w2, b2);
}

}  // namespace llava_engine
