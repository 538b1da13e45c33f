// Shared memory of the products with weights of 8 or 4 bits.
#pragma once

#include "common.cuh"
#include "quant_linear.h"
#include "ring.cuh"

namespace llava_engine {
namespace {

// Warps that multiply; with more of them registers are too few for as many sums. One more keeps the
// ring full, and one makes results of their sums, which takes as long as a share of a unit.
template <int kTiles>
constexpr int kConsumers = kTiles == 1 ? 12 : 8;
template <int kTiles>
constexpr int kThreads = (kConsumers<kTiles> + 2) * kWarp;
constexpr int kGroup = 64;          // inputs of four mma; a block of NF4
constexpr int kStep = 2 * kGroup;   // inputs that a warp takes at once
constexpr int kRowPad = 64;  // bytes: two neighbouring rows, 64 of each, lie in different banks
constexpr int kShared = 227 << 10;  // bytes: all that a block may have
constexpr int kSharedBase = 1024;   // the address of the first of them

// NF4's table has the two levels of every byte of indices, once in every bank. It stands at an
// address of which byte and lane are bits, so that one or two operations find an entry; what else
// there is in shared memory is before and behind it.
template <int kTiles>
struct Table {
  // With 256 bytes an entry, half of them unused, one byte permutation makes an address; for twice
  // as many rows of x there is no room for that.
  static constexpr int kEntry = kTiles == 1 ? 256 : 128;
  static constexpr unsigned kAddress = 256 * kEntry;
  static constexpr int kBegin = kAddress - kSharedBase, kEnd = kBegin + 256 * kEntry;
  unsigned column = kAddress | threadIdx.x % kWarp * 4;

  // The levels' pair for the `which`-th byte.
  __device__ unsigned look_up(unsigned word, int which) const {
    unsigned at;
    if constexpr (kEntry == 256) {
      at = __byte_perm(word, column, 0x7604 | which << 4);
    } else {
      at = (which == 0 ? word << 7 : word >> (8 * which - 7)) & 255 * kEntry | column;
    }
    unsigned both;
    asm("ld.shared.u32 %0, [%1];" : "=r"(both) : "r"(at));
    return both;
  }

  template <typename T>
  __device__ static void fill(char* shared) {
    const int byte = threadIdx.x;
    if (byte >= 256) return;
    const T levels[2] = {from_float<T>(nf4_level(byte >> 4)), from_float<T>(nf4_level(byte & 15))};
    const unsigned both = *reinterpret_cast<const unsigned*>(levels);
    uint4* entry = reinterpret_cast<uint4*>(shared + kBegin + byte * kEntry);
#pragma unroll
    for (int i = 0; i < 8; ++i) entry[(i + byte) % 8] = {both, both, both, both};
  }
};

// Where in shared memory there is what, in bytes: barriers; sums of squares; NF4's scales; what the
// warps have of a unit, for two units; what there is of all units while x comes in spans; x
// [tokens, span]; and the ring. What fits stands before the table.
template <Format kFormat, int kTiles>
struct QuantLayout {
  static constexpr bool kPacked = kFormat == kNf4;
  static constexpr int kMostSlots = 16;
  static constexpr int kSummed = 2 * kMostSlots * 8, kSquares = kSummed + 2 * 2 * 8;
  static constexpr int kCode = kSquares + 64;
  static constexpr int kSums = kCode + (kPacked ? kBlockGroup * 4 : 0);
  static constexpr int kPartial = kSums + 2 * kConsumers<kTiles> * kWarp * kTiles * 16;
  int x_stride;                // in elements of 2 bytes
  int row_stride, slot_bytes;
  int x, low_ring, high_ring;  // of the ring's part before the table and of that behind it
  int low_slots, slots;        // that there are before it, and that there is room for in all
  int least;                   // bytes up to the end of the table, and of x where that is behind it

  __host__ __device__ QuantLayout(int tokens, int inputs, int piece, int span, int units) {
    // 16 bytes more than a multiple of 128: the 8 lanes of a phase have 4 times 16 of two rows.
    x_stride = ceil_div(span, 64) * 64 + 8;
    row_stride = ceil_div(piece, 128) * 128 + kRowPad;
    slot_bytes = kPacked ? kHeadBytes + piece / kStep * kStepBytes : kUnitRows * row_stride;
    const int low_end = kPacked ? Table<kTiles>::kBegin : kShared;
    const int x_bytes = ceil_div(tokens * x_stride * 2, 128) * 128;
    int low = kPartial + (span < inputs ? units * kTiles * kWarp * 16 : 0);
    low = ceil_div(low, 128) * 128;
    int high = kPacked ? Table<kTiles>::kEnd : kShared;
    x = low + x_bytes <= low_end ? low : high;
    (x == low ? low : high) += x_bytes;
    least = kPacked ? high : 0;
    low_ring = low;
    low_slots = low_end > low ? (low_end - low) / slot_bytes : 0;
    high_ring = high - low_slots * slot_bytes;
    slots = low_slots + (kShared > high ? (kShared - high) / slot_bytes : 0);
    if (high > kShared || low > low_end) slots = 0;
    if (slots > kMostSlots) slots = kMostSlots;
  }

  __host__ __device__ int slot(int index) const {
    return (index < low_slots ? low_ring : high_ring) + index * slot_bytes;
  }
  __host__ __device__ int bytes() const {
    const int last = slot(slots - 1) + slot_bytes;
    return last > least ? last : least;
  }
};

#if __CUDA_ARCH__ >= 900
// A block's barriers: of the ring's slots; of the two places that units have in turn for what the
// warps have of them, whether all have left theirs, and whether it has been used.
struct Barriers {
  uint64_t *full, *empty, *summed, *taken;

  template <typename Layout>
  __device__ Barriers(char* shared, const Layout&)
      : full(reinterpret_cast<uint64_t*>(shared)),
        empty(full + Layout::kMostSlots),
        summed(empty + Layout::kMostSlots),
        taken(summed + 2) {}

  __device__ void init(int slots, int consumers) const {
    for (int slot = 0; slot < slots; ++slot) {
      barrier_init(full + slot, 1);
      barrier_init(empty + slot, consumers);
    }
    for (int place = 0; place < 2; ++place) {
      barrier_init(summed + place, consumers);
      barrier_init(taken + place, 1);
    }
    barriers_ready();
  }
};
#endif

}  // namespace
}  // namespace llava_engine
