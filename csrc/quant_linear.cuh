// Products of a few rows with a weight matrix of 8 or 4 bits: linear.cu's structure, with the weights
// as the m of an mma and up to 8 rows of x as its n, or twice that. A unit of work is 16 weight rows;
// warps divide its inputs among them, 128 at a time.
#pragma once

#include <cuda_fp8.h>

#include <algorithm>

#include "common.cuh"
#include "linear_epilogues.cuh"
#include "linear_rows.cuh"
#include "mma.cuh"
#include "quant_linear.h"
#include "ring.cuh"

namespace llava_engine {
namespace {

constexpr int kConsumers = 8;  // warps that multiply
constexpr int kConsumerThreads = kConsumers * kWarp;
constexpr int kThreads = kConsumerThreads + kWarp;  // and one that keeps the ring full
constexpr int kGroup = 64;          // inputs of four mma; a block of NF4
constexpr int kStep = 2 * kGroup;   // inputs that a warp takes at once
constexpr int kRowPad = 64;  // bytes: two neighbouring rows, 64 of each, lie in different banks
constexpr int kShared = 226 << 10;  // bytes, of which a kernel takes what it can use
constexpr int kSharedBase = 1024;   // the address of the first of them

// NF4's table has the two levels of every byte of indices, once in every bank. It stands at an address
// of which byte and lane are bits, so that one or two operations find an entry; what else there is in
// shared memory is before and behind it.
template <int kTiles>
struct Table {
  // With 256 bytes an entry, half of them unused, one byte permutation makes an address; for twice as
  // many rows of x there is no room for that.
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
    static_assert(kConsumerThreads == 256);
    const int byte = threadIdx.x;
    const T levels[2] = {from_float<T>(nf4_level(byte >> 4)), from_float<T>(nf4_level(byte & 15))};
    const unsigned both = *reinterpret_cast<const unsigned*>(levels);
    uint4* entry = reinterpret_cast<uint4*>(shared + kBegin + byte * kEntry);
#pragma unroll
    for (int i = 0; i < 8; ++i) entry[(i + byte) % 8] = {both, both, both, both};
  }
};

// Where in shared memory there is what, in bytes: the slots' barriers; sums of squares; NF4's scales;
// what the warps have of a unit, for two units; what there is of all units while x comes in spans; x
// [tokens, span]; and the ring. What fits stands before the table.
template <Format kFormat, int kTiles>
struct QuantLayout {
  static constexpr bool kPacked = kFormat == kNf4;
  static constexpr int kMostSlots = 16;
  static constexpr int kSquares = 2 * kMostSlots * 8, kCode = kSquares + 64;
  static constexpr int kSums = kCode + (kPacked ? kBlockGroup * 4 : 0);
  static constexpr int kPartial = kSums + 2 * kConsumerThreads * kTiles * 16;
  int x_stride;                // in elements of 2 bytes
  int row_stride, slot_bytes;
  int x, low_ring, high_ring;  // of the ring's part before the table and of that behind it
  int low_slots, slots;        // that there are before it, and that there is room for in all

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
    const int end = kPacked ? Table<kTiles>::kEnd : 0, last = slot(slots - 1) + slot_bytes;
    return last > end ? last : end;
  }
};

// Four weights of 8 bits as two registers of two.
template <Format kFormat, typename T>
__device__ inline void widen(unsigned word, unsigned& first, unsigned& second) {
  const auto bits = [](auto two) { return *reinterpret_cast<unsigned*>(&two); };
  if constexpr (kFormat == kInt8 && std::is_same_v<T, __half>) {
    word ^= 0x80808080u;  // 0x64nn is 1024 + nn
    const __half2 offset = __float2half2_rn(1152.0f);
    unsigned made[2] = {__byte_perm(word, 0x64646464u, 0x4140), __byte_perm(word, 0x64646464u, 0x4342)};
    first = bits(__hsub2(*reinterpret_cast<__half2*>(&made[0]), offset));
    second = bits(__hsub2(*reinterpret_cast<__half2*>(&made[1]), offset));
  } else if constexpr (kFormat == kInt8) {
    // 0x43nn is 128 + n of the low 7 bits; with the sign bit alone it is 128 or 256.
    unsigned made[2] = {__byte_perm(word, 0x43434343u, 0x4140), __byte_perm(word, 0x43434343u, 0x4342)};
#pragma unroll
    for (unsigned& two : made) {
      unsigned low = two & 0xff7fff7fu, sign = two & 0xff80ff80u;
      two = bits(__hsub2(*reinterpret_cast<__nv_bfloat162*>(&low),
                         *reinterpret_cast<__nv_bfloat162*>(&sign)));
    }
    first = made[0], second = made[1];
  } else {
    const auto pair = [&](unsigned short two) {
      const __half2 half = __nv_cvt_fp8x2_to_halfraw2(two, __NV_E4M3);
      if constexpr (std::is_same_v<T, __half>) return bits(half);
      const float2 wide = __half22float2(half);
      return bits(__floats2bfloat162_rn(wide.x, wide.y));
    };
    first = pair(word & 0xffff);
    second = pair(word >> 16);
  }
}

#if __CUDA_ARCH__ >= 900
// One warp: asks for piece after piece as slots become free.
template <Format kFormat, int kTiles, typename T, typename Epilogue>
__device__ void fill_ring(const QuantProduct<T>& product, const Epilogue& epilogue,
                          const QuantLayout<kFormat, kTiles>& layout, char* shared, uint64_t* full,
                          uint64_t* empty) {
  const int lane = threadIdx.x % kWarp;
  if (kFormat == kNf4 && lane > 0) return;  // a piece is one run of bytes: one lane asks for it
  const uint64_t policy = product.again ? evict_normal() : evict_first();
  Cursor at;
  bool first_round = true;
  for (int begin = 0; begin < product.inputs; begin += product.span) {
    const int end = min(begin + product.span, product.inputs);
    for (int unit = blockIdx.x; unit < product.units; unit += gridDim.x) {
      const uint8_t* from;
      if constexpr (kFormat == kNf4) {
        from = product.weight + unit * unit_bytes(product.inputs);
      } else {
        const Rows pair = epilogue.rows(unit * kUnitPairs + lane % kUnitPairs);
        from = product.weight + static_cast<int64_t>(lane < kUnitPairs ? pair.first : pair.second) *
                                    product.inputs;
      }
      for (int start = begin; start < end; start += product.piece) {
        if (!first_round) barrier_wait(empty + at.slot, at.phase ^ 1);
        // The lanes leave that loop one by one, but the compiler keeps what is the same in all of them
        // in registers of the warp.
        if constexpr (kFormat != kNf4) __syncwarp();
        const int count = min(product.piece, end - start);
        char* slot = shared + layout.slot(at.slot);
        if constexpr (kFormat == kNf4) {
          const uint32_t bytes = ceil_div(count, kStep) * kStepBytes;
          const bool head = start == begin;
          barrier_expect(full + at.slot, bytes + (head ? kHeadBytes : 0));
          if (head) bulk_copy(slot, from, kHeadBytes, full + at.slot, policy);
          bulk_copy(slot + kHeadBytes, from + kHeadBytes + start / kStep * kStepBytes, bytes,
                    full + at.slot, policy);
        } else {
          if (lane == 0) barrier_expect(full + at.slot, kUnitRows * count);
          __syncwarp();
          if (lane < kUnitRows) {
            bulk_copy(slot + lane * layout.row_stride, from + start, count, full + at.slot, policy);
          }
        }
        at.advance(layout.slots);
        if (at.slot == 0) first_round = false;
      }
    }
  }
}
#endif

// What a lane knows of the two rows whose sums it has: NF4's scales of scales.
struct RowScales {
  float near[2], far[2], offset[2];
  int limit[2];  // blocks from this one on have the far one

  __device__ void read(const char* head, int pair) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float4 row = reinterpret_cast<const float4*>(head)[2 * pair + i];
      near[i] = row.x, far[i] = row.y, offset[i] = row.z;
      limit[i] = kBlockGroup - static_cast<int>(row.w);
    }
  }
  // Rounded as bitsandbytes does.
  __device__ float of_block(const float* code, unsigned index, int row, int block) const {
    return __fadd_rn(__fmul_rn(code[index], block < limit[row] ? near[row] : far[row]), offset[row]);
  }
};

// kGroups times 64 inputs of a unit's rows with x, where lane 4 * g + t has inputs 16 * t to 16 * t +
// 15 of rows g and g + 8 and of token g: an mma pairs inputs by their place in a fragment, so any
// order serves that is the same for both.
template <Format kFormat, int kGroups, typename T, int kTiles>
__device__ inline void multiply_step(float (&sums)[2][kTiles][4], const T* const (&x)[kTiles],
                                     const uint4 (&words)[2][2], const Table<kTiles>& table,
                                     const float (&scales)[2][2]) {
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    uint4 rows[kTiles][2];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        rows[tile][i] = *reinterpret_cast<const uint4*>(x[tile] + group * kGroup + i * kVector);
      }
    }
    float part[kTiles][4] = {};
    unsigned of_row[2][4];  // a row's words
    if constexpr (kFormat == kNf4) {
      const uint4 both = words[group][0];
      of_row[0][0] = both.x, of_row[0][1] = both.y, of_row[1][0] = both.z, of_row[1][1] = both.w;
    } else {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const uint4 four = words[group][row];
        of_row[row][0] = four.x, of_row[row][1] = four.y;
        of_row[row][2] = four.z, of_row[row][3] = four.w;
      }
    }
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      unsigned a[4];
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        if constexpr (kFormat == kNf4) {
          a[row] = table.look_up(of_row[row][m / 2], m % 2 * 2);
          a[row + 2] = table.look_up(of_row[row][m / 2], m % 2 * 2 + 1);
        } else {
          widen<kFormat, T>(of_row[row][m], a[row], a[row + 2]);
        }
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const uint4 four = rows[tile][m / 2];
        auto& to = kFormat == kNf4 ? part[tile] : sums[group][tile];
        multiply(to, a, m % 2 == 0 ? four.x : four.z, m % 2 == 0 ? four.y : four.w, T{});
      }
    }
    if constexpr (kFormat == kNf4) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[0][tile][i] += part[tile][i] * scales[group][i / 2];
      }
    }
  }
}

template <Format kFormat, int kTiles, typename T, typename Epilogue>
__global__ __launch_bounds__(kThreads, 1) void quant_kernel(QuantProduct<T> product,
                                                            Epilogue epilogue) {
#if __CUDA_ARCH__ >= 900
  launch_dependents();
  extern __shared__ __align__(128) char shared[];
  using Layout = QuantLayout<kFormat, kTiles>;
  const Layout layout(product.tokens, product.inputs, product.piece, product.span,
                      ceil_div(product.units, static_cast<int>(gridDim.x)));
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  T* x = reinterpret_cast<T*>(shared + layout.x);
  uint64_t* full = reinterpret_cast<uint64_t*>(shared);
  uint64_t* empty = full + Layout::kMostSlots;
  if (threadIdx.x == 0) {
    if (kFormat == kNf4 && shared_address(shared) != kSharedBase) __trap();
    for (int slot = 0; slot < layout.slots; ++slot) {
      barrier_init(full + slot, 1);
      barrier_init(empty + slot, kConsumers);
    }
    barriers_ready();
  }
  __syncthreads();
  if (warp == kConsumers) {
    fill_ring(product, epilogue, layout, shared, full, empty);
    return;
  }
  float* code = reinterpret_cast<float*>(shared + Layout::kCode);
  const Table<kTiles> table;
  if constexpr (kFormat == kNf4) {
    const float scale = product.scales[threadIdx.x];
    table.template fill<T>(shared);
    code[threadIdx.x] = scale;
  }
  const bool whole = product.span >= product.inputs;
  if (whole) {
    load_rows<kConsumers>(product.x, product.gain, product.eps, product.tokens, product.inputs,
                          layout.x_stride, x, reinterpret_cast<float*>(shared + Layout::kSquares));
  } else {
    wait_for_predecessor();
  }

  const int g = lane / 4, t = lane % 4;
  const T* x_rows[kTiles];
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    // Lanes without a token read the last one's row: what becomes of it is dropped.
    const int token = min(tile * 8 + g, product.tokens - 1);
    x_rows[tile] = x + token * layout.x_stride + t * 2 * kVector;
  }
  float4* sums_of = reinterpret_cast<float4*>(shared + Layout::kSums);
  float4* partial = reinterpret_cast<float4*>(shared + Layout::kPartial);
  Cursor at;
  int turn = 0;     // of two places for sums
  int passed = 0;   // steps, which the warps take in turn
  for (int begin = 0; begin < product.inputs; begin += product.span) {
    const int end = min(begin + product.span, product.inputs);
    if (!whole) {
      load_columns<kConsumers>(product.x, product.tokens, product.inputs, begin, end - begin,
                               layout.x_stride, x);
    }
    int place = 0;  // of the unit among this block's
    for (int unit = blockIdx.x; unit < product.units; unit += gridDim.x, ++turn, ++place) {
      const int pair = unit * kUnitPairs + g;
      const bool finishes = warp == place % kConsumers;
      const auto token_of = [&](int i) { return i / 2 * 8 + 2 * t + i % 2; };
      typename Epilogue::Early early[2 * kTiles] = {};
      float row_scales[2] = {1.0f, 1.0f};
      if (finishes && end == product.inputs) {
#pragma unroll
        for (int i = 0; i < 2 * kTiles; ++i) {
          if (token_of(i) < product.tokens) early[i] = epilogue.early(pair, token_of(i));
        }
        if constexpr (kFormat != kNf4) {
          const Rows rows = epilogue.rows(pair);
          constexpr float kUnit = kFormat == kInt8 ? kInt8Step : 1.0f;
          row_scales[0] = product.scales[rows.first] * kUnit;
          row_scales[1] = product.scales[rows.second] * kUnit;
        }
      }
      [[maybe_unused]] RowScales block_scales;
      float sums[2][kTiles][4] = {};
      for (int start = begin; start < end; start += product.piece) {
        const int count = min(product.piece, end - start);
        const int steps = ceil_div(count, kStep);
        barrier_wait(full + at.slot, at.phase);
        __syncwarp();
        const char* slot = shared + layout.slot(at.slot);
        if constexpr (kFormat == kNf4) {
          if (start == begin) block_scales.read(slot, g);
        }
        for (int step = (warp - passed) & (kConsumers - 1); step < steps; step += kConsumers) {
          const T* rows[kTiles];
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile) {
            rows[tile] = x_rows[tile] + (start - begin) + step * kStep;
          }
          uint4 words[2][2];
          float scales[2][2];
          const auto take = [&](auto count_of) {
            constexpr int kGroups = decltype(count_of)::value;
            if constexpr (kFormat == kNf4) {
              const char* codes = slot + kHeadBytes + step * kStepBytes;
              const unsigned indices =
                  *reinterpret_cast<const unsigned*>(codes + 2 * kCodeBytes + 4 * g);
#pragma unroll
              for (int group = 0; group < kGroups; ++group) {
                words[group][0] =
                    *reinterpret_cast<const uint4*>(codes + group * kCodeBytes + lane * 16);
                const int block = start / kBlock + step * 2 + group;
#pragma unroll
                for (int row = 0; row < 2; ++row) {
                  const unsigned index = indices >> (16 * group + 8 * row) & 255;
                  scales[group][row] = block_scales.of_block(code, index, row, block);
                }
              }
            } else {
              const char* from = slot + g * layout.row_stride + step * kStep + t * 16;
#pragma unroll
              for (int group = 0; group < kGroups; ++group) {
#pragma unroll
                for (int row = 0; row < 2; ++row) {
                  words[group][row] = *reinterpret_cast<const uint4*>(
                      from + row * 8 * layout.row_stride + group * kGroup);
                }
              }
            }
            multiply_step<kFormat, kGroups>(sums, rows, words, table, scales);
          };
          if (count - step * kStep >= kStep) {
            take(std::integral_constant<int, 2>{});
          } else {
            take(std::integral_constant<int, 1>{});
          }
        }
        passed += steps;
        __syncwarp();
        if (lane == 0) barrier_arrive(empty + at.slot);
        at.advance(layout.slots);
      }
      // Two units have their places in turn: who is here twice knows that the finisher of the unit
      // before last has gone on.
      float4* mine = sums_of + turn % 2 * kConsumerThreads * kTiles + t * kUnitPairs + g;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        float4 sum{sums[0][tile][0], sums[0][tile][1], sums[0][tile][2], sums[0][tile][3]};
        if constexpr (kFormat != kNf4) {
          sum.x += sums[1][tile][0], sum.y += sums[1][tile][1];
          sum.z += sums[1][tile][2], sum.w += sums[1][tile][3];
        }
        if (tile * 8 + 2 * t < product.tokens) mine[(warp * kTiles + tile) * kWarp] = sum;
      }
      consumers_sync<kConsumers>();
      if (!finishes) continue;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        if (tile * 8 + 2 * t >= product.tokens) continue;
        float4 sum = mine[tile * kWarp];
#pragma unroll
        for (int w = 1; w < kConsumers; ++w) {
          const float4 other = mine[(w * kTiles + tile) * kWarp];
          sum.x += other.x, sum.y += other.y, sum.z += other.z, sum.w += other.w;
        }
        float4* kept = partial + (place * kTiles + tile) * kWarp + lane;
        if (begin > 0) {
          sum.x += kept->x, sum.y += kept->y, sum.z += kept->z, sum.w += kept->w;
        }
        if (end < product.inputs) {
          *kept = sum;
          continue;
        }
        const int token = token_of(2 * tile);
        epilogue.finish(pair, token, early[2 * tile], sum.x * row_scales[0], sum.z * row_scales[1]);
        if (token + 1 < product.tokens) {
          epilogue.finish(pair, token + 1, early[2 * tile + 1], sum.y * row_scales[0],
                          sum.w * row_scales[1]);
        }
      }
    }
  }
#endif
}

inline int quant_attribute(const Tensor& tensor, cudaDeviceAttr which) {
  int value = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, tensor.get_device_index()));
  return value;
}

// x whole where that leaves a ring of some size, else in as few spans as do; the ring has the rest.
template <Format kFormat, int kTiles, typename T>
QuantLayout<kFormat, kTiles> plan_ring(QuantProduct<T>& product, int blocks) {
  constexpr int kLeast = 48 << 10;
  product.piece = std::min(kTiles == 1 ? 2048 : 1024, ceil_div(product.inputs, kStep) * kStep);
  for (int spans = 1;; ++spans) {
    product.span = ceil_div(ceil_div(product.inputs, spans), kStep) * kStep;
    const QuantLayout<kFormat, kTiles> layout(product.tokens, product.inputs, product.piece,
                                              product.span, ceil_div(product.units, blocks));
    const bool may_divide = product.gain == nullptr && product.span > kStep;
    if (layout.slots >= 2 && (layout.slots * layout.slot_bytes >= kLeast || !may_divide ||
                              layout.slots == layout.kMostSlots)) {
      return layout;
    }
    STD_TORCH_CHECK(may_divide, "rows of ", product.inputs, " inputs are too long for ",
                    product.tokens, " tokens");
  }
}

template <Format kFormat, int kTiles, typename T, typename Epilogue>
void launch_tiles(const Tensor& x, QuantProduct<T> product, const Epilogue& epilogue) {
  const Launch to(x);
  const int blocks = std::min(quant_attribute(x, cudaDevAttrMultiProcessorCount), product.units);
  const auto layout = plan_ring<kFormat, kTiles>(product, blocks);
  const auto kernel = quant_kernel<kFormat, kTiles, T, Epilogue>;
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      layout.bytes()));
  launch_chained(kernel, blocks, kThreads, layout.bytes(), to.stream(), product, epilogue);
}

}  // namespace

template <Format kFormat, typename T, typename Epilogue>
void launch_quant(const Tensor& x, QuantProduct<T> product, const Epilogue& epilogue) {
  if (product.tokens <= 8) return launch_tiles<kFormat, 1>(x, product, epilogue);
  launch_tiles<kFormat, 2>(x, product, epilogue);
}

}  // namespace llava_engine
