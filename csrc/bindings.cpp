// Registers every op for CUDA under the schemas that llava_engine/kernels/*.py declare. Nothing
// else registers ops, so this file is the whole surface.
#include <torch/csrc/stable/library.h>

#include "ops.h"

STABLE_TORCH_LIBRARY_IMPL(llava_engine, CUDA, m) {
  m.impl("rms_norm", TORCH_BOX(&llava_engine::rms_norm));
  m.impl("add_rms_norm", TORCH_BOX(&llava_engine::add_rms_norm));
  m.impl("layer_norm", TORCH_BOX(&llava_engine::layer_norm));
  m.impl("add_layer_norm", TORCH_BOX(&llava_engine::add_layer_norm));
  m.impl("embed_norm", TORCH_BOX(&llava_engine::embed_norm));
  m.impl("quantize_rows", TORCH_BOX(&llava_engine::quantize_rows));
  m.impl("rms_norm_fp8", TORCH_BOX(&llava_engine::rms_norm_fp8));
  m.impl("linear_add", TORCH_BOX(&llava_engine::linear_add));
  m.impl("norm_linear", TORCH_BOX(&llava_engine::norm_linear));
  m.impl("norm_linear_silu_mul", TORCH_BOX(&llava_engine::norm_linear_silu_mul));
  m.impl("norm_qkv_rope_append", TORCH_BOX(&llava_engine::norm_qkv_rope_append));
  m.impl("quant_linear_add", TORCH_BOX(&llava_engine::quant_linear_add));
  m.impl("quant_norm_linear_silu_mul", TORCH_BOX(&llava_engine::quant_norm_linear_silu_mul));
  m.impl("quant_norm_qkv_rope_append", TORCH_BOX(&llava_engine::quant_norm_qkv_rope_append));
  m.impl("dequantize_rows", TORCH_BOX(&llava_engine::dequantize_rows));
  m.impl("matmul_store", TORCH_BOX(&llava_engine::matmul_store));
  m.impl("matmul_add", TORCH_BOX(&llava_engine::matmul_add));
  m.impl("matmul_silu_mul", TORCH_BOX(&llava_engine::matmul_silu_mul));
  m.impl("matmul_rope_append", TORCH_BOX(&llava_engine::matmul_rope_append));
  m.impl("decoder_layers", TORCH_BOX(&llava_engine::decoder_layers));
  m.impl("prefill_step", TORCH_BOX(&llava_engine::prefill_step));
  m.impl("silu_mul", TORCH_BOX(&llava_engine::silu_mul));
  m.impl("quick_gelu", TORCH_BOX(&llava_engine::quick_gelu));
  m.impl("rope_append", TORCH_BOX(&llava_engine::rope_append));
  m.impl("paged_attention", TORCH_BOX(&llava_engine::paged_attention));
  m.impl("preprocess", TORCH_BOX(&llava_engine::preprocess));
  m.impl("project", TORCH_BOX(&llava_engine::project));
  m.impl("sample", TORCH_BOX(&llava_engine::sample));
  m.impl("advance", TORCH_BOX(&llava_engine::advance));
}
