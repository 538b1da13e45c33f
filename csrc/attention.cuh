// What the attention kernels share: their arguments and how a key finds its place in the cache.
#pragma once

#include "common.cuh"

namespace llava_engine {

struct AttentionArguments {
  void* out;       // [T, heads, dim]
  const void* q;   // [T, heads, dim], rows q_stride apart
  const void* k_cache;  // [blocks, kv_heads, block_size, dim]
  const void* v_cache;
  const int32_t* block_table;   // [sequences, max_blocks]
  const int32_t* query_start;   // [sequences + 1]
  const int32_t* context_lens;  // [sequences]
  int64_t q_stride;
  int64_t blocks;  // of the cache
  int tokens, sequences, heads, kv_heads, dim, block_size, max_blocks;
  uint64_t block_magic;  // ceil(2^32 / block_size)
  float scale_log2;  // the scores' factor, times log2(e): the kernels use exp2
};

// key / block_size by a product: exact while key * block_size < 2^32, which the op checks.
__device__ inline int block_of(const AttentionArguments& a, int key) {
  return static_cast<int>(static_cast<uint32_t>(key) * a.block_magic >> 32);
}

// Where the row of `key`, which is in `block` of the cache, begins in k_cache and v_cache.
__device__ inline int64_t cache_offset(const AttentionArguments& a, int64_t block, int kv_head,
                                       int key) {
  const int place = key - block_of(a, key) * a.block_size;
  return ((block * a.kv_heads + kv_head) * a.block_size + place) * a.dim;
}

// One query row per sequence, 16-byte loads: dim a multiple of 8, rows of q aligned.
// workspace: float32; counters, which are zero between launches, and then partial results.
template <typename T>
void launch_decode(const AttentionArguments& arguments, const Tensor& workspace,
                   cudaStream_t stream);

// Two or more query rows per sequence, on the tensor cores: a 16-bit T, and as for decode.
template <typename T>
void launch_prefill(const AttentionArguments& arguments, const Tensor& workspace,
                    cudaStream_t stream);

}  // namespace llava_engine
