#include "aten.h"

#include <torch/csrc/stable/ops.h>

#include <array>

namespace llava_engine {

using torch::stable::Tensor;

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

Tensor index_select(const Tensor& rows, const Tensor& which) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(rows),
                                    torch::stable::detail::from(int64_t{0}),
                                    torch::stable::detail::from(which)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::index_select", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace llava_engine
