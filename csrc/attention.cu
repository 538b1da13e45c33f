// The attention op: checks, and which kernel has which rows. Here too is the plain kernel, for what
// the fast ones do not take: float32 prefill (tensor cores would round it) and uneven head sizes.
#include "attention.cuh"
#include "ops.h"

namespace llava_engine {
namespace {

constexpr int kWarps = 4;
constexpr int kMaxDim = 256;

// The last sequence that starts at or before `row`, of those that have rows.
__device__ inline int sequence_of(const AttentionArguments& a, int row) {
  int low = 0, high = a.sequences;  // query_start[low] <= row < query_start[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (a.query_start[middle] <= row ? low : high) = middle;
  }
  return low;
}

// A warp has one query row of one head. A lane scores every 32nd key, then owns every 32nd
// dimension.
template <typename T>
__global__ __launch_bounds__(kWarps* kWarp) void plain_kernel(AttentionArguments a,
                                                              bool singles_too) {
  __shared__ float queries[kWarps][kMaxDim];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int row = blockIdx.x, head = blockIdx.y * kWarps + warp;
  if (head >= a.heads) return;
  const int sequence = sequence_of(a, row);
  const int start = a.query_start[sequence], end = a.query_start[sequence + 1];
  if (row >= end || (end - start == 1 && !singles_too)) return;
  const int context = a.context_lens[sequence];
  const int keys = context == 0 ? 0 : context - (end - start) + (row - start) + 1;

  const T* q = static_cast<const T*>(a.q) + row * a.q_stride + head * a.dim;
  float* query = queries[warp];
  for (int d = lane; d < a.dim; d += kWarp) query[d] = to_float(q[d]) * a.scale_log2;
  __syncwarp();
  const int32_t* table = a.block_table + static_cast<int64_t>(sequence) * a.max_blocks;
  const int kv_head = head / (a.heads / a.kv_heads);
  const T* k_cache = static_cast<const T*>(a.k_cache);
  const T* v_cache = static_cast<const T*>(a.v_cache);
  float maximum = -INFINITY, weight = 0.0f, output[kMaxDim / kWarp] = {};
  for (int base = 0; base < keys; base += kWarp) {
    const int key = base + lane;
    int64_t offset = 0;
    float score = -INFINITY;
    if (key < keys) {
      offset = cache_offset(a, table[block_of(a, key)], kv_head, key);
      score = 0.0f;
      for (int d = 0; d < a.dim; ++d) score += query[d] * to_float(k_cache[offset + d]);
    }
    const float highest = fmaxf(maximum, warp_max(score));
    const float kept = exp2f(maximum - highest);
    const float mine = exp2f(score - highest);
    maximum = highest;
    weight = weight * kept + warp_sum(mine);
#pragma unroll
    for (int i = 0; i < kMaxDim / kWarp; ++i) output[i] *= kept;
    for (int j = 0; j < min(kWarp, keys - base); ++j) {
      const float factor = __shfl_sync(kAllLanes, mine, j);
      const T* v = v_cache + __shfl_sync(kAllLanes, offset, j);
#pragma unroll
      for (int i = 0; i < kMaxDim / kWarp; ++i) {
        const int d = lane + i * kWarp;
        if (d < a.dim) output[i] += factor * to_float(v[d]);
      }
    }
  }
  T* out = static_cast<T*>(a.out) + (static_cast<int64_t>(row) * a.heads + head) * a.dim;
#pragma unroll
  for (int i = 0; i < kMaxDim / kWarp; ++i) {
    const int d = lane + i * kWarp;
    if (d < a.dim) out[d] = from_float<T>(keys == 0 ? 0.0f : output[i] / weight);
  }
}

template <typename T>
void launch_plain(const AttentionArguments& a, bool singles_too, cudaStream_t stream) {
  const dim3 grid(a.tokens, ceil_div(a.heads, kWarps));
  plain_kernel<T><<<grid, kWarps * kWarp, 0, stream>>>(a, singles_too);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

void paged_attention(Tensor out, Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table,
                     Tensor query_start, Tensor context_lens, Tensor workspace,
                     int64_t max_query_len, double scale) {
  STD_TORCH_CHECK(q.dim() == 3 && k_cache.dim() == 4 && block_table.dim() == 2,
                  "q must be [T, heads, D], the caches [blocks, heads, block_size, D]");
  const ScalarType type = q.scalar_type();
  const int64_t tokens = q.size(0), heads = q.size(1), dim = q.size(2);
  const int64_t sequences = block_table.size(0), kv_heads = k_cache.size(1);
  check_column(out, type, tokens * heads * dim, "out");
  STD_TORCH_CHECK(q.stride(2) == 1 && q.stride(1) == dim, "q's heads must be dense");
  for (const Tensor* cache : {&k_cache, &v_cache}) {
    check_dense(*cache, "cache");
    check_type(*cache, type, "cache");
  }
  STD_TORCH_CHECK(v_cache.numel() == k_cache.numel() && k_cache.size(3) == dim &&
                      heads % kv_heads == 0,
                  "sizes of q and the caches do not fit each other");
  STD_TORCH_CHECK(dim <= kMaxDim, "heads of more than 256 dimensions are not implemented");
  check_dense(block_table, "block_table");
  check_type(block_table, ScalarType::Int, "block_table");
  check_column(query_start, ScalarType::Int, sequences + 1, "query_start");
  check_column(context_lens, ScalarType::Int, sequences, "context_lens");
  check_dense(workspace, "workspace");
  check_type(workspace, ScalarType::Float, "workspace");
  // Masked scores are -inf, highest scores are found, before and after the scaling.
  STD_TORCH_CHECK(scale > 0, "the scores' factor must be positive");
  const uint64_t block_size = k_cache.size(2);
  STD_TORCH_CHECK(block_table.size(1) * block_size * block_size < 1ull << 32,
                  "so long a context is not implemented with blocks of this size");
  if (tokens == 0) return;

  const AttentionArguments arguments{
      out.data_ptr(),
      q.data_ptr(),
      k_cache.data_ptr(),
      v_cache.data_ptr(),
      data<int32_t>(block_table),
      data<int32_t>(query_start),
      data<int32_t>(context_lens),
      q.stride(0),
      k_cache.size(0),
      static_cast<int>(tokens),
      static_cast<int>(sequences),
      static_cast<int>(heads),
      static_cast<int>(kv_heads),
      static_cast<int>(dim),
      static_cast<int>(block_size),
      static_cast<int>(block_table.size(1)),
      ((1ull << 32) + block_size - 1) / block_size,
      static_cast<float>(scale * 1.44269504088896340736),
  };
  const Launch to(q);
  const bool vectors = dim % kVector == 0 && q.stride(0) % kVector == 0 && aligned(q) &&
                       aligned(out) && aligned(k_cache) && aligned(v_cache);
  by_type(q, [&](auto zero) {
    using T = decltype(zero);
    if (!vectors) return launch_plain<T>(arguments, true, to.stream());
    // Where every sequence has the most rows, there is none of a single row.
    const bool alike = tokens == sequences * max_query_len;
    if (max_query_len == 1 || !alike) launch_decode<T>(arguments, workspace, to.stream());
    if (max_query_len == 1) return;
    if constexpr (sizeof(T) == 2) {
      launch_prefill<T>(arguments, workspace, to.stream());
    } else {
      launch_plain<T>(arguments, false, to.stream());
    }
  });
}

}  // namespace llava_engine
