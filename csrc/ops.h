// The op surface: what each family implements and bindings.cpp registers. The schemas, with shapes
// and meaning of every argument, are declared in llava_engine/kernels/<family>.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace llava_engine {

using torch::stable::Tensor;

// norm.cu
void rms_norm(Tensor out, Tensor x, Tensor weight, double eps);
void add_rms_norm(Tensor out, Tensor residual, Tensor x, Tensor weight, double eps);
void layer_norm(Tensor out, Tensor x, Tensor weight, Tensor bias, double eps);
void add_layer_norm(Tensor out, Tensor residual, Tensor x, Tensor weight, Tensor bias, double eps);
void embed_norm(Tensor out, Tensor patches, Tensor class_token, Tensor positions, Tensor weight,
                Tensor bias, double eps);

// fp8.cu
void quantize_rows(Tensor out, Tensor scales, Tensor x);
void rms_norm_fp8(Tensor out, Tensor scales, Tensor x, Tensor weight, double eps);

// linear.cu
void linear_add(Tensor residual, Tensor x, Tensor weight);
void norm_linear(Tensor out, Tensor x, Tensor norm_weight, double eps, Tensor weight);
void norm_linear_silu_mul(Tensor out, Tensor x, Tensor norm_weight, double eps, Tensor gate_up);
void norm_qkv_rope_append(Tensor q, Tensor k_cache, Tensor v_cache, Tensor x, Tensor norm_weight,
                          double eps, Tensor qkv, Tensor cos_sin, Tensor positions,
                          Tensor slot_mapping);

// quant_linear.cu
void quant_linear_add(Tensor residual, Tensor x, Tensor weight, Tensor scales);
void quant_norm_linear_silu_mul(Tensor out, Tensor x, Tensor norm_weight, double eps,
                                Tensor gate_up, Tensor scales);
void quant_norm_qkv_rope_append(Tensor q, Tensor k_cache, Tensor v_cache, Tensor x,
                                Tensor norm_weight, double eps, Tensor qkv, Tensor scales,
                                Tensor cos_sin, Tensor positions, Tensor slot_mapping);

// dequantize.cu
void dequantize_rows(Tensor out, Tensor weight, Tensor scales, int64_t apart, int64_t first_row);

// matmul.cu
bool matmul_takes(const Tensor& x, const Tensor& weight);  // no op: whether the ones below do
void matmul_store(Tensor out, Tensor x, Tensor weight, std::optional<Tensor> bias,
                  int64_t activation);
void matmul_add(Tensor residual, Tensor x, Tensor weight, std::optional<Tensor> bias,
                std::optional<Tensor> x_scales, std::optional<Tensor> weight_scales);
void matmul_silu_mul(Tensor out, Tensor x, Tensor gate_up, std::optional<Tensor> x_scales,
                     std::optional<Tensor> weight_scales);
void matmul_rope_append(Tensor q, Tensor k_cache, Tensor v_cache, Tensor x, Tensor qkv,
                        std::optional<Tensor> x_scales, std::optional<Tensor> weight_scales,
                        Tensor cos_sin, Tensor positions, Tensor slot_mapping);

// decoder.cpp
void decoder_layers(Tensor out, Tensor residual, std::vector<Tensor> k_caches,
                    std::vector<Tensor> v_caches, std::vector<Tensor> weights,
                    std::vector<Tensor> scales, std::vector<Tensor> fp8, Tensor final_norm,
                    Tensor cos_sin, Tensor positions, Tensor slot_mapping, Tensor block_table,
                    Tensor query_start, Tensor context_lens, std::optional<Tensor> wanted,
                    Tensor workspace, int64_t max_query_len, double scale, double eps);

// prefill.cu
void prefill_step(Tensor tokens, Tensor uploaded, std::vector<int64_t> sizes, Tensor embedding,
                  std::vector<Tensor> features, std::vector<int64_t> feature_rows,
                  std::vector<Tensor> k_caches, std::vector<Tensor> v_caches,
                  std::vector<Tensor> weights, std::vector<Tensor> scales, std::vector<Tensor> fp8,
                  Tensor final_norm, Tensor cos_sin, Tensor head, Tensor workspace,
                  int64_t max_query_len, double scale, double eps);

// activation.cu
void silu_mul(Tensor out, Tensor gate_up);
void quick_gelu(Tensor out, Tensor x);

// rope_kv.cu
void rope_append(Tensor q, Tensor k, Tensor v, Tensor cos_sin, Tensor positions,
                 Tensor slot_mapping, Tensor k_cache, Tensor v_cache);

// attention.cu
void paged_attention(Tensor out, Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table,
                     Tensor query_start, Tensor context_lens, Tensor workspace,
                     int64_t max_query_len, double scale);

// preprocess.cu
void preprocess(Tensor out, Tensor uploaded, std::vector<int64_t> pixels, int64_t levels,
                std::vector<int64_t> passes, int64_t patch, std::vector<int64_t> place);

// projector.cu
void project(Tensor out, Tensor features, Tensor w1, std::optional<Tensor> b1, Tensor w2,
             std::optional<Tensor> b2);

// sampling.cu
void sample(Tensor out, Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p,
            Tensor repetition_penalty, std::optional<Tensor> seen, Tensor seed, Tensor position);

// decode_step.cu
void advance(Tensor token, Tensor position, Tensor slot, Tensor context_len,
             Tensor sample_position, Tensor remaining, Tensor seen, Tensor step, Tensor ring,
             Tensor sampled, Tensor eos, Tensor block_table, int64_t block_size);

}  // namespace llava_engine
