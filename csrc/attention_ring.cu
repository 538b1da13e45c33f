// Decoding attention on Hopper: keys and values stream through a ring in shared memory by bulk
// copies, all but the newest asked for before the predecessor has ended. A sequence's keys are
// split over the blocks of a cluster; the first merges what the others store in its shared memory.
// The grid depends on shapes alone, so a captured graph serves every context length.
#include <algorithm>
#include <cstddef>

#include "attention_decode.cuh"
#include "ring.cuh"

namespace llava_engine {
namespace {

constexpr int kConsumers = 4;                      // warps that compute,
constexpr int kThreads = (kConsumers + 1) * kWarp;  // and one that keeps the ring full
constexpr int kMaxSplits = 8;      // of one sequence's keys: a cluster's blocks
constexpr int kSplitTarget = 384;  // blocks in all that splitting may make: three on each SM

// kLanes lanes hold one key's row, 8 dimensions each; a warp has 32 / kLanes keys at once.
template <typename T, int kLanes, int G>
struct Shared {
  static constexpr int kDim = kLanes * kVector;
  static constexpr int kKeysPerWarp = kWarp / kLanes;
  static constexpr int kKeys = kConsumers * kKeysPerWarp;
  // At most 8 KB of keys a slot, and 48 KB of ring: four blocks share an SM. At most one key for
  // each lane of the copying warp, since blocks of the cache may be that small.
  static constexpr int kDepth = std::min<int>(kWarp, 8192 / (kDim * sizeof(T))) / kKeys;
  static constexpr int kSlotKeys = kDepth * kKeys;
  static constexpr int kSlots = std::min<int>(6, 49152 / (2 * kSlotKeys * kDim * sizeof(T)));

  alignas(128) T keys[kSlots][kSlotKeys * kDim];  // rows as in the cache, dim apart
  T values[kSlots][kSlotKeys * kDim];
  uint64_t full[kSlots], empty[kSlots], merge;
  float sums[kConsumers][G][kDim], maxima[kConsumers][G], weights[kConsumers][G];
  float parts[kMaxSplits][G][kDim + 2];  // sum, maximum, weight; not there without splits
};

#if __CUDA_ARCH__ >= 900
// Into the first block of the cluster, at the place that `to` has here; `barrier` there counts the
// bytes. No fence is needed, which would cost more than all else that merging does.
__device__ inline void store_in_first(float* to, float value, uint64_t* barrier) {
  asm volatile(
      "{\n"
      ".reg .b32 place, counter;\n"
      "mapa.shared::cluster.u32 place, %0, 0;\n"
      "mapa.shared::cluster.u32 counter, %1, 0;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [place], %2, [counter];\n"
      "}\n" ::"r"(shared_address(to)),
      "r"(shared_address(barrier)), "r"(__float_as_uint(value))
      : "memory");
}

// One warp: asks for slot after slot of the keys begin to end as slots become free. `blocks` is the
// lane's entry of the first 32 in the table. The newest key and value, which the predecessor wrote,
// come by ordinary loads: a bulk copy would see them only behind a fence that costs as much.
template <typename T, int kLanes, int G>
__device__ void fill_ring(const AttentionArguments& a, Shared<T, kLanes, G>& shared,
                          const int32_t* table, int blocks, int kv_head, int begin, int end,
                          int context) {
  constexpr int kSlots = shared.kSlots, kSlotKeys = shared.kSlotKeys;
  const int lane = threadIdx.x % kWarp;
  const T* k_cache = static_cast<const T*>(a.k_cache);
  const T* v_cache = static_cast<const T*>(a.v_cache);
  const uint32_t row_bytes = a.dim * sizeof(T);
  const uint64_t policy = evict_first();
  Cursor at;
  bool first_round = true;
  for (int base = begin; base < end; base += kSlotKeys) {
    const int slot_end = min(base + kSlotKeys, end);
    // Each lane has one of the blocks that the slot's keys are in, if there are so many.
    const int index = block_of(a, base) + lane;
    const int from = max(base, index * a.block_size);
    const int to = min(slot_end, (index + 1) * a.block_size);
    const bool some = from < to;
    int block = __shfl_sync(kAllLanes, blocks, min(index, kWarp - 1));
    if (some && index >= kWarp) block = table[index];

    if (!first_round) barrier_wait(shared.empty + at.slot, at.phase ^ 1);
    uint64_t* full = shared.full + at.slot;
    const int newest = context - 1;
    if (lane == 0) barrier_announce(full, 2 * (min(slot_end, newest) - base) * row_bytes);
    __syncwarp();
    const int known = min(to, newest);
    if (from < known) {
      const int64_t offset = cache_offset(a, block, kv_head, from);
      const int place = (from - base) * a.dim;
      const uint32_t bytes = (known - from) * row_bytes;
      bulk_copy(shared.keys[at.slot] + place, k_cache + offset, bytes, full, policy);
      bulk_copy(shared.values[at.slot] + place, v_cache + offset, bytes, full, policy);
    }
    if (slot_end == context) {
      wait_for_predecessor();
      block = __shfl_sync(kAllLanes, block, block_of(a, newest) - block_of(a, base));
      const int64_t offset = cache_offset(a, block, kv_head, newest);
      const int place = (newest - base) * a.dim, vectors = a.dim / kVector;
      for (int i = lane; i < 2 * vectors; i += kWarp) {
        const bool is_v = i >= vectors;
        const int d = (is_v ? i - vectors : i) * kVector;
        const auto words = Loaded<T>::from((is_v ? v_cache : k_cache) + offset + d);
        words.to_shared((is_v ? shared.values : shared.keys)[at.slot] + place + d);
      }
    }
    // Every lane that has stored arrives for itself: `full` counts a warp.
    if (slot_end == context) {
      barrier_arrive(full);
    } else if (lane == 0) {
      barrier_arrive(full, kWarp);
    }
    at.advance(kSlots);
    if (at.slot == 0) first_round = false;
  }
}
#endif

// G query heads, which share the key head, are answered from one read of its keys and values.
template <typename T, int kLanes, int G>
__global__ __launch_bounds__(kThreads, G == 1 ? 4 : 2) void ring_kernel(AttentionArguments a) {
#if __CUDA_ARCH__ >= 900
  using Memory = Shared<T, kLanes, G>;
  constexpr int kDim = Memory::kDim, kKeys = Memory::kKeys, kDepth = Memory::kDepth;
  launch_dependents();
  extern __shared__ __align__(128) char memory[];
  Memory& shared = *reinterpret_cast<Memory*>(memory);
  const int sequence = blockIdx.z, split = blockIdx.x, splits = gridDim.x;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  // Which blocks the first keys are in, asked for before it is known how many keys there are: every
  // load that waits for another costs half a microsecond.
  const int32_t* table = a.block_table + static_cast<int64_t>(sequence) * a.max_blocks;
  const int blocks = table[min(lane, a.max_blocks - 1)];
  const int row = a.query_start[sequence];
  const int row_end = a.query_start[sequence + 1];
  const int context = a.context_lens[sequence];
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < Memory::kSlots; ++slot) {
      barrier_init(shared.full + slot, kWarp);
      barrier_init(shared.empty + slot, kConsumers * kWarp);
    }
    barrier_init(&shared.merge, 1);
    barriers_ready();
  }
  const int group = a.heads / a.kv_heads;
  const int chunks = ceil_div(group, G);
  const int kv_head = blockIdx.y / chunks;
  const int first = blockIdx.y % chunks * G;
  const int head = kv_head * group + first;
  const int queries = min(G, group - first);
  T* out = static_cast<T*>(a.out) + (static_cast<int64_t>(row) * a.heads + head) * a.dim;
  const int dims = queries * a.dim;
  if (row_end - row != 1 || context == 0) {  // so for the whole cluster
    wait_for_predecessor();
    if (row_end - row != 1 || split != 0) return;
    for (int i = threadIdx.x; i < dims; i += kThreads) out[i] = from_float<T>(0.0f);
    return;
  }
  if (splits > 1) {
    if (threadIdx.x == 0 && split == 0) {
      barrier_expect(&shared.merge, splits * queries * (a.dim + 2) * sizeof(float));
    }
    __syncwarp();
    // This block has started: others may store in its memory.
    asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
  }
  __syncthreads();

  const int share = ceil_div(context, splits * kKeys) * kKeys;
  const int begin = min(split * share, context), end = min(begin + share, context);
  if (warp == kConsumers) {
    fill_ring(a, shared, table, blocks, kv_head, begin, end, context);
    __syncwarp();
  } else {
    wait_for_predecessor();
    // Lanes behind the last dimension read the first ones, and multiply them by zero.
    const bool inside = lane % kLanes * kVector < a.dim;
    const int place = inside ? lane % kLanes * kVector : 0;
    const T* q = static_cast<const T*>(a.q) + row * a.q_stride + head * a.dim + place;
    float query[G][kVector];
#pragma unroll
    for (int g = 0; g < G; ++g) {
      Loaded<T> words{};
      if (inside && g < queries) words = Loaded<T>::from(q + g * a.dim);
#pragma unroll
      for (int j = 0; j < kVector; ++j) query[g][j] = words[j] * a.scale_log2;
    }

    Running<kVector> running[G];
    Cursor at;
    const int first_key = warp * Memory::kKeysPerWarp + lane / kLanes;
    for (int base = begin; base < end; base += Memory::kSlotKeys) {
      const int count = min(Memory::kSlotKeys, end - base);
      // Behind the last key the last one stands in, with no weight: what is in the slot there may
      // be no number.
      int offsets[kDepth];
#pragma unroll
      for (int u = 0; u < kDepth; ++u) {
        offsets[u] = min(first_key + u * kKeys, count - 1) * a.dim + place;
      }
      barrier_wait(shared.full + at.slot, at.phase);
      __syncwarp();
      Loaded<T> k[kDepth], v[kDepth];
#pragma unroll
      for (int u = 0; u < kDepth; ++u) {
        k[u] = Loaded<T>::from_shared(shared.keys[at.slot] + offsets[u]);
        v[u] = Loaded<T>::from_shared(shared.values[at.slot] + offsets[u]);
      }
#pragma unroll
      for (int g = 0; g < G; ++g) {
        float score[kDepth], highest = -INFINITY;
#pragma unroll
        for (int u = 0; u < kDepth; ++u) {
          score[u] = 0.0f;
#pragma unroll
          for (int j = 0; j < kVector; ++j) score[u] += query[g][j] * k[u][j];
#pragma unroll
          for (int offset = kLanes / 2; offset > 0; offset /= 2) {
            score[u] += __shfl_xor_sync(kAllLanes, score[u], offset);
          }
          if (first_key + u * kKeys >= count) score[u] = -INFINITY;
          highest = fmaxf(highest, score[u]);
        }
        Running<kVector>& run = running[g];
        const float kept = run.raise(highest);
        run.weight *= kept;
#pragma unroll
        for (int j = 0; j < kVector; ++j) run.sum[j] *= kept;
#pragma unroll
        for (int u = 0; u < kDepth; ++u) {
          const float weight = worth(score[u], run.maximum);
          run.weight += weight;
#pragma unroll
          for (int j = 0; j < kVector; ++j) run.sum[j] += weight * v[u][j];
        }
      }
      // Only a slot that is filled again is waited for.
      if (base + Memory::kSlots * Memory::kSlotKeys < end) barrier_arrive(shared.empty + at.slot);
      at.advance(Memory::kSlots);
    }

    // Merge what the lanes of the warp have of each query.
#pragma unroll
    for (int g = 0; g < G; ++g) {
      Running<kVector>& run = running[g];
#pragma unroll
      for (int offset = kLanes; offset < kWarp; offset *= 2) {
        const float other = __shfl_xor_sync(kAllLanes, run.maximum, offset);
        const float theirs = __shfl_xor_sync(kAllLanes, run.weight, offset);
        const float mine = run.raise(other);
        const float factor = worth(other, run.maximum);
        run.weight = run.weight * mine + theirs * factor;
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
          const float value = __shfl_xor_sync(kAllLanes, run.sum[j], offset);
          run.sum[j] = run.sum[j] * mine + value * factor;
        }
      }
      if (lane < kLanes && inside) {
#pragma unroll
        for (int j = 0; j < kVector; ++j) shared.sums[warp][g][place + j] = run.sum[j];
        if (lane == 0) {
          shared.maxima[warp][g] = run.maximum;
          shared.weights[warp][g] = run.weight;
        }
      }
    }
  }
  __syncthreads();

  // Then what the warps have, then the blocks of the cluster.
  if (splits > 1) asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
  for (int i = threadIdx.x; i < dims; i += kThreads) {
    const int g = i / a.dim, d = i % a.dim;
    float maximum = -INFINITY, sum = 0.0f, weight = 0.0f;
#pragma unroll
    for (int w = 0; w < kConsumers; ++w) maximum = fmaxf(maximum, shared.maxima[w][g]);
#pragma unroll
    for (int w = 0; w < kConsumers; ++w) {
      const float factor = worth(shared.maxima[w][g], maximum);
      sum += shared.sums[w][g][d] * factor;
      weight += shared.weights[w][g] * factor;
    }
    if (splits == 1) {
      out[i] = from_float<T>(sum / weight);
    } else {
      float* part = shared.parts[split][g];
      store_in_first(part + d, sum, &shared.merge);
      if (d == 0) {
        store_in_first(part + kDim, maximum, &shared.merge);
        store_in_first(part + kDim + 1, weight, &shared.merge);
      }
    }
  }
  if (splits == 1 || split != 0) return;
  barrier_wait_cluster(&shared.merge, 0);
  for (int i = threadIdx.x; i < dims; i += kThreads) {
    const int g = i / a.dim, d = i % a.dim;
    float maximum = -INFINITY, sum = 0.0f, weight = 0.0f;
    for (int p = 0; p < splits; ++p) maximum = fmaxf(maximum, shared.parts[p][g][kDim]);
    for (int p = 0; p < splits; ++p) {
      const float* part = shared.parts[p][g];
      const float factor = worth(part[kDim], maximum);
      sum += part[d] * factor;
      weight += part[kDim + 1] * factor;
    }
    out[i] = from_float<T>(sum / weight);
  }
#endif
}

// Shared memory of a block, so much that an SM takes no more blocks than its share: they start as
// the predecessor's end, and the first SMs to be free would have them all. One more of a cluster's,
// which have to find their places close together.
int fair_share(int64_t blocks, int cluster) {
  constexpr int kSm = 228 << 10, kReserved = 1 << 10;  // for each block
  int device = 0, count = 0;
  STD_CUDA_CHECK(cudaGetDevice(&device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return kSm / (ceil_div<int64_t>(blocks, count) + (cluster > 1)) / 128 * 128 - kReserved;
}

template <typename T, int kLanes, int G>
void launch(const AttentionArguments& a, cudaStream_t stream) {
  using Memory = Shared<T, kLanes, G>;
  const int rows = a.kv_heads * ceil_div(a.heads / a.kv_heads, G);
  const int64_t groups = static_cast<int64_t>(a.sequences) * rows;
  const int64_t longest = static_cast<int64_t>(a.max_blocks) * a.block_size;
  int splits = 1;
  while (splits < kMaxSplits && groups * splits * 2 <= kSplitTarget &&
         longest > splits * Memory::kSlotKeys) {
    splits *= 2;
  }
  const int needed = splits == 1 ? offsetof(Memory, parts) : sizeof(Memory);
  const int bytes = std::max(needed, fair_share(groups * splits, splits));
  const auto kernel = ring_kernel<T, kLanes, G>;
  // The same at every launch: a captured one must not find it lowered by another.
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      fair_share(1, 1)));
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                      cudaSharedmemCarveoutMaxShared));
  const dim3 grid(splits, rows, a.sequences);
  launch_clusters(kernel, splits, grid, kThreads, bytes, stream, a);
}

template <typename T, int kLanes>
void by_group(const AttentionArguments& a, cudaStream_t stream) {
  if (a.heads == a.kv_heads) {
    launch<T, kLanes, 1>(a, stream);
  } else {
    launch<T, kLanes, 4>(a, stream);
  }
}

}  // namespace

template <typename T>
void launch_ring_decode(const AttentionArguments& a, cudaStream_t stream) {
  if (a.dim <= 32) {
    by_group<T, 4>(a, stream);
  } else if (a.dim <= 64) {
    by_group<T, 8>(a, stream);
  } else if (a.dim <= 128) {
    by_group<T, 16>(a, stream);
  } else {
    by_group<T, 32>(a, stream);
  }
}

template void launch_ring_decode<__half>(const AttentionArguments&, cudaStream_t);
template void launch_ring_decode<__nv_bfloat16>(const AttentionArguments&, cudaStream_t);
template void launch_ring_decode<float>(const AttentionArguments&, cudaStream_t);

}  // namespace llava_engine
