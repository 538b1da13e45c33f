// Copies arrays to the device from memory that is not pinned, for llava_engine/runtime/host_copy.py
// through ctypes. Pinning them would take longer than copying them; so a few threads copy them into
// pieces of memory that is pinned already, from which the device reads. One thread alone copies
// slower than the bus, and starting others takes longer than a small upload: they are kept.
#include <cuda_runtime.h>
#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>
#include <thread>
#include <vector>

// Rows of `row_bytes` that lie `stride` bytes apart, and on the device right behind each other from
// byte `place` on.
extern "C" struct llava_host_array {
  const char* source;
  int64_t rows, row_bytes, stride, place;
};

namespace {

// How long a caller looks for the end of the helpers' last pieces before it sleeps. Copying a piece
// takes some 30 us, and waking up afterwards would take as long again.
constexpr std::chrono::microseconds kLook{50};

// Bytes begin..end of an array, counted without what lies between its rows.
void copy_rows(char* to, const llava_host_array& array, int64_t begin, int64_t end) {
  int64_t row = begin / array.row_bytes, within = begin % array.row_bytes;
  while (begin < end) {
    const char* from = array.source + row * array.stride + within;
    const int64_t bytes = std::min(array.row_bytes - within, end - begin);
    std::memcpy(to, from, bytes);
    to += bytes;
    begin += bytes;
    ++row;
    within = 0;
  }
}

// What the caller of `upload` owns; it is read by those alone for whom that call waits.
struct Upload {
  cudaStream_t stream;
  char* there;
  const llava_host_array* arrays;
  int count;
};

class HostCopier {
 public:
  HostCopier(int device, char* pinned, void* const* copied, int pieces, int64_t piece_bytes)
      : device_(device),
        pinned_(pinned),
        copied_(copied, copied + pieces),
        piece_bytes_(piece_bytes),
        idle_(pieces) {
    std::iota(idle_.begin(), idle_.end(), 0);
  }

  ~HostCopier() {
    {
      const std::lock_guard lock(mutex_);
      closing_ = true;
    }
    work_.notify_all();
    for (std::thread& helper : helpers_) helper.join();
  }

  // Starts at most so many helpers, and waits for none of them.
  void start(int helpers) {
    helpers_.reserve(helpers);
    // No signal may be delivered to a new thread, not even before its first instruction: Python
    // counts on its handlers running in its own threads. Its own faults are let through.
    sigset_t blocked, before;
    sigfillset(&blocked);
    for (const int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGTRAP}) {
      sigdelset(&blocked, fault);
    }
    pthread_sigmask(SIG_SETMASK, &blocked, &before);
    try {
      while (static_cast<int>(helpers_.size()) < helpers) {
        helpers_.emplace_back(&HostCopier::help, this);
      }
    } catch (const std::exception&) {  // no more threads or memory: those there are copy all
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  cudaError_t upload(const Upload& upload) {
    cudaError_t error = cudaSetDevice(device_);
    if (error == cudaSuccess && upload.count > 0) error = copy_all(upload);
    if (error != cudaSuccess) cudaGetLastError();  // reported here, not by the next launch
    return error;
  }

 private:
  cudaError_t copy_all(const Upload& upload) {
    const llava_host_array& last = upload.arrays[upload.count - 1];
    const int64_t total = last.place + last.rows * last.row_bytes;
    // One for each piece but the first, which is the caller's.
    const int wanted = static_cast<int>(
        std::min<int64_t>(helpers_.size(), std::max<int64_t>(total - 1, 0) / piece_bytes_));
    std::unique_lock lock(mutex_);
    upload_ = upload;
    begun_ = 0;
    total_ = total;
    error_ = cudaSuccess;
    wanted_ = wanted;
    lock.unlock();
    for (int helper = 0; helper < wanted; ++helper) work_.notify_one();
    lock.lock();
    copy_pieces(lock);
    wanted_ = 0;  // who wakes from now on goes back to sleep
    lock.unlock();
    const auto until = std::chrono::steady_clock::now() + kLook;
    while (helping_ != 0 && std::chrono::steady_clock::now() < until) {
    }
    lock.lock();
    finished_.wait(lock, [this] { return helping_ == 0; });
    return error_;
  }

  // Copies pieces until the last one has begun. The lock is given up while a piece is copied.
  void copy_pieces(std::unique_lock<std::mutex>& lock) {
    while (begun_ < total_ && error_ == cudaSuccess) {
      const int64_t begin = begun_;
      begun_ = std::min(begin + piece_bytes_, total_);
      const int64_t end = begun_;
      const int piece = idle_[taken_++ % idle_.size()];
      lock.unlock();
      const cudaError_t error = copy_piece(begin, end, piece);
      lock.lock();
      idle_[given_back_++ % idle_.size()] = piece;
      if (error_ == cudaSuccess) error_ = error;
    }
  }

  cudaError_t copy_piece(int64_t begin, int64_t end, int piece) {
    const auto event = static_cast<cudaEvent_t>(copied_[piece]);
    char* const to = pinned_ + piece * piece_bytes_;
    // Until the device has read what the piece held before.
    if (const cudaError_t error = cudaEventSynchronize(event); error != cudaSuccess) return error;
    const llava_host_array* const arrays_end = upload_.arrays + upload_.count;
    for (const llava_host_array* array = upload_.arrays; array != arrays_end; ++array) {
      const int64_t from = std::max(begin, array->place);
      const int64_t until = std::min(end, array->place + array->rows * array->row_bytes);
      if (from < until) {
        copy_rows(to + from - begin, *array, from - array->place, until - array->place);
      }
    }
    const cudaError_t error = cudaMemcpyAsync(upload_.there + begin, to, end - begin,
                                              cudaMemcpyHostToDevice, upload_.stream);
    return error == cudaSuccess ? cudaEventRecord(event, upload_.stream) : error;
  }

  void help() {
    char name[16];
    std::snprintf(name, sizeof(name), "llava-copy:%d", device_);
    pthread_setname_np(pthread_self(), name);
    // Without the device it helps nobody. The caller asks for the same device, and reports why it
    // cannot be had.
    if (cudaSetDevice(device_) != cudaSuccess) return;
    std::unique_lock lock(mutex_);
    for (;;) {
      work_.wait(lock, [this] { return wanted_ > 0 || closing_; });
      if (closing_) return;
      --wanted_;
      ++helping_;
      copy_pieces(lock);
      if (--helping_ == 0) finished_.notify_one();
    }
  }

  const int device_;
  char* const pinned_;
  const std::vector<void*> copied_;
  const int64_t piece_bytes_;
  std::vector<std::thread> helpers_;

  // Held for what stands below, never while anything is copied and never in a call to CUDA.
  std::mutex mutex_;
  std::condition_variable work_, finished_;
  Upload upload_{};  // read without the lock by who copies a piece: it stays until all are done
  int64_t begun_ = 0, total_ = 0;  // bytes
  cudaError_t error_ = cudaSuccess;
  int wanted_ = 0;                // helpers that may still join this upload
  std::atomic<int> helping_ = 0;  // those that joined it; read without the lock by who looks for 0
  // A ring of the pieces that nobody writes, the one whose copy was queued first in front. A thread
  // holds one piece at most, and there are no more threads than pieces: it is never empty.
  std::vector<int> idle_;
  uint64_t taken_ = 0, given_back_ = 0;
  bool closing_ = false;
};

}  // namespace

// The rest of the library is compiled with hidden symbols.
#define LLAVA_EXPORT extern "C" __attribute__((visibility("default")))

// A copier to `device` through `pinned`, pieces * piece_bytes, which outlives it as the events do.
// A piece is written once its event of `copied`, recorded behind its last copy, has passed. At most
// `threads` copy, of which the caller of `upload` is one; fewer where the system has no more, and
// never more than `pieces`. NULL if there is no memory.
LLAVA_EXPORT void* llava_host_copier_open(int device, void* pinned, void* const* copied, int pieces,
                                          int64_t piece_bytes, int threads) {
  try {
    auto copier = std::make_unique<HostCopier>(device, static_cast<char*>(pinned), copied, pieces,
                                               piece_bytes);
    copier->start(std::min(threads, pieces) - 1);
    return copier.release();
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

// Queues on `stream` the copies of `count` arrays to `there`, memory of the device; when it
// returns, the arrays have been read. They lie there in order. One call at a time. Returns a
// cudaError_t: cudaErrorInvalidResourceHandle without a copier.
LLAVA_EXPORT int llava_host_copier_upload(void* copier, void* stream, void* there,
                                          const llava_host_array* arrays, int count) {
  if (copier == nullptr) return cudaErrorInvalidResourceHandle;
  return static_cast<HostCopier*>(copier)->upload(
      {static_cast<cudaStream_t>(stream), static_cast<char*>(there), arrays, count});
}

// Ends the threads and frees the copier; nobody may be in, or make, another call. The device may
// still read the pieces then.
LLAVA_EXPORT void llava_host_copier_close(void* copier) { delete static_cast<HostCopier*>(copier); }
