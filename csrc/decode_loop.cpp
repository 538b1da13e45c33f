// The native decode loop: a thread that launches captured decoding steps ahead of the device and
// reads the tokens that they leave in pinned memory. Nothing here knows Python: the C functions at
// the end are called through ctypes, which gives up the GIL for as long as they run.
#include <cuda_runtime.h>
#include <pthread.h>
#include <sys/prctl.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "signals_blocked.h"
#include "step_time.h"

extern "C" struct llava_decode_event {
  int64_t step;
  int64_t time_ns;  // CLOCK_MONOTONIC, when the token was seen
  int32_t row;
  int32_t token;
  int32_t flags;  // bit 0: this token finishes the row
  int32_t reserved;
};

namespace {

using Event = llava_decode_event;

// What `wait` says of the run.
enum State : int { kRunning = 0, kEnded = 1, kDeviceFailed = 2, kEntryMissing = 3 };

constexpr int kFinished = 1;  // bit 0 of an entry's flags

constexpr int64_t kMicrosecond = 1000;
constexpr int64_t kMillisecond = 1000 * kMicrosecond;
// 1 % of the shortest step of a 7B model (2 ms in nf4), and 20 times what looking costs.
constexpr int64_t kLookEvery = 20 * kMicrosecond;
// How long nothing may arrive before the device is asked whether it still works.
constexpr int64_t kQueryEvery = 5 * kMillisecond;
constexpr int64_t kIdleQueryEvery = 100 * kMicrosecond;
constexpr int64_t kLongestWait = int64_t{1000000} * 1000 * kMillisecond;

// A ring entry. The device writes it as one aligned 16-byte store (csrc/decode_step.cu).
struct alignas(16) Entry {
  int32_t sequence;  // step + 1
  int32_t token;
  int32_t flags;
  int32_t reserved;
};
static_assert(sizeof(Entry) == 16 && sizeof(Event) == 32);

struct Run {
  cudaGraphExec_t graph;
  std::vector<int> rows;  // unfinished, ascending
  int64_t first_step;
  int64_t max_steps;
  int ahead;
  int stop_at;
};

int64_t now_ns() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return int64_t{time.tv_sec} * 1000 * kMillisecond + time.tv_nsec;
}

void sleep_ns(int64_t duration) {
  const timespec time{static_cast<time_t>(duration / (1000 * kMillisecond)),
                      static_cast<long>(duration % (1000 * kMillisecond))};
  nanosleep(&time, nullptr);
}

// Has the entry of `step` arrived? An aligned 16-byte store lies within one cache line, which the
// device's write reaches as a whole: who sees its first word can no longer read an older state of
// the others, if the loads happen in this order. That is what acquire says, on x86 for free.
bool read_entry(Entry& entry, int64_t step, int32_t& token, int32_t& flags) {
  const std::atomic_ref<int32_t> sequence(entry.sequence);
  if (sequence.load(std::memory_order_acquire) != static_cast<int32_t>(step + 1)) return false;
  token = std::atomic_ref<int32_t>(entry.token).load(std::memory_order_relaxed);
  flags = std::atomic_ref<int32_t>(entry.flags).load(std::memory_order_relaxed);
  return true;
}

class DecodeLoop {
 public:
  DecodeLoop(int device, cudaStream_t stream, Entry* ring, int ring_steps, int max_batch)
      : device_(device),
        stream_(stream),
        ring_(ring),
        ring_steps_(ring_steps),
        max_batch_(max_batch) {
    found_.reserve(max_batch);
  }
  ~DecodeLoop() { close(); }

  // Returns when the thread is ready, or why it is not. Throws std::system_error without a thread.
  cudaError_t start() {
    {
      const llava_engine::SignalsBlocked blocked;
      thread_ = std::thread(&DecodeLoop::main, this);
    }
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return started_; });
    return error_;
  }

  cudaError_t run(cudaGraphExec_t graph, const uint8_t* active, int rows, int64_t first_step,
                  int64_t max_steps, int ahead, int stop_at) {
    if (graph == nullptr || active == nullptr || rows < 1 || rows > max_batch_ || first_step < 0 ||
        max_steps < 1 || max_steps > ring_steps_ || ahead < 1 || stop_at < 0) {
      return cudaErrorInvalidValue;
    }
    Run run{graph, {}, first_step, max_steps, ahead, stop_at};
    for (int row = 0; row < rows; ++row) {
      if (active[row] != 0) run.rows.push_back(row);
    }
    const std::lock_guard lock(mutex_);
    if (on_ || closing_) return cudaErrorIllegalState;
    events_.clear();
    events_.reserve(static_cast<size_t>(max_steps) * run.rows.size());
    taken_ = 0;
    next_ = std::move(run);
    on_ = true;
    state_ = kRunning;
    error_ = cudaSuccess;
    stopping_ = false;
    launched_ = 0;
    work_.notify_one();
    return cudaSuccess;
  }

  int wait(Event* events, int capacity, int64_t timeout_ns, int* state, int* error) {
    std::unique_lock lock(mutex_);
    const auto ready = [this] { return taken_ < events_.size() || state_ != kRunning || woken_; };
    if (timeout_ns < 0) {
      changed_.wait(lock, ready);
    } else {
      changed_.wait_for(lock, std::chrono::nanoseconds(std::min(timeout_ns, kLongestWait)), ready);
    }
    woken_ = false;
    const size_t count = std::min(static_cast<size_t>(capacity), events_.size() - taken_);
    std::copy_n(events_.begin() + taken_, count, events);
    taken_ += count;
    // A failure comes alone: who raises it has been given every token before it.
    const bool all_given = taken_ == events_.size() && (state_ == kEnded || count == 0);
    *state = all_given ? state_ : kRunning;
    *error = all_given ? error_ : cudaSuccess;
    if (*state != kRunning) on_ = false;
    return static_cast<int>(count);
  }

  void wake() {
    const std::lock_guard lock(mutex_);
    woken_ = true;
    changed_.notify_all();
  }

  void stop() {
    const std::lock_guard lock(mutex_);
    stopping_ = true;  // `run` resets it
    woken_ = true;
    changed_.notify_all();
  }

  void close() {
    {
      const std::lock_guard lock(mutex_);
      closing_ = stopping_ = woken_ = true;
      changed_.notify_all();
      work_.notify_all();
    }
    if (thread_.joinable()) thread_.join();
  }

  int64_t launched() const { return launched_; }

 private:
  void main() {
    char name[16];
    std::snprintf(name, sizeof(name), "llava-decode:%d", device_);
    pthread_setname_np(pthread_self(), name);
    prctl(PR_SET_TIMERSLACK, static_cast<unsigned long>(kMicrosecond), 0, 0, 0);
    cudaError_t start_error = cudaSetDevice(device_);
    if (start_error == cudaSuccess) {
      // A capture elsewhere in the process, in CUDA's default mode, must not forbid our queries.
      cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
      start_error = cudaThreadExchangeStreamCaptureMode(&mode);
    }
    std::unique_lock lock(mutex_);
    error_ = start_error;
    started_ = true;
    changed_.notify_all();
    if (start_error != cudaSuccess) return;
    for (;;) {
      work_.wait(lock, [this] { return next_.has_value() || closing_; });
      if (!next_.has_value()) return;
      Run run = std::move(*next_);
      next_.reset();
      lock.unlock();
      const auto [state, error] = execute(run);
      lock.lock();
      state_ = state;
      error_ = error;
      changed_.notify_all();
    }
  }

  std::pair<State, cudaError_t> execute(Run& run) {
    int64_t launched = 0, seen = 0;
    cudaError_t launch_error = cudaSuccess;
    int64_t last_seen = now_ns(), next_query = last_seen + kQueryEvery;
    llava_engine::StepTime step_time;
    bool in_vain = false;  // whether the next step was looked for before it was there
    for (;;) {
      const bool going = run.rows.size() > static_cast<size_t>(run.stop_at);
      // The first step is launched whatever was said: no storm of stops keeps a batch where it is.
      const auto may_launch = [&] {
        return launch_error == cudaSuccess && launched < run.max_steps &&
               launched - seen < run.ahead && ((going && !stopping_) || launched == 0);
      };
      // One at a time: a launch may take as long as a quick step, whose tokens are to be seen.
      if (may_launch()) {
        launch_error = cudaGraphLaunch(run.graph, stream_);
        if (launch_error == cudaSuccess) launched_ = ++launched;
      }
      if (launched == seen) break;
      if (run.rows.empty()) {
        // The steps that are still in flight have no rows left and tell us nothing.
        const cudaError_t error = wait_until_idle();
        if (error != cudaSuccess) return {kDeviceFailed, error};
        break;
      }
      const auto look = [&] {
        if (!take_step(run, run.first_step + seen)) {
          in_vain = true;
          return false;
        }
        const int64_t now = now_ns();
        if (++seen > 1) step_time.seen(now - last_seen, in_vain);
        last_seen = now;
        next_query = now + kQueryEvery;
        in_vain = false;
        return true;
      };
      if (look() || may_launch()) continue;
      const int64_t now = now_ns();
      if (now >= next_query) {
        const cudaError_t error = cudaStreamQuery(stream_);
        next_query = now + kQueryEvery;
        if (error == cudaSuccess) {
          // All is done, so the entries are there or never will be.
          if (look()) continue;
          return {kEntryMissing, cudaErrorUnknown};
        }
        if (error != cudaErrorNotReady) return {kDeviceFailed, error};
      }
      // Steps take about the same time, so the first three quarters of one need no look.
      const int64_t until = std::min(last_seen + step_time.guess() / 4 * 3, next_query);
      sleep_ns(std::max(until - now, kLookEvery));
    }
    return {launch_error == cudaSuccess ? kEnded : kDeviceFailed, launch_error};
  }

  // Hands out the tokens of `step` if all of them are there, and strikes out the rows they finish.
  bool take_step(Run& run, int64_t step) {
    Entry* const entries = ring_ + step % ring_steps_ * max_batch_;
    found_.clear();
    for (const int row : run.rows) {
      int32_t token, flags;
      if (!read_entry(entries[row], step, token, flags)) return false;
      found_.push_back({step, 0, row, token, flags, 0});
    }
    const int64_t now = now_ns();
    for (Event& event : found_) event.time_ns = now;
    run.rows.clear();
    for (const Event& event : found_) {
      if ((event.flags & kFinished) == 0) run.rows.push_back(event.row);
    }
    const std::lock_guard lock(mutex_);
    events_.insert(events_.end(), found_.begin(), found_.end());
    changed_.notify_all();
    return true;
  }

  cudaError_t wait_until_idle() {
    for (;;) {
      const cudaError_t error = cudaStreamQuery(stream_);
      if (error != cudaErrorNotReady) return error;
      sleep_ns(kIdleQueryEvery);
    }
  }

  const int device_;
  const cudaStream_t stream_;
  Entry* const ring_;
  const int ring_steps_, max_batch_;

  std::thread thread_;
  std::vector<Event> found_;  // the thread's own
  std::atomic<bool> stopping_ = false;
  std::atomic<int64_t> launched_ = 0;

  // Held for what stands below, never in a call to CUDA.
  std::mutex mutex_;
  std::condition_variable work_, changed_;
  std::optional<Run> next_;
  std::vector<Event> events_;  // of this run; the first `taken_` have been waited for
  size_t taken_ = 0;
  State state_ = kEnded;
  cudaError_t error_ = cudaSuccess;
  bool started_ = false;
  bool on_ = false;  // from `run` until `wait` has told its end
  bool woken_ = false;
  bool closing_ = false;
};

DecodeLoop* as_loop(void* loop) { return static_cast<DecodeLoop*>(loop); }

}  // namespace

// The rest of the library is compiled with hidden symbols.
#define LLAVA_EXPORT extern "C" __attribute__((visibility("default")))

// A loop on `device` that launches into `stream`, which nobody else uses during a run. ring:
// [ring_steps][max_batch] entries of 16 bytes in pinned memory, which outlives the loop. NULL, and
// a cudaError_t in *error, if it cannot be had.
LLAVA_EXPORT void* llava_decode_loop_create(int device, void* stream, const void* ring,
                                            int ring_steps, int max_batch, int* error) {
  *error = cudaErrorInvalidValue;
  if (ring == nullptr || reinterpret_cast<uintptr_t>(ring) % alignof(Entry) != 0 ||
      ring_steps < 1 || max_batch < 1) {
    return nullptr;
  }
  try {
    // Not const: std::atomic_ref has no other way to read.
    Entry* const entries = static_cast<Entry*>(const_cast<void*>(ring));
    auto loop = std::make_unique<DecodeLoop>(device, static_cast<cudaStream_t>(stream), entries,
                                             ring_steps, max_batch);
    *error = loop->start();
    return *error == cudaSuccess ? loop.release() : nullptr;
  } catch (const std::bad_alloc&) {
    *error = cudaErrorMemoryAllocation;
  } catch (const std::system_error&) {
    *error = cudaErrorOperatingSystem;  // no thread
  }
  return nullptr;
}

// Starts a run: launches graph_exec (cudaGraphExec_t) for first_step, first_step + 1, ..., at most
// max_steps (<= ring_steps) of them, with at most `ahead` launches whose tokens were not yet seen.
// active: uint8[rows], which rows are in use; others write no entries. After the first, launches no
// more once `stop` was called or at most stop_at rows are unfinished. It ends when all that was
// launched was seen. Returns a cudaError_t: cudaErrorIllegalState while a run is on or after close.
LLAVA_EXPORT int llava_decode_loop_run(void* loop, void* graph_exec, const uint8_t* active,
                                       int rows, int64_t first_step, int64_t max_steps, int ahead,
                                       int stop_at) {
  try {
    return as_loop(loop)->run(static_cast<cudaGraphExec_t>(graph_exec), active, rows, first_step,
                              max_steps, ahead, stop_at);
  } catch (const std::bad_alloc&) {
    return cudaErrorMemoryAllocation;
  }
}

// Blocks until tokens are there, the run has ended, timeout_ns passed (< 0: no limit), or `wake` or
// `stop` was called since the last wait returned. Returns the number of events written, whole steps
// in order, rows ascending (`capacity` may cut one). *state: 0 running; 1 ended, and no events left
// (also without a run); failed, and no events at all: 2 with the device's cudaError_t in *error, 3
// when the stream is idle and an entry is missing. A failure ends the run.
LLAVA_EXPORT int llava_decode_loop_wait(void* loop, llava_decode_event* events, int capacity,
                                        int64_t timeout_ns, int* state, int* error) {
  return as_loop(loop)->wait(events, capacity, timeout_ns, state, error);
}

// Makes a blocked wait return now, or the next one at once.
LLAVA_EXPORT void llava_decode_loop_wake(void* loop) { as_loop(loop)->wake(); }

// Launches nothing more in this run, a launch that has begun aside, and wakes.
LLAVA_EXPORT void llava_decode_loop_stop(void* loop) { as_loop(loop)->stop(); }

// Steps launched in the current or last run.
LLAVA_EXPORT int64_t llava_decode_loop_launched(void* loop) { return as_loop(loop)->launched(); }

// Stops, waits for what is in flight and ends the thread. Every function may still be called, until
// `destroy`.
LLAVA_EXPORT void llava_decode_loop_close(void* loop) { as_loop(loop)->close(); }

// Closes and frees; nobody may be in, or make, another call.
LLAVA_EXPORT void llava_decode_loop_destroy(void* loop) { delete as_loop(loop); }
