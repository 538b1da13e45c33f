// matmul.cuh's kernel for a weight of 8 or 4 bits and x of 16: the weight goes from shared memory
// through registers, where it is widened, into the products, which take x from shared memory. For
// prompts, and for steps of more sequences than quant_linear.cuh is for.
//
// A slot of the ring has 128 inputs of 128 weight rows and of a tile of tokens; of the latter as two
// swizzled tiles of 64 inputs, one behind the other. Where there are few tiles, the blocks of a cluster
// divide the inputs of one among them (kSplit of them) instead of taking a tile each (kSplit is 1): then
// the first adds up what they have.
#pragma once

#include "matmul.cuh"
#include "quant_operands.cuh"

namespace llava_engine {
namespace {

template <int kSplit>
constexpr int kBlocks = kSplit > 1 ? kSplit : kCluster;  // of a cluster

// The two NF4 levels of every byte of indices, once in every bank.
struct LevelPairs {
  static constexpr int kEntry = kWarp * 4, kBytes = 256 * kEntry;
  uint32_t lane;  // the address of this lane's bank

  __device__ explicit LevelPairs(const char* table)
      : lane(shared_address(table) + threadIdx.x % kWarp * 4) {}

  // The levels' pair for the `which`-th byte.
  __device__ unsigned look_up(unsigned word, unsigned which) const {
    unsigned both;
    asm("ld.shared.u32 %0, [%1];"
        : "=r"(both)
        : "r"(lane + __byte_perm(word, 0, 0x4440 | which) * kEntry));
    return both;
  }

  template <typename T>
  __device__ static void fill(char* table) {
    constexpr int kParts = kEntry / 16;
    for (int i = threadIdx.x; i < 256 * kParts; i += kMatmulThreads) {
      const int byte = i / kParts;
      const T levels[2] = {from_float<T>(nf4_level(byte >> 4)), from_float<T>(nf4_level(byte & 15))};
      const unsigned both = *reinterpret_cast<const unsigned*>(levels);
      reinterpret_cast<uint4*>(table)[i] = {both, both, both, both};
    }
  }
};

// Of shared memory, in this order: x's slots, the weight's, for NF4 its levels and what its blocks' 8-bit
// scales stand for, barriers.
template <Format kFormat, int kTokens, int kSplit>
struct QuantMatmulMemory {
  static constexpr bool kPacked = kFormat == kNf4;
  static constexpr int kSharers = kSplit > 1 ? 1 : kCluster;  // of the same inputs of tokens
  static constexpr int kShare = kSplit > 1 ? kTokens : TokenTile<kTokens>::kShare;
  static constexpr int kUnits = kTileRows / kUnitRows;
  static constexpr int kWeightBytes = kPacked ? kUnits * kStepBytes : kTileRows * kStep;
  static constexpr int kGroupBytes = kTokens * kSwizzleBytes;  // of x, 64 inputs
  static constexpr int kXBytes = 2 * kGroupBytes;
  static constexpr int kArrivingBytes = kWeightBytes + 2 * kSharers * kShare * kSwizzleBytes;
  static_assert(TokenTile<kTokens>::kPassBytes <= kXBytes);
  static constexpr int kTableBytes = kPacked ? LevelPairs::kBytes + kBlockGroup * 4 : 0;
  static constexpr int kFit = (kMostShared - kTableBytes - 256) / (kXBytes + kWeightBytes);
  static constexpr int kStages = kFit < 8 ? kFit : 8;
  static constexpr int kWeights = kStages * kXBytes;
  static constexpr int kLevels = kWeights + kStages * kWeightBytes;
  static constexpr int kCode = kLevels + (kPacked ? LevelPairs::kBytes : 0);
  static constexpr int kBarriers = kLevels + kTableBytes;
  static constexpr int kBytes = kBarriers + 2 * kStages * 8;
  static constexpr int kSumsBytes = kTokens * kTileRows * 4;  // of a block, in place of the ring
  static_assert((kSplit - 1) * kSumsBytes <= kLevels);
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
// What a block does: items, which its cluster has one after the other; of an item's weight tiles one;
// and of the inputs, in slots, those from begin to end.
template <int kSplit, typename T>
struct Assignment {
  int rank = cluster_rank();
  int first = blockIdx.x / kBlocks<kSplit>, clusters = gridDim.x / kBlocks<kSplit>, items;
  int begin = 0, end;

  __device__ explicit Assignment(const Work<T>& work)
      : items(work.tile_pairs * work.token_tiles), end(ceil_div(work.inputs, kStep)) {
    if constexpr (kSplit > 1) {
      begin = end * rank / kSplit;
      end = end * (rank + 1) / kSplit;
    }
  }
  __device__ int tile(const Work<T>& work, int item) const {
    const int group = item / work.token_tiles;
    return kSplit > 1 ? group : group * kCluster + rank;
  }
};

// The unit of NF4 rows that is the `index`-th of a tile; for those behind the last, whose sums nobody
// uses, the last.
template <typename T>
__device__ inline const uint8_t* unit_of(const Work<T>& work, const uint8_t* packed, int tile,
                                         int index) {
  const int units = (work.result == Result::kSiluMul ? 2 : 1) * work.outputs / kUnitRows;
  return packed + min(tile * (kTileRows / kUnitRows) + index, units - 1) * unit_bytes(work.inputs);
}

// One thread: asks for the tiles of one item after the other, as slots become free.
template <Format kFormat, int kTokens, int kSplit, typename T>
__device__ void fill_quant_tiles(const CUtensorMap* x_map, const CUtensorMap* w_map,
                                 const uint8_t* packed, const Work<T>& work, char* shared,
                                 uint64_t* full, uint64_t* empty) {
  using Memory = QuantMatmulMemory<kFormat, kTokens, kSplit>;
  const Assignment<kSplit, T> mine(work);
  const uint64_t policy = work.token_tiles > 1 ? evict_normal() : evict_first();
  const auto ask_weights = [&](int item, int depth, int slot) {
    const int tile = mine.tile(work, item);
    char* to = shared + Memory::kWeights + slot * Memory::kWeightBytes;
    barrier_expect(full + slot, Memory::kArrivingBytes);
    if constexpr (kFormat == kNf4) {
      for (int i = 0; i < Memory::kUnits; ++i) {
        const uint8_t* unit = unit_of(work, packed, tile, i);
        bulk_copy(to + i * kStepBytes, unit + kHeadBytes + depth * kStepBytes, kStepBytes,
                  full + slot, policy);
      }
    } else {
      tensor_copy_parts(to, w_map, depth * kStep, weight_row(work, tile, 0), full + slot);
    }
  };
  // Weights do not depend on the kernel before: the ring is filled with them while that still runs.
  const int early = min(mine.end - mine.begin, Memory::kStages);
  for (int i = 0; i < early; ++i) ask_weights(mine.first, mine.begin + i, i);
  wait_for_predecessor();
  Cursor at;
  bool first_round = true;
  for (int item = mine.first; item < mine.items; item += mine.clusters) {
    const int place = kSplit > 1 ? 0 : mine.rank * (kTokens - Memory::kShare);
    const int token = item % work.token_tiles * kTokens + place;
    for (int depth = mine.begin; depth < mine.end; ++depth) {
      if (item != mine.first || depth >= mine.begin + early) {
        if (!first_round) barrier_wait(empty + at.slot, at.phase ^ 1);
        ask_weights(item, depth, at.slot);
      }
      char* to = shared + at.slot * Memory::kXBytes + place * kSwizzleBytes;
#pragma unroll
      for (int group = 0; group < 2; ++group) {
        char* half = to + group * Memory::kGroupBytes;
        const int column = depth * kStep + group * kGroup;
        if constexpr (kSplit > 1) {
          tensor_copy(half, x_map, column, token, full + at.slot);
        } else {
          tensor_copy_to_all(half, x_map, column, token, full + at.slot, (1 << kCluster) - 1);
        }
      }
      at.advance(Memory::kStages);
      if (at.slot == 0) first_round = false;
    }
  }
}

// A thread's part of 64 inputs of its warp's 16 rows as the products' a, of 16 after 16. rows: the
// warp's first in a swizzled tile of 128 bytes each.
template <Format kFormat, typename T>
__device__ inline void widen_rows(unsigned (&a)[4][4], const char* rows, int group) {
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int s = 0; s < 4; ++s) {
    const char* from = rows + g * kSwizzleBytes + (((group * 4 + s) ^ g) << 4) + 2 * t;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const unsigned two =
            *reinterpret_cast<const uint16_t*>(from + row * 8 * kSwizzleBytes + i * 8);
        a[s][row + 2 * i] = widen_two<kFormat, T>(two, 0);
      }
    }
  }
}

// A factor of 16-bit numbers in two parts, so that a product is rounded once.
template <typename T>
struct Factor {
  using Two = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
  Two high, low;

  __device__ explicit Factor(float value) {
    const T first = from_float<T>(value), second = from_float<T>(value - to_float(first));
    high.x = high.y = first;
    low.x = low.y = second;
  }
  __device__ unsigned operator*(unsigned both) const {
    const Two two = *reinterpret_cast<const Two*>(&both);
    const Two product = __hfma2(two, high, __hmul2(two, low));
    return *reinterpret_cast<const unsigned*>(&product);
  }
};

// The same of an NF4 unit: its 128 inputs' bytes in the slot, and which blocks of 64 they are.
template <typename T>
__device__ inline void widen_unit(unsigned (&a)[4][4], const char* step, int group, int block,
                                  const RowScales& row_scales, const float* code,
                                  const LevelPairs& levels) {
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const unsigned indices =
      *reinterpret_cast<const unsigned*>(step + 2 * kCodeBytes + 4 * g) >> (16 * group);
  const Factor<T> upper(row_scales.of_block(code, indices & 255, 0, block));
  const Factor<T> lower(row_scales.of_block(code, indices >> 8 & 255, 1, block));
#pragma unroll
  for (int s = 0; s < 4; ++s) {
    // 16 inputs of both rows, as a lane of quant_linear.cuh has them.
    const uint4 words =
        *reinterpret_cast<const uint4*>(step + group * kCodeBytes + (4 * g + s) * 16);
    a[s][0] = upper * levels.look_up(words.x, t);
    a[s][1] = lower * levels.look_up(words.z, t);
    a[s][2] = upper * levels.look_up(words.y, t);
    a[s][3] = lower * levels.look_up(words.w, t);
  }
}

// The sums of a cluster's blocks in the first one. All their threads take part; those that have no
// sums, with null.
template <int kSplit, int kTokens>
__device__ void add_up(float (*sums)[kTokens / 2], char* shared) {
  constexpr int kFours = kTokens / 8;
  const int rank = cluster_rank();
  float4* place = reinterpret_cast<float4*>(shared) + (threadIdx.x - kWarpgroup);
  cluster_barrier();  // all have read what is in their rings
  if (sums != nullptr && rank > 0) {
#pragma unroll
    for (int i = 0; i < kFours; ++i) {
      const float* four = *sums + 4 * i;
      store_at(place + ((rank - 1) * kFours + i) * kMultipliers, 0,
               {four[0], four[1], four[2], four[3]});
    }
  }
  cluster_barrier();
  if (sums == nullptr || rank > 0) return;
#pragma unroll
  for (int i = 0; i < kFours; ++i) {
#pragma unroll
    for (int block = 0; block < kSplit - 1; ++block) {
      const float4 four = place[(block * kFours + i) * kMultipliers];
      float* to = *sums + 4 * i;
      to[0] += four.x, to[1] += four.y, to[2] += four.z, to[3] += four.w;
    }
  }
}

// Two warpgroups: multiply, and make results of the sums.
template <Format kFormat, int kTokens, int kSplit, typename T>
__device__ void multiply_quant_tiles(const uint8_t* packed, const Work<T>& work, char* shared,
                                     uint64_t* full, uint64_t* empty) {
  using Memory = QuantMatmulMemory<kFormat, kTokens, kSplit>;
  const Assignment<kSplit, T> mine(work);
  // The same in all lanes, and known to be: what a product is told must be in uniform registers.
  const int warp = __shfl_sync(kAllLanes, threadIdx.x / kWarp, 0) - kWarpgroup / kWarp;
  const int lane = threadIdx.x % kWarp;
  [[maybe_unused]] const LevelPairs levels(shared + Memory::kLevels);
  [[maybe_unused]] const float* code = reinterpret_cast<const float*>(shared + Memory::kCode);
  // The last slots are not filled again, and nobody waits for their release: it might still be on its
  // way when the other block ends, since the cluster's last barrier does not wait for such arrivals.
  int awaited = ceil_div(mine.items - mine.first, mine.clusters) * (mine.end - mine.begin) -
                Memory::kStages;
  const auto release = [&](int slot) {
    if (awaited-- <= 0 || lane >= Memory::kSharers) return;
    if constexpr (kSplit > 1) {
      barrier_arrive(empty + slot);
    } else {
      barrier_arrive_at(empty + slot, lane);
    }
  };
  Cursor at;
  for (int item = mine.first; item < mine.items; item += mine.clusters) {
    const int tile = mine.tile(work, item);
    const int token = item % work.token_tiles * kTokens;
    [[maybe_unused]] RowScales row_scales;
    if constexpr (kFormat == kNf4) {
      const uint8_t* unit = unit_of(work, packed, tile, warp);
      row_scales.read(reinterpret_cast<const char*>(unit), lane / 4);
    }
    wait_for_predecessor();
    Residual<T, kTokens> residual;
    const bool finishes = kSplit == 1 || mine.rank == 0;
    if (work.result == Result::kAdd && finishes) residual.ask(work, tile, token);
    float sums[kTokens / 2] = {};
    unsigned a[2][4][4];
    int before = 0;
    for (int depth = mine.begin; depth < mine.end; ++depth) {
      const char* x = shared + at.slot * Memory::kXBytes;
      const char* weights = shared + Memory::kWeights + at.slot * Memory::kWeightBytes;
      barrier_wait(full + at.slot, at.phase);
#pragma unroll
      for (int group = 0; group < 2; ++group) {
        if constexpr (kFormat == kNf4) {
          widen_unit<T>(a[group], weights + warp * kStepBytes, group, 2 * depth + group, row_scales,
                        code, levels);
        } else {
          widen_rows<kFormat, T>(a[group], weights + warp * kUnitRows * kSwizzleBytes, group);
        }
        const uint64_t tokens = tile_descriptor(x + group * Memory::kGroupBytes);
        products_fence(a[group]);
#pragma unroll
        for (int s = 0; s < 4; ++s) multiply_registers<T>(sums, a[group][s], tokens + 2 * s);
        products_commit();
        products_wait<1>();  // those with the other registers are done
        if (group == 0 && depth > mine.begin) release(before);
      }
      before = at.slot;
      at.advance(Memory::kStages);
    }
    products_wait<0>();
    if constexpr (kSplit > 1) {
      add_up<kSplit, kTokens>(&sums, shared);
      if (!finishes) return;  // a cluster has one item
    }
    T* pass = reinterpret_cast<T*>(shared + before * Memory::kXBytes);
    finish_tile<kTokens, kFormat == kNf4>(work, tile, token, sums, residual, pass);
    copies_fence();
    multipliers_sync();
    release(before);
  }
}
#endif

template <Format kFormat, typename T, int kTokens, int kSplit>
__global__ __launch_bounds__(kMatmulThreads, 1) void quant_matmul_kernel(
    const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap w_map,
    const uint8_t* packed, const float* code, const __grid_constant__ Work<T> work) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Memory = QuantMatmulMemory<kFormat, kTokens, kSplit>;
  launch_dependents();
  extern __shared__ __align__(1024) char shared[];
  uint64_t* full = reinterpret_cast<uint64_t*>(shared + Memory::kBarriers);
  uint64_t* empty = full + Memory::kStages;
  if (threadIdx.x == 0) {
    tensor_map_prefetch(&x_map);
    if (kFormat != kNf4) tensor_map_prefetch(&w_map);
    for (int slot = 0; slot < Memory::kStages; ++slot) {
      barrier_init(full + slot, 1);
      barrier_init(empty + slot, Memory::kSharers * kMultipliers / kWarp);
    }
    barriers_ready();
  }
  if constexpr (kFormat == kNf4) {
    LevelPairs::fill<T>(shared + Memory::kLevels);
    float* scales = reinterpret_cast<float*>(shared + Memory::kCode);
    if (threadIdx.x < kBlockGroup) scales[threadIdx.x] = code[threadIdx.x];
    __syncthreads();
  }
  cluster_sync();
  if (threadIdx.x < kWarpgroup) {
    registers_down<40>();
    if (threadIdx.x == 0) {
      fill_quant_tiles<kFormat, kTokens, kSplit>(&x_map, &w_map, packed, work, shared, full, empty);
    }
    __syncwarp();
    if constexpr (kSplit > 1) add_up<kSplit, kTokens>(nullptr, shared);
  } else {
    registers_up<232>();
    multiply_quant_tiles<kFormat, kTokens, kSplit>(packed, work, shared, full, empty);
  }
  __syncwarp();
  cluster_sync();  // neither ends before the other is done
#endif
}

}  // namespace
}  // namespace llava_engine
