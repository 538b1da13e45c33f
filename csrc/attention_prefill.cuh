// What the prefill kernels share: which query rows a block has, and the softmax's small steps.
#pragma once

#include "attention.cuh"

namespace llava_engine {

// A block's query rows: number `index` of the tiles of a sequence, whose first row is `start`.
struct QueryTile {
  int sequence;  // -1 behind the last tile: `index` is how many there are
  int index;
  int start, length, context;  // of the sequence
};

// Tile number `wanted`, of kRows rows each, over all sequences of two or more rows, which only the
// device can count. From the last one backwards: a sequence's last tiles see the most keys, and are
// best begun first. A whole warp asks.
template <int kRows>
__device__ inline QueryTile find_tile(const AttentionArguments& a, int wanted) {
  const int lane = threadIdx.x % kWarp;
  int before = 0;
  for (int top = a.sequences - 1; top >= 0; top -= kWarp) {
    // All that may be needed at once: a load that waits for another costs half a microsecond.
    const int sequence = top - lane;
    int start = 0, length = 0, context = 0;
    if (sequence >= 0) {
      start = a.query_start[sequence];
      length = a.query_start[sequence + 1] - start;
      context = a.context_lens[sequence];
    }
    const int tiles = length > 1 ? ceil_div(length, kRows) : 0;
    int through = tiles;
#pragma unroll
    for (int offset = 1; offset < kWarp; offset *= 2) {
      const int other = __shfl_up_sync(kAllLanes, through, offset);
      if (lane >= offset) through += other;
    }
    const unsigned reached = __ballot_sync(kAllLanes, before + through > wanted);
    if (reached != 0) {
      const int holder = __ffs(reached) - 1;
      const int end = __shfl_sync(kAllLanes, before + through, holder);
      const int count = __shfl_sync(kAllLanes, tiles, holder);
      return {top - holder, count - 1 - (wanted - (end - count)),
              __shfl_sync(kAllLanes, start, holder), __shfl_sync(kAllLanes, length, holder),
              __shfl_sync(kAllLanes, context, holder)};
    }
    before += __shfl_sync(kAllLanes, through, kWarp - 1);
  }
  return {-1, before, 0, 0, 0};
}

// At most so many tiles, however the rows are divided among the sequences.
template <int kRows>
int most_tiles(const AttentionArguments& a) {
  const int sequences = a.sequences < a.tokens / 2 ? a.sequences : a.tokens / 2;
  return (a.tokens + sequences * (kRows - 1)) / kRows;
}

template <typename T>
__device__ inline unsigned pair(float low, float high) {
  Pack<T, 2> both{{from_float<T>(low), from_float<T>(high)}};
  return *reinterpret_cast<unsigned*>(&both);
}

// 2^x, flushed to 0 where it is tiny.
__device__ inline float power_of_2(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// The same on Hopper's matrix units; true if it has launched, false if these arguments or this GPU
// are not for it.
template <typename T>
bool launch_wgmma_prefill(const AttentionArguments& arguments, const Tensor& workspace,
                          cudaStream_t stream);

}  // namespace llava_engine
