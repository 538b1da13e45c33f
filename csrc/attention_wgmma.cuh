// The products of attention on Hopper's matrix units: scores = queries * keys^T from two tiles in
// shared memory, output += weights * values with the weights in registers and the values' tile read
// across. PTX ISA 8.0, "wgmma.mma_async".
//
// Thread t of a warpgroup holds row t / 32 * 16 + t % 32 / 4 and the one 8 below, of each eight
// columns the two from t % 4 * 2 on: sums[4 * j] and [4 * j + 1] of the upper row, [4 * j + 2] and
// [4 * j + 3] of the lower. The weights of 16 keys are four pairs: upper and lower row of the first
// eight, then of the last.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "wgmma.cuh"

namespace llava_engine {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
// A tile [keys, 64 columns] of values, as a factor whose columns are contiguous (MN-major):
// `leading` bytes from 64 columns to the next 64, 1024 from 8 keys to the next.
__device__ inline uint64_t values_descriptor(const void* tile, uint32_t leading) {
  uint64_t descriptor = (shared_address(tile) & 0x3ffff) >> 4;
  descriptor |= uint64_t{leading >> 4} << 16;
  descriptor |= uint64_t{1024 >> 4} << 32;
  descriptor |= uint64_t{1} << 62;  // 128-byte swizzle
  return descriptor;
}

// Behind products_wait: the compiler does not know that sums change until then.
template <int kCount>
__device__ inline void settled(float (&sums)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

// What was written here by ordinary stores is for copies and products to see.
__device__ inline void stores_before_products() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

#define NAMES_32                                                           \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_64                                                                     \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FOUR(i) "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3])
#define SUMS_16(i) FOUR(i), FOUR(i + 4), FOUR(i + 8), FOUR(i + 12)
#define SUMS_32 SUMS_16(0), SUMS_16(16)
#define SUMS_64 SUMS_32, SUMS_16(32), SUMS_16(48)

// 64 queries by 128 keys, over 16 dimensions; kAdd: on top of what is in `sums`.
#define SCORES(TYPE)                                                                      \
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " {" NAMES_64 \
               "}, "                                                                      \
               "%64, %65, %66, 1, 1, 0, 0;\n"                                             \
               : SUMS_64                                                                  \
               : "l"(queries), "l"(keys), "n"(kAdd))

template <typename T, bool kAdd>
__device__ inline void multiply_keys(float (&sums)[64], uint64_t queries, uint64_t keys) {
  if constexpr (std::is_same_v<T, __half>) {
    SCORES("f16");
  } else {
    SCORES("bf16");
  }
}

// 64 rows by N dimensions, over 16 keys; adds.
#define OUTPUT(TYPE, N, SUMS, A0, A1, A2, A3, B)                                                 \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" NAMES_##SUMS \
               "}, "                                                                             \
               "{%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B ", 1, 1, 1, 1;\n"                \
               : SUMS_##SUMS                                                                     \
               : "r"(weights[0]), "r"(weights[1]), "r"(weights[2]), "r"(weights[3]), "l"(values))

template <typename T>
__device__ inline void multiply_values(float (&sums)[64], const unsigned (&weights)[4],
                                       uint64_t values) {
  if constexpr (std::is_same_v<T, __half>) {
    OUTPUT("f16", 128, 64, 64, 65, 66, 67, 68);
  } else {
    OUTPUT("bf16", 128, 64, 64, 65, 66, 67, 68);
  }
}

template <typename T>
__device__ inline void multiply_values(float (&sums)[32], const unsigned (&weights)[4],
                                       uint64_t values) {
  if constexpr (std::is_same_v<T, __half>) {
    OUTPUT("f16", 64, 32, 32, 33, 34, 35, 36);
  } else {
    OUTPUT("bf16", 64, 32, 32, 33, 34, 35, 36);
  }
}

#undef OUTPUT
#undef SCORES
#undef SUMS_64
#undef SUMS_32
#undef SUMS_16
#undef FOUR
#undef NAMES_64
#undef NAMES_32
#endif

}  // namespace llava_engine
