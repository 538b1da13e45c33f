// Chooses a tile for matmul.cuh's kernel and launches it. For the files that have it for a type each.
#pragma once

#include <algorithm>

#include "matmul.cuh"

namespace llava_engine {
namespace {

template <int kTokens>
using Width = std::integral_constant<int, kTokens>;

template <typename In>
constexpr CUtensorMapDataType kMapType = std::is_same_v<In, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                         : std::is_same_v<In, __nv_bfloat16>
                                             ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                             : CU_TENSOR_MAP_DATA_TYPE_UINT8;

template <typename In>
CUtensorMap rows_map(const Tensor& x, int box_rows) {
  return matrix_map(x.data_ptr(), kMapType<In>, sizeof(In), x.size(0), x.size(1),
                    x.stride(0) * sizeof(In), box_rows);
}

// A tile of the weight at a time: neighbouring rows, or as many of the gate's as of up's.
template <typename In>
CUtensorMap weight_map(const Tensor& weight, Result result) {
  const int parts = result == Result::kSiluMul ? 2 : 1;
  return parts_map(weight.data_ptr(), kMapType<In>, sizeof(In), parts, weight.size(0) / parts,
                   weight.size(1), weight.stride(0) * sizeof(In), kTileRows / parts);
}

template <typename In, typename Out, int kTokens>
void launch(const Tensor& x, const Tensor& weight, Work<Out> work, int clusters) {
  using Memory = MatmulMemory<kTokens>;
  static_assert(Memory::kStages >= 3);
  const Launch to(x);
  const auto kernel = matmul_kernel<In, Out, kTokens>;
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      Memory::kBytes));
  work.token_tiles = ceil_div(work.tokens, kTokens);
  const int blocks = kCluster * std::min(clusters, work.tile_pairs * work.token_tiles);
  launch_clusters(kernel, kCluster, blocks, kMatmulThreads, Memory::kBytes, to.stream(),
                  rows_map<In>(x, Memory::kShare), weight_map<In>(weight, work.result), work);
}

// Widths of a tile that there is a kernel for.
template <int... kWidths>
struct Widths {
  // f(width) for each.
  template <typename F>
  static void each(F&& f) {
    (f(Width<kWidths>{}), ...);
  }

  // f(the width with which the fewest columns are multiplied, one wave of clusters after the other).
  // narrowest: a tile of fewer columns takes no less time.
  template <typename F>
  static void best(int tokens, int tile_pairs, int clusters, int narrowest, F&& f) {
    constexpr int kTileCost = 24;  // what a tile takes besides, in columns
    int best = 0, least = INT32_MAX;
    each([&](auto width) {
      const int waves = ceil_div(tile_pairs * ceil_div<int>(tokens, width.value), clusters);
      const int cost = waves * (std::max<int>(width.value, narrowest) + kTileCost);
      if (cost < least || (cost == least && width.value > narrowest)) {
        least = cost;
        best = width.value;
      }
    });
    each([&](auto width) {
      if (width.value == best) f(width);
    });
  }
};

// Pairs of blocks that run at once.
inline int clusters_of(const Tensor& x) {
  int processors = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount,
                                        x.get_device_index()));
  return processors / kCluster;
}

}  // namespace

template <typename In, typename Out>
void run_matmul(const Tensor& x, const Tensor& weight, Work<Out> work) {
  // Prompts with a picture of 576 tokens are three or four tiles, so there the widths lie close.
  using Ours = Widths<128, 144, 152, 160, 168, 176, 192, 200, 208, 216, 224, 232, 240, 256>;
  const int rows = work.result == Result::kSiluMul ? kHalfRows : kTileRows;
  work.tokens = static_cast<int>(x.size(0));
  work.inputs = static_cast<int>(x.size(1));
  work.tile_pairs = ceil_div(work.outputs, rows * kCluster);
  const int clusters = clusters_of(x);
  Ours::best(work.tokens, work.tile_pairs, clusters, 0, [&](auto width) {
    launch<In, Out, width.value>(x, weight, work, clusters);
  });
}

}  // namespace llava_engine
