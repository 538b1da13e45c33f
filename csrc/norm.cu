// RMSNorm and LayerNorm, alone and with the addition before them: one block per row, one pass over
// device memory. The row waits in shared memory, in its own type, while its sums are taken.
#include <algorithm>

#include "common.cuh"
#include "ops.h"

namespace llava_engine {
namespace {

// Not __restrict__: out may be x.
template <typename T, int N, bool kAdd>
__global__ void rms_norm_kernel(T* out, T* residual, const T* x, const T* weight, int hidden,
                                float eps) {
  launch_dependents();
  wait_for_predecessor();
  extern __shared__ __align__(16) char shared[];
  T* row = reinterpret_cast<T*>(shared);
  const int64_t base = static_cast<int64_t>(blockIdx.x) * hidden;
  const int step = blockDim.x * N;
  float sum = 0.0f;
  for (int i = threadIdx.x * N; i < hidden; i += step) {
    float values[N];
    load(x + base + i, values);
    if constexpr (kAdd) {
      float before[N];
      load(residual + base + i, before);
#pragma unroll
      for (int j = 0; j < N; ++j) values[j] = rounded<T>(values[j] + before[j]);
      store(residual + base + i, values);
    }
#pragma unroll
    for (int j = 0; j < N; ++j) sum += values[j] * values[j];
    store(row + i, values);
  }
  const float scale = rsqrtf(block_sum(sum) / hidden + eps);
  for (int i = threadIdx.x * N; i < hidden; i += step) {
    float values[N], weights[N];
    load(row + i, values);  // what this thread itself put there
    load(weight + i, weights);
#pragma unroll
    for (int j = 0; j < N; ++j) values[j] = rounded<T>(values[j] * scale) * weights[j];
    store(out + base + i, values);
  }
}

// The row that this block has in shared memory, of which a thread has summed what it put there.
template <typename T, int N>
__device__ void layer_norm_row(T* out, const T* row, float sum, const T* weight, const T* bias,
                               int hidden, float eps) {
  const int step = blockDim.x * N;
  const float mean = block_sum(sum) / hidden;
  float squares = 0.0f;
  for (int i = threadIdx.x * N; i < hidden; i += step) {
    float values[N];
    load(row + i, values);  // what this thread itself put there
#pragma unroll
    for (int j = 0; j < N; ++j) squares += (values[j] - mean) * (values[j] - mean);
  }
  __syncthreads();  // everyone has read the first sums
  const float scale = rsqrtf(block_sum(squares) / hidden + eps);
  for (int i = threadIdx.x * N; i < hidden; i += step) {
    float values[N], weights[N], biases[N];
    load(row + i, values);
    load(weight + i, weights);
    load(bias + i, biases);
#pragma unroll
    for (int j = 0; j < N; ++j) values[j] = (values[j] - mean) * scale * weights[j] + biases[j];
    store(out + i, values);
  }
}

// Not __restrict__: out may be x.
template <typename T, int N, bool kAdd>
__global__ void layer_norm_kernel(T* out, T* residual, const T* x, const T* weight, const T* bias,
                                  int hidden, float eps) {
  launch_dependents();
  wait_for_predecessor();
  extern __shared__ __align__(16) char shared[];
  T* row = reinterpret_cast<T*>(shared);
  const int64_t base = static_cast<int64_t>(blockIdx.x) * hidden;
  float sum = 0.0f;
  for (int i = threadIdx.x * N; i < hidden; i += blockDim.x * N) {
    float values[N];
    load(x + base + i, values);
    if constexpr (kAdd) {
      float before[N];
      load(residual + base + i, before);
#pragma unroll
      for (int j = 0; j < N; ++j) values[j] = rounded<T>(values[j] + before[j]);
      store(residual + base + i, values);
    }
#pragma unroll
    for (int j = 0; j < N; ++j) sum += values[j];
    store(row + i, values);
  }
  layer_norm_row<T, N>(out + base, row, sum, weight, bias, hidden, eps);
}

// Block (token, picture): the class token or a patch, plus the token's position.
template <typename T, int N>
__global__ void embed_norm_kernel(T* __restrict__ out, const T* __restrict__ patches,
                                  const T* __restrict__ class_token,
                                  const T* __restrict__ positions, const T* __restrict__ weight,
                                  const T* __restrict__ bias, int hidden, float eps) {
  launch_dependents();
  wait_for_predecessor();
  extern __shared__ __align__(16) char shared[];
  T* row = reinterpret_cast<T*>(shared);
  const int token = blockIdx.x;
  const int64_t picture = blockIdx.y, tokens = gridDim.x;
  const T* x = token == 0 ? class_token : patches + (picture * (tokens - 1) + token - 1) * hidden;
  const T* position = positions + static_cast<int64_t>(token) * hidden;
  float sum = 0.0f;
  for (int i = threadIdx.x * N; i < hidden; i += blockDim.x * N) {
    float values[N], added[N];
    load(x + i, values);
    load(position + i, added);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      values[j] = rounded<T>(values[j] + added[j]);
      sum += values[j];
    }
    store(row + i, values);
  }
  layer_norm_row<T, N>(out + (picture * tokens + token) * hidden, row, sum, weight, bias, hidden,
                       eps);
}

// The threads of a row, N elements each at a time.
template <int N>
int threads_for(int64_t hidden) {
  return static_cast<int>(
      std::min<int64_t>(1024, ceil_div(ceil_div<int64_t>(hidden, N), int64_t{kWarp}) * kWarp));
}

template <typename T>
void check_row_fits(int64_t hidden) {
  STD_TORCH_CHECK(hidden * sizeof(T) <= 48 << 10, "the row does not fit shared memory");
}

template <typename T, int N, bool kAdd>
void launch(const Launch& to, Tensor& out, Tensor* residual, const Tensor& x, const Tensor& weight,
            float eps) {
  const int64_t rows = x.size(0);
  const int hidden = static_cast<int>(x.size(1));
  launch_chained(rms_norm_kernel<T, N, kAdd>, rows, threads_for<N>(hidden), hidden * sizeof(T),
                 to.stream(), data<T>(out), kAdd ? data<T>(*residual) : nullptr, data<T>(x),
                 data<T>(weight), hidden, eps);
}

template <bool kAdd>
void run(Tensor& out, Tensor* residual, const Tensor& x, const Tensor& weight, double eps) {
  STD_TORCH_CHECK(x.dim() == 2 && out.dim() == 2, "x and out must be [T, H]");
  const ScalarType type = x.scalar_type();
  const int64_t rows = x.size(0), hidden = x.size(1);
  check_column(out, type, rows * hidden, "out");
  check_column(x, type, rows * hidden, "x");
  check_column(weight, type, hidden, "weight");
  if (kAdd) check_column(*residual, type, rows * hidden, "residual");
  if (rows == 0) return;
  const bool vectors = hidden % kVector == 0 && aligned(out) && aligned(x) && aligned(weight) &&
                       (!kAdd || aligned(*residual));
  const Launch to(x);
  by_type(x, [&](auto zero) {
    using T = decltype(zero);
    check_row_fits<T>(hidden);
    const float e = static_cast<float>(eps);
    if (vectors) {
      launch<T, kVector, kAdd>(to, out, residual, x, weight, e);
    } else {
      launch<T, 1, kAdd>(to, out, residual, x, weight, e);
    }
  });
}

template <bool kAdd>
void run_layer_norm(Tensor& out, Tensor* residual, const Tensor& x, const Tensor& weight,
                    const Tensor& bias, double eps) {
  STD_TORCH_CHECK(x.dim() == 2 && out.dim() == 2, "x and out must be [T, H]");
  const ScalarType type = x.scalar_type();
  const int64_t rows = x.size(0), hidden = x.size(1);
  check_column(out, type, rows * hidden, "out");
  check_column(x, type, rows * hidden, "x");
  check_column(weight, type, hidden, "weight");
  check_column(bias, type, hidden, "bias");
  if (kAdd) check_column(*residual, type, rows * hidden, "residual");
  if (rows == 0) return;
  const bool vectors = hidden % kVector == 0 && aligned(out) && aligned(x) && aligned(weight) &&
                       aligned(bias) && (!kAdd || aligned(*residual));
  const Launch to(x);
  by_type(x, [&](auto zero) {
    using T = decltype(zero);
    check_row_fits<T>(hidden);
    const auto kernel =
        vectors ? layer_norm_kernel<T, kVector, kAdd> : layer_norm_kernel<T, 1, kAdd>;
    launch_chained(kernel, rows, vectors ? threads_for<kVector>(hidden) : threads_for<1>(hidden),
                   hidden * sizeof(T), to.stream(), data<T>(out),
                   kAdd ? data<T>(*residual) : nullptr, data<T>(x), data<T>(weight), data<T>(bias),
                   static_cast<int>(hidden), static_cast<float>(eps));
  });
}

}  // namespace

void rms_norm(Tensor out, Tensor x, Tensor weight, double eps) {
  run<false>(out, nullptr, x, weight, eps);
}

void add_rms_norm(Tensor out, Tensor residual, Tensor x, Tensor weight, double eps) {
  run<true>(out, &residual, x, weight, eps);
}

void layer_norm(Tensor out, Tensor x, Tensor weight, Tensor bias, double eps) {
  run_layer_norm<false>(out, nullptr, x, weight, bias, eps);
}

void add_layer_norm(Tensor out, Tensor residual, Tensor x, Tensor weight, Tensor bias, double eps) {
  run_layer_norm<true>(out, &residual, x, weight, bias, eps);
}

void embed_norm(Tensor out, Tensor patches, Tensor class_token, Tensor positions, Tensor weight,
                Tensor bias, double eps) {
  STD_TORCH_CHECK(out.dim() == 3 && patches.dim() == 3 && out.size(1) == patches.size(1) + 1,
                  "out must be [n, 1 + patches, H], patches [n, patches, H]");
  const ScalarType type = out.scalar_type();
  const int64_t pictures = out.size(0), tokens = out.size(1), hidden = out.size(2);
  check_column(out, type, pictures * tokens * hidden, "out");
  check_column(patches, type, pictures * (tokens - 1) * hidden, "patches");
  check_column(class_token, type, hidden, "class_token");
  check_column(positions, type, tokens * hidden, "positions");
  check_column(weight, type, hidden, "weight");
  check_column(bias, type, hidden, "bias");
  STD_TORCH_CHECK(pictures <= 65535, "too many pictures at once");
  if (pictures == 0) return;
  const bool vectors = hidden % kVector == 0 && aligned(out) && aligned(patches) &&
                       aligned(class_token) && aligned(positions) && aligned(weight) &&
                       aligned(bias);
  const Launch to(out);
  by_type(out, [&](auto zero) {
    using T = decltype(zero);
    check_row_fits<T>(hidden);
    const auto kernel = vectors ? embed_norm_kernel<T, kVector> : embed_norm_kernel<T, 1>;
    launch_chained(kernel, dim3(tokens, pictures),
                   vectors ? threads_for<kVector>(hidden) : threads_for<1>(hidden),
                   hidden * sizeof(T), to.stream(), data<T>(out), data<T>(patches),
                   data<T>(class_token), data<T>(positions), data<T>(weight), data<T>(bias),
                   static_cast<int>(hidden), static_cast<float>(eps));
  });
}

}  // namespace llava_engine
