// What llava_engine/kernels/library.py asks and tells through ctypes. Can this driver and this GPU
// run the code that is in here? One real look-up answers both. And is this thread capturing a step
// whose kernels may overlap?
#include <cuda_runtime.h>

namespace llava_engine {
thread_local bool programmatic_launch = false;  // common.cuh
}

namespace {

__global__ void probe_kernel() {}

}  // namespace

// The rest of the library is compiled with hidden symbols.
#define LLAVA_EXPORT extern "C" __attribute__((visibility("default")))

// The architectures that were compiled for, as setup.py had them.
LLAVA_EXPORT const char* llava_engine_architectures() { return LLAVA_ARCHITECTURES; }

// A cudaError_t: 0 if the kernels run on `device`. Changes nothing, the current device included.
LLAVA_EXPORT int llava_engine_probe(int device) {
  int before = 0;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error == cudaSuccess) {
    cudaFuncAttributes attributes;
    error = cudaFuncGetAttributes(&attributes, probe_kernel);
    const cudaError_t restored = cudaSetDevice(before);
    if (error == cudaSuccess) error = restored;
  }
  cudaGetLastError();  // it is reported here, not by whatever launches next
  return error;
}

LLAVA_EXPORT const char* llava_engine_error_text(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

// Returns what it was before.
LLAVA_EXPORT int llava_engine_programmatic_launch(int on) {
  const bool before = llava_engine::programmatic_launch;
  llava_engine::programmatic_launch = on != 0;
  return before;
}
