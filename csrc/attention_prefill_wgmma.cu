// Prefill attention over the paged cache on Hopper's matrix units (FlashAttention-3, Shah et al.
// 2024). A block takes one piece of work after the other: 128 query rows of one head, a warpgroup
// 64 of them. One more warp brings tiles of keys and values through a ring by tensor copies, those
// of the next work while the last is finished. The scores of a tile are multiplied while the values
// of the tile before are, so that one warpgroup's softmax runs under the other's products and its
// own.
#include <algorithm>
#include <string_view>

#include "attention_prefill.cuh"
#include "attention_wgmma.cuh"

namespace llava_engine {
namespace {

constexpr int kBox = 64;    // rows and columns of a tensor copy; query rows of a warpgroup
constexpr int kKeys = 128;  // of a tile: two boxes, each within one block of the cache
constexpr int kGroups = 2;  // warpgroups that compute
constexpr int kConsumers = kGroups * 4;               // their warps
constexpr int kThreads = (kGroups + 1) * kWarpgroup;  // and one that copies, of one warp
constexpr int kBoxBytes = kBox * kSwizzleBytes;
constexpr int kSlots = 5;

struct Work {
  int sequence, head;
  int row, rows;  // the queries, counted over all sequences; no rows: there is no more work
  int position;   // the last key that the first row sees
  int context, key_tiles;
};

// Tiles are 64 columns wide, those of a wider head one behind the other.
template <int kDim>
struct Shared {
  static constexpr int kParts = kDim / kBox;

  alignas(1024) char queries[kGroups][kParts][kBoxBytes];
  char slots[kSlots][kParts][kKeys / kBox][kBoxBytes];
  char results[kConsumers][16 * kDim * 2];
  Work work;                 // comes with the queries: complete when `asked` is,
  uint64_t asked, answered;  // read when `answered` is
  uint64_t tail, full[kSlots], empty[kSlots];
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
// One warp: finds the work, asks for its queries, and for keys and values in the order in which
// they are used: keys 0, keys 1, values 0, keys 2, values 1, ...
template <int kDim, int kRows>
__device__ void fill_ring(const AttentionArguments& a, Shared<kDim>& shared, int* counter,
                          const CUtensorMap& q_map, const CUtensorMap& k_map,
                          const CUtensorMap& v_map) {
  constexpr int kParts = Shared<kDim>::kParts;
  const int lane = threadIdx.x % kWarp;
  if (lane < a.sequences) {  // needed as soon as the first work is known
    const int64_t sequence = a.sequences - 1 - lane;
    asm volatile("prefetch.global.L2 [%0];" ::"l"(a.block_table + sequence * a.max_blocks));
  }
  Cursor at;
  bool first_round = true;
  uint32_t tail_phase = 0;
  const auto ask = [&](const CUtensorMap& map, int valid, int row, int second_row, bool values) {
    // What is behind the context may be no number, and 0 times that is none either: the values
    // there become zero before the consumers are told.
    const bool clear = values && valid < kKeys;
    uint64_t* full = shared.full + at.slot;
    uint64_t* told = clear ? &shared.tail : full;
    if (!first_round) barrier_wait(shared.empty + at.slot, at.phase ^ 1);
    if (lane == 0) {
      const int boxes = valid > kBox ? 2 : 1;
      barrier_expect(told, boxes * kParts * kBoxBytes);
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        tensor_copy(shared.slots[at.slot][part][0], &map, part * kBox, row, told);
        if (boxes == 1) continue;
        tensor_copy(shared.slots[at.slot][part][1], &map, part * kBox, second_row, told);
      }
    }
    __syncwarp();
    if (clear) {
      barrier_wait(told, tail_phase);
      tail_phase ^= 1;
      for (int part = 0; part < kParts; ++part) {
        uint4* vectors = reinterpret_cast<uint4*>(shared.slots[at.slot][part]);
        constexpr int kPerRow = kSwizzleBytes / sizeof(uint4);
        for (int i = valid * kPerRow + lane; i < kKeys * kPerRow; i += kWarp) {
          vectors[i] = make_uint4(0, 0, 0, 0);
        }
      }
      stores_before_products();
      __syncwarp();
      if (lane == 0) barrier_arrive(full);
    }
    at.advance(kSlots);
    if (at.slot == 0) first_round = false;
  };

  uint32_t answers = 1;  // so it counts as answered at first
  const auto tell = [&](const Work& work) {
    barrier_wait(&shared.answered, answers);
    answers ^= 1;
    if (lane != 0) return;
    shared.work = work;
    if (work.key_tiles == 0) return barrier_arrive(&shared.asked);
    const int groups = ceil_div(work.rows, kBox);
    barrier_expect(&shared.asked, groups * kParts * kBoxBytes);
    for (int group = 0; group < groups; ++group) {
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        tensor_copy(shared.queries[group][part], &q_map, work.head * kDim + part * kBox,
                    work.row + group * kBox, &shared.asked);
      }
    }
  };

  int number = blockIdx.x;
  while (true) {
    const QueryTile query = find_tile<kRows>(a, number / a.heads);
    if (query.sequence < 0) {
      // Every work that is done takes one number: was this the last of them?
      const int taken = number - static_cast<int>(gridDim.x);
      if (lane == 0 && taken == query.index * a.heads - 1) *counter = 0;
      return tell(Work{});
    }
    const int first = query.index * kRows;
    Work work;
    work.sequence = query.sequence;
    work.head = number % a.heads;
    work.row = query.start + first;
    work.rows = min(kRows, query.length - first);
    work.position = query.context - query.length + first;
    work.context = query.context;
    work.key_tiles = work.context == 0 ? 0 : ceil_div(work.position + work.rows, kKeys);

    const int32_t* table = a.block_table + static_cast<int64_t>(work.sequence) * a.max_blocks;
    const int kv_head = work.head / (a.heads / a.kv_heads);
    // Each lane finds one of the next 32 boxes: its first row in the cache as a matrix.
    const auto row_of = [&](int box) {
      const int key = box * kBox;
      if (key >= work.context) return 0;
      const int block = block_of(a, key);
      return (table[block] * a.kv_heads + kv_head) * a.block_size + key - block * a.block_size;
    };
    int rows = row_of(lane), row = 0, second_row = 0;
    for (int tile = 0; tile <= work.key_tiles; ++tile) {
      const int box = 2 * tile, valid = work.context - tile * kKeys;
      if (tile > 0 && box % kWarp == 0) rows = row_of(box + lane);
      const int next = __shfl_sync(kAllLanes, rows, box % kWarp);
      const int second_next = __shfl_sync(kAllLanes, rows, box % kWarp + 1);
      if (tile < work.key_tiles) ask(k_map, valid, next, second_next, false);
      // After the first keys, which need not wait until the last work's queries are done with.
      if (tile == 0) tell(work);
      if (tile > 0) ask(v_map, valid + kKeys, row, second_row, true);
      row = next;
      second_row = second_next;
    }
    // Only now, so that a block with much to do takes no more before one with little.
    if (lane == 0) number = gridDim.x + atomicAdd(counter, 1);
    number = __shfl_sync(kAllLanes, number, 0);
  }
}

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
__device__ void attend(const AttentionArguments& a, Shared<kDim>& shared) {
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
    const Work work = shared.work;
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
  Shared<kDim>& shared = *reinterpret_cast<Shared<kDim>*>(memory);
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
  constexpr int kBytes = sizeof(Shared<kDim>);
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
