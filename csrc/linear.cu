// Products of a few rows with a weight matrix, as decoding makes them: bound by reading the weights
// once. A warp owns pairs of weight rows and streams them through its own ring in shared memory by
// bulk copies, filled before the predecessor has ended (weights do not depend on it). What precedes
// and follows a product in the decoder, norm and rotation and cache, SiLU or residual, is folded in.
#include <algorithm>

#include "common.cuh"
#include "ops.h"

namespace llava_engine {
namespace {

constexpr int kMaxTokens = 8;
constexpr int kMaxWarps = 8;
constexpr int kMaxSlots = 8;
constexpr int kLoads = 4;  // 16-byte loads of x that a thread has in flight

// How a launch uses an SM. ring: `slots` pieces, each the same `piece` elements of two rows.
struct Plan {
  int blocks_per_sm, warps, pieces, piece, slots;
  size_t shared;
};

template <typename T>
struct Product {
  const T* x;     // [tokens, inputs]
  const T* gain;  // the norm's weight [inputs]; null: x is used as it is
  float eps;
  const T* weight;  // [outputs, inputs]
  int tokens, inputs;
  int units;  // pairs of weight rows; which two, the epilogue says
  int pieces, piece, slots;
};

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

#if __CUDA_ARCH__ >= 900
__device__ inline void barrier_init(uint64_t* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
}

__device__ inline void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                   shared_address(barrier)),
               "r"(bytes)
               : "memory");
}

__device__ inline void barrier_wait(uint64_t* barrier, uint32_t phase) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(phase)
      : "memory");
}

// The weights will not be used again before 13 GB of others.
__device__ inline uint64_t evict_first() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

__device__ inline void bulk_copy(void* to, const void* from, uint32_t bytes, uint64_t* barrier,
                                 uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1], %2, [%3], %4;" ::"r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier)), "l"(policy)
      : "memory");
}
#endif

template <typename T>
struct Pieces {
  const T* first;
  const T* second;
};

// One warp's weights, in the order in which it needs them. Before Hopper, which brought the bulk
// copies, the pieces are read where they are.
template <typename T, typename Epilogue>
class WeightStream {
 public:
  __device__ WeightStream(const Product<T>& product, const Epilogue& epilogue, T* ring,
                          uint64_t* barriers, int first, int stride)
      : product_(product),
        epilogue_(epilogue),
        ring_(ring),
        barriers_(barriers),
        unit_(first),
        stride_(stride) {
#if __CUDA_ARCH__ >= 900
    if (threadIdx.x % kWarp == 0) {
      for (int slot = 0; slot < product.slots; ++slot) barrier_init(barriers + slot);
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
      policy_ = evict_first();
    }
    __syncwarp();
    for (int slot = 0; slot < product.slots; ++slot) request(slot);
#endif
  }

  // The next piece of both rows of the unit.
  __device__ Pieces<T> next(int unit, int piece) {
#if __CUDA_ARCH__ >= 900
    barrier_wait(barriers_ + slot_, phase_);
    const T* place = ring_ + slot_ * 2 * product_.piece;
    return {place, place + product_.piece};
#else
    const auto [first, second] = epilogue_.rows(unit);
    const T* place = product_.weight + piece * product_.piece;
    return {place + static_cast<int64_t>(first) * product_.inputs,
            place + static_cast<int64_t>(second) * product_.inputs};
#endif
  }

  // The whole warp has read the piece: its slot is free.
  __device__ void release() {
#if __CUDA_ARCH__ >= 900
    __syncwarp();
    request(slot_);
    if (++slot_ == product_.slots) {
      slot_ = 0;
      phase_ ^= 1;
    }
#endif
  }

 private:
#if __CUDA_ARCH__ >= 900
  __device__ void request(int slot) {
    if (unit_ >= product_.units) return;
    if (threadIdx.x % kWarp == 0) {
      const int start = piece_ * product_.piece;
      const uint32_t bytes = min(product_.piece, product_.inputs - start) * sizeof(T);
      const auto [first, second] = epilogue_.rows(unit_);
      const T* from = product_.weight + start;
      T* to = ring_ + slot * 2 * product_.piece;
      barrier_expect(barriers_ + slot, 2 * bytes);
      bulk_copy(to, from + static_cast<int64_t>(first) * product_.inputs, bytes, barriers_ + slot,
                policy_);
      bulk_copy(to + product_.piece, from + static_cast<int64_t>(second) * product_.inputs, bytes,
                barriers_ + slot, policy_);
    }
    if (++piece_ == product_.pieces) {
      piece_ = 0;
      unit_ += stride_;
    }
  }
#endif

  const Product<T>& product_;
  const Epilogue& epilogue_;
  T* ring_;
  uint64_t* barriers_;
  int unit_, stride_;
  int piece_ = 0;
  int slot_ = 0;
  uint32_t phase_ = 0;
  uint64_t policy_ = 0;
};

// Waits for the predecessor; then x, or its RMSNorm, into shared memory as [kTokens, inputs], rows
// that are not there as zero. x is read past L1, since the predecessor wrote it while this block was
// here already. A thread rereads only what it wrote, until the caller's barrier.
template <typename T, int kTokens>
__device__ void load_rows(const Product<T>& product, T* rows) {
  __shared__ float squares[kMaxWarps][kTokens];
  const int vectors = product.inputs / kVector;
  uint4 gains[kLoads] = {};  // the first of this thread's, in time
  if (product.gain != nullptr) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int v = threadIdx.x + i * blockDim.x;
      if (v < vectors) gains[i] = reinterpret_cast<const uint4*>(product.gain)[v];
    }
  }
  wait_for_predecessor();
  float sums[kTokens] = {};
#pragma unroll
  for (int token = 0; token < kTokens; ++token) {
    const uint4* from = reinterpret_cast<const uint4*>(product.x + token * product.inputs);
    for (int base = threadIdx.x; base < vectors; base += kLoads * blockDim.x) {
      uint4 words[kLoads];
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const int v = base + i * blockDim.x;
        const bool there = v < vectors && token < product.tokens;
        words[i] = there ? __ldcg(from + v) : uint4{};
      }
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const int v = base + i * blockDim.x;
        if (v >= vectors) break;
        T* to = rows + token * product.inputs + v * kVector;
        *reinterpret_cast<uint4*>(to) = words[i];
        float values[kVector];
        load(to, values);
#pragma unroll
        for (int j = 0; j < kVector; ++j) sums[token] += values[j] * values[j];
      }
    }
  }
  if (product.gain == nullptr) return;
#pragma unroll
  for (int token = 0; token < kTokens; ++token) {
    const float sum = warp_sum(sums[token]);
    if (threadIdx.x % kWarp == 0) squares[threadIdx.x / kWarp][token] = sum;
  }
  __syncthreads();
#pragma unroll
  for (int token = 0; token < kTokens; ++token) {
    float sum = 0.0f;
    for (int warp = 0; warp < blockDim.x / kWarp; ++warp) sum += squares[warp][token];
    const float scale = rsqrtf(sum / product.inputs + product.eps);
    const auto normalise = [&](int v, const T* gain) {
      T* place = rows + token * product.inputs + v * kVector;
      float values[kVector], factors[kVector];
      load(place, values);
      load(gain, factors);
#pragma unroll
      for (int j = 0; j < kVector; ++j) values[j] = rounded<T>(values[j] * scale) * factors[j];
      store(place, values);
    };
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int v = threadIdx.x + i * blockDim.x;
      if (v < vectors) normalise(v, reinterpret_cast<const T*>(&gains[i]));
    }
    for (int v = threadIdx.x + kLoads * blockDim.x; v < vectors; v += blockDim.x) {
      normalise(v, product.gain + v * kVector);
    }
  }
}

// Shared memory: x [kTokens, inputs], the rings [warps, slots, 2, piece], their barriers.
template <typename T, int kTokens, typename Epilogue>
__global__ __launch_bounds__(kMaxWarps* kWarp, 1) void product_kernel(Product<T> product,
                                                                   Epilogue epilogue) {
  launch_dependents();
  extern __shared__ __align__(128) char shared[];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int warps = blockDim.x / kWarp;
  T* rows = reinterpret_cast<T*>(shared);
  T* rings = rows + kTokens * product.inputs;
  const int ring = product.slots * 2 * product.piece;
  uint64_t* barriers = reinterpret_cast<uint64_t*>(rings + warps * ring) + warp * product.slots;
  // The last, shorter round of units falls on as many SMs as there are.
  const int first = warp * gridDim.x + blockIdx.x;
  const int stride = warps * gridDim.x;
  WeightStream<T, Epilogue> weights(product, epilogue, rings + warp * ring, barriers, first,
                                    stride);
  load_rows<T, kTokens>(product, rows);
  __syncthreads();

  for (int unit = first; unit < product.units; unit += stride) {
    const bool mine = lane < product.tokens;  // a lane finishes a token
    typename Epilogue::Early early{};
    if (mine) early = epilogue.early(unit, lane);
    float sums[2][kTokens] = {};
    for (int piece = 0, start = 0; piece < product.pieces; ++piece, start += product.piece) {
      const auto [first_row, second_row] = weights.next(unit, piece);
      const int count = min(product.piece, product.inputs - start);
#pragma unroll 4
      for (int i = lane * kVector; i < count; i += kWarp * kVector) {
        float a[kVector], b[kVector];
        load(first_row + i, a);
        load(second_row + i, b);
#pragma unroll
        for (int token = 0; token < kTokens; ++token) {
          float x[kVector];
          load(rows + token * product.inputs + start + i, x);
#pragma unroll
          for (int j = 0; j < kVector; ++j) {
            sums[0][token] += a[j] * x[j];
            sums[1][token] += b[j] * x[j];
          }
        }
      }
      weights.release();
    }
    float first_sum = 0.0f, second_sum = 0.0f;
#pragma unroll
    for (int token = 0; token < kTokens; ++token) {
      const float a = warp_sum(sums[0][token]), b = warp_sum(sums[1][token]);
      if (lane == token) {
        first_sum = a;
        second_sum = b;
      }
    }
    if (mine) epilogue.finish(unit, lane, early, first_sum, second_sum);
  }
}

struct Rows {
  int first, second;
};

struct Nothing {};

// Neighbouring outputs, as they are.
struct StoreSums {
  float* out;  // [tokens, outputs]
  int outputs;
  using Early = Nothing;

  __device__ Rows rows(int unit) const { return {2 * unit, 2 * unit + 1}; }
  __device__ Early early(int, int) const { return {}; }
  __device__ void finish(int unit, int token, Early, float a, float b) const {
    *reinterpret_cast<float2*>(out + static_cast<int64_t>(token) * outputs + 2 * unit) = {a, b};
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

  __device__ Rows rows(int unit) const { return {2 * unit, 2 * unit + 1}; }
  __device__ Early early(int unit, int token) const {
    const T* from = residual + token * outputs + 2 * unit;
    const uint32_t word = __ldcg(reinterpret_cast<const uint32_t*>(from));
    const Pack<T, 2> pair = *reinterpret_cast<const Pack<T, 2>*>(&word);
    return {to_float(pair.values[0]), to_float(pair.values[1])};
  }
  __device__ void finish(int unit, int token, Early before, float a, float b) const {
    const float sums[2] = {before.a + rounded<T>(a), before.b + rounded<T>(b)};
    store(residual + token * outputs + 2 * unit, sums);
  }
};

// A row of the gate's matrix, and the same of the one for up behind it.
template <typename T>
struct SiluMul {
  T* out;  // [tokens, wide]
  int wide;
  using Early = Nothing;

  __device__ Rows rows(int unit) const { return {unit, unit + wide}; }
  __device__ Early early(int, int) const { return {}; }
  __device__ void finish(int unit, int token, Early, float a, float b) const {
    const float gate = rounded<T>(a);
    const float activated = rounded<T>(gate / (1.0f + expf(-gate)));
    out[token * wide + unit] = from_float<T>(activated * rounded<T>(b));
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

  __device__ Rows rows(int unit) const {
    const int row = unit / half * 2 * half + unit % half;
    return {row, row + half};
  }
  __device__ Early early(int unit, int token) const {
    const float* angle = cos_sin + positions[token] * 2 * half + unit % half;
    return {angle[0], angle[half], slots[token]};
  }
  __device__ void finish(int unit, int token, Early place, float a, float b) const {
    const int head = unit / half, i = unit % half;
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

// Two blocks of four warps on an SM if x leaves them room for their rings, and the small blocks of
// an attention kernel room beside them; else one of eight. As much of the weights in flight as fits,
// in pieces of 2 KiB or more.
template <typename T>
Plan make_plan(int tokens, int inputs) {
  constexpr int kSizes[] = {211 << 10, 226 << 10};  // of an SM's 228 KiB
  constexpr int kPerBlock = (1 << 10) + kMaxWarps * kMaxTokens * sizeof(float);  // runtime, squares
  const int vectors = inputs / kVector;
  const int fixed = tokens * inputs * static_cast<int>(sizeof(T));
  for (int blocks : {2, 1}) {
    const int warps = 8 / blocks;
    const int room = kSizes[2 - blocks] / blocks - kPerBlock - fixed;
    const int ring = room / warps - kMaxSlots * static_cast<int>(sizeof(uint64_t));
    Plan best{};
    int most = 0;
    for (int pieces = 1; pieces * 2048 <= inputs * static_cast<int>(sizeof(T)) || pieces == 1;
         ++pieces) {
      const int piece = ceil_div(vectors, pieces) * kVector;
      const int slot = 2 * piece * static_cast<int>(sizeof(T));
      const int slots = std::min(kMaxSlots, ring / slot);
      if (slots < 2 || ceil_div(inputs, piece) != pieces || slots * slot <= most) continue;
      most = slots * slot;
      const size_t barriers = slots * sizeof(uint64_t);
      best = {blocks, warps, pieces, piece, slots, fixed + warps * (most + barriers)};
    }
    // Less than 48 KiB on its way does not keep the memory busy; a short row is in flight whole.
    const int least = std::min<int>((24 << 10) * blocks / 2, vectors * kVector * sizeof(T) * warps);
    if (most > 0 && (blocks == 1 || warps * most >= least)) return best;
  }
  STD_TORCH_CHECK(false, "rows of ", inputs, " inputs are too long for ", tokens, " tokens");
}

int multiprocessors(const Tensor& tensor) {
  int count = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount,
                                        tensor.get_device_index()));
  return count;
}

template <typename T, int kTokens, typename Epilogue>
void launch(const Tensor& x, Product<T> product, const Epilogue& epilogue) {
  const Launch to(x);
  const Plan plan = make_plan<T>(kTokens, product.inputs);
  product.pieces = plan.pieces;
  product.piece = plan.piece;
  product.slots = plan.slots;
  const auto kernel = product_kernel<T, kTokens, Epilogue>;
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      static_cast<int>(plan.shared)));
  const int blocks = std::min(multiprocessors(x) * plan.blocks_per_sm, product.units);
  launch_chained(kernel, blocks, plan.warps * kWarp, plan.shared, to.stream(), product, epilogue);
}

// f(element type): what the epilogue is for it.
template <typename F>
void run(const Tensor& x, const Tensor* norm_weight, double eps, const Tensor& weight,
         int64_t units, F&& epilogue_of) {
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2, "x and weight must be matrices");
  const ScalarType type = x.scalar_type();
  const int64_t tokens = x.size(0), inputs = x.size(1);
  STD_TORCH_CHECK(type == ScalarType::Half || type == ScalarType::BFloat16,
                  "products of a few rows take float16 and bfloat16");
  STD_TORCH_CHECK(tokens <= kMaxTokens, "a product of a few rows takes at most 8");
  STD_TORCH_CHECK(inputs % kVector == 0 && inputs > 0, "inputs must be a multiple of 8");
  check_column(x, type, tokens * inputs, "x");
  check_column(weight, type, weight.size(0) * inputs, "weight");
  STD_TORCH_CHECK(aligned(x) && aligned(weight), "x and weight must be aligned to 16 bytes");
  if (norm_weight != nullptr) {
    check_column(*norm_weight, type, inputs, "norm_weight");
    STD_TORCH_CHECK(aligned(*norm_weight), "norm_weight must be aligned to 16 bytes");
  }
  if (tokens == 0 || units == 0) return;
  const auto by_tokens = [&](auto zero) {
    using T = decltype(zero);
    const Product<T> product{data<T>(x),
                             norm_weight != nullptr ? data<T>(*norm_weight) : nullptr,
                             static_cast<float>(eps),
                             data<T>(weight),
                             static_cast<int>(tokens),
                             static_cast<int>(inputs),
                             static_cast<int>(units),
                             0,
                             0,
                             0};
    const auto epilogue = epilogue_of(zero);
    if (tokens == 1) return launch<T, 1>(x, product, epilogue);
    if (tokens == 2) return launch<T, 2>(x, product, epilogue);
    if (tokens <= 4) return launch<T, 4>(x, product, epilogue);
    launch<T, 8>(x, product, epilogue);
  };
  if (type == ScalarType::Half) return by_tokens(__half{});
  by_tokens(__nv_bfloat16{});
}

}  // namespace

void linear_add(Tensor residual, Tensor x, Tensor weight) {
  const int64_t outputs = weight.size(0);
  check_column(residual, x.scalar_type(), x.size(0) * outputs, "residual");
  STD_TORCH_CHECK(outputs % 2 == 0 && aligned(residual), "outputs must be even");
  run(x, nullptr, 0.0, weight, outputs / 2, [&](auto zero) {
    using T = decltype(zero);
    return AddToResidual<T>{data<T>(residual), static_cast<int>(outputs)};
  });
}

void norm_linear(Tensor out, Tensor x, Tensor norm_weight, double eps, Tensor weight) {
  const int64_t outputs = weight.size(0);
  check_column(out, ScalarType::Float, x.size(0) * outputs, "out");
  STD_TORCH_CHECK(outputs % 2 == 0 && aligned(out), "outputs must be even");
  run(x, &norm_weight, eps, weight, outputs / 2, [&](auto) {
    return StoreSums{data<float>(out), static_cast<int>(outputs)};
  });
}

void norm_linear_silu_mul(Tensor out, Tensor x, Tensor norm_weight, double eps, Tensor gate_up) {
  const int64_t wide = gate_up.size(0) / 2;
  STD_TORCH_CHECK(gate_up.size(0) == 2 * wide, "gate_up must have an even number of rows");
  check_column(out, x.scalar_type(), x.size(0) * wide, "out");
  run(x, &norm_weight, eps, gate_up, wide, [&](auto zero) {
    using T = decltype(zero);
    return SiluMul<T>{data<T>(out), static_cast<int>(wide)};
  });
}

void norm_qkv_rope_append(Tensor q, Tensor k_cache, Tensor v_cache, Tensor x, Tensor norm_weight,
                          double eps, Tensor qkv, Tensor cos_sin, Tensor positions,
                          Tensor slot_mapping) {
  STD_TORCH_CHECK(q.dim() == 3 && k_cache.dim() == 4,
                  "q must be [T, heads, D], the caches [blocks, heads, block_size, D]");
  const ScalarType type = x.scalar_type();
  const int64_t tokens = x.size(0), q_heads = q.size(1), dim = q.size(2);
  const int64_t kv_heads = k_cache.size(1), heads = q_heads + 2 * kv_heads;
  STD_TORCH_CHECK(dim % 2 == 0 && k_cache.size(3) == dim && qkv.size(0) == heads * dim &&
                      v_cache.numel() == k_cache.numel(),
                  "sizes of q, the caches and qkv do not fit each other");
  check_column(q, type, tokens * q_heads * dim, "q");
  for (const Tensor* cache : {&k_cache, &v_cache}) {
    check_dense(*cache, "cache");
    check_type(*cache, type, "cache");
  }
  check_dense(cos_sin, "cos_sin");
  check_type(cos_sin, ScalarType::Float, "cos_sin");
  STD_TORCH_CHECK(cos_sin.dim() == 2 && cos_sin.size(1) == dim, "cos_sin must be [positions, D]");
  check_column(positions, ScalarType::Long, tokens, "positions");
  check_column(slot_mapping, ScalarType::Long, tokens, "slot_mapping");
  run(x, &norm_weight, eps, qkv, heads * dim / 2, [&](auto zero) {
    using T = decltype(zero);
    return RotateAndAppend<T>{data<T>(q),
                              data<T>(k_cache),
                              data<T>(v_cache),
                              data<float>(cos_sin),
                              data<int64_t>(positions),
                              data<int64_t>(slot_mapping),
                              static_cast<int>(q_heads),
                              static_cast<int>(kv_heads),
                              static_cast<int>(dim / 2),
                              static_cast<int>(k_cache.size(2))};
  });
}

}  // namespace llava_engine
