// What the kernel of matmul.cuh is told, and where it is started.
#pragma once

#include "common.cuh"
#include "quant_linear.h"

namespace llava_engine {

constexpr int kTileRows = 128;  // of the weight

enum class Result { kStore, kAdd, kSiluMul, kRopeAppend };
enum class Activation { kNone, kGelu, kQuickGelu };

// What becomes of the sums. Out: the type of results, biases and caches.
template <typename Out>
struct Work {
  Result result;
  Activation activation;  // with kStore
  int tokens, inputs;
  int outputs;  // columns of `out`; with kSiluMul half of the weight's rows
  int token_tiles, tile_pairs;  // tile_pairs: of weight rows, what a cluster has of them at a time
  Out* out;  // kAdd: the residual; kRopeAppend: the queries
  int64_t out_stride;
  const Out* bias;                        // [outputs] or null
  // [tokens] and [weight rows], or null. Without the first x is of 16 bits and the weight is not;
  // scale_unit is what the weight's are multiplied with.
  const float *x_scales, *weight_scales;
  float scale_unit;
  // kRopeAppend, whose heads have kTileRows dimensions. See rope_kv.cu.
  const float* cos_sin;
  const int64_t *positions, *slots;
  Out *k_cache, *v_cache;
  int q_heads, kv_heads, block_size;
};

// x [tokens, inputs] times weight [.., inputs] transposed, by the kernel for In and Out: those of
// 16 bits in themselves, or float8 into one of them. `work` lacks what is said by x.
template <typename In, typename Out>
void run_matmul(const Tensor& x, const Tensor& weight, Work<Out> work);

// The same with a quantised weight (quant_matmul.cuh). scales: of its rows, or NF4's.
template <Format kFormat, typename T>
void run_quant_matmul(const Tensor& x, const Tensor& weight, const Tensor& scales, Work<T> work);

}  // namespace llava_engine
