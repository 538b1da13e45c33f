// Decoding attention over the paged cache (flash decoding, Dao et al. 2023) before Hopper: a
// sequence's keys are split over blocks, and the block that finishes last merges the parts in the
// same launch. The grid depends on shapes alone, so a captured graph serves every context length.
#include <algorithm>

#include "attention_decode.cuh"

namespace llava_engine {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
constexpr int kMaxSplits = 32;     // of one sequence's keys
constexpr int kSplitTarget = 384;  // blocks in all that splitting may make: three on each SM
// Keys whose loads a lane has in flight; more would cost registers, and so blocks per SM.
template <typename T, int G>
constexpr int kUnroll = sizeof(T) == 2 && G == 1 ? 8 : 4;

struct Split {
  int count;       // blockIdx.x goes so far, whatever the context
  int* counters;   // [sequences * gridDim.y], how many parts of each are done
  float* parts;    // [sequences * gridDim.y, count, G, dim + 2]: sum, maximum, weight
};

__device__ inline bool last_to_finish(int* counter, int participants) {
  // The barrier puts every thread's stores before thread 0's release; the other blocks' acquire
  // then sees them all.
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    int before;
    asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;"
                 : "=r"(before)
                 : "l"(counter)
                 : "memory");
    last = before == participants - 1;
    if (last) *counter = 0;  // for the next launch
  }
  __syncthreads();
  return last;
}

// kLanes lanes hold one key's row, 8 dimensions each; a warp has 32 / kLanes keys at once. G query
// heads, which share the key head, are answered from one read of its keys and values.
template <typename T, int kLanes, int G>
__global__ __launch_bounds__(kThreads, G == 1 ? 4 : 2)
void decode_kernel(AttentionArguments a, Split split) {
  constexpr int kKeysPerWarp = kWarp / kLanes;
  constexpr int kKeys = kWarps * kKeysPerWarp;
  constexpr int kDepth = kUnroll<T, G>;
  constexpr int kStep = kKeys * kDepth;
  constexpr int kDim = kLanes * kVector;

  launch_dependents();
  const int sequence = blockIdx.z;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int32_t* table = a.block_table + static_cast<int64_t>(sequence) * a.max_blocks;
  // Which blocks the first keys are in, asked for before it is known how many keys there are:
  // every load that waits for another costs half a microsecond.
  int blocks[kDepth];
  const int first_key = warp * kKeysPerWarp + lane / kLanes;
  const auto look_up = [&](int step) {
#pragma unroll
    for (int u = 0; u < kDepth; ++u) {
      const int block = block_of(a, step * kStep + first_key + u * kKeys);
      blocks[u] = table[min(block, a.max_blocks - 1)];
    }
  };
  look_up(blockIdx.x);
  const int row = a.query_start[sequence];
  const int row_end = a.query_start[sequence + 1];
  const int context = a.context_lens[sequence];
  const bool alone = row_end - row == 1;
  const int steps = ceil_div(context, kStep);  // which the splits take in turn
  const int active = min(split.count, steps);
  const bool busy = alone && static_cast<int>(blockIdx.x) < active;
  const int group = a.heads / a.kv_heads;
  const int chunks = ceil_div(group, G);
  const int kv_head = blockIdx.y / chunks;
  const int place = lane % kLanes * kVector;
  const bool inside = place < a.dim;
  const T* k_cache = static_cast<const T*>(a.k_cache) + place;
  const T* v_cache = static_cast<const T*>(a.v_cache) + place;
  Loaded<T> k[kDepth] = {}, v[kDepth] = {};
  const auto request = [&](int step, int from, int to) {
#pragma unroll
    for (int u = 0; u < kDepth; ++u) {
      const int key = step * kStep + first_key + u * kKeys;
      if (from <= key && key < to && inside) {
        const int64_t offset = cache_offset(a, blocks[u], kv_head, key);
        k[u] = Loaded<T>::from(k_cache + offset);
        v[u] = Loaded<T>::from(v_cache + offset);
      }
    }
  };
  // The keys of earlier steps are there; the newest one comes with the queries.
  if (busy) request(blockIdx.x, 0, context - 1);
  wait_for_predecessor();
  if (!alone) return;
  const int first = blockIdx.y % chunks * G;
  const int head = kv_head * group + first;
  const int queries = min(G, group - first);
  T* out = static_cast<T*>(a.out) + (static_cast<int64_t>(row) * a.heads + head) * a.dim;
  const int dims = queries * a.dim;
  if (context == 0 && blockIdx.x == 0) {
    for (int i = threadIdx.x; i < dims; i += kThreads) out[i] = from_float<T>(0.0f);
  }
  if (!busy) return;

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
  int known = context - 1;  // whose keys are on their way already
  for (int step = blockIdx.x; step < steps; step += split.count) {
    const int base = step * kStep + first_key;
    request(step, known, context);
    known = 0;
    if (step + split.count < steps) look_up(step + split.count);
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
        if (base + u * kKeys >= context) score[u] = -INFINITY;
        highest = fmaxf(highest, score[u]);
      }
      Running<kVector>& run = running[g];
      const float kept = run.raise(highest);
      run.weight *= kept;
#pragma unroll
      for (int j = 0; j < kVector; ++j) run.sum[j] *= kept;
#pragma unroll
      for (int u = 0; u < kDepth; ++u) {
        const float weight = score[u] == -INFINITY ? 0.0f : exp2f(score[u] - run.maximum);
        run.weight += weight;
#pragma unroll
        for (int j = 0; j < kVector; ++j) run.sum[j] += weight * v[u][j];
      }
    }
  }

  // Merge what the lanes of a warp, then the warps, have of each query.
  __shared__ float sums[kWarps][G][kDim];
  __shared__ float maxima[kWarps][G], weights[kWarps][G];
#pragma unroll
  for (int g = 0; g < G; ++g) {
    Running<kVector>& run = running[g];
#pragma unroll
    for (int offset = kLanes; offset < kWarp; offset *= 2) {
      const float other = __shfl_xor_sync(kAllLanes, run.maximum, offset);
      const float theirs = __shfl_xor_sync(kAllLanes, run.weight, offset);
      const float mine = run.raise(other);
      const float factor = run.maximum == -INFINITY ? 0.0f : exp2f(other - run.maximum);
      run.weight = run.weight * mine + theirs * factor;
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        const float value = __shfl_xor_sync(kAllLanes, run.sum[j], offset);
        run.sum[j] = run.sum[j] * mine + value * factor;
      }
    }
    if (lane < kLanes) {
#pragma unroll
      for (int j = 0; j < kVector; ++j) sums[warp][g][place + j] = run.sum[j];
      if (lane == 0) {
        maxima[warp][g] = run.maximum;
        weights[warp][g] = run.weight;
      }
    }
  }
  __syncthreads();

  const int64_t group_index = static_cast<int64_t>(sequence) * gridDim.y + blockIdx.y;
  const int part_size = a.dim + 2;
  float* parts = split.parts + group_index * split.count * G * part_size;
  for (int i = threadIdx.x; i < dims; i += kThreads) {
    const int g = i / a.dim, d = i % a.dim;
    float maximum = maxima[0][g];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) maximum = fmaxf(maximum, maxima[w][g]);
    float sum = 0.0f, weight = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float factor = exp2f(maxima[w][g] - maximum);
      sum += sums[w][g][d] * factor;
      weight += weights[w][g] * factor;
    }
    if (active == 1) {
      out[i] = from_float<T>(sum / weight);
    } else {
      float* part = parts + (blockIdx.x * G + g) * part_size;
      part[d] = sum;
      if (d == 0) {
        part[a.dim] = maximum;
        part[a.dim + 1] = weight;
      }
    }
  }
  if (active == 1 || !last_to_finish(split.counters + group_index, active)) return;

  // Read past L1, which may hold what stood here before.
  __shared__ float part_maxima[kMaxSplits * G], part_weights[kMaxSplits * G];
  for (int i = threadIdx.x; i < active * G; i += kThreads) {
    if (i % G < queries) {
      part_maxima[i] = __ldcg(parts + i * part_size + a.dim);
      part_weights[i] = __ldcg(parts + i * part_size + a.dim + 1);
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < dims; i += kThreads) {
    const int g = i / a.dim, d = i % a.dim;
    float maximum = part_maxima[g];
    for (int p = 1; p < active; ++p) maximum = fmaxf(maximum, part_maxima[p * G + g]);
    float sum = 0.0f, weight = 0.0f;
#pragma unroll 8
    for (int p = 0; p < active; ++p) {
      const float factor = exp2f(part_maxima[p * G + g] - maximum);
      sum += __ldcg(parts + (p * G + g) * part_size + d) * factor;
      weight += part_weights[p * G + g] * factor;
    }
    out[i] = from_float<T>(sum / weight);
  }
}

template <typename T, int kLanes, int G>
void launch(const AttentionArguments& a, const Tensor& workspace, cudaStream_t stream) {
  constexpr int kStep = kWarps * (kWarp / kLanes) * kUnroll<T, G>;
  const int rows = a.kv_heads * ceil_div(a.heads / a.kv_heads, G);
  const int64_t groups = static_cast<int64_t>(a.sequences) * rows;
  const int64_t longest = static_cast<int64_t>(a.max_blocks) * a.block_size;
  const int64_t steps = ceil_div<int64_t>(longest, kStep);
  const int64_t splits =
      std::clamp<int64_t>(std::min<int64_t>(kSplitTarget / groups, steps), 1, kMaxSplits);
  if (splits > 1) {
    const int64_t needed = kSplitTarget + groups * splits * G * (a.dim + 2);
    STD_TORCH_CHECK(workspace.numel() >= needed, "the attention workspace is too small");
  }
  float* words = data<float>(workspace);
  const Split split{static_cast<int>(splits), reinterpret_cast<int*>(words), words + kSplitTarget};
  const dim3 grid(splits, rows, a.sequences);
  launch_chained(decode_kernel<T, kLanes, G>, grid, kThreads, 0, stream, a, split);
}

template <typename T, int kLanes>
void by_group(const AttentionArguments& a, const Tensor& workspace, cudaStream_t stream) {
  if (a.heads == a.kv_heads) {
    launch<T, kLanes, 1>(a, workspace, stream);
  } else {
    launch<T, kLanes, 4>(a, workspace, stream);
  }
}

// Whether these are Hopper's instructions or later ones.
bool has_bulk_copies(const Tensor& tensor) {
  int major = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor,
                                        tensor.get_device_index()));
  return major >= 9;
}

}  // namespace

template <typename T>
void launch_decode(const AttentionArguments& a, const Tensor& workspace, cudaStream_t stream) {
  if (has_bulk_copies(workspace)) return launch_ring_decode<T>(a, stream);
  if (a.dim <= 32) {
    by_group<T, 4>(a, workspace, stream);
  } else if (a.dim <= 64) {
    by_group<T, 8>(a, workspace, stream);
  } else if (a.dim <= 128) {
    by_group<T, 16>(a, workspace, stream);
  } else {
    by_group<T, 32>(a, workspace, stream);
  }
}

template void launch_decode<__half>(const AttentionArguments&, const Tensor&, cudaStream_t);
template void launch_decode<__nv_bfloat16>(const AttentionArguments&, const Tensor&, cudaStream_t);
template void launch_decode<float>(const AttentionArguments&, const Tensor&, cudaStream_t);

}  // namespace llava_engine
