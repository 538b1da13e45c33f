// What a block of the Hopper prefill kernel works on, and the warp that brings it: see
// attention_prefill_wgmma.cu.
#pragma once

#include "attention_prefill.cuh"
#include "attention_wgmma.cuh"

namespace llava_engine {

constexpr int kBox = 64;    // rows and columns of a tensor copy; query rows of a warpgroup
constexpr int kKeys = 128;  // of a tile: two boxes, each within one block of the cache
constexpr int kGroups = 2;  // warpgroups that compute
constexpr int kConsumers = kGroups * 4;               // their warps
constexpr int kThreads = (kGroups + 1) * kWarpgroup;  // and one that copies, of one warp
constexpr int kBoxBytes = kBox * kSwizzleBytes;
constexpr int kSlots = 5;

struct PrefillWork {
  int sequence, head;
  int row, rows;  // the queries, counted over all sequences; no rows: there is no more work
  int position;   // the last key that the first row sees
  int context, key_tiles;
};

// Tiles are 64 columns wide, those of a wider head one behind the other.
template <int kDim>
struct PrefillMemory {
  static constexpr int kParts = kDim / kBox;

  alignas(1024) char queries[kGroups][kParts][kBoxBytes];
  char slots[kSlots][kParts][kKeys / kBox][kBoxBytes];
  char results[kConsumers][16 * kDim * 2];
  PrefillWork work;          // comes with the queries: complete when `asked` is,
  uint64_t asked, answered;  // read when `answered` is
  uint64_t tail, full[kSlots], empty[kSlots];
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
// One warp: finds the work, asks for its queries, and for keys and values in the order in which
// they are used: keys 0, keys 1, values 0, keys 2, values 1, ...
template <int kDim, int kRows>
__device__ void fill_ring(const AttentionArguments& a, PrefillMemory<kDim>& shared, int* counter,
                          const CUtensorMap& q_map, const CUtensorMap& k_map,
                          const CUtensorMap& v_map) {
  constexpr int kParts = PrefillMemory<kDim>::kParts;
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
  const auto tell = [&](const PrefillWork& work) {
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
      return tell(PrefillWork{});
    }
    const int first = query.index * kRows;
    PrefillWork work;
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
#endif

}  // namespace llava_engine
