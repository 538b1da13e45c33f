// A device that decodes by a script: what is launched becomes, in order and when the test allows
// it, the ring entries that csrc/decode_step.cu would write. A stream is one such device. Tests
// drive it through ctypes.
#include <cuda_runtime.h>
#include <pthread.h>
#include <signal.h>
#include <sys/prctl.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <limits>
#include <mutex>
#include <thread>
#include <vector>

namespace {

std::atomic<int> threads = 0;  // that have a current device and have not ended

struct CurrentDevice {
  int index = -1;
  ~CurrentDevice() {
    if (index >= 0) --threads;
  }
};

thread_local CurrentDevice current_device;
thread_local cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;

// What the thread that launches is like.
struct Launcher {
  char name[16];
  uint64_t blocked_signals;  // bit n - 1: signal n
  int32_t device;
  int32_t capture_mode;
  int64_t timer_slack;
};

}  // namespace

struct FakeDevice {
  std::mutex mutex;
  std::condition_variable changed;
  std::thread thread;

  int32_t* ring = nullptr;
  int ring_steps = 0, max_batch = 0;

  // The state that a run starts from.
  cudaGraphExec_t graph = nullptr;
  std::vector<int32_t> tokens;  // [steps][rows]
  std::vector<int32_t> left;    // [rows]: tokens until the row is finished
  int64_t first_step = 0, step = 0;

  // Since the beginning.
  int64_t launched = 0, completed = 0, queries = 0, most_in_flight = 0;
  Launcher launcher{};

  // Orders of the test.
  int64_t allowed = 0;  // steps that may complete, since the beginning
  bool complete_at_query = false;
  int64_t refuse_launch = -1, break_at = -1;
  int64_t drop_step = -1, drop_row = -1;
  cudaError_t launch_error = cudaSuccess, sticky = cudaSuccess;
  bool broken = false, ending = false;

  // The step's kernel `advance`. An entry's first word is written last: this machine has no store
  // of 16 bytes that C++ vouches for.
  void execute() {
    const int rows = static_cast<int>(left.size());
    for (int row = 0; row < rows; ++row) {
      if (left[row] == 0) continue;
      const bool finished = --left[row] == 0;
      if (step == drop_step && row == drop_row) continue;
      int32_t* entry = ring + (step % ring_steps * max_batch + row) * 4;
      const int32_t token = tokens.at((step - first_step) * rows + row);
      std::atomic_ref(entry[1]).store(token, std::memory_order_relaxed);
      std::atomic_ref(entry[2]).store(finished ? 1 : 0, std::memory_order_relaxed);
      std::atomic_ref(entry[0]).store(static_cast<int32_t>(step + 1), std::memory_order_release);
    }
    ++step;
  }

  void main() {
    std::unique_lock lock(mutex);
    for (;;) {
      changed.wait(lock, [this] {
        return ending || (!broken && (completed == break_at || completed < pending()));
      });
      if (ending) return;
      if (completed == break_at) {
        broken = true;
      } else {
        execute();
        ++completed;
      }
      changed.notify_all();
    }
  }

  int64_t pending() const { return launched < allowed ? launched : allowed; }

  template <typename Condition>
  int wait_for(double seconds, Condition condition) {
    std::unique_lock lock(mutex);
    return changed.wait_for(lock, std::chrono::duration<double>(seconds), condition);
  }
};

extern "C" {

cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device > 7) return cudaErrorInvalidDevice;
  if (current_device.index < 0) ++threads;
  current_device.index = device;
  return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  const cudaStreamCaptureMode before = capture_mode;
  capture_mode = *mode;
  *mode = before;
  return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
  const std::lock_guard lock(stream->mutex);
  if (stream->broken) return stream->sticky;
  if (graph != stream->graph) return cudaErrorInvalidResourceHandle;
  if (stream->launched == stream->refuse_launch) return stream->launch_error;
  ++stream->launched;
  const int64_t in_flight = stream->launched - stream->completed;
  if (in_flight > stream->most_in_flight) stream->most_in_flight = in_flight;
  Launcher& launcher = stream->launcher;
  sigset_t blocked;
  pthread_sigmask(SIG_SETMASK, nullptr, &blocked);
  launcher.blocked_signals = 0;
  for (int signal = 1; signal <= 64; ++signal) {
    if (sigismember(&blocked, signal) == 1) launcher.blocked_signals |= uint64_t{1} << (signal - 1);
  }
  pthread_getname_np(pthread_self(), launcher.name, sizeof(launcher.name));
  launcher.device = current_device.index;
  launcher.capture_mode = capture_mode;
  launcher.timer_slack = prctl(PR_GET_TIMERSLACK, 0, 0, 0, 0);
  stream->changed.notify_all();
  return cudaSuccess;
}

cudaError_t cudaStreamQuery(cudaStream_t stream) {
  std::unique_lock lock(stream->mutex);
  ++stream->queries;
  if (stream->complete_at_query) stream->allowed = std::numeric_limits<int64_t>::max();
  stream->changed.notify_all();
  if (stream->complete_at_query) {
    stream->changed.wait(
        lock, [=] { return stream->broken || stream->completed == stream->launched; });
  }
  if (stream->broken) return stream->sticky;
  return stream->completed == stream->launched ? cudaSuccess : cudaErrorNotReady;
}

const char* llava_engine_error_text(int error) {
  return error == cudaErrorIllegalAddress ? "an illegal memory access was encountered" : "other";
}

FakeDevice* fake_new(int32_t* ring, int ring_steps, int max_batch) {
  auto* device = new FakeDevice;
  device->ring = ring;
  device->ring_steps = ring_steps;
  device->max_batch = max_batch;
  device->thread = std::thread(&FakeDevice::main, device);
  return device;
}

void fake_free(FakeDevice* device) {
  {
    const std::lock_guard lock(device->mutex);
    device->ending = true;
    device->changed.notify_all();
  }
  device->thread.join();
  delete device;
}

// Before a run. left: [rows], tokens that each row will sample, 0: idle. tokens: [steps][rows].
void fake_fill(FakeDevice* device, cudaGraphExec_t graph, const int32_t* left, int rows,
               const int32_t* tokens, int steps, int64_t first_step) {
  const std::lock_guard lock(device->mutex);
  device->graph = graph;
  device->left.assign(left, left + rows);
  device->tokens.assign(tokens, tokens + int64_t{steps} * rows);
  device->first_step = device->step = first_step;
}

// Lets `steps` more complete.
void fake_allow(FakeDevice* device, int64_t steps) {
  const std::lock_guard lock(device->mutex);
  device->allowed += steps;
  device->changed.notify_all();
}

// From the next query on all steps may complete; those in flight do before it is answered.
void fake_complete_at_query(FakeDevice* device) {
  const std::lock_guard lock(device->mutex);
  device->complete_at_query = true;
}

// The launch after `launched` ones is refused, and so is every later one.
void fake_refuse(FakeDevice* device, int64_t launched, int error) {
  const std::lock_guard lock(device->mutex);
  device->refuse_launch = launched;
  device->launch_error = static_cast<cudaError_t>(error);
}

// Once `completed` steps are done, or now if it is below 0, the device does nothing more and
// answers all with `error`.
void fake_break(FakeDevice* device, int64_t completed, int error) {
  const std::lock_guard lock(device->mutex);
  device->sticky = static_cast<cudaError_t>(error);
  device->break_at = completed;
  if (completed < 0) device->broken = true;
  device->changed.notify_all();
}

// This entry is not written.
void fake_drop(FakeDevice* device, int64_t step, int64_t row) {
  const std::lock_guard lock(device->mutex);
  device->drop_step = step;
  device->drop_row = row;
}

// These return whether it came to that within `seconds`.
int fake_wait_launched(FakeDevice* device, int64_t count, double seconds) {
  return device->wait_for(seconds, [=] { return device->launched >= count; });
}

int fake_wait_completed(FakeDevice* device, int64_t count, double seconds) {
  return device->wait_for(seconds, [=] { return device->completed >= count; });
}

// `count` more, counted from this call.
int fake_wait_queries(FakeDevice* device, int64_t count, double seconds) {
  int64_t wanted;
  {
    const std::lock_guard lock(device->mutex);
    wanted = device->queries + count;
  }
  return device->wait_for(seconds, [=] { return device->queries >= wanted; });
}

int64_t fake_launched(FakeDevice* device) {
  const std::lock_guard lock(device->mutex);
  return device->launched;
}

int64_t fake_completed(FakeDevice* device) {
  const std::lock_guard lock(device->mutex);
  return device->completed;
}

int64_t fake_most_in_flight(FakeDevice* device) {
  const std::lock_guard lock(device->mutex);
  return device->most_in_flight;
}

int fake_threads() { return threads; }

void fake_launcher(FakeDevice* device, Launcher* launcher) {
  const std::lock_guard lock(device->mutex);
  *launcher = device->launcher;
}

}  // extern "C"
