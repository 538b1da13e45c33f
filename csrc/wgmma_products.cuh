// wgmma: d (64 x N, float32) += a (64 x 32 bytes) * b (N x 32 bytes)^T, both from swizzled tiles in shared
// memory. An instruction has its width in its name and its sums one by one, hence the macros.
//
// Thread t of the warpgroup holds row t / 32 * 16 + t % 32 / 4 and the one 8 below, of each eight
// columns the two from t % 4 * 2 on: d[4 * j] and d[4 * j + 1] of the upper row, then of the lower.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>
#include <type_traits>

namespace llava_engine {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
// The sums of eight columns after another, by name and by place.
#define NAMES_1 "%0, %1, %2, %3"
#define NAMES_2 NAMES_1 ", %4, %5, %6, %7"
#define NAMES_3 NAMES_2 ", %8, %9, %10, %11"
#define NAMES_4 NAMES_3 ", %12, %13, %14, %15"
#define NAMES_5 NAMES_4 ", %16, %17, %18, %19"
#define NAMES_6 NAMES_5 ", %20, %21, %22, %23"
#define NAMES_7 NAMES_6 ", %24, %25, %26, %27"
#define NAMES_8 NAMES_7 ", %28, %29, %30, %31"
#define NAMES_9 NAMES_8 ", %32, %33, %34, %35"
#define NAMES_10 NAMES_9 ", %36, %37, %38, %39"
#define NAMES_11 NAMES_10 ", %40, %41, %42, %43"
#define NAMES_12 NAMES_11 ", %44, %45, %46, %47"
#define NAMES_13 NAMES_12 ", %48, %49, %50, %51"
#define NAMES_14 NAMES_13 ", %52, %53, %54, %55"
#define NAMES_15 NAMES_14 ", %56, %57, %58, %59"
#define NAMES_16 NAMES_15 ", %60, %61, %62, %63"
#define NAMES_17 NAMES_16 ", %64, %65, %66, %67"
#define NAMES_18 NAMES_17 ", %68, %69, %70, %71"
#define NAMES_19 NAMES_18 ", %72, %73, %74, %75"
#define NAMES_20 NAMES_19 ", %76, %77, %78, %79"
#define NAMES_21 NAMES_20 ", %80, %81, %82, %83"
#define NAMES_22 NAMES_21 ", %84, %85, %86, %87"
#define NAMES_23 NAMES_22 ", %88, %89, %90, %91"
#define NAMES_24 NAMES_23 ", %92, %93, %94, %95"
#define NAMES_25 NAMES_24 ", %96, %97, %98, %99"
#define NAMES_26 NAMES_25 ", %100, %101, %102, %103"
#define NAMES_27 NAMES_26 ", %104, %105, %106, %107"
#define NAMES_28 NAMES_27 ", %108, %109, %110, %111"
#define NAMES_29 NAMES_28 ", %112, %113, %114, %115"
#define NAMES_30 NAMES_29 ", %116, %117, %118, %119"
#define NAMES_31 NAMES_30 ", %120, %121, %122, %123"
#define NAMES_32 NAMES_31 ", %124, %125, %126, %127"
#define FOUR(i) "+f"(d[4 * i]), "+f"(d[4 * i + 1]), "+f"(d[4 * i + 2]), "+f"(d[4 * i + 3])
#define SUMS_1 FOUR(0)
#define SUMS_2 SUMS_1, FOUR(1)
#define SUMS_3 SUMS_2, FOUR(2)
#define SUMS_4 SUMS_3, FOUR(3)
#define SUMS_5 SUMS_4, FOUR(4)
#define SUMS_6 SUMS_5, FOUR(5)
#define SUMS_7 SUMS_6, FOUR(6)
#define SUMS_8 SUMS_7, FOUR(7)
#define SUMS_9 SUMS_8, FOUR(8)
#define SUMS_10 SUMS_9, FOUR(9)
#define SUMS_11 SUMS_10, FOUR(10)
#define SUMS_12 SUMS_11, FOUR(11)
#define SUMS_13 SUMS_12, FOUR(12)
#define SUMS_14 SUMS_13, FOUR(13)
#define SUMS_15 SUMS_14, FOUR(14)
#define SUMS_16 SUMS_15, FOUR(15)
#define SUMS_17 SUMS_16, FOUR(16)
#define SUMS_18 SUMS_17, FOUR(17)
#define SUMS_19 SUMS_18, FOUR(18)
#define SUMS_20 SUMS_19, FOUR(19)
#define SUMS_21 SUMS_20, FOUR(20)
#define SUMS_22 SUMS_21, FOUR(21)
#define SUMS_23 SUMS_22, FOUR(22)
#define SUMS_24 SUMS_23, FOUR(23)
#define SUMS_25 SUMS_24, FOUR(24)
#define SUMS_26 SUMS_25, FOUR(25)
#define SUMS_27 SUMS_26, FOUR(26)
#define SUMS_28 SUMS_27, FOUR(27)
#define SUMS_29 SUMS_28, FOUR(28)
#define SUMS_30 SUMS_29, FOUR(29)
#define SUMS_31 SUMS_30, FOUR(30)
#define SUMS_32 SUMS_31, FOUR(31)

#define MULTIPLY(N, EIGHTHS, A, B, TYPES, TRANSPOSED)                                         \
  asm volatile(                                                                               \
      "{\n"                                                                                   \
      ".reg .pred adds;\n"                                                                    \
      "setp.ne.b32 adds, 1, 0;\n"                                                             \
      "wgmma.mma_async.sync.aligned.m64n" #N TYPES " {" NAMES_##EIGHTHS "}, %" #A ", %" #B     \
      ", adds, 1, 1" TRANSPOSED ";\n"                                                         \
      "}\n"                                                                                   \
      : SUMS_##EIGHTHS                                                                         \
      : "l"(a), "l"(b))

// N columns, which are so many eighths, and the places of a and b, which are descriptors. Asynchronous: see products_wait.
#define MULTIPLY_TILES(N, EIGHTHS, A, B)                                                       \
  template <typename T>                                                                       \
  __device__ inline void multiply_tiles(float (&d)[N / 2], uint64_t a, uint64_t b) {          \
    if constexpr (std::is_same_v<T, __half>) {                                                \
      MULTIPLY(N, EIGHTHS, A, B, "k16.f32.f16.f16", ", 0, 0");                                 \
    } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {                                  \
      MULTIPLY(N, EIGHTHS, A, B, "k16.f32.bf16.bf16", ", 0, 0");                               \
    } else {                                                                                  \
      static_assert(std::is_same_v<T, __nv_fp8_e4m3>);                                        \
      MULTIPLY(N, EIGHTHS, A, B, "k32.f32.e4m3.e4m3", "");                                     \
    }                                                                                         \
  }

MULTIPLY_TILES(128, 16, 64, 65)
MULTIPLY_TILES(144, 18, 72, 73)
MULTIPLY_TILES(152, 19, 76, 77)
MULTIPLY_TILES(160, 20, 80, 81)
MULTIPLY_TILES(168, 21, 84, 85)
MULTIPLY_TILES(176, 22, 88, 89)
MULTIPLY_TILES(192, 24, 96, 97)
MULTIPLY_TILES(200, 25, 100, 101)
MULTIPLY_TILES(208, 26, 104, 105)
MULTIPLY_TILES(216, 27, 108, 109)
MULTIPLY_TILES(224, 28, 112, 113)
MULTIPLY_TILES(232, 29, 116, 117)
MULTIPLY_TILES(240, 30, 120, 121)
MULTIPLY_TILES(256, 32, 128, 129)

#undef MULTIPLY_TILES
#undef MULTIPLY

#define MULTIPLY(N, EIGHTHS, A0, A1, A2, A3, B, TYPES)                                        \
  asm volatile(                                                                               \
      "{\n"                                                                                   \
      ".reg .pred adds;\n"                                                                    \
      "setp.ne.b32 adds, 1, 0;\n"                                                             \
      "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPES " {" NAMES_##EIGHTHS             \
      "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B ", adds, 1, 1, 0;\n"                \
      "}\n"                                                                                   \
      : SUMS_##EIGHTHS                                                                         \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

// The same with a in registers, as m16n8k16 has it in each warp, 16 rows a warp. They may not change
// before the product is done.
#define MULTIPLY_REGISTERS(N, EIGHTHS, A0, A1, A2, A3, B)                                      \
  template <typename T>                                                                       \
  __device__ inline void multiply_registers(float (&d)[N / 2], const unsigned (&a)[4],         \
                                            uint64_t b) {                                     \
    if constexpr (std::is_same_v<T, __half>) {                                                \
      MULTIPLY(N, EIGHTHS, A0, A1, A2, A3, B, "f16.f16");                                      \
    } else {                                                                                  \
      static_assert(std::is_same_v<T, __nv_bfloat16>);                                        \
      MULTIPLY(N, EIGHTHS, A0, A1, A2, A3, B, "bf16.bf16");                                    \
    }                                                                                         \
  }

MULTIPLY_REGISTERS(32, 4, 16, 17, 18, 19, 20)
MULTIPLY_REGISTERS(64, 8, 32, 33, 34, 35, 36)
MULTIPLY_REGISTERS(104, 13, 52, 53, 54, 55, 56)
MULTIPLY_REGISTERS(152, 19, 76, 77, 78, 79, 80)
MULTIPLY_REGISTERS(208, 26, 104, 105, 106, 107, 108)

#undef MULTIPLY_REGISTERS
#undef MULTIPLY
#undef FOUR
#endif

}  // namespace llava_engine
