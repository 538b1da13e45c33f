// Weights of 8 or 4 bits as operands of the tensor cores.
#pragma once

#include <cuda_fp8.h>

#include "common.cuh"
#include "mma.cuh"
#include "quant_layout.cuh"
#include "quant_linear.h"

namespace llava_engine {
namespace {

// Two of a word's four weights of 8 bits, the first or (`which`, a constant) the last, as a register.
template <Format kFormat, typename T>
__device__ inline unsigned widen_two(unsigned word, int which) {
  const auto bits = [](auto two) { return *reinterpret_cast<unsigned*>(&two); };
  const unsigned bytes = which == 0 ? 0x4140 : 0x4342;
  if constexpr (kFormat == kInt8 && std::is_same_v<T, __half>) {
    // 0x64nn is 1024 + nn.
    unsigned made = __byte_perm(word ^ 0x80808080u, 0x64646464u, bytes);
    return bits(__hsub2(*reinterpret_cast<__half2*>(&made), __float2half2_rn(1152.0f)));
  } else if constexpr (kFormat == kInt8) {
    // 0x43nn is 128 + n of the low 7 bits; with the sign bit alone it is 128 or 256.
    const unsigned made = __byte_perm(word, 0x43434343u, bytes);
    unsigned low = made & 0xff7fff7fu, sign = made & 0xff80ff80u;
    return bits(__hsub2(*reinterpret_cast<__nv_bfloat162*>(&low),
                        *reinterpret_cast<__nv_bfloat162*>(&sign)));
  } else {
    const auto two = static_cast<unsigned short>(which == 0 ? word & 0xffff : word >> 16);
    const __half2 half = __nv_cvt_fp8x2_to_halfraw2(two, __NV_E4M3);
    if constexpr (std::is_same_v<T, __half>) return bits(half);
    const float2 wide = __half22float2(half);
    return bits(__floats2bfloat162_rn(wide.x, wide.y));
  }
}

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
    const float group = block < limit[row] ? near[row] : far[row];
    return __fadd_rn(__fmul_rn(code[index], group), offset[row]);
  }
};

// kGroups times 64 inputs of a unit's rows with x, where lane 4 * g + t has inputs 16 * t to 16 * t
// + 15 of rows g and g + 8 and of token g: an mma pairs inputs by their place in a fragment, so any
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
          a[row] = widen_two<kFormat, T>(of_row[row][m], 0);
          a[row + 2] = widen_two<kFormat, T>(of_row[row][m], 1);
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

}  // namespace
}  // namespace llava_engine
