// Captures what a thread launches into a stream as a graph, for llava_engine/runtime/graph.py
// through ctypes. Not by torch.cuda.CUDAGraph: that one holds the device's random generator while it
// captures, so that another thread's torch.randn fails, and keeps it after a capture that failed.
#include <cuda_runtime.h>

// The rest of the library is compiled with hidden symbols.
#define LLAVA_EXPORT extern "C" __attribute__((visibility("default")))

// What this thread launches into `stream` from now on is recorded instead of run. Other threads may
// use the device as they like. Returns a cudaError_t, as all here.
LLAVA_EXPORT int llava_engine_capture_begin(void* stream) {
  return cudaStreamBeginCapture(static_cast<cudaStream_t>(stream), cudaStreamCaptureModeThreadLocal);
}

// Ends the capture, also one that failed. *graph_exec: the recorded cudaGraphExec_t, ready on the
// device and the caller's to destroy; NULL after an error.
LLAVA_EXPORT int llava_engine_capture_end(void* stream, void** graph_exec) {
  *graph_exec = nullptr;
  const auto to = static_cast<cudaStream_t>(stream);
  cudaGraph_t graph = nullptr;
  cudaError_t error = cudaStreamEndCapture(to, &graph);
  cudaGraphExec_t made = nullptr;
  if (error == cudaSuccess) error = cudaGraphInstantiate(&made, graph, 0);
  if (graph != nullptr) cudaGraphDestroy(graph);
  if (error == cudaSuccess) error = cudaGraphUpload(made, to);
  if (error == cudaSuccess) {
    *graph_exec = made;
  } else {
    if (made != nullptr) cudaGraphExecDestroy(made);
    cudaGetLastError();  // it is reported here, not by whatever launches next
  }
  return error;
}

LLAVA_EXPORT int llava_engine_graph_launch(void* graph_exec, void* stream) {
  return cudaGraphLaunch(static_cast<cudaGraphExec_t>(graph_exec),
                         static_cast<cudaStream_t>(stream));
}

LLAVA_EXPORT int llava_engine_graph_destroy(void* graph_exec) {
  return cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(graph_exec));
}
