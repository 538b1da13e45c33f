// Products of a few rows with a weight matrix, as decoding makes them: bound by reading the weights
// once. A block streams rows of the matrix through a ring in shared memory by bulk copies, asked for
// before the predecessor has ended (weights do not depend on it), and multiplies them on the tensor
// cores, where the few rows of x fill half a tile. What precedes and follows a product in the
// decoder, norm and rotation and cache, SiLU or residual, is folded in.
#include <algorithm>

#include "common.cuh"
#include "linear_epilogues.cuh"
#include "linear_rows.cuh"
#include "mma.cuh"
#include "ops.h"
#include "ring.cuh"

namespace llava_engine {
namespace {

constexpr int kMaxTokens = 8;
constexpr int kPairs = 4;            // a unit of work: pairs of weight rows,
constexpr int kRows = 2 * kPairs;    // the n of an mma
constexpr int kDepth = 32;           // inputs that a warp takes at once: two mma of 16
constexpr int kConsumers = 4;        // warps that multiply, each every fourth 32 inputs
constexpr int kConsumerThreads = kConsumers * kWarp;
constexpr int kThreads = kConsumerThreads + kWarp;  // and one that keeps the ring full
[[maybe_unused]] constexpr int kBatch = 4;  // 16-byte loads of weights, and of x, before they are multiplied
constexpr int kPad = 64;   // bytes between rows in shared memory: two rows, 64 bytes of each, at once

template <typename T>
struct Product {
  const T* x;     // [tokens, inputs]
  const T* gain;  // the norm's weight [inputs]; null: x is used as it is
  float eps;
  const T* weight;  // [outputs, inputs]
  int tokens, inputs;
  int pairs;  // of weight rows; which two, the epilogue says
  int piece, slots;  // the ring: slots of `piece` inputs of a unit's rows
};

// What is in shared memory: x [tokens] and the ring [slots, kRows], rows padded; what the warps have
// of a unit, for two units; the slots' barriers.
template <typename T>
struct Layout {
  int x_stride, row_stride, slot_stride;  // in elements
  int ring, sums, barriers, bytes;        // offsets in bytes

  __host__ __device__ Layout(int tokens, int inputs, int piece, int slots) {
    constexpr int kPadded = kPad / static_cast<int>(sizeof(T));
    // 64 bytes more than a multiple of 128, so that neighbouring rows have different banks.
    x_stride = ceil_div(inputs, 2 * kPadded) * 2 * kPadded + kPadded;
    row_stride = ceil_div(piece, 2 * kPadded) * 2 * kPadded + kPadded;
    slot_stride = kRows * row_stride;
    ring = tokens * x_stride * static_cast<int>(sizeof(T));
    sums = ring + slots * slot_stride * static_cast<int>(sizeof(T));
    barriers = sums + 2 * kConsumerThreads * static_cast<int>(sizeof(float2));
    bytes = barriers + 2 * slots * static_cast<int>(sizeof(uint64_t));
  }
};

// The weight row that is the `row`-th of a unit. Behind the last pair the last one stands in.
template <typename T, typename Epilogue>
__device__ inline const T* weight_row(const Product<T>& product, const Epilogue& epilogue, int unit,
                                      int row) {
  const Rows pair = epilogue.rows(min(unit * kPairs + row / 2, product.pairs - 1));
  return product.weight + static_cast<int64_t>(row % 2 == 0 ? pair.first : pair.second) *
                              product.inputs;
}

#if __CUDA_ARCH__ >= 900
// One warp: asks for piece after piece as slots become free.
template <typename T, typename Epilogue>
__device__ void fill_ring(const Product<T>& product, const Epilogue& epilogue,
                          const Layout<T>& layout, T* ring, uint64_t* full, uint64_t* empty) {
  const int lane = threadIdx.x % kWarp;
  const uint64_t policy = evict_first();  // not used again before 13 GB of other weights
  Cursor at;
  bool first_round = true;
  const int units = ceil_div(product.pairs, kPairs);
  for (int unit = blockIdx.x; unit < units; unit += gridDim.x) {
    const T* from = weight_row(product, epilogue, unit, lane % kRows);
    for (int start = 0; start < product.inputs; start += product.piece) {
      if (!first_round) barrier_wait(empty + at.slot, at.phase ^ 1);
      const uint32_t bytes = min(product.piece, product.inputs - start) * sizeof(T);
      if (lane == 0) barrier_expect(full + at.slot, kRows * bytes);
      __syncwarp();
      if (lane < kRows) {
        T* to = ring + at.slot * layout.slot_stride + lane * layout.row_stride;
        bulk_copy(to, from + start, bytes, full + at.slot, policy);
      }
      at.advance(product.slots);
      if (at.slot == 0) first_round = false;
    }
  }
}
#endif

template <typename T, typename Epilogue>
__global__ __launch_bounds__(kThreads, 4) void product_kernel(Product<T> product,
                                                              Epilogue epilogue) {
#if __CUDA_ARCH__ >= 900
  launch_dependents();
  extern __shared__ __align__(128) char shared[];
  const Layout<T> layout(product.tokens, product.inputs, product.piece, product.slots);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  T* x = reinterpret_cast<T*>(shared);
  T* ring = reinterpret_cast<T*>(shared + layout.ring);
  uint64_t* full = reinterpret_cast<uint64_t*>(shared + layout.barriers);
  uint64_t* empty = full + product.slots;
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < product.slots; ++slot) {
      barrier_init(full + slot, 1);
      barrier_init(empty + slot, kConsumers);
    }
    barriers_ready();
  }
  __syncthreads();
  if (warp == kConsumers) {
    fill_ring(product, epilogue, layout, ring, full, empty);
    return;
  }
  __shared__ float squares[kConsumers];
  load_rows<kConsumers>(product.x, product.gain, product.eps, product.tokens, product.inputs,
                        layout.x_stride, x, squares, [] {});

  // Lane 4 * g + t has inputs 8 * t of token g and of row g. An mma pairs inputs by their place in a
  // fragment, so any order serves that is the same for both.
  const int g = lane / 4, t = lane % 4;
  const bool there = g < product.tokens;
  const T* x_row = x + g * layout.x_stride + t * kVector;
  float2* sums = reinterpret_cast<float2*>(shared + layout.sums);
  const int units = ceil_div(product.pairs, kPairs);
  Cursor at;
  int turn = 0;  // the warps take turns in finishing units
  for (int unit = blockIdx.x; unit < units; unit += gridDim.x, ++turn) {
    const int pair = unit * kPairs + t;
    const bool finishes = warp == turn % kConsumers && there && pair < product.pairs;
    typename Epilogue::Early early{};
    if (finishes) early = epilogue.early(pair, g);
    float c[2][4] = {};
    for (int start = 0; start < product.inputs; start += product.piece) {
      const int count = min(product.piece, product.inputs - start);
      barrier_wait(full + at.slot, at.phase);
      const T* w_row = ring + at.slot * layout.slot_stride + g * layout.row_stride;
      for (int base = warp * kDepth; base < count; base += kBatch * kConsumers * kDepth) {
        uint4 w[kBatch], v[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          const int k = base + i * kConsumers * kDepth;
          w[i] = v[i] = {};
          if (k < count) w[i] = *reinterpret_cast<const uint4*>(w_row + t * kVector + k);
          if (k < count && there) v[i] = *reinterpret_cast<const uint4*>(x_row + start + k);
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          multiply_upper<T>(c[0], v[i].x, v[i].y, w[i].x, w[i].y);
          multiply_upper<T>(c[1], v[i].z, v[i].w, w[i].z, w[i].w);
        }
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(empty + at.slot);
      at.advance(product.slots);
    }
    // Two units have their places in turn: who is here twice knows that the finisher of the unit
    // before last has gone on.
    float2* mine = sums + turn % 2 * kConsumerThreads;
    mine[threadIdx.x] = {c[0][0] + c[1][0], c[0][1] + c[1][1]};
    consumers_sync<kConsumers>();
    if (finishes) {
      float2 sum = mine[lane];
#pragma unroll
      for (int w = 1; w < kConsumers; ++w) {
        sum.x += mine[w * kWarp + lane].x;
        sum.y += mine[w * kWarp + lane].y;
      }
      epilogue.finish(pair, g, early, sum.x, sum.y);
    }
  }
#endif
}

// The ring: all of an SM that x leaves. A ring of half the size, so that the next kernel's block fills
// its own beside it, was slower wherever an attention kernel is between two products (bench/NOTES.md).
template <typename T>
void plan_ring(Product<T>& product) {
  constexpr int kPiece = 1024, kSlots = 12, kShared = 226 << 10;
  product.piece = std::min(kPiece, product.inputs);
  for (product.slots = kSlots; product.slots > 0; --product.slots) {
    const Layout<T> layout(product.tokens, product.inputs, product.piece, product.slots);
    if (layout.bytes <= kShared) return;
  }
  STD_TORCH_CHECK(false, "rows of ", product.inputs, " inputs are too long for ", product.tokens,
                  " tokens");
}

int attribute(const Tensor& tensor, cudaDeviceAttr which) {
  int value = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, tensor.get_device_index()));
  return value;
}

template <typename T, typename Epilogue>
void launch(const Tensor& x, Product<T> product, const Epilogue& epilogue) {
  const Launch to(x);
  plan_ring(product);
  const Layout<T> layout(product.tokens, product.inputs, product.piece, product.slots);
  const auto kernel = product_kernel<T, Epilogue>;
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      layout.bytes));
  const int blocks = std::min(attribute(x, cudaDevAttrMultiProcessorCount),
                              ceil_div(product.pairs, kPairs));
  launch_chained(kernel, blocks, kThreads, layout.bytes, to.stream(), product, epilogue);
}

// f(element type): what the epilogue is for it.
template <typename F>
void run(const Tensor& x, const Tensor* norm_weight, double eps, const Tensor& weight,
         int64_t pairs, F&& epilogue_of) {
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2, "x and weight must be matrices");
  const ScalarType type = x.scalar_type();
  const int64_t tokens = x.size(0), inputs = x.size(1);
  STD_TORCH_CHECK(type == ScalarType::Half || type == ScalarType::BFloat16,
                  "products of a few rows take float16 and bfloat16");
  STD_TORCH_CHECK(tokens <= kMaxTokens, "a product of a few rows takes at most 8");
  STD_TORCH_CHECK(inputs % kDepth == 0 && inputs > 0, "inputs must be a multiple of 32");
  check_column(x, type, tokens * inputs, "x");
  check_column(weight, type, weight.size(0) * inputs, "weight");
  STD_TORCH_CHECK(aligned(x) && aligned(weight), "x and weight must be aligned to 16 bytes");
  if (norm_weight != nullptr) {
    check_column(*norm_weight, type, inputs, "norm_weight");
    STD_TORCH_CHECK(aligned(*norm_weight), "norm_weight must be aligned to 16 bytes");
  }
  STD_TORCH_CHECK(attribute(x, cudaDevAttrComputeCapabilityMajor) >= 9,
                  "products of a few rows need a Hopper GPU or a later one");
  if (tokens == 0 || pairs == 0) return;
  const auto by_type_of_x = [&](auto zero) {
    using T = decltype(zero);
    const Product<T> product{data<T>(x),
                             norm_weight != nullptr ? data<T>(*norm_weight) : nullptr,
                             static_cast<float>(eps),
                             data<T>(weight),
                             static_cast<int>(tokens),
                             static_cast<int>(inputs),
                             static_cast<int>(pairs),
                             0,
                             0};
    launch(x, product, epilogue_of(zero));
  };
  if (type == ScalarType::Half) return by_type_of_x(__half{});
  by_type_of_x(__nv_bfloat16{});
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
  const RopeSizes sizes =
      check_rope(q, k_cache, v_cache, x.scalar_type(), x.size(0), cos_sin, positions, slot_mapping);
  const int64_t outputs = (sizes.q_heads + 2 * sizes.kv_heads) * sizes.dim;
  STD_TORCH_CHECK(qkv.size(0) == outputs, "qkv does not fit q and the caches");
  run(x, &norm_weight, eps, qkv, outputs / 2, [&](auto zero) {
    return rotate_and_append<decltype(zero)>(sizes, q, k_cache, v_cache, cos_sin, positions,
                                             slot_mapping);
  });
}

}  // namespace llava_engine
