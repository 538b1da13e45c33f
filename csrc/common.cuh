// What every family uses: element types, vector loads and stores, reductions, and the stream and
// checks around a launch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace llava_engine {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kVector = 8;  // elements: 16 bytes of a 16-bit type

template <typename Int>
__host__ __device__ constexpr Int ceil_div(Int a, Int b) {
  return (a + b - 1) / b;
}

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// x as it would be after a store in T: where torch rounds between two operations, so do we.
template <typename T>
__device__ inline float rounded(float x) {
  return to_float(from_float<T>(x));
}

// N elements as one, moved by accesses of at most 16 bytes.
template <typename T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Pack {
  T values[N];
};

template <int N, typename T>
__device__ inline void load(const T* from, float (&to)[N]) {
  const Pack<T, N> pack = *reinterpret_cast<const Pack<T, N>*>(from);
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = to_float(pack.values[i]);
}

template <int N, typename T>
__device__ inline void store(T* to, const float (&from)[N]) {
  Pack<T, N> pack;
#pragma unroll
  for (int i = 0; i < N; ++i) pack.values[i] = from_float<T>(from[i]);
  *reinterpret_cast<Pack<T, N>*>(to) = pack;
}

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
  return x;
}

__device__ inline float warp_max(float x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, offset));
  }
  return x;
}

// The sum over a block of whole warps, in every thread. Called once per kernel, or with a
// __syncthreads in between.
__device__ inline float block_sum(float x) {
  __shared__ float sums[kWarp];
  const int lane = threadIdx.x % kWarp;
  x = warp_sum(x);
  if (lane == 0) sums[threadIdx.x / kWarp] = x;
  __syncthreads();
  return warp_sum(lane < blockDim.x / kWarp ? sums[lane] : 0.0f);
}

// Makes a tensor's device current and names the stream that torch would use there.
class Launch {
 public:
  explicit Launch(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

// Programmatic dependent launch: the kernels of a captured decoding step start before the one ahead
// has ended. Such a kernel lets its successor start at once, may then read what no kernel of the
// step writes (weights, block tables, keys of earlier steps), and waits before it reads or writes
// anything else. Every block has to wait: a grid that ended early would release its successor too
// soon. Both are no-ops where the launch was an ordinary one.
__device__ inline void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ inline void wait_for_predecessor() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Whether this thread's launches are programmatic (llava_engine_programmatic_launch, probe.cu).
extern thread_local bool programmatic_launch;

// Launches a kernel that calls wait_for_predecessor; its blocks in clusters of `cluster` along x.
template <typename... Parameters, typename... Arguments>
void launch_clusters(void (*kernel)(Parameters...), int cluster, dim3 grid, dim3 block,
                     size_t shared, cudaStream_t stream, Arguments&&... arguments) {
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = attributes;
  if (programmatic_launch) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    // An SM must run empty before it divides its memory another way: all kernels want the same.
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                        cudaSharedmemCarveoutMaxShared));
  }
  if (cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  }
  STD_CUDA_CHECK(
      cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
}

// The same without clusters.
template <typename... Parameters, typename... Arguments>
void launch_chained(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared,
                    cudaStream_t stream, Arguments&&... arguments) {
  launch_clusters(kernel, 1, grid, block, shared, stream, arguments...);
}

// Calls f with a value of the element type: half, bfloat16 or float.
template <typename F>
void by_type(const Tensor& tensor, F&& f) {
  switch (tensor.scalar_type()) {
    case ScalarType::Half:
      return f(__half{});
    case ScalarType::BFloat16:
      return f(__nv_bfloat16{});
    case ScalarType::Float:
      return f(float{});
    default:
      STD_TORCH_CHECK(false, "the kernels take float16, bfloat16 and float32");
  }
}

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

inline bool aligned(const Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0;
}

inline void check_dense(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_cuda(), name, " must be on the GPU");
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
}

inline void check_type(const Tensor& tensor, ScalarType type, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == type, name, " has the wrong type");
}

// A dense vector of `count` elements of `type`.
inline void check_column(const Tensor& tensor, ScalarType type, int64_t count, const char* name) {
  check_dense(tensor, name);
  check_type(tensor, type, name);
  STD_TORCH_CHECK(tensor.numel() == count, name, " has the wrong length");
}

}  // namespace llava_engine
