// The next token of each row: one block per row, no sort and nothing back to the host.
//
// Argmax over (value, lowest id); where the row draws, top-k and top-p become one cut-off key each,
// found by radix selection from the top (11 + 11 + 10 bits), first by count and then by weight. The
// weights are 28-bit fixed point, so that sums do not depend on the order of the atomics. Then
// Gumbel-max over what is left, with the noise of llava_engine/kernels/sampling.py.
#include "common.cuh"
#include "ops.h"

namespace llava_engine {
namespace {

constexpr int kThreads = 1024;
constexpr int kBins = 2 * kThreads;
constexpr int kWeightBits = 28;
constexpr int kPartBits = kWeightBits / 2;       // a histogram's two 32-bit words take a half each,
constexpr int64_t kMaxVocab = (1 << 18) - 1;     // so neither overflows up to here
constexpr float kLargestNoise = 23.0f;           // -log(-log1p(-2^-33)) = 22.87

struct Row {
  const float* logits;
  const bool* seen;  // or null
  float penalty, temperature;
  int vocab;

  __device__ float penalised(int token) const {
    const float x = logits[token];
    if (seen == nullptr || !seen[token]) return x;
    return x < 0.0f ? x * penalty : x / penalty;
  }
  __device__ float score(int token) const { return penalised(token) / temperature; }
};

// Unsigned integers in the order of the floats, both zeros equal and NaN on top as in torch.argmax.
__device__ inline uint32_t key_of(float x) {
  if (isnan(x)) return 0xffffffffu;
  const uint32_t bits = __float_as_uint(x + 0.0f);  // -0 becomes 0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ inline float value_of(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// Larger is better: the value first, then the lower id.
__device__ inline uint64_t ranked(float value, int token) {
  return static_cast<uint64_t>(key_of(value)) << 32 | ~static_cast<uint32_t>(token);
}

// A row without one finite logit may have no winner: the token is some token all the same.
__device__ inline int64_t token_of(uint64_t best, int vocab) {
  return min(~static_cast<uint32_t>(best), static_cast<uint32_t>(vocab - 1));
}

struct Shared {
  uint32_t low[kBins], high[kBins];  // a bin's weight: low + (high << kPartBits)
  uint64_t sums[kWarp];
  uint64_t before, weight, total;
  uint32_t bin;
  int id;
};

__device__ inline uint64_t block_max(uint64_t x, Shared& shared) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    x = max(x, static_cast<uint64_t>(__shfl_xor_sync(kAllLanes, x, offset)));
  }
  __syncthreads();
  if (lane == 0) shared.sums[threadIdx.x / kWarp] = x;
  __syncthreads();
  x = shared.sums[lane];
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    x = max(x, static_cast<uint64_t>(__shfl_xor_sync(kAllLanes, x, offset)));
  }
  return x;
}

__device__ inline uint64_t warp_inclusive_sum(uint64_t x) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const uint64_t other = __shfl_up_sync(kAllLanes, x, offset);
    if (lane >= offset) x += other;
  }
  return x;
}

__device__ inline uint64_t block_inclusive_sum(uint64_t x, Shared& shared) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  x = warp_inclusive_sum(x);
  __syncthreads();
  if (lane == kWarp - 1) shared.sums[warp] = x;
  __syncthreads();
  const uint64_t warps = warp_inclusive_sum(shared.sums[lane]);
  const uint64_t before = __shfl_sync(kAllLanes, warps, max(warp - 1, 0));
  return x + (warp > 0 ? before : 0);
}

struct Cut {
  uint32_t key;
  uint64_t above;   // weight of all tokens with a larger key
  uint64_t equal;   // weight of all tokens with this key
  uint64_t target;
};

// The key at which the weight from the top down reaches target_of(total weight), which must be in
// [1, total]. weight_of(token, key): what a token counts.
template <typename Weight, typename Target>
__device__ Cut cut_from_top(const Row& row, Weight weight_of, Target target_of, Shared& shared) {
  Cut cut{0, 0, 0, 0};
  int shift = 32;
  for (int pass = 0; pass < 3; ++pass) {
    const int bits = pass < 2 ? 11 : 10;
    const int above_shift = shift;
    shift -= bits;
    for (int bin = threadIdx.x; bin < kBins; bin += kThreads) {
      shared.low[bin] = shared.high[bin] = 0;
    }
    __syncthreads();
    for (int token = threadIdx.x; token < row.vocab; token += kThreads) {
      const uint32_t key = key_of(row.score(token));
      if (pass > 0 && key >> above_shift != cut.key) continue;
      const uint32_t weight = weight_of(key);
      if (weight == 0) continue;
      const uint32_t bin = key >> shift & ((1u << bits) - 1);
      atomicAdd(&shared.low[bin], weight & ((1u << kPartBits) - 1));
      if (weight >> kPartBits != 0) atomicAdd(&shared.high[bin], weight >> kPartBits);
    }
    __syncthreads();
    // This thread's two bins, from the top.
    uint32_t bins[2];
    uint64_t weights[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      bins[i] = kBins - 1 - 2 * threadIdx.x - i;
      weights[i] = shared.low[bins[i]] + (static_cast<uint64_t>(shared.high[bins[i]]) << kPartBits);
    }
    const uint64_t through = block_inclusive_sum(weights[0] + weights[1], shared);
    if (pass == 0) {
      if (threadIdx.x == kThreads - 1) shared.total = through;
      __syncthreads();
      cut.target = target_of(shared.total);
    }
    uint64_t before = through - weights[0] - weights[1];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint64_t reached = cut.above + before;
      if (reached < cut.target && cut.target <= reached + weights[i]) {
        shared.bin = bins[i];
        shared.before = before;
        shared.weight = weights[i];
      }
      before += weights[i];
    }
    __syncthreads();
    cut.key = cut.key << bits | shared.bin;
    cut.above += shared.before;
    cut.equal = shared.weight;
  }
  return cut;
}

// The id of the `wanted`-th token, counted from 1, whose key is `key`. There are that many.
__device__ int id_of_equal(const Row& row, uint32_t key, uint64_t wanted, Shared& shared) {
  uint64_t before = 0;
  for (int base = 0; base < row.vocab; base += kThreads) {
    const int token = base + threadIdx.x;
    const uint64_t mine = token < row.vocab && key_of(row.score(token)) == key;
    const uint64_t through = before + block_inclusive_sum(mine, shared);
    if (mine != 0 && through == wanted) shared.id = token;
    if (threadIdx.x == kThreads - 1) shared.before = through;
    __syncthreads();
    before = shared.before;
    if (before >= wanted) break;
  }
  return shared.id;
}

struct Block {
  uint32_t words[4];
};

// Salmon et al. 2011, as philox4x32 in llava_engine/kernels/sampling.py.
__device__ inline Block philox4x32(uint32_t c0, uint32_t c2, uint64_t seed) {
  uint32_t c1 = 0, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = __umulhi(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
    const uint32_t high1 = __umulhi(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

__device__ inline float gumbel(uint32_t word) {
  const double uniform = fmin((word + 0.5) * 0x1p-32, 1 - 0x1p-24);
  return static_cast<float>(-log(-log1p(-uniform)));
}

// The same within 0.05, for a twentieth of the time: enough to see that a token cannot win.
__device__ inline float gumbel_estimate(uint32_t word) {
  const float uniform = fminf((word + 0.5f) * 0x1p-32f, 1 - 0x1p-24f);
  return -__logf(uniform < 0.001f ? uniform : -__logf(1.0f - uniform));
}
constexpr float kEstimateError = 0.05f;

struct SampleArguments {
  int64_t* out;
  const float* logits;
  const float* temperature;
  const int32_t* top_k;
  const float* top_p;
  const float* penalty;
  const bool* seen;
  const int64_t* seed;
  const int64_t* position;
  int vocab;
};

__global__ __launch_bounds__(kThreads) void sample_kernel(SampleArguments a) {
  launch_dependents();
  wait_for_predecessor();
  __shared__ Shared shared;
  const int64_t index = blockIdx.x;
  const float penalty = a.penalty[index];
  const bool* seen = a.seen != nullptr && penalty != 1.0f ? a.seen + index * a.vocab : nullptr;
  const Row row{a.logits + index * a.vocab, seen, penalty, a.temperature[index], a.vocab};

  uint64_t best = 0;
  for (int token = threadIdx.x; token < row.vocab; token += kThreads) {
    best = max(best, ranked(row.penalised(token), token));
  }
  best = block_max(best, shared);
  if (row.temperature <= 0.0f) {
    if (threadIdx.x == 0) a.out[index] = token_of(best, row.vocab);
    return;
  }

  const float largest = value_of(static_cast<uint32_t>(best >> 32)) / row.temperature;
  uint32_t lowest_key = 0;    // tokens below it are out,
  int last_id = row.vocab;    // and of those that have it, the ids behind this one
  const int top_k = a.top_k[index];
  if (top_k > 0 && top_k < row.vocab) {
    const auto one = [](uint32_t) { return 1u; };
    const auto count = [&](uint64_t) { return static_cast<uint64_t>(top_k); };
    lowest_key = cut_from_top(row, one, count, shared).key;
  }
  const float top_p = a.top_p[index];
  if (top_p < 1.0f) {
    const auto weight_of = [&](uint32_t key) {
      if (key < lowest_key) return 0u;
      constexpr float kLog2E = 1.44269504088896340736f;
      const float share = exp2f((value_of(key) - largest) * kLog2E);
      return __float2uint_rn(share * (1 << kWeightBits));
    };
    // A token stays if what is at or below it in rank weighs more than 1 - top_p of the whole, so
    // if what is above it weighs less than the rest; the first one always stays.
    const auto target_of = [&](uint64_t total) {
      const uint64_t dropped = static_cast<uint64_t>(static_cast<double>(1.0f - top_p) * total);
      return max(total - min(dropped, total), static_cast<uint64_t>(1));
    };
    const Cut cut = cut_from_top(row, weight_of, target_of, shared);
    const uint64_t each = max(weight_of(cut.key), 1u);
    const uint64_t kept = ceil_div<uint64_t>(cut.target - cut.above, each);
    lowest_key = cut.key;
    if (kept * each < cut.equal) last_id = id_of_equal(row, cut.key, kept, shared);
  }

  const uint64_t seed = a.seed[index];
  const uint32_t position = static_cast<uint32_t>(a.position[index]);
  // Calls f(token, score, word of noise) for this thread's tokens that are in and, with the largest
  // noise there is, would reach `needed`.
  const auto each_candidate = [&](const float& needed, const auto& f) {
    for (int first = threadIdx.x * 4; first < row.vocab; first += kThreads * 4) {
      float scores[4];
      bool hopeful = false;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scores[i] = -INFINITY;
        if (first + i >= row.vocab) continue;
        const float score = row.score(first + i);
        const uint32_t key = key_of(score);
        if (key < lowest_key || (key == lowest_key && first + i > last_id)) continue;
        scores[i] = score;
        hopeful |= score + kLargestNoise >= needed;
      }
      if (!hopeful) continue;
      const Block noise = philox4x32(first / 4, position, seed);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (scores[i] != -INFINITY) f(first + i, scores[i], noise.words[i]);
      }
    }
  };
  // The exact noise takes two logarithms in double precision. So estimate first, and then look
  // closely only at what may still be the best; few warps have any of it.
  float reached = -INFINITY;
  each_candidate(reached, [&](int, float score, uint32_t word) {
    reached = fmaxf(reached, score + gumbel_estimate(word));
  });
  const uint64_t leader = block_max(ranked(reached, 0), shared);
  const float needed = value_of(static_cast<uint32_t>(leader >> 32)) - 2 * kEstimateError;
  best = 0;
  if (reached >= needed) {
    each_candidate(needed, [&](int token, float score, uint32_t word) {
      if (score + gumbel_estimate(word) >= needed) {
        best = max(best, ranked(score + gumbel(word), token));
      }
    });
  }
  best = block_max(best, shared);
  if (threadIdx.x == 0) a.out[index] = token_of(best, row.vocab);
}

}  // namespace

void sample(Tensor out, Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p,
            Tensor repetition_penalty, std::optional<Tensor> seen, Tensor seed, Tensor position) {
  STD_TORCH_CHECK(logits.dim() == 2, "logits must be [R, V]");
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  STD_TORCH_CHECK(vocab > 0 && vocab <= kMaxVocab, "the vocabulary must have 1 to 262143 tokens");
  check_column(out, ScalarType::Long, rows, "out");
  check_column(logits, ScalarType::Float, rows * vocab, "logits");
  check_column(temperature, ScalarType::Float, rows, "temperature");
  check_column(top_k, ScalarType::Int, rows, "top_k");
  check_column(top_p, ScalarType::Float, rows, "top_p");
  check_column(repetition_penalty, ScalarType::Float, rows, "repetition_penalty");
  if (seen.has_value()) check_column(*seen, ScalarType::Bool, rows * vocab, "seen");
  check_column(seed, ScalarType::Long, rows, "seed");
  check_column(position, ScalarType::Long, rows, "position");
  if (rows == 0) return;
  const Launch to(logits);
  const SampleArguments arguments{
      data<int64_t>(out),
      data<float>(logits),
      data<float>(temperature),
      data<int32_t>(top_k),
      data<float>(top_p),
      data<float>(repetition_penalty),
      seen.has_value() ? data<bool>(*seen) : nullptr,
      data<int64_t>(seed),
      data<int64_t>(position),
      static_cast<int>(vocab),
  };
  launch_chained(sample_kernel, rows, kThreads, 0, to.stream(), arguments);
}

}  // namespace llava_engine
