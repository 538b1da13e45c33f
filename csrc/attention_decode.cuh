// What the two decoding kernels share: elements as loaded, and the running softmax.
#pragma once

#include <type_traits>

#include "attention.cuh"

namespace llava_engine {

// 8 elements as they came from memory. Whole words, since the compiler gives each 16-bit member of
// a struct a register of its own.
template <typename T>
struct Loaded {
  uint4 words[sizeof(T) * kVector / 16];

  // Past L1: nobody reads it twice, and the newest key is written while this block is here already.
  __device__ static Loaded from(const T* place) {
    Loaded loaded;
#pragma unroll
    for (int i = 0; i < sizeof(T) * kVector / 16; ++i) {
      loaded.words[i] = __ldcg(reinterpret_cast<const uint4*>(place) + i);
    }
    return loaded;
  }
  __device__ static Loaded from_shared(const T* place) {
    Loaded loaded;
#pragma unroll
    for (int i = 0; i < sizeof(T) * kVector / 16; ++i) {
      loaded.words[i] = reinterpret_cast<const uint4*>(place)[i];
    }
    return loaded;
  }
  __device__ void to_shared(T* place) const {
#pragma unroll
    for (int i = 0; i < sizeof(T) * kVector / 16; ++i) {
      reinterpret_cast<uint4*>(place)[i] = words[i];
    }
  }
  __device__ float operator[](int i) const {
    const uint4& four = words[i * sizeof(T) / 16];
    const int index = i * sizeof(T) % 16 / 4;
    const uint32_t word =
        index == 0 ? four.x : index == 1 ? four.y : index == 2 ? four.z : four.w;
    if constexpr (std::is_same_v<T, float>) {
      return __uint_as_float(word);
    } else if constexpr (std::is_same_v<T, __half>) {
      return __half2float(__ushort_as_half(i % 2 == 0 ? word & 0xffff : word >> 16));
    } else {
      return __uint_as_float(i % 2 == 0 ? word << 16 : word & 0xffff0000u);
    }
  }
};

// The running softmax of one query: maximum, sum of weights, weighted sum of values.
template <int N>
struct Running {
  float maximum = -INFINITY, weight = 0.0f, sum[N] = {};

  // What the sums so far are worth under a new maximum; 0 while there are none.
  __device__ float raise(float score) {
    const float before = maximum;
    maximum = fmaxf(maximum, score);
    return maximum == -INFINITY ? 0.0f : exp2f(before - maximum);
  }
};

// What sums under `maximum` are worth under `common`, which is no smaller; 0 where there are none.
__device__ inline float worth(float maximum, float common) {
  return maximum == -INFINITY ? 0.0f : exp2f(maximum - common);
}

// Hopper's kernel (attention_ring.cu): arguments as for launch_decode; it needs no workspace.
template <typename T>
void launch_ring_decode(const AttentionArguments& arguments, cudaStream_t stream);

}  // namespace llava_engine
