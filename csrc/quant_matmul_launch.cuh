// Chooses a variant of quant_matmul.cuh's kernel and launches it. For the files that have it for a
// format each.
#pragma once

#include <atomic>

#include "matmul_launch.cuh"
#include "quant_matmul.cuh"

namespace llava_engine {
namespace {

// How many clusters of the kernel run at once on the current device: they have to lie within the groups
// that its processors are divided into, which differ from card to card. Asked for once a device.
template <typename Memory, int kSplit, typename Kernel>
int most_clusters(Kernel kernel, int device) {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];  // 0: not asked for yet
  if (device < kDevices && known[device] > 0) return known[device];
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {kBlocks<kSplit>, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = kBlocks<kSplit>;
  config.blockDim = kMatmulThreads;
  config.dynamicSmemBytes = Memory::kBytes;
  config.attrs = &attribute;
  config.numAttrs = 1;
  int most = 0;
  STD_CUDA_CHECK(cudaOccupancyMaxActiveClusters(&most, kernel, &config));
  if (device < kDevices) known[device] = most;
  return most;
}

// Launches the kernel, divided inputs only if all clusters run at once. Says whether it did.
template <Format kFormat, typename T, int kTokens, int kSplit>
bool launch_quant_matmul(const Tensor& x, const Tensor& weight, const Tensor& scales, Work<T> work,
                         int tiles) {
  using Memory = QuantMatmulMemory<kFormat, kTokens, kSplit>;
  static_assert(Memory::kStages >= 3);
  const Launch to(x);
  const auto kernel = quant_matmul_kernel<kFormat, T, kTokens, kSplit>;
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      Memory::kBytes));
  work.token_tiles = ceil_div(work.tokens, kTokens);
  work.tile_pairs = kSplit > 1 ? tiles : ceil_div(tiles, kCluster);
  int clusters = work.tile_pairs * work.token_tiles;
  if constexpr (kSplit > 1) {
    if (clusters > most_clusters<Memory, kSplit>(kernel, x.get_device_index())) return false;
  } else {
    clusters = std::min(clusters, clusters_of(x));
  }
  const CUtensorMap x_map = rows_map<T>(x, Memory::kShare);
  const CUtensorMap w_map = kFormat == kNf4 ? x_map : weight_map<uint8_t>(weight, work.result);
  launch_clusters(kernel, kBlocks<kSplit>, kBlocks<kSplit> * clusters, kMatmulThreads,
                  Memory::kBytes, to.stream(), x_map, w_map, data<uint8_t>(weight),
                  data<float>(scales), work);
  return true;
}

}  // namespace

template <Format kFormat, typename T>
void run_quant_matmul(const Tensor& x, const Tensor& weight, const Tensor& scales, Work<T> work) {
  using Ours = Widths<32, 64, 104, 152, 208>;
  constexpr int kNarrowest = 96;  // columns that take as long as the weights to arrive
  constexpr int kWidestSplit = 104;  // columns of which there is room for all blocks' sums
  work.tokens = static_cast<int>(x.size(0));
  work.inputs = static_cast<int>(x.size(1));
  if constexpr (kFormat != kNf4) {
    work.weight_scales = data<float>(scales);
    work.scale_unit = kFormat == kInt8 ? kInt8Step : 1.0f;
  } else {
    STD_TORCH_CHECK(work.bias == nullptr, "products with NF4 weights take no bias");
  }
  const int tiles =
      ceil_div(work.outputs, work.result == Result::kSiluMul ? kHalfRows : kTileRows);
  const int pairs = clusters_of(x);
  bool launched = false, tried = tiles > pairs;
  Ours::each([&](auto width) {
    constexpr int kTokens = decltype(width)::value;
    if constexpr (kTokens <= kWidestSplit) {
      if (tried || work.tokens > kTokens) return;
      tried = true;
      launched = launch_quant_matmul<kFormat, T, kTokens, 4>(x, weight, scales, work, tiles) ||
                 launch_quant_matmul<kFormat, T, kTokens, 2>(x, weight, scales, work, tiles);
    }
  });
  if (launched) return;
  Ours::best(work.tokens, ceil_div(tiles, kCluster), pairs, kNarrowest, [&](auto width) {
    launch_quant_matmul<kFormat, T, decltype(width)::value, 1>(x, weight, scales, work, tiles);
  });
}

}  // namespace llava_engine
