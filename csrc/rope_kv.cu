// Rotary positions on q and k in place, and k and v into their cache slots, in one launch.
#include "common.cuh"
#include "ops.h"

namespace llava_engine {
namespace {

constexpr int kThreads = 128;

template <typename T>
struct RopeArguments {
  T* q;
  T* k;
  const T* v;
  int64_t q_stride, k_stride, v_stride;
  const float* cos_sin;
  const int64_t* positions;
  const int64_t* slots;
  T* k_cache;
  T* v_cache;
  int q_heads, kv_heads, dim, block_size;
};

// A thread has N dimensions of a head's left half and their partners in the right half.
template <typename T, int N>
__global__ void rope_append_kernel(RopeArguments<T> a) {
  launch_dependents();
  wait_for_predecessor();
  const int64_t token = blockIdx.x;
  const int half = a.dim / 2;
  const int per_head = half / N;
  const int item = blockIdx.y * kThreads + threadIdx.x;
  int head = item / per_head;
  const int i = item % per_head * N;
  if (head >= a.q_heads + 2 * a.kv_heads) return;

  float left[N], right[N];
  const bool is_q = head < a.q_heads;
  const bool is_v = head >= a.q_heads + a.kv_heads;
  if (is_v) {
    head -= a.q_heads + a.kv_heads;
    const T* from = a.v + token * a.v_stride + head * a.dim + i;
    load(from, left);
    load(from + half, right);
  } else {
    if (!is_q) head -= a.q_heads;
    T* place = is_q ? a.q + token * a.q_stride : a.k + token * a.k_stride;
    place += head * a.dim + i;
    const float* angles = a.cos_sin + a.positions[token] * a.dim + i;
    float l[N], r[N], cosine[N], sine[N];
    load(place, l);
    load(place + half, r);
    load(angles, cosine);
    load(angles + half, sine);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      left[j] = l[j] * cosine[j] - r[j] * sine[j];
      right[j] = r[j] * cosine[j] + l[j] * sine[j];
    }
    store(place, left);
    store(place + half, right);
  }
  if (is_q) return;
  const int64_t slot = a.slots[token];
  if (slot < 0) return;
  const int64_t row =
      (slot / a.block_size * a.kv_heads + head) * a.block_size + slot % a.block_size;
  T* to = (is_v ? a.v_cache : a.k_cache) + row * a.dim + i;
  store(to, left);
  store(to + half, right);
}

}  // namespace

void rope_append(Tensor q, Tensor k, Tensor v, Tensor cos_sin, Tensor positions,
                 Tensor slot_mapping, Tensor k_cache, Tensor v_cache) {
  STD_TORCH_CHECK(q.dim() == 3 && k.dim() == 3 && v.dim() == 3 && k_cache.dim() == 4,
                  "q, k, v must be [T, heads, D], the caches [blocks, heads, block_size, D]");
  const int64_t tokens = q.size(0), q_heads = q.size(1), kv_heads = k.size(1), dim = q.size(2);
  const ScalarType type = q.scalar_type();
  check_column(positions, ScalarType::Long, tokens, "positions");
  check_column(slot_mapping, ScalarType::Long, tokens, "slot_mapping");
  check_dense(cos_sin, "cos_sin");
  check_type(cos_sin, ScalarType::Float, "cos_sin");
  for (const Tensor* x : {&q, &k, &v}) {
    check_type(*x, type, "q, k or v");
    STD_TORCH_CHECK(x->size(0) == tokens && x->size(2) == dim && x->stride(2) == 1 &&
                        x->stride(1) == dim,
                    "q, k and v must be [T, heads, D] with dense heads");
  }
  for (const Tensor* cache : {&k_cache, &v_cache}) {
    check_dense(*cache, "cache");
    check_type(*cache, type, "cache");
  }
  STD_TORCH_CHECK(v.size(1) == kv_heads && k_cache.size(1) == kv_heads && k_cache.size(3) == dim &&
                      v_cache.numel() == k_cache.numel() && cos_sin.size(1) == dim && dim % 2 == 0,
                  "sizes of q, k, v, cos_sin and the caches do not fit each other");
  if (tokens == 0) return;
  bool vectors = dim % (2 * kVector) == 0 && aligned(cos_sin) && aligned(k_cache) &&
                 aligned(v_cache);
  for (const Tensor* x : {&q, &k, &v}) {
    vectors = vectors && aligned(*x) && x->stride(0) % kVector == 0;
  }
  const Launch to(q);
  by_type(q, [&](auto zero) {
    using T = decltype(zero);
    const RopeArguments<T> arguments{
        data<T>(q),
        data<T>(k),
        data<T>(v),
        q.stride(0),
        k.stride(0),
        v.stride(0),
        data<float>(cos_sin),
        data<int64_t>(positions),
        data<int64_t>(slot_mapping),
        data<T>(k_cache),
        data<T>(v_cache),
        static_cast<int>(q_heads),
        static_cast<int>(kv_heads),
        static_cast<int>(dim),
        static_cast<int>(k_cache.size(2)),
    };
    const int64_t items = (q_heads + 2 * kv_heads) * (dim / 2) / (vectors ? kVector : 1);
    const dim3 grid(tokens, ceil_div<int64_t>(items, kThreads));
    const auto kernel = vectors ? rope_append_kernel<T, kVector> : rope_append_kernel<T, 1>;
    launch_chained(kernel, grid, kThreads, 0, to.stream(), arguments);
  });
}

}  // namespace llava_engine
