// What quant_linear.cu asks of the files that hold a format's kernels each, and how NF4 is packed.
#pragma once

#include "linear_epilogues.cuh"

namespace llava_engine {

// The order of kernels/quant_linear.py.
enum Format { kInt8, kFp8, kNf4, kFormats };

// A unit of work is 16 weight rows, 8 pairs. In NF4 a unit is one run of bytes: for every pair both
// rows' {group scale, next group's, offset, scales that precede the row's in its group}, 4 floats;
// then for every 128 inputs 1024 bytes of indices, in which each lane of a warp has 16 for 64 inputs,
// 8 of a pair's first row and 8 of its second, and 32 of the blocks' scales: 4 for every pair, of
// both rows for 64 inputs and for the next 64.
constexpr float kInt8Step = 7.874015718698502e-3f;  // 1 / 127, as bitsandbytes has it
constexpr int kUnitRows = 16, kUnitPairs = kUnitRows / 2;
constexpr int kBlock = 64;       // weights that share a scale
constexpr int kBlockGroup = 256; // scales that share one
constexpr int kHeadBytes = kUnitRows * 16;
constexpr int kCodeBytes = kUnitRows * kBlock / 2;       // of 64 inputs
constexpr int kStepBytes = 2 * kCodeBytes + 2 * kUnitRows;  // of 128

__host__ __device__ constexpr int64_t unit_bytes(int inputs) {
  return kHeadBytes + static_cast<int64_t>(ceil_div(inputs, 2 * kBlock)) * kStepBytes;
}

// The 16 levels (Dettmers et al. 2023), by selects: tables in memory would be one more to wait for.
__device__ inline float nf4_level(unsigned index) {
  const auto pick = [=](unsigned bit, float low, float high) {
    return (index >> bit & 1) != 0 ? high : low;
  };
  const float quarters[4] = {
      pick(1, pick(0, -1.0f, -0.6961928009986877f),
           pick(0, -0.5250730514526367f, -0.39491748809814453f)),
      pick(1, pick(0, -0.28444138169288635f, -0.18477343022823334f),
           pick(0, -0.09105003625154495f, 0.0f)),
      pick(1, pick(0, 0.07958029955625534f, 0.16093020141124725f),
           pick(0, 0.24611230194568634f, 0.33791524171829224f)),
      pick(1, pick(0, 0.44070982933044434f, 0.5626170039176941f),
           pick(0, 0.7229568362236023f, 1.0f))};
  return pick(3, pick(2, quarters[0], quarters[1]), pick(2, quarters[2], quarters[3]));
}

template <typename T>
struct QuantProduct {
  const T* x;     // [tokens, inputs]
  const T* gain;  // the norm's weight [inputs]; null: x is used as it is
  float eps;
  const uint8_t* weight;  // [outputs, inputs], or packed units
  const float* scales;    // of the rows [outputs]: int8's 127 times; or NF4's of scales [256]
  int tokens, inputs, units;
  bool again;               // the same weights come once more
  int piece, span;          // of inputs: in a slot of the ring; of x in shared memory at a time
};

constexpr int kQuantTokens = 16;  // of one launch

// Launches the kernel on x's device; fills in piece and span.
template <Format kFormat, typename T, typename Epilogue>
void launch_quant(const Tensor& x, QuantProduct<T> product, const Epilogue& epilogue);

#define LLAVA_ENGINE_QUANT_LINEAR(format)                                                        \
  template void launch_quant<format>(const Tensor&, QuantProduct<__half>,                        \
                                     const AddToResidual<__half>&);                              \
  template void launch_quant<format>(const Tensor&, QuantProduct<__half>,                        \
                                     const SiluMul<__half>&);                                    \
  template void launch_quant<format>(const Tensor&, QuantProduct<__half>,                        \
                                     const RotateAndAppend<__half>&);                            \
  template void launch_quant<format>(const Tensor&, QuantProduct<__nv_bfloat16>,                 \
                                     const AddToResidual<__nv_bfloat16>&);                       \
  template void launch_quant<format>(const Tensor&, QuantProduct<__nv_bfloat16>,                 \
                                     const SiluMul<__nv_bfloat16>&);                             \
  template void launch_quant<format>(const Tensor&, QuantProduct<__nv_bfloat16>,                 \
                                     const RotateAndAppend<__nv_bfloat16>&)

}  // namespace llava_engine
