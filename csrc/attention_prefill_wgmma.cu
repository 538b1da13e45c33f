// Prefill attention over the paged cache on Hopper's matrix units (FlashAttention-3, Shah et al.
// 2024). A block takes one piece of work after the other: 128 query rows of one head, a warpgroup
// 64 of them. One more warp brings tiles of keys and values through a ring by tensor copies, those
// of the next work while the last is finished. The scores of a tile are multiplied while the values
// of the tile before are, so that one warpgroup's softmax runs under the other's products and its
// own.
#include <algorithm>
#include <string_view>

#include "attention_prefill_ring.cuh"

namespace llava_engine {
namespace {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
// A thread's two rows so far: the highest score and the sum of the weights.
struct Running {
  float maximum[2] = {-INFINITY, -INFINITY}, weight[2] = {};
};

// Makes scores into weights. Returned in `kept`: what earlier weights and outputs are now worth.
__device__ inline void soften(float (&scores)[kKeys / 2], Running& run, float (&kept)[2],
                              float scale) {
  float highest[2] = {run.maximum[0], run.maximum[1]}, shift[2];
#pragma unroll
  for (int i = 0; i < kKeys / 2; ++i) highest[i / 2 % 2] = fmaxf(highest[i / 2 % 2], scores[i]);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    highest[r] = fmaxf(highest[r], __shfl_xor_sync(kAllLanes, highest[r], 1));
    highest[r] = fmaxf(highest[r], __shfl_xor_sync(kAllLanes, highest[r], 2));
    // Key 0 is in the first tile and every row sees it: the maximum is finite from there on.
    kept[r] = power_of_2((run.maximum[r] - highest[r]) * scale);
    run.maximum[r] = highest[r];
    run.weight[r] *= kept[r];
    shift[r] = highest[r] * scale;
  }
#pragma unroll
  for (int i = 0; i < kKeys / 2; ++i) {
    scores[i] = power_of_2(fmaf(scores[i], scale, -shift[i / 2 % 2]));
    run.weight[i / 2 % 2] += scores[i];
  }
}

// A warpgroup: its 64 rows of one work after the other.
template <typename T, int kDim>
__device__ void attend(const AttentionArguments& a, PrefillMemory<kDim>& shared) {
  constexpr int kSteps = kKeys / 16;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, group = warp / 4;
  float scores[kKeys / 2], output[kDim / 2];
  unsigned weights[kSteps][4];
  Cursor at;

  const uint64_t queries = tile_descriptor(shared.queries[group]);
  const auto multiply_queries = [&](int slot) {
    const uint64_t keys = tile_descriptor(shared.slots[slot]);
    products_fence();
    multiply_keys<T, false>(scores, queries, keys);
#pragma unroll
    for (int d = 16; d < kDim; d += 16) {
      const int part = d / kBox, bytes = d % kBox * sizeof(T);
      multiply_keys<T, true>(scores, queries + (part * kBoxBytes + bytes) / 16,
                             keys + (part * kKeys * kSwizzleBytes + bytes) / 16);
    }
    products_commit();
  };
  const auto multiply_weights = [&](int slot) {
    const uint64_t values = values_descriptor(shared.slots[slot], kKeys * kSwizzleBytes);
    products_fence();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      multiply_values<T>(output, weights[step], values + step * 16 * kSwizzleBytes / 16);
    }
    products_commit();
  };

  for (uint32_t phase = 0;; phase ^= 1) {
    barrier_wait(&shared.asked, phase);
    const PrefillWork work = shared.work;
    if (work.rows == 0) return;
    const auto answer = [&] {
      __syncwarp();
      if (lane == 0) barrier_arrive(&shared.answered);
    };
    // The warp's rows of the result.
    const int first = warp * 16;
    T* out = static_cast<T*>(a.out) +
             (static_cast<int64_t>(work.row + first) * a.heads + work.head) * kDim;
    const int64_t out_stride = static_cast<int64_t>(a.heads) * kDim;
    constexpr int kVectors = kDim / kVector;
    if (work.key_tiles == 0 || group * kBox >= work.rows) {
      answer();
      if (work.key_tiles == 0) {
        for (int i = lane; i < min(16, work.rows - first) * kVectors; i += kWarp) {
          const int row = i / kVectors, vector = i % kVectors;
          *reinterpret_cast<uint4*>(out + row * out_stride + vector * kVector) =
              make_uint4(0, 0, 0, 0);
        }
      }
      for (int i = 0; i < 2 * work.key_tiles; ++i) at.advance(kSlots);
      continue;
    }

    // Where the other warpgroup has no rows, this one stands for it too.
    const int shares = work.rows > kBox ? 1 : kGroups;
    const auto release = [&](int slot) {
      __syncwarp();
      if (lane == 0) barrier_arrive(shared.empty + slot, shares);
    };
    // A thread has rows lane / 4 and that + 8 of its warp's 16, and columns 2 * (lane % 4), + 1 of
    // each 8.
    const int lowest = work.position + first;  // what the warp's first row sees
    const int column = lane % 4 * 2;
    const auto mask = [&](int base) {
      if (base + kKeys - 1 <= lowest) return;  // no key is in the future of any row
      const int sees = lowest + lane / 4 - base - column;
#pragma unroll
      for (int i = 0; i < kKeys / 2; ++i) {
        if (i / 4 * 8 + i % 2 > sees + i / 2 % 2 * 8) scores[i] = -INFINITY;
      }
    };
    Running run;
    float kept[2];
    int values = 0;  // the slot whose values are being multiplied
    // The loop's last steps stand at its start: a softmax within one turn would be put behind the
    // wait by the compiler, and no longer run while the values are multiplied.
    const auto finish_values = [&] {
      products_wait<0>();
      settled(output);
#pragma unroll
      for (int i = 0; i < kDim / 2; ++i) output[i] *= kept[i / 2 % 2];
#pragma unroll
      for (int i = 0; i < kKeys / 2; i += 2) {
        unsigned& both = weights[i / 8][i / 2 % 4];
        both = pair<T>(scores[i], scores[i + 1]);
        asm volatile("" : "+r"(both));  // not behind the next fence
      }
    };

#pragma unroll
    for (int i = 0; i < kDim / 2; ++i) output[i] = 0.0f;
    barrier_wait(shared.full + at.slot, at.phase);
    multiply_queries(at.slot);
    products_wait<0>();
    settled(scores);
    release(at.slot);
    if (work.key_tiles == 1) answer();
    at.advance(kSlots);
    mask(0);
    soften(scores, run, kept, a.scale_log2);
    for (int tile = 1; tile < work.key_tiles; ++tile) {
      finish_values();
      if (tile > 1) release(values);
      const int keys = at.slot;
      barrier_wait(shared.full + keys, at.phase);
      multiply_queries(keys);
      at.advance(kSlots);
      values = at.slot;
      barrier_wait(shared.full + values, at.phase);
      multiply_weights(values);
      at.advance(kSlots);
      products_wait<1>();
      settled(scores);
      release(keys);
      if (tile + 1 == work.key_tiles) answer();
      mask(tile * kKeys);
      soften(scores, run, kept, a.scale_log2);
    }
    finish_values();
    if (work.key_tiles > 1) release(values);
    barrier_wait(shared.full + at.slot, at.phase);
    multiply_weights(at.slot);
    products_wait<0>();
    settled(output);
    release(at.slot);
    at.advance(kSlots);

    // Through shared memory, so that whole rows are stored.
    char* const results = shared.results[warp];
    constexpr int kRowBytes = kDim * sizeof(T);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      run.weight[r] += __shfl_xor_sync(kAllLanes, run.weight[r], 1);
      run.weight[r] += __shfl_xor_sync(kAllLanes, run.weight[r], 2);
      const float factor = 1.0f / run.weight[r];
      const int row = lane / 4 + r * 8;
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        // Eight rows' words of one column are spread over all banks.
        const int place = row * kRowBytes + (n ^ lane / 4) * 16 + column * 2;
        *reinterpret_cast<unsigned*>(results + place) =
            pair<T>(output[4 * n + 2 * r] * factor, output[4 * n + 2 * r + 1] * factor);
      }
    }
    __syncwarp();
#pragma unroll
    for (int i = lane; i < 16 * kVectors; i += kWarp) {
      const int row = i / kVectors, vector = i % kVectors;
      if (first + row >= work.rows) break;
      *reinterpret_cast<uint4*>(out + row * out_stride + vector * kVector) =
          *reinterpret_cast<const uint4*>(results + row * kRowBytes + (vector ^ row % 8) * 16);
    }
    __syncwarp();
  }
}
#endif

template <typename T, int kDim, int kRows>
__global__ __launch_bounds__(kThreads, 1) void wgmma_prefill_kernel(
    AttentionArguments a, int* counter, const __grid_constant__ CUtensorMap q_map,
    const __grid_constant__ CUtensorMap k_map, const __grid_constant__ CUtensorMap v_map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) char memory[];
  PrefillMemory<kDim>& shared = *reinterpret_cast<PrefillMemory<kDim>*>(memory);
  const int warp = threadIdx.x / kWarp;
  if (threadIdx.x == 0) {
    tensor_map_prefetch(&q_map);
    tensor_map_prefetch(&k_map);
    tensor_map_prefetch(&v_map);
    barrier_init(&shared.asked, 1);
    barrier_init(&shared.answered, kConsumers);
    barrier_init(&shared.tail, 1);
    for (int slot = 0; slot < kSlots; ++slot) {
      barrier_init(shared.full + slot, 1);
      barrier_init(shared.empty + slot, kConsumers);
    }
    barriers_ready();
  }
  __syncthreads();
  if (warp >= kConsumers) {
    registers_down<56>();
    if (warp == kConsumers) fill_ring<kDim, kRows>(a, shared, counter, q_map, k_map, v_map);
  } else {
    registers_up<224>();
    attend<T, kDim>(a, shared);
  }
#endif
}

template <typename T, int kDim, int kRows>
void launch(const AttentionArguments& a, int* counter, int blocks, cudaStream_t stream) {
  constexpr auto kType = std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                   : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const auto q_map =
      matrix_map(a.q, kType, sizeof(T), a.tokens, a.heads * kDim, a.q_stride * sizeof(T), kBox);
  const int64_t rows = a.blocks * a.kv_heads * a.block_size;
  const auto k_map = matrix_map(a.k_cache, kType, sizeof(T), rows, kDim, kDim * sizeof(T), kBox);
  const auto v_map = matrix_map(a.v_cache, kType, sizeof(T), rows, kDim, kDim * sizeof(T), kBox);
  const auto kernel = wgmma_prefill_kernel<T, kDim, kRows>;
  constexpr int kBytes = sizeof(PrefillMemory<kDim>);
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
  kernel<<<blocks, kThreads, kBytes, stream>>>(a, counter, q_map, k_map, v_map);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// A block for each SM, unless there is less work.
template <typename T, int kDim>
void by_rows(const AttentionArguments& a, const Tensor& workspace, cudaStream_t stream) {
  int* counter = reinterpret_cast<int*>(data<float>(workspace));
  int device = 0, places = 0;
  STD_CUDA_CHECK(cudaGetDevice(&device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&places, cudaDevAttrMultiProcessorCount, device));
  const int64_t halves = static_cast<int64_t>(most_tiles<kBox>(a)) * a.heads;
  if (halves <= places) return launch<T, kDim, kBox>(a, counter, halves, stream);
  constexpr int kRows = kGroups * kBox;
  const int64_t works = static_cast<int64_t>(most_tiles<kRows>(a)) * a.heads;
  launch<T, kDim, kRows>(a, counter, std::min<int64_t>(works, places), stream);
}

// Whether this is the GPU whose instructions these are, and the library has them.
bool has_wgmma() {
  if (std::string_view(LLAVA_ARCHITECTURES).find("90a") == std::string_view::npos) return false;
  int device = 0, major = 0, minor = 0;
  STD_CUDA_CHECK(cudaGetDevice(&device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  return major == 9 && minor == 0;
}

}  // namespace

template <typename T>
bool launch_wgmma_prefill(const AttentionArguments& a, const Tensor& workspace,
                          cudaStream_t stream) {
  // A box of keys is within one block, and rows are counted in 32 bits.
  const bool boxes = a.block_size % kBox == 0 &&
                     a.blocks * a.kv_heads * a.block_size < int64_t{1} << 31 &&
                     a.q_stride >= static_cast<int64_t>(a.heads) * a.dim;
  if (!boxes || !has_wgmma()) return false;
  if (a.dim == 128) {
    by_rows<T, 128>(a, workspace, stream);
  } else if (a.dim == 64) {
    by_rows<T, 64>(a, workspace, stream);
  } else {
    return false;
  }
  return true;
}

template bool launch_wgmma_prefill<__half>(const AttentionArguments&, const Tensor&, cudaStream_t);
template bool launch_wgmma_prefill<__nv_bfloat16>(const AttentionArguments&, const Tensor&,
                                                  cudaStream_t);

}  // namespace llava_engine
