// A stream of a device that puts every copy off until somebody waits for what lies behind it. So a
// piece that is written again too early arrives with what it holds by then. Tests drive it through
// ctypes, and say what befalls a copier's own threads.
#include <cuda_runtime.h>
#include <pthread.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <deque>
#include <mutex>
#include <string_view>
#include <thread>

namespace {

constexpr int kDevice = 3;  // the only one there is

thread_local int current_device = -1;

enum Helpers : int { kPrompt, kHeld, kSlow };
std::atomic<int> helpers = kPrompt;

bool is_helper() {
  char name[16];
  pthread_getname_np(pthread_self(), name, sizeof(name));
  return std::string_view(name).starts_with("llava-copy:");
}

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

}  // namespace

struct FakeDevice {
  std::mutex mutex;
  std::deque<Copy> pending;
  int64_t queued = 0, done = 0, refuse_at = -1;

  void run_until(int64_t count) {
    for (; done < count; ++done) {
      const Copy& copy = pending.front();
      std::memcpy(copy.to, copy.from, copy.bytes);
      pending.pop_front();
    }
  }
};

struct FakeEvent {
  FakeDevice* stream = nullptr;
  int64_t behind = 0;  // so many copies
};

extern "C" {

cudaError_t cudaSetDevice(int device) {
  if (device != kDevice) return cudaErrorInvalidDevice;
  current_device = device;
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream) {
  const std::lock_guard lock(stream->mutex);
  if (current_device != kDevice) return cudaErrorInvalidDevice;
  if (kind != cudaMemcpyHostToDevice) return cudaErrorInvalidValue;
  if (stream->refuse_at >= 0 && stream->queued >= stream->refuse_at) return cudaErrorIllegalAddress;
  stream->pending.push_back({to, from, bytes});
  ++stream->queued;
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  const std::lock_guard lock(stream->mutex);
  event->stream = stream;
  event->behind = stream->queued;
  return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  if (event->stream == nullptr) return cudaSuccess;
  const std::lock_guard lock(event->stream->mutex);
  event->stream->run_until(event->behind);
  return cudaSuccess;
}

// Linked with --wrap, these stand between a copier's threads and the first thing that each does,
// and every row that it copies.
int __real_pthread_setname_np(pthread_t thread, const char* name);
int __wrap_pthread_setname_np(pthread_t thread, const char* name) {
  const int result = __real_pthread_setname_np(thread, name);
  helpers.wait(kHeld);
  return result;
}

void* __real_memcpy(void* to, const void* from, size_t bytes);
void* __wrap_memcpy(void* to, const void* from, size_t bytes) {
  if (helpers == kSlow && is_helper()) std::this_thread::sleep_for(std::chrono::microseconds(300));
  return __real_memcpy(to, from, bytes);
}

cudaError_t cudaGetLastError() { return cudaSuccess; }

const char* llava_engine_error_text(int error) {
  return error == cudaErrorIllegalAddress ? "an illegal memory access was encountered" : "other";
}

FakeDevice* fake_stream_new() { return new FakeDevice; }

void fake_stream_free(FakeDevice* stream) { delete stream; }

FakeEvent* fake_event_new() { return new FakeEvent; }

void fake_event_free(FakeEvent* event) { delete event; }

// From now on threads of copiers are 0: left alone, 1: held before they are ready, until this is
// called again, 2: slow.
void fake_helpers(int kind) {
  helpers = kind;
  helpers.notify_all();
}

// The copy after `count` ones is refused, and so is every later one.
void fake_refuse(FakeDevice* stream, int64_t count) { stream->refuse_at = count; }

int64_t fake_queued(FakeDevice* stream) { return stream->queued; }

int64_t fake_done(FakeDevice* stream) { return stream->done; }

void fake_finish(FakeDevice* stream) { stream->run_until(stream->queued); }

}  // extern "C"
