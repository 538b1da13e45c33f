// Torch's own operations, through its dispatcher.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace llava_engine {

// out = input @ weight.T + bias, by cuBLAS
void linear_out(const torch::stable::Tensor& out, const torch::stable::Tensor& input,
                const torch::stable::Tensor& weight,
                const std::optional<torch::stable::Tensor>& bias);

// The rows [n, ...] that are named by `which`, int64.
torch::stable::Tensor index_select(const torch::stable::Tensor& rows,
                                   const torch::stable::Tensor& which);

}  // namespace llava_engine
