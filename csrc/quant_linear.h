// What quant_linear.cu asks of the files that hold a format's kernels each, and how NF4 is packed.
#pragma once

#include "linear_epilogues.cuh"

namespace llava_engine {

enum Format { kInt8, kFp8, kNf4 };

// f(format) with the format, which the weight's type says, as a constant.
template <typename F>
void by_format(const Tensor& weight, F&& f) {
  switch (weight.scalar_type()) {
    case ScalarType::Char:
      return f(std::integral_constant<Format, kInt8>{});
    case ScalarType::Float8_e4m3fn:
      return f(std::integral_constant<Format, kFp8>{});
    case ScalarType::Byte:
      return f(std::integral_constant<Format, kNf4>{});
    default:
      STD_TORCH_CHECK(false, "quantised weights are int8, float8_e4m3fn or packed in uint8");
  }
}

// A unit of work is 16 weight rows, 8 pairs. In NF4 a unit is one run of bytes: for every pair both
// rows' {group scale, next group's, offset, scales that precede the row's in its group}, 4 floats;
// then for every 128 inputs 1024 bytes of indices, in which each lane of a warp has 16 for 64
// inputs, 8 of a pair's first row and 8 of its second, and 32 of the blocks' scales: 4 for every
// pair, of both rows for 64 inputs and for the next 64.
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
  bool again = false;  // the same weights come once more
  // What a launch chooses, of inputs: in a slot of the ring; of x in shared memory at a time.
  int piece = 0, span = 0;
};

constexpr int kTileTokens = 8;  // the n of an mma, of which a launch has up to two

// The epilogue for the rows of x from a given one on.
template <typename T>
struct AddToResidualRows {
  T* residual;
  int outputs;
  AddToResidual<T> operator()(int start) const {
    return {residual + static_cast<int64_t>(start) * outputs, outputs};
  }
};

template <typename T>
struct SiluMulRows {
  T* out;
  int wide;
  SiluMul<T> operator()(int start) const {
    return {out + static_cast<int64_t>(start) * wide, wide};
  }
};

template <typename T>
struct RotateAndAppendRows {
  RotateAndAppend<T> first;
  RotateAndAppend<T> operator()(int start) const {
    RotateAndAppend<T> made = first;
    made.q += static_cast<int64_t>(start) * first.q_heads * 2 * first.half;
    made.positions += start;
    made.slots += start;
    return made;
  }
};

// Launches kernels on x's device, each for as many rows as there is room for.
template <Format kFormat, typename T, typename F>
void launch_quant(const Tensor& x, QuantProduct<T> product, const F& epilogue_of);

#define LLAVA_ENGINE_QUANT_LINEAR_OF(format, type)                             \
  template void launch_quant<format>(const Tensor&, QuantProduct<type>,        \
                                     const AddToResidualRows<type>&);          \
  template void launch_quant<format>(const Tensor&, QuantProduct<type>,        \
                                     const SiluMulRows<type>&);                \
  template void launch_quant<format>(const Tensor&, QuantProduct<type>,        \
                                     const RotateAndAppendRows<type>&)
#define LLAVA_ENGINE_QUANT_LINEAR(format)         \
  LLAVA_ENGINE_QUANT_LINEAR_OF(format, __half);   \
  LLAVA_ENGINE_QUANT_LINEAR_OF(format, __nv_bfloat16)

}  // namespace llava_engine
