// The few rows that linear.cu and quant_linear.cuh multiply, brought into shared memory by the
// warps that will.
#pragma once

#include "common.cuh"

namespace llava_engine {

[[maybe_unused]] constexpr int kLoads = 4;  // 16-byte loads of x that a thread has in flight

// The block's first kWarps warps wait for each other.
template <int kWarps>
__device__ inline void consumers_sync() {
  asm volatile("bar.sync 1, %0;" ::"n"(kWarps * kWarp) : "memory");
}

// Waits for the predecessor; then x [tokens, inputs], or its RMSNorm where there is a gain, into
// rows that are `stride` elements apart. x is read past L1, since the predecessor wrote it while
// this block was here already. kWarps warps do it, in teams of which each has a token at a time; a
// thread rereads only what it wrote, until the barrier at the end. `squares` is room for kWarps
// sums; `meanwhile` is done while the first loads are on their way.
template <int kWarps, typename T, typename F>
__device__ void load_rows(const T* x, const T* gain, float eps, int tokens, int inputs, int stride,
                          T* rows, float* squares, F&& meanwhile) {
  const int vectors = inputs / kVector;
  constexpr int kMost = kWarps % 8 == 0 ? 8 : 4;
  static_assert(kWarps % kMost == 0);
  const int teams = tokens >= kMost ? kMost : tokens >= 4 ? 4 : tokens >= 2 ? 2 : 1;
  const int members = kWarps * kWarp / teams;
  const int team = threadIdx.x / members, member = threadIdx.x % members;
  const bool norm = gain != nullptr;
  uint4 gains[kLoads];  // the first of this thread's, in time
  if (norm) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int v = member + i * members;
      if (v < vectors) gains[i] = reinterpret_cast<const uint4*>(gain)[v];
    }
  }
  wait_for_predecessor();
  bool idle = true;
  for (int round = 0; round < tokens; round += teams) {
    const int token = round + team;
    const bool there = token < tokens;
    T* row = rows + token * stride;
    float sum = 0.0f;
    if (there) {
      const uint4* from = reinterpret_cast<const uint4*>(x + static_cast<int64_t>(token) * inputs);
      for (int base = member; base < vectors; base += kLoads * members) {
        uint4 words[kLoads];
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
          const int v = base + i * members;
          if (v < vectors) words[i] = __ldcg(from + v);
        }
        if (idle) meanwhile();
        idle = false;
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
          const int v = base + i * members;
          if (v >= vectors) break;
          *reinterpret_cast<uint4*>(row + v * kVector) = words[i];
          if (!norm) continue;
          float values[kVector];
          load(reinterpret_cast<const T*>(&words[i]), values);
#pragma unroll
          for (int j = 0; j < kVector; ++j) sum += values[j] * values[j];
        }
      }
    }
    if (idle) meanwhile();
    idle = false;
    if (!norm) continue;
    sum = warp_sum(sum);
    if (threadIdx.x % kWarp == 0) squares[threadIdx.x / kWarp] = sum;
    consumers_sync<kWarps>();
    sum = 0.0f;
    for (int w = 0; w < kWarps / teams; ++w) sum += squares[team * (kWarps / teams) + w];
    const float scale = rsqrtf(sum / inputs + eps);
    const auto normalise = [&](int v, const T* factors_of) {
      float values[kVector], factors[kVector];
      load(row + v * kVector, values);
      load(factors_of, factors);
#pragma unroll
      for (int j = 0; j < kVector; ++j) values[j] = rounded<T>(values[j] * scale) * factors[j];
      store(row + v * kVector, values);
    };
    if (there) {
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const int v = member + i * members;
        if (v < vectors) normalise(v, reinterpret_cast<const T*>(&gains[i]));
      }
      for (int v = member + kLoads * members; v < vectors; v += members) {
        normalise(v, gain + v * kVector);
      }
    }
    if (round + teams < tokens) consumers_sync<kWarps>();  // squares are used again
  }
  consumers_sync<kWarps>();
}

// `count` columns of x [tokens, inputs] from `start` on, without a norm and without waiting.
template <int kWarps, typename T>
__device__ void load_columns(const T* x, int tokens, int inputs, int start, int count, int stride,
                             T* rows) {
  const int vectors = count / kVector;
  for (int base = threadIdx.x; base < tokens * vectors; base += kLoads * kWarps * kWarp) {
    uint4 words[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int at = base + i * kWarps * kWarp;
      const int token = at / vectors, v = at % vectors;
      if (token >= tokens) break;
      const T* row = x + static_cast<int64_t>(token) * inputs + start;
      words[i] = __ldcg(reinterpret_cast<const uint4*>(row) + v);
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int at = base + i * kWarps * kWarp;
      const int token = at / vectors, v = at % vectors;
      if (token >= tokens) break;
      *reinterpret_cast<uint4*>(rows + token * stride + v * kVector) = words[i];
    }
  }
  consumers_sync<kWarps>();
}

}  // namespace llava_engine
