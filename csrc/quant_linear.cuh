// Products of a few rows with a weight matrix of 8 or 4 bits: linear.cu's structure, with the
// weights as the m of an mma and up to 8 rows of x as its n, or twice that. A unit of work is 16
// weight rows; warps divide its inputs among them, 128 at a time.
#pragma once

#include <algorithm>

#include "common.cuh"
#include "linear_epilogues.cuh"
#include "linear_rows.cuh"
#include "quant_layout.cuh"
#include "quant_linear.h"
#include "quant_operands.cuh"
#include "ring.cuh"

namespace llava_engine {
namespace {

#if __CUDA_ARCH__ >= 900
// f(unit, its place among the block's, where the span of x begins that it is multiplied with, and
// where that ends), in the order in which all warps go through them.
template <typename T, typename F>
__device__ void for_units(const QuantProduct<T>& product, F&& f) {
  for (int begin = 0; begin < product.inputs; begin += product.span) {
    const int end = min(begin + product.span, product.inputs);
    int place = 0;
    for (int unit = blockIdx.x; unit < product.units; unit += gridDim.x, ++place) {
      f(unit, place, begin, end);
    }
  }
}

// One warp: asks for piece after piece as slots become free.
template <Format kFormat, int kTiles, typename T, typename Epilogue>
__device__ void fill_ring(const QuantProduct<T>& product, const Epilogue& epilogue,
                          const QuantLayout<kFormat, kTiles>& layout, char* shared,
                          const Barriers& barriers) {
  const int lane = threadIdx.x % kWarp;
  if (kFormat == kNf4 && lane > 0) return;  // a piece is one run of bytes: one lane asks for it
  const uint64_t policy = product.again ? evict_normal() : evict_first();
  Cursor at;
  bool first_round = true;
  for_units(product, [&](int unit, int place, int begin, int end) {
    const uint8_t* from;
    if constexpr (kFormat == kNf4) {
      from = product.weight + unit * unit_bytes(product.inputs);
    } else {
      const Rows pair = epilogue.rows(unit * kUnitPairs + lane % kUnitPairs);
      from = product.weight +
             static_cast<int64_t>(lane < kUnitPairs ? pair.first : pair.second) * product.inputs;
    }
    for (int start = begin; start < end; start += product.piece) {
      const int count = min(product.piece, end - start);
      if (!first_round) barrier_wait(barriers.empty + at.slot, at.phase ^ 1);
      // The lanes leave that loop one by one, but the compiler keeps what is the same in all of
      // them in registers of the warp.
      if constexpr (kFormat != kNf4) __syncwarp();
      char* slot = shared + layout.slot(at.slot);
      uint64_t* full = barriers.full + at.slot;
      if constexpr (kFormat == kNf4) {
        const uint32_t bytes = ceil_div(count, kStep) * kStepBytes;
        const bool head = start == begin;
        const uint32_t code_bytes = head && begin == 0 && place == 0 ? kBlockGroup * 4 : 0;
        barrier_expect(full, bytes + (head ? kHeadBytes : 0) + code_bytes);
        if (code_bytes > 0) {
          bulk_copy(shared + layout.kCode, product.scales, code_bytes, full, policy);
        }
        if (head) bulk_copy(slot, from, kHeadBytes, full, policy);
        bulk_copy(slot + kHeadBytes, from + kHeadBytes + start / kStep * kStepBytes, bytes, full,
                  policy);
      } else {
        if (lane == 0) barrier_expect(full, kUnitRows * count);
        __syncwarp();
        if (lane < kUnitRows) {
          bulk_copy(slot + lane * layout.row_stride, from + start, count, full, policy);
        }
      }
      at.advance(layout.slots);
      if (at.slot == 0) first_round = false;
    }
  });
}

// Another: adds up what the warps have of a unit, always in the same order, and makes results of
// it.
template <Format kFormat, int kTiles, typename T, typename Epilogue>
__device__ void finish_units(const QuantProduct<T>& product, const Epilogue& epilogue,
                             const QuantLayout<kFormat, kTiles>&, char* shared,
                             const Barriers& barriers) {
  using Layout = QuantLayout<kFormat, kTiles>;
  constexpr int kWarps = kConsumers<kTiles>;
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const float4* sums = reinterpret_cast<const float4*>(shared + Layout::kSums) + t * kUnitPairs + g;
  float4* partial = reinterpret_cast<float4*>(shared + Layout::kPartial) + lane;
  const auto token_of = [&](int i) { return i / 2 * 8 + 2 * t + i % 2; };
  wait_for_predecessor();
  int turn = 0;
  for_units(product, [&](int unit, int place, int begin, int end) {
    const int pair = unit * kUnitPairs + g;
    typename Epilogue::Early early[2 * kTiles] = {};
    float scales[2] = {1.0f, 1.0f};
    if (end == product.inputs) {
#pragma unroll
      for (int i = 0; i < 2 * kTiles; ++i) {
        if (token_of(i) < product.tokens) early[i] = epilogue.early(pair, token_of(i));
      }
      if constexpr (kFormat != kNf4) {
        const Rows rows = epilogue.rows(pair);
        constexpr float kUnit = kFormat == kInt8 ? kInt8Step : 1.0f;
        scales[0] = product.scales[rows.first] * kUnit;
        scales[1] = product.scales[rows.second] * kUnit;
      }
    }
    const int at = turn % 2;
    barrier_wait(barriers.summed + at, turn++ / 2 % 2);
    __syncwarp();
    float4 totals[kTiles] = {};
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      if (tile * 8 + 2 * t >= product.tokens) continue;
      float4& total = totals[tile];
#pragma unroll
      for (int warp = 0; warp < kWarps; ++warp) {
        const float4 sum = sums[((at * kWarps + warp) * kTiles + tile) * kWarp];
        total.x += sum.x, total.y += sum.y, total.z += sum.z, total.w += sum.w;
      }
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(barriers.taken + at);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const int token = token_of(2 * tile);
      if (token >= product.tokens) continue;
      float4 total = totals[tile];
      float4* kept = partial + (place * kTiles + tile) * kWarp;
      if (begin > 0) {
        const float4 before = *kept;
        total.x += before.x, total.y += before.y, total.z += before.z, total.w += before.w;
      }
      if (end < product.inputs) {
        *kept = total;
        continue;
      }
      epilogue.finish(pair, token, early[2 * tile], total.x * scales[0], total.z * scales[1]);
      if (token + 1 >= product.tokens) continue;
      epilogue.finish(pair, token + 1, early[2 * tile + 1], total.y * scales[0],
                      total.w * scales[1]);
    }
  });
}
#endif

#if __CUDA_ARCH__ >= 900
// The others.
template <Format kFormat, int kTiles, typename T>
__device__ void multiply_units(const QuantProduct<T>& product,
                               const QuantLayout<kFormat, kTiles>& layout, char* shared,
                               const Barriers& barriers) {
  using Layout = QuantLayout<kFormat, kTiles>;
  constexpr int kWarps = kConsumers<kTiles>;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  T* x = reinterpret_cast<T*>(shared + layout.x);
  const float* code = reinterpret_cast<const float*>(shared + Layout::kCode);
  const Table<kTiles> table;
  const auto fill_table = [&] {
    if constexpr (kFormat == kNf4) table.template fill<T>(shared);
  };
  const bool whole = product.span >= product.inputs;
  if (whole) {
    load_rows<kWarps>(product.x, product.gain, product.eps, product.tokens, product.inputs,
                      layout.x_stride, x, reinterpret_cast<float*>(shared + Layout::kSquares),
                      fill_table);
  } else {
    fill_table();
    wait_for_predecessor();
  }
  const T* x_rows[kTiles];
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    // Lanes without a token read the last one's row: what becomes of it is dropped.
    const int token = min(tile * 8 + g, product.tokens - 1);
    x_rows[tile] = x + token * layout.x_stride + t * 2 * kVector;
  }
  float4* mine = reinterpret_cast<float4*>(shared + Layout::kSums) + warp * kTiles * kWarp +
                 t * kUnitPairs + g;
  Cursor at;
  int turn = 0;     // of the places for sums
  int step = warp;  // of the piece, the next that is this warp's; they take them in turn
  for_units(product, [&](int, int place, int begin, int end) {
    if (!whole && place == 0) {
      if (begin > 0) consumers_sync<kWarps>();  // all are through with the span before
      load_columns<kWarps>(product.x, product.tokens, product.inputs, begin, end - begin,
                           layout.x_stride, x);
    }
    [[maybe_unused]] RowScales block_scales;
    float sums[2][kTiles][4] = {};
    for (int start = begin; start < end; start += product.piece) {
      const int count = min(product.piece, end - start), steps = ceil_div(count, kStep);
      barrier_wait(barriers.full + at.slot, at.phase);
      __syncwarp();
      const char* slot = shared + layout.slot(at.slot);
      if constexpr (kFormat == kNf4) {
        if (start == begin) block_scales.read(slot, g);
      }
      for (; step < steps; step += kWarps) {
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
      step -= steps;
      __syncwarp();
      if (lane == 0) barrier_arrive(barriers.empty + at.slot);
      at.advance(layout.slots);
    }
    if (turn >= 2) {
      barrier_wait(barriers.taken + turn % 2, (turn / 2 - 1) % 2);
      __syncwarp();
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      float4 sum{sums[0][tile][0], sums[0][tile][1], sums[0][tile][2], sums[0][tile][3]};
      if constexpr (kFormat != kNf4) {
        sum.x += sums[1][tile][0], sum.y += sums[1][tile][1];
        sum.z += sums[1][tile][2], sum.w += sums[1][tile][3];
      }
      const int index = turn % 2 * kWarps * kTiles + tile;
      if (tile * 8 + 2 * t < product.tokens) mine[index * kWarp] = sum;
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(barriers.summed + turn % 2);
    ++turn;
  });
}
#endif

template <Format kFormat, int kTiles, typename T, typename Epilogue>
__global__ __launch_bounds__(kThreads<kTiles>, 1) void quant_kernel(QuantProduct<T> product,
                                                                    Epilogue epilogue) {
#if __CUDA_ARCH__ >= 900
  launch_dependents();
  extern __shared__ __align__(128) char shared[];
  constexpr int kWarps = kConsumers<kTiles>;
  const QuantLayout<kFormat, kTiles> layout(product.tokens, product.inputs, product.piece,
                                            product.span,
                                            ceil_div(product.units, static_cast<int>(gridDim.x)));
  const Barriers barriers(shared, layout);
  const int warp = threadIdx.x / kWarp;
  if (threadIdx.x == 0) {
    if (kFormat == kNf4 && shared_address(shared) != kSharedBase) __trap();
    barriers.init(layout.slots, kWarps);
  }
  __syncthreads();
  if (warp == kWarps) {
    fill_ring(product, epilogue, layout, shared, barriers);
  } else if (warp == kWarps + 1) {
    finish_units(product, epilogue, layout, shared, barriers);
  } else {
    multiply_units(product, layout, shared, barriers);
  }
#endif
}

inline int quant_attribute(const Tensor& tensor, cudaDeviceAttr which) {
  int value = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, tensor.get_device_index()));
  return value;
}

// x whole where that leaves a ring of some size, else in as few spans as do, which with a norm it
// may not be; pieces as large as that allows, since every one costs every warp some time. Says
// whether there is room at all.
template <Format kFormat, int kTiles, typename T>
bool plan_ring(QuantProduct<T>& product, int blocks) {
  constexpr int kLeast = 48 << 10, kSmallest = 1024;
  constexpr int kLargest = kTiles == 2 ? 1024 : kFormat == kNf4 ? 4096 : 2048;
  const int inputs = ceil_div(product.inputs, kStep) * kStep;
  const int units = ceil_div(product.units, blocks);
  const auto ring_with = [&](int piece) {
    product.piece = std::min(piece, inputs);
    const QuantLayout<kFormat, kTiles> layout(product.tokens, product.inputs, product.piece,
                                              product.span, units);
    if (layout.slots < 2) return 0;
    return layout.slots == layout.kMostSlots ? kShared : layout.slots * layout.slot_bytes;
  };
  for (int spans = 1;; ++spans) {
    product.span = ceil_div(ceil_div(product.inputs, spans), kStep) * kStep;
    for (int piece = kLargest; piece >= kSmallest; piece /= 2) {
      if (ring_with(piece) >= kLeast) return true;
    }
    if (product.gain != nullptr || product.span == kStep) return ring_with(kSmallest) > 0;
  }
}

template <Format kFormat, int kTiles, typename T, typename Epilogue>
void launch_tiles(const Tensor& x, QuantProduct<T> product, int blocks, const Epilogue& epilogue) {
  const Launch to(x);
  const QuantLayout<kFormat, kTiles> layout(product.tokens, product.inputs, product.piece,
                                            product.span, ceil_div(product.units, blocks));
  const auto kernel = quant_kernel<kFormat, kTiles, T, Epilogue>;
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      layout.bytes()));
  launch_chained(kernel, blocks, kThreads<kTiles>, layout.bytes(), to.stream(), product, epilogue);
}

}  // namespace

template <Format kFormat, typename T, typename F>
void launch_quant(const Tensor& x, QuantProduct<T> product, const F& epilogue_of) {
  const int tokens = product.tokens;
  const int blocks = std::min(quant_attribute(x, cudaDevAttrMultiProcessorCount), product.units);
  int most = 2 * kTileTokens;
  const auto plan = [&](int count) {
    product.tokens = count;
    return count > kTileTokens ? plan_ring<kFormat, 2>(product, blocks)
                               : plan_ring<kFormat, 1>(product, blocks);
  };
  while (!plan(std::min(most, tokens))) {
    most /= 2;
    STD_TORCH_CHECK(most > 0, "rows of ", product.inputs, " inputs are too long");
  }
  const T* x_rows = product.x;
  for (int start = 0; start < tokens; start += most) {
    product.again = start + most < tokens;
    product.x = x_rows + static_cast<int64_t>(start) * product.inputs;
    plan(std::min(most, tokens - start));
    if (product.tokens > kTileTokens) {
      launch_tiles<kFormat, 2>(x, product, blocks, epilogue_of(start));
    } else {
      launch_tiles<kFormat, 1>(x, product, blocks, epilogue_of(start));
    }
  }
}

}  // namespace llava_engine
