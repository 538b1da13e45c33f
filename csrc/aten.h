// Torch's own products, through its dispatcher: cuBLAS.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace llava_engine {

// out = input @ weight.T + bias
void linear_out(const torch::stable::Tensor& out, const torch::stable::Tensor& input,
                const torch::stable::Tensor& weight,
                const std::optional<torch::stable::Tensor>& bias);

}  // namespace llava_engine
