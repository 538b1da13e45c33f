// What becomes of the products of linear.cu: which two weight rows make a pair, and where their sums
// for a token go. `early` asks for what `finish` needs, while the weights arrive.
#pragma once

#include "common.cuh"

namespace llava_engine {

struct Rows {
  int first, second;
};

struct Nothing {};

// Neighbouring outputs, as they are.
struct StoreSums {
  float* out;  // [tokens, outputs]
  int outputs;
  using Early = Nothing;

  __device__ Rows rows(int pair) const { return {2 * pair, 2 * pair + 1}; }
  __device__ Early early(int, int) const { return {}; }
  __device__ void finish(int pair, int token, Early, float a, float b) const {
    *reinterpret_cast<float2*>(out + static_cast<int64_t>(token) * outputs + 2 * pair) = {a, b};
  }
};

// Neighbouring outputs, added to the residual.
template <typename T>
struct AddToResidual {
  T* residual;  // [tokens, outputs]
  int outputs;
  struct Early {
    float a, b;
  };

  __device__ Rows rows(int pair) const { return {2 * pair, 2 * pair + 1}; }
  __device__ Early early(int pair, int token) const {
    const T* from = residual + token * outputs + 2 * pair;
    const uint32_t word = __ldcg(reinterpret_cast<const uint32_t*>(from));
    const Pack<T, 2> both = *reinterpret_cast<const Pack<T, 2>*>(&word);
    return {to_float(both.values[0]), to_float(both.values[1])};
  }
  __device__ void finish(int pair, int token, Early before, float a, float b) const {
    const float sums[2] = {before.a + rounded<T>(a), before.b + rounded<T>(b)};
    store(residual + token * outputs + 2 * pair, sums);
  }
};

// A row of the gate's matrix, and the same of the one for up behind it.
template <typename T>
struct SiluMul {
  T* out;  // [tokens, wide]
  int wide;
  using Early = Nothing;

  __device__ Rows rows(int pair) const { return {pair, pair + wide}; }
  __device__ Early early(int, int) const { return {}; }
  __device__ void finish(int pair, int token, Early, float a, float b) const {
    const float gate = rounded<T>(a);
    const float activated = rounded<T>(gate / (1.0f + expf(-gate)));
    out[token * wide + pair] = from_float<T>(activated * rounded<T>(b));
  }
};

// Dimensions i and i + dim / 2 of a head: the two that a rotation mixes. Heads are those of the
// queries, then of the keys, then of the values.
template <typename T>
struct RotateAndAppend {
  T* q;  // [tokens, q_heads, dim]
  T* k_cache;
  T* v_cache;
  const float* cos_sin;
  const int64_t* positions;
  const int64_t* slots;
  int q_heads, kv_heads, half, block_size;
  struct Early {
    float cosine, sine;
    int64_t slot;
  };

  __device__ Rows rows(int pair) const {
    const int row = pair / half * 2 * half + pair % half;
    return {row, row + half};
  }
  __device__ Early early(int pair, int token) const {
    const float* angle = cos_sin + positions[token] * 2 * half + pair % half;
    return {angle[0], angle[half], slots[token]};
  }
  __device__ void finish(int pair, int token, Early place, float a, float b) const {
    const int head = pair / half, i = pair % half;
    float left = rounded<T>(a), right = rounded<T>(b);
    if (head < q_heads + kv_heads) {
      const float rotated = left * place.cosine - right * place.sine;
      right = right * place.cosine + left * place.sine;
      left = rotated;
    }
    T* to;
    if (head < q_heads) {
      to = q + (static_cast<int64_t>(token) * q_heads + head) * 2 * half;
    } else {
      if (place.slot < 0) return;
      const bool is_v = head >= q_heads + kv_heads;
      const int kv_head = head - q_heads - (is_v ? kv_heads : 0);
      const int64_t block = place.slot / block_size, offset = place.slot % block_size;
      to = (is_v ? v_cache : k_cache) +
           ((block * kv_heads + kv_head) * block_size + offset) * 2 * half;
    }
    to[i] = from_float<T>(left);
    to[i + half] = from_float<T>(right);
  }
};

struct RopeSizes {
  int64_t q_heads, kv_heads, dim;
};

inline RopeSizes check_rope(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                            ScalarType type, int64_t tokens, const Tensor& cos_sin,
                            const Tensor& positions, const Tensor& slot_mapping) {
  STD_TORCH_CHECK(q.dim() == 3 && k_cache.dim() == 4,
                  "q must be [T, heads, D], the caches [blocks, heads, block_size, D]");
  const RopeSizes sizes{q.size(1), k_cache.size(1), q.size(2)};
  STD_TORCH_CHECK(sizes.dim % 2 == 0 && k_cache.size(3) == sizes.dim &&
                      v_cache.numel() == k_cache.numel(),
                  "sizes of q and the caches do not fit each other");
  check_column(q, type, tokens * sizes.q_heads * sizes.dim, "q");
  for (const Tensor* cache : {&k_cache, &v_cache}) {
    check_dense(*cache, "cache");
    check_type(*cache, type, "cache");
  }
  check_dense(cos_sin, "cos_sin");
  check_type(cos_sin, ScalarType::Float, "cos_sin");
  STD_TORCH_CHECK(cos_sin.dim() == 2 && cos_sin.size(1) == sizes.dim,
                  "cos_sin must be [positions, D]");
  check_column(positions, ScalarType::Long, tokens, "positions");
  check_column(slot_mapping, ScalarType::Long, tokens, "slot_mapping");
  return sizes;
}

template <typename T>
RotateAndAppend<T> rotate_and_append(const RopeSizes& sizes, const Tensor& q,
                                     const Tensor& k_cache, const Tensor& v_cache,
                                     const Tensor& cos_sin, const Tensor& positions,
                                     const Tensor& slot_mapping) {
  return {data<T>(q),
          data<T>(k_cache),
          data<T>(v_cache),
          data<float>(cos_sin),
          data<int64_t>(positions),
          data<int64_t>(slot_mapping),
          static_cast<int>(sizes.q_heads),
          static_cast<int>(sizes.kv_heads),
          static_cast<int>(sizes.dim / 2),
          static_cast<int>(k_cache.size(2))};
}

}  // namespace llava_engine
