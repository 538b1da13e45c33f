// Prefill attention over the paged cache on the tensor cores (FlashAttention-2, Dao 2023): a block
// has 64 query rows of one head, a warp 16 of them; keys and values come tile by tile through
// cp.async, the values under the scores' product and the next keys under the values'.
#include "attention_prefill.cuh"
#include "mma.cuh"

namespace llava_engine {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
constexpr int kRows = kWarps * 16;
constexpr int kPad = 8;  // elements behind each row in shared memory: ldmatrix meets no bank twice

__device__ inline void copy_async(void* to, const void* from, bool present) {
  // Absent rows are filled with zeros: a NaN there, times a weight of 0, would still be NaN.
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from),
               "r"(present ? 16 : 0)
               : "memory");
}

__device__ inline void copies_issued() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ inline void copies_done() { asm volatile("cp.async.wait_group 0;" ::: "memory"); }

// Four 8x8 tiles; lane i gives the address of row i % 8 of tile i / 8.
__device__ inline void load_tiles(unsigned (&tiles)[4], const void* row) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(tiles[0]), "=r"(tiles[1]), "=r"(tiles[2]), "=r"(tiles[3])
               : "r"(address)
               : "memory");
}

__device__ inline void load_tiles_transposed(unsigned (&tiles)[4], const void* row) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(tiles[0]), "=r"(tiles[1]), "=r"(tiles[2]), "=r"(tiles[3])
               : "r"(address)
               : "memory");
}

// kDim: the head's dimensions, filled up with zeros. kKeys: keys per tile.
template <typename T, int kDim, int kKeys>
__global__ __launch_bounds__(kThreads) void prefill_kernel(AttentionArguments a) {
  constexpr int kStride = kDim + kPad;
  constexpr int kPieces = kDim / kVector;  // of 16 bytes, per row
  extern __shared__ __align__(16) char shared[];
  T* const queries = reinterpret_cast<T*>(shared);
  T* const keys = queries + kRows * kStride;
  T* const values = keys + kKeys * kStride;
  // Where the rows of this tile of keys and the next begin in the cache; -1 behind the last.
  __shared__ int64_t offsets[2][kKeys];

  const QueryTile tile = find_tile<kRows>(a, blockIdx.x);
  if (tile.sequence < 0) return;
  const int head = blockIdx.y;
  const int kv_head = head / (a.heads / a.kv_heads);
  const int start = tile.start, length = tile.length, context = tile.context;
  const int first = tile.index * kRows;
  const int rows = min(kRows, length - first);
  T* out = static_cast<T*>(a.out) + (static_cast<int64_t>(start + first) * a.heads + head) * a.dim;
  const int64_t out_stride = static_cast<int64_t>(a.heads) * a.dim;
  if (context == 0) {
    for (int i = threadIdx.x; i < rows * a.dim; i += kThreads) {
      out[i / a.dim * out_stride + i % a.dim] = from_float<T>(0.0f);
    }
    return;
  }

  const T* q = static_cast<const T*>(a.q) + (start + first) * a.q_stride + head * a.dim;
  for (int i = threadIdx.x; i < kRows * kPieces; i += kThreads) {
    const int row = i / kPieces, d = i % kPieces * kVector;
    const bool present = row < rows && d < a.dim;
    copy_async(queries + row * kStride + d, present ? q + row * a.q_stride + d : q, present);
  }
  const int32_t* table = a.block_table + static_cast<int64_t>(tile.sequence) * a.max_blocks;
  const int position = context - length + first;  // of the first row
  const int limit = position + rows;              // keys that any row sees
  const auto locate = [&](int64_t* to, int base) {
    for (int i = threadIdx.x; i < kKeys; i += kThreads) {
      const int key = base + i;
      to[i] = key < limit ? cache_offset(a, table[block_of(a, key)], kv_head, key) : -1;
    }
  };
  const auto fetch = [&](T* to, const void* cache, const int64_t* where) {
    const T* from = static_cast<const T*>(cache);
#pragma unroll
    for (int i = threadIdx.x; i < kKeys * kPieces; i += kThreads) {
      const int key = i / kPieces, d = i % kPieces * kVector;
      const int64_t offset = where[key];
      const bool present = offset >= 0 && d < a.dim;
      copy_async(to + key * kStride + d, present ? from + offset + d : from, present);
    }
    copies_issued();
  };
  locate(offsets[0], 0);
  __syncthreads();
  fetch(keys, a.k_cache, offsets[0]);

  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const T* const query_row = queries + (warp * 16 + lane % 16) * kStride + lane / 16 * 8;
  const T* const key_row = keys + (lane % 8 + lane / 16 * 8) * kStride + lane / 8 % 2 * 8;
  const T* const value_row = values + lane % 16 * kStride + lane / 16 * 8;
  // A thread has rows lane / 4 and that + 8 of its warp's 16, and columns 2 * (lane % 4), + 1 of
  // each 8.
  const int sees = position + warp * 16 + lane / 4;  // the last key that its first row sees
  const int column = lane % 4 * 2;
  float output[kDim / 8][4] = {};
  float maximum[2] = {-INFINITY, -INFINITY}, weight[2] = {};

  for (int base = 0, now = 0; base < limit; base += kKeys, now ^= 1) {
    copies_done();
    __syncthreads();  // the keys are there, and every warp is done with the last values
    fetch(values, a.v_cache, offsets[now]);
    locate(offsets[now ^ 1], base + kKeys);

    float scores[kKeys / 8][4] = {};
#pragma unroll
    for (int d = 0; d < kDim; d += 16) {
      unsigned query[4];
      load_tiles(query, query_row + d);
#pragma unroll
      for (int n = 0; n < kKeys / 8; n += 2) {
        unsigned key[4];
        load_tiles(key, key_row + n * 8 * kStride + d);
        multiply(scores[n], query, key[0], key[1], T{});
        multiply(scores[n + 1], query, key[2], key[3], T{});
      }
    }

    if (base + kKeys - 1 > position + warp * 16) {  // some key is in the future of some row
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int key = base + n * 8 + column + i % 2;
          if (key > sees + i / 2 * 8) scores[n][i] = -INFINITY;
        }
      }
    }
    float highest[2] = {maximum[0], maximum[1]};
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scores[n][i] *= a.scale_log2;
        highest[i / 2] = fmaxf(highest[i / 2], scores[n][i]);
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      highest[r] = fmaxf(highest[r], __shfl_xor_sync(kAllLanes, highest[r], 1));
      highest[r] = fmaxf(highest[r], __shfl_xor_sync(kAllLanes, highest[r], 2));
      // Key 0 is in the first tile and every row sees it: the maximum is finite from there on.
      const float kept = power_of_2(maximum[r] - highest[r]);
      maximum[r] = highest[r];
      weight[r] *= kept;
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        output[n][2 * r] *= kept;
        output[n][2 * r + 1] *= kept;
      }
    }
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scores[n][i] = power_of_2(scores[n][i] - maximum[i / 2]);
        weight[i / 2] += scores[n][i];
      }
    }

    copies_done();
    __syncthreads();  // the values are there, and every warp is done with the keys
    if (base + kKeys < limit) fetch(keys, a.k_cache, offsets[now ^ 1]);
#pragma unroll
    for (int n = 0; n < kKeys / 8; n += 2) {
      const unsigned weights[4] = {
          pair<T>(scores[n][0], scores[n][1]),
          pair<T>(scores[n][2], scores[n][3]),
          pair<T>(scores[n + 1][0], scores[n + 1][1]),
          pair<T>(scores[n + 1][2], scores[n + 1][3]),
      };
#pragma unroll
      for (int d = 0; d < kDim; d += 16) {
        unsigned value[4];
        load_tiles_transposed(value, value_row + n * 8 * kStride + d);
        multiply(output[d / 8], weights, value[0], value[1], T{});
        multiply(output[d / 8 + 1], weights, value[2], value[3], T{});
      }
    }
  }

#pragma unroll
  for (int r = 0; r < 2; ++r) {
    weight[r] += __shfl_xor_sync(kAllLanes, weight[r], 1);
    weight[r] += __shfl_xor_sync(kAllLanes, weight[r], 2);
    const int row = warp * 16 + lane / 4 + r * 8;
    if (row >= rows) continue;
    const float factor = 1.0f / weight[r];
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      const int d = n * 8 + column;
      if (d < a.dim) {
        *reinterpret_cast<unsigned*>(out + row * out_stride + d) =
            pair<T>(output[n][2 * r] * factor, output[n][2 * r + 1] * factor);
      }
    }
  }
}

template <typename T, int kDim, int kKeys>
void launch(const AttentionArguments& a, cudaStream_t stream) {
  constexpr int kBytes = (kRows + 2 * kKeys) * (kDim + kPad) * sizeof(T);
  const auto kernel = prefill_kernel<T, kDim, kKeys>;
  if (kBytes > 48 << 10) {
    constexpr auto kLimit = cudaFuncAttributeMaxDynamicSharedMemorySize;
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, kLimit, kBytes));
  }
  kernel<<<dim3(most_tiles<kRows>(a), a.heads), kThreads, kBytes, stream>>>(a);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

template <typename T>
void launch_prefill(const AttentionArguments& a, const Tensor& workspace, cudaStream_t stream) {
  if (launch_wgmma_prefill<T>(a, workspace, stream)) return;
  if (a.dim <= 32) {
    launch<T, 32, 64>(a, stream);
  } else if (a.dim <= 64) {
    launch<T, 64, 64>(a, stream);
  } else if (a.dim <= 128) {
    launch<T, 128, 64>(a, stream);
  } else {
    launch<T, 256, 32>(a, stream);
  }
}

template void launch_prefill<__half>(const AttentionArguments&, const Tensor&, cudaStream_t);
template void launch_prefill<__nv_bfloat16>(const AttentionArguments&, const Tensor&, cudaStream_t);

}  // namespace llava_engine
