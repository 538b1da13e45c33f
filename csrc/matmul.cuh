// The kernel of matmul.cu: x [tokens, inputs] times weight [outputs, inputs] transposed, on Hopper's
// matrix units, and what becomes of the sums.
//
// A weight tile of 128 rows is the products' M and a tile of kTokens tokens their N, which may be any
// multiple of 8: so the tiles fit the number of tokens, and few places of the last wave stay empty.
// Two blocks make a cluster. Each has its own weight rows and fetches half of the tokens' tile for
// both, to eights. In a block one thread keeps a ring of tiles full, and two warpgroups multiply 64
// weight rows each.
#pragma once

#include "matmul.h"
#include "ring.cuh"
#include "wgmma.cuh"
#include "wgmma_products.cuh"

namespace llava_engine {

constexpr int kHalfRows = kTileRows / 2;
constexpr int kCluster = 2;
constexpr int kMatmulThreads = 3 * kWarpgroup;
constexpr int kMultipliers = 2 * kWarpgroup;  // threads

// How the tokens of a tile are fetched, and how their results leave.
template <int kTokens>
struct TokenTile {
  // Each block's share of the tokens. Where it is not the half the shares overlap by eight tokens,
  // which come twice: a box has one size for both.
  static constexpr int kShare = ceil_div(kTokens, 16) * 8;
  // Results pass through the slot that was multiplied last, half of the tokens at a time. 8 elements
  // more keep the rows of a store apart.
  static constexpr int kPassTokens = ceil_div(kTokens, 32) * 16;
  static constexpr int kPitch = kTileRows + 8;
  static constexpr int kPasses = ceil_div(kTokens, kPassTokens);
  // A token's results lie beside each other: 16 threads have them, a turn a token each.
  static constexpr int kVectors = kTileRows / kVector;
  static constexpr int kAtOnce = kMultipliers / kVectors;
  static constexpr int kTurns = kPassTokens / kAtOnce;  // of a pass
  static constexpr int kPassBytes = kPassTokens * kPitch * 2;
};

constexpr int kMostShared = 227 << 10;  // bytes that a block may have

template <int kTokens>
struct MatmulMemory {
  static constexpr int kShare = TokenTile<kTokens>::kShare;
  static constexpr int kStageBytes = (kTileRows + kTokens) * kSwizzleBytes;
  static constexpr int kArrivingBytes = (kTileRows + kCluster * kShare) * kSwizzleBytes;
  static_assert(TokenTile<kTokens>::kPassBytes <= kStageBytes);
  static constexpr int kStages = (kMostShared - 256) / kStageBytes;
  static constexpr int kBarriers = kStages * kStageBytes;
  static constexpr int kBytes = kBarriers + 2 * kStages * 8;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
__device__ inline void multipliers_sync() { asm volatile("bar.sync 1, 256;" ::: "memory"); }

// The first weight row of a half of a tile.
template <typename Out>
__device__ inline int weight_row(const Work<Out>& work, int tile, int half) {
  if (work.result == Result::kSiluMul) return half * work.outputs + tile * kHalfRows;
  return tile * kTileRows + half * kHalfRows;
}

// One thread: asks for the tiles of one item after the other, as slots become free.
template <typename In, int kTokens, typename Out>
__device__ void fill_tiles(const CUtensorMap* x_map, const CUtensorMap* w_map,
                           const Work<Out>& work, char* ring, uint64_t* full, uint64_t* empty) {
  using Memory = MatmulMemory<kTokens>;
  constexpr int kDepth = kSwizzleBytes / sizeof(In);
  const int rank = cluster_rank(), items = work.tile_pairs * work.token_tiles;
  const int depths = ceil_div(work.inputs, kDepth);
  const int clusters = gridDim.x / kCluster;
  const auto tile_of = [&](int item) { return item / work.token_tiles * kCluster + rank; };
  const auto ask_weights = [&](int item, int depth, int slot) {
    char* to = ring + slot * Memory::kStageBytes;
    barrier_expect(full + slot, Memory::kArrivingBytes);
    tensor_copy_parts(to, w_map, depth * kDepth, weight_row(work, tile_of(item), 0), full + slot);
  };
  // Weights do not depend on the kernel before: the ring is filled with them while that still runs.
  const int first = blockIdx.x / kCluster, early = min(depths, Memory::kStages);
  for (int depth = 0; depth < early; ++depth) ask_weights(first, depth, depth);
  wait_for_predecessor();
  Cursor at;
  bool first_round = true;
  for (int item = first; item < items; item += clusters) {
    const int place = rank * (kTokens - Memory::kShare);
    const int token = item % work.token_tiles * kTokens + place;
    for (int depth = 0; depth < depths; ++depth) {
      if (item != first || depth >= early) {
        if (!first_round) barrier_wait(empty + at.slot, at.phase ^ 1);
        ask_weights(item, depth, at.slot);
      }
      char* to = ring + at.slot * Memory::kStageBytes + (kTileRows + place) * kSwizzleBytes;
      tensor_copy_to_all(to, x_map, depth * kDepth, token, full + at.slot, (1 << kCluster) - 1);
      at.advance(Memory::kStages);
      if (at.slot == 0) first_round = false;
    }
  }
}

// Four 8 x 8 matrices, each transposed: lane i has the address of a row of matrix i / 8.
__device__ inline void store_transposed(void* row, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                   shared_address(row)),
               "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}

template <typename Out>
__device__ inline uint32_t packed(float a, float b) {
  Pack<Out, 2> pack;
  pack.values[0] = from_float<Out>(a);
  pack.values[1] = from_float<Out>(b);
  return *reinterpret_cast<uint32_t*>(&pack);
}

// Where 8 results of a token go, if they are stored or added as they are; null behind the last.
template <typename Out>
__device__ inline Out* place_of(const Work<Out>& work, int tile, int token, int vector) {
  const int column = tile * kTileRows + vector * kVector;
  return column < work.outputs ? work.out + token * work.out_stride + column : nullptr;
}

// What 8 results of a token become; `row` has all results of the token in this tile. kPaired: those
// of the odd rows stand behind those of the even ones.
template <bool kPaired, typename Out>
__device__ inline void store_vector(const Work<Out>& work, int tile, int token, const Out* row,
                                    int vector, const Pack<Out, kVector>& before) {
  Out* to = place_of(work, tile, token, vector);
  if (to == nullptr) return;
  float values[kVector];
  if constexpr (kPaired) {
    const Out* even = row + vector * (kVector / 2);
#pragma unroll
    for (int i = 0; i < kVector; ++i) values[i] = to_float(even[i / 2 + i % 2 * kHalfRows]);
  } else {
    load(row + vector * kVector, values);
  }
  if (work.result == Result::kAdd) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) values[i] += to_float(before.values[i]);
  } else if (work.activation == Activation::kGelu) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      values[i] = values[i] * 0.5f * (1.0f + erff(values[i] * 0.70710678118654752440f));
    }
  } else if (work.activation == Activation::kQuickGelu) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      values[i] = __fdividef(values[i], 1.0f + __expf(-1.702f * values[i]));
    }
  }
  store(to, values);
}

// The same for results that depend on two rows of the weight, kHalfRows apart.
template <typename Out>
__device__ inline void finish_pair(const Work<Out>& work, int tile, int token, const Out* row,
                                   int vector) {
  const int place = vector * kVector;
  float lefts[kVector], rights[kVector];
  load(row + place, lefts);
  load(row + kHalfRows + place, rights);
  if (work.result == Result::kSiluMul) {
    const int column = tile * kHalfRows + place;
    if (column >= work.outputs) return;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      rights[i] *= rounded<Out>(__fdividef(lefts[i], 1.0f + __expf(-lefts[i])));
    }
    store(work.out + token * work.out_stride + column, rights);
    return;
  }
  const int head = tile;
  if (head >= work.q_heads + 2 * work.kv_heads) return;
  const bool is_q = head < work.q_heads, is_v = head >= work.q_heads + work.kv_heads;
  if (!is_v) {
    const float* angles = work.cos_sin + work.positions[token] * kTileRows + place;
    float cosine[kVector], sine[kVector];
    load(angles, cosine);
    load(angles + kHalfRows, sine);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const float left = lefts[i], right = rights[i];
      lefts[i] = left * cosine[i] - right * sine[i];
      rights[i] = right * cosine[i] + left * sine[i];
    }
  }
  if (is_q) {
    Out* to = work.out + token * work.out_stride + head * kTileRows + place;
    store(to, lefts);
    store(to + kHalfRows, rights);
    return;
  }
  const int kv_head = head - work.q_heads - (is_v ? work.kv_heads : 0);
  const int64_t slot = work.slots[token];
  if (slot < 0) return;
  const int64_t cached =
      (slot / work.block_size * work.kv_heads + kv_head) * work.block_size + slot % work.block_size;
  Out* to = (is_v ? work.v_cache : work.k_cache) + cached * kTileRows + place;
  store(to, lefts);
  store(to + kHalfRows, rights);
}

// A thread's part of the residual that a tile is added to.
template <typename Out, int kTokens>
struct Residual {
  using Tile = TokenTile<kTokens>;
  Pack<Out, kVector> packs[Tile::kPasses * Tile::kTurns];

  __device__ void ask(const Work<Out>& work, int tile, int first_token) {
    const int thread = threadIdx.x - kWarpgroup;
#pragma unroll
    for (int turn = 0; turn < Tile::kPasses * Tile::kTurns; ++turn) {
      const int token = first_token + turn * Tile::kAtOnce + thread / Tile::kVectors;
      const Out* from = place_of(work, tile, token, thread % Tile::kVectors);
      if (token < work.tokens && from != nullptr) {
        packs[turn] = *reinterpret_cast<const Pack<Out, kVector>*>(from);
      }
    }
  }
};

// The multipliers: sums of a tile, through shared memory, to where they go. kPaired: of a warp's 16
// rows the last eight belong to the other half of the tile (quant_linear.h has NF4's units).
template <int kTokens, bool kPaired = false, typename Out>
__device__ void finish_tile(const Work<Out>& work, int tile, int first_token,
                            float (&sums)[kTokens / 2], const Residual<Out, kTokens>& before,
                            Out* pass) {
  using Tile = TokenTile<kTokens>;
  constexpr int kTurns = Tile::kTurns, kVectors = Tile::kVectors;
  const int thread = threadIdx.x - kWarpgroup, half = thread / kWarpgroup, lane = thread % kWarp;
  const int warp_row = thread % kWarpgroup / kWarp * 16;  // within the half
  const int first_row = weight_row(work, tile, half) + warp_row + lane / 4;
  if (work.weight_scales != nullptr) {
    // Of rows behind the last nobody reads the sums.
    const int rows = work.result == Result::kSiluMul ? 2 * work.outputs : work.outputs;
    const float upper = work.weight_scales[min(first_row, rows - 1)] * work.scale_unit;
    const float lower = work.weight_scales[min(first_row + 8, rows - 1)] * work.scale_unit;
    const bool scaled = work.x_scales != nullptr;
#pragma unroll
    for (int j = 0; j < kTokens / 8; ++j) {
      const int token = first_token + 8 * j + lane % 4 * 2;
      const float even = scaled ? work.x_scales[min(token, work.tokens - 1)] : 1.0f;
      const float odd = scaled ? work.x_scales[min(token + 1, work.tokens - 1)] : 1.0f;
      sums[4 * j] *= upper * even;
      sums[4 * j + 1] *= upper * odd;
      sums[4 * j + 2] *= lower * even;
      sums[4 * j + 3] *= lower * odd;
    }
  }
  if (work.bias != nullptr) {
    const float upper = to_float(work.bias[min(first_row, work.outputs - 1)]);
    const float lower = to_float(work.bias[min(first_row + 8, work.outputs - 1)]);
#pragma unroll
    for (int j = 0; j < kTokens / 8; ++j) {
      sums[4 * j] += upper;
      sums[4 * j + 1] += upper;
      sums[4 * j + 2] += lower;
      sums[4 * j + 3] += lower;
    }
  }
  // The token and the rows whose place this lane names to store_transposed.
  const bool upper_rows = lane / 8 % 2 == 0;
  const int column = kPaired ? half * (kHalfRows / 2) + warp_row / 2 + (upper_rows ? 0 : kHalfRows)
                             : half * kHalfRows + warp_row + (upper_rows ? 0 : 8);
  Out* mine = pass + (lane / 16 * 8 + lane % 8) * Tile::kPitch + column;
#pragma unroll
  for (int p = 0; p < Tile::kPasses; ++p) {
    const int start = p * Tile::kPassTokens;
    const int there =
        min(min(Tile::kPassTokens, kTokens - start), work.tokens - first_token - start);
    multipliers_sync();  // what was in the slot has been read
#pragma unroll
    for (int t = 0; t < Tile::kPassTokens; t += 16) {
      if (start + t < kTokens) {
        const float* s = sums + (start + t) / 2;
        // The last eight tokens stand alone where kTokens is odd in eights.
        const bool both = start + t + 8 < kTokens;
        store_transposed(mine + t * Tile::kPitch, packed<Out>(s[0], s[1]), packed<Out>(s[2], s[3]),
                         both ? packed<Out>(s[4], s[5]) : 0, both ? packed<Out>(s[6], s[7]) : 0);
      }
    }
    multipliers_sync();
    if (work.result == Result::kStore || work.result == Result::kAdd) {
#pragma unroll
      for (int turn = 0; turn < kTurns; ++turn) {
        const int token = turn * Tile::kAtOnce + thread / kVectors;
        if (token < there) {
          store_vector<kPaired>(work, tile, first_token + start + token,
                                pass + token * Tile::kPitch, thread % kVectors,
                                before.packs[p * kTurns + turn]);
        }
      }
    } else {
      constexpr int kPairs = kVectors / 2;
#pragma unroll
      for (int turn = 0; turn < ceil_div(kTurns, 2); ++turn) {
        const int token = turn * kMultipliers / kPairs + thread / kPairs;
        if (token < there) {
          finish_pair(work, tile, first_token + start + token, pass + token * Tile::kPitch,
                      thread % kPairs);
        }
      }
    }
  }
}
#endif

template <typename In, typename Out, int kTokens>
__global__ __launch_bounds__(kMatmulThreads, 1) void matmul_kernel(
    const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap w_map,
    const __grid_constant__ Work<Out> work) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Memory = MatmulMemory<kTokens>;
  launch_dependents();
  extern __shared__ __align__(1024) char shared[];
  uint64_t* full = reinterpret_cast<uint64_t*>(shared + Memory::kBarriers);
  uint64_t* empty = full + Memory::kStages;
  if (threadIdx.x == 0) {
    tensor_map_prefetch(&x_map);
    tensor_map_prefetch(&w_map);
    for (int slot = 0; slot < Memory::kStages; ++slot) {
      barrier_init(full + slot, 1);
      barrier_init(empty + slot, kCluster * kMultipliers / kWarpgroup);
    }
    barriers_ready();
  }
  cluster_sync();
  if (threadIdx.x < kWarpgroup) {
    registers_down<40>();
    if (threadIdx.x == 0) {
      fill_tiles<In, kTokens>(&x_map, &w_map, work, shared, full, empty);
    }
  } else {
    registers_up<232>();
    // The same in all lanes, and known to be: what a product is told must be in uniform registers.
    const int half = __shfl_sync(kAllLanes, threadIdx.x / kWarpgroup, 0) - 1;
    const int member = threadIdx.x % kWarpgroup;
    const int items = work.tile_pairs * work.token_tiles, clusters = gridDim.x / kCluster;
    const int depths = ceil_div<int>(work.inputs, kSwizzleBytes / sizeof(In));
    // The last slots are not filled again, and nobody waits for their release: it might reach the
    // other block when that has ended.
    int awaited =
        ceil_div<int>(items - blockIdx.x / kCluster, clusters) * depths - Memory::kStages;
    const auto release = [&](int slot) {
      if (awaited-- > 0 && member < kCluster) barrier_arrive_at(empty + slot, member);
    };
    Cursor at;
    for (int item = blockIdx.x / kCluster; item < items; item += clusters) {
      const int tile = item / work.token_tiles * kCluster + cluster_rank();
      const int token = item % work.token_tiles * kTokens;
      wait_for_predecessor();
      Residual<Out, kTokens> residual;
      if (work.result == Result::kAdd) residual.ask(work, tile, token);
      float sums[kTokens / 2] = {};
      int before = 0;
      for (int depth = 0; depth < depths; ++depth) {
        const char* stage = shared + at.slot * Memory::kStageBytes;
        const uint64_t w = tile_descriptor(stage + half * kHalfRows * kSwizzleBytes);
        const uint64_t x = tile_descriptor(stage + kTileRows * kSwizzleBytes);
        barrier_wait(full + at.slot, at.phase);
        products_fence();
#pragma unroll
        for (int k = 0; k < 4; ++k) multiply_tiles<In>(sums, w + 2 * k, x + 2 * k);
        products_commit();
        products_wait<1>();
        if (depth > 0) release(before);
        before = at.slot;
        at.advance(Memory::kStages);
      }
      products_wait<0>();
      Out* pass = reinterpret_cast<Out*>(shared + before * Memory::kStageBytes);
      finish_tile<kTokens>(work, tile, token, sums, residual, pass);
      copies_fence();
      multipliers_sync();
      release(before);
    }
  }
  __syncwarp();
  cluster_sync();  // neither ends before the other is done
#endif
}

}  // namespace llava_engine
