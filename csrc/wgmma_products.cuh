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
// The names of 8 sums after another, as many as sixteen times.
#define NAMES_1 "%0, %1, %2, %3, %4, %5, %6, %7"
#define NAMES_2 NAMES_1 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define NAMES_3 NAMES_2 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define NAMES_4 NAMES_3 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_5 NAMES_4 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define NAMES_6 NAMES_5 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define NAMES_7 NAMES_6 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define NAMES_8 NAMES_7 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define NAMES_9 NAMES_8 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define NAMES_10 NAMES_9 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define NAMES_11 NAMES_10 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define NAMES_12 NAMES_11 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define NAMES_13 NAMES_12 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define NAMES_14 NAMES_13 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define NAMES_15 NAMES_14 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define NAMES_16 NAMES_15 ", %120, %121, %122, %123, %124, %125, %126, %127"
#define EIGHT(i)                                                                               \
  "+f"(d[8 * i]), "+f"(d[8 * i + 1]), "+f"(d[8 * i + 2]), "+f"(d[8 * i + 3]),                  \
      "+f"(d[8 * i + 4]), "+f"(d[8 * i + 5]), "+f"(d[8 * i + 6]), "+f"(d[8 * i + 7])
#define SUMS_1 EIGHT(0)
#define SUMS_2 SUMS_1, EIGHT(1)
#define SUMS_3 SUMS_2, EIGHT(2)
#define SUMS_4 SUMS_3, EIGHT(3)
#define SUMS_5 SUMS_4, EIGHT(4)
#define SUMS_6 SUMS_5, EIGHT(5)
#define SUMS_7 SUMS_6, EIGHT(6)
#define SUMS_8 SUMS_7, EIGHT(7)
#define SUMS_9 SUMS_8, EIGHT(8)
#define SUMS_10 SUMS_9, EIGHT(9)
#define SUMS_11 SUMS_10, EIGHT(10)
#define SUMS_12 SUMS_11, EIGHT(11)
#define SUMS_13 SUMS_12, EIGHT(12)
#define SUMS_14 SUMS_13, EIGHT(13)
#define SUMS_15 SUMS_14, EIGHT(14)
#define SUMS_16 SUMS_15, EIGHT(15)

#define MULTIPLY(N, EIGHTS, A, B, TYPES, TRANSPOSED)                                         \
  asm volatile(                                                                               \
      "{\n"                                                                                   \
      ".reg .pred adds;\n"                                                                    \
      "setp.ne.b32 adds, 1, 0;\n"                                                             \
      "wgmma.mma_async.sync.aligned.m64n" #N TYPES " {" NAMES_##EIGHTS "}, %" #A ", %" #B     \
      ", adds, 1, 1" TRANSPOSED ";\n"                                                         \
      "}\n"                                                                                   \
      : SUMS_##EIGHTS                                                                         \
      : "l"(a), "l"(b))

// a and b are descriptors. Asynchronous: see products_wait.
#define MULTIPLY_TILES(N, EIGHTS, A, B)                                                       \
  template <typename T>                                                                       \
  __device__ inline void multiply_tiles(float (&d)[N / 2], uint64_t a, uint64_t b) {          \
    if constexpr (std::is_same_v<T, __half>) {                                                \
      MULTIPLY(N, EIGHTS, A, B, "k16.f32.f16.f16", ", 0, 0");                                 \
    } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {                                  \
      MULTIPLY(N, EIGHTS, A, B, "k16.f32.bf16.bf16", ", 0, 0");                               \
    } else {                                                                                  \
      static_assert(std::is_same_v<T, __nv_fp8_e4m3>);                                        \
      MULTIPLY(N, EIGHTS, A, B, "k32.f32.e4m3.e4m3", "");                                     \
    }                                                                                         \
  }

MULTIPLY_TILES(128, 8, 64, 65)
MULTIPLY_TILES(144, 9, 72, 73)
MULTIPLY_TILES(160, 10, 80, 81)
MULTIPLY_TILES(176, 11, 88, 89)
MULTIPLY_TILES(192, 12, 96, 97)
MULTIPLY_TILES(208, 13, 104, 105)
MULTIPLY_TILES(224, 14, 112, 113)
MULTIPLY_TILES(240, 15, 120, 121)
MULTIPLY_TILES(256, 16, 128, 129)

#undef MULTIPLY_TILES
#undef MULTIPLY
#undef EIGHT
#endif

}  // namespace llava_engine
