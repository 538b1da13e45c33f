// Copies arrays to the device from memory that is not pinned, for llava_engine/runtime/host_copy.py
// through ctypes. Pinning them would take longer than copying them; so a few threads copy them into
// pieces of memory that is pinned already, from which the device reads. One thread alone copies
// slower than the bus, and starting others takes longer than a small upload: they are kept.
#include <cuda_runtime.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <iterator>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include "signals_blocked.h"

// Rows of `row_bytes` that lie `stride` bytes apart, and on the device right behind each other from
// byte `place` on.
extern "C" struct llava_host_array {
  const char* source;
  int64_t rows, row_bytes, stride, place;
};

namespace {

// How long who waits for others' pieces looks for them before it lets other threads run. Copying a
// piece takes some 20 us, and waking up takes longer.
constexpr std::chrono::microseconds kLook{100};

// Calls `step` until `ready` says so.
template <typename Ready, typename Step>
void look(Ready&& ready, Step&& step) {
  const auto until = std::chrono::steady_clock::now() + kLook;
  while (!ready()) {
    step();
    if (std::chrono::steady_clock::now() > until) std::this_thread::yield();
  }
}

// std::memcpy to memory that the device reads next and no processor: written past the caches, which
// would first read each line that they are to hold. What comes `ahead` of it is asked for, where the
// processor would not know: at the next row, or behind the page's end.
void copy_past_caches(char* to, const char* from, int64_t bytes, int64_t ahead) {
#ifdef __SSE2__
  constexpr int64_t kLine = 64;
  const int64_t unaligned = std::min<int64_t>(-reinterpret_cast<uintptr_t>(to) % kLine, bytes);
  std::memcpy(to, from, unaligned);
  to += unaligned;
  from += unaligned;
  bytes -= unaligned;
  for (; bytes >= kLine; bytes -= kLine, to += kLine, from += kLine) {
    _mm_prefetch(from + ahead, _MM_HINT_T1);
    __m128i line[kLine / sizeof(__m128i)];
    std::memcpy(line, from, kLine);
    for (size_t i = 0; i < std::size(line); ++i) {
      _mm_stream_si128(reinterpret_cast<__m128i*>(to) + i, line[i]);
    }
  }
#endif
  std::memcpy(to, from, bytes);
}

// Such stores are in no order, not even before a release.
void stores_before_release() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

// Bytes begin..end of an array, counted without what lies between its rows.
void copy_rows(char* to, const llava_host_array& array, int64_t begin, int64_t end) {
  constexpr int64_t kPage = 4096;
  const int64_t ahead = array.rows > 1 ? array.stride : kPage;
  int64_t row = begin / array.row_bytes, within = begin % array.row_bytes;
  while (begin < end) {
    const char* from = array.source + row * array.stride + within;
    const int64_t bytes = std::min(array.row_bytes - within, end - begin);
    copy_past_caches(to, from, bytes, ahead);
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

// The pieces of all uploads are numbered through; piece n goes through slot n % slots of the pinned
// memory. Any thread copies a piece into its slot. The caller alone talks to CUDA, where threads
// would wait for each other: it queues the device's copies, of all pieces at once that are there.
class HostCopier {
 public:
  HostCopier(int device, char* pinned, void* const* copied, int slots, int64_t piece_bytes)
      : device_(device),
        pinned_(pinned),
        copied_(copied, copied + slots),
        slots_(slots),
        piece_bytes_(piece_bytes),
        run_end_(slots),
        there_(slots) {}

  ~HostCopier() {
    closing_ = true;
    gate_.fetch_add(kNext);
    gate_.notify_all();
    for (std::thread& helper : helpers_) helper.join();
  }

  // Starts at most so many helpers, and waits for none of them.
  void start(int helpers) {
    helpers_.reserve(helpers);
    const llava_engine::SignalsBlocked blocked;
    try {
      while (static_cast<int>(helpers_.size()) < helpers) {
        helpers_.emplace_back(&HostCopier::help, this);
      }
    } catch (const std::exception&) {  // no more threads or memory: those there are copy all
    }
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
    upload_ = upload;
    bytes_ = last.place + last.rows * last.row_bytes;
    first_ = queued_ = end_;
    end_ = first_ + (bytes_ + piece_bytes_ - 1) / piece_bytes_;
    begun_ = first_;
    error_ = cudaSuccess;
    const bool helped = !helpers_.empty() && end_ - first_ >= kFewest;
    if (helped) {
      gate_.fetch_add(kNext | kOpen);  // a new number, and open
      gate_.notify_all();
    }
    copy_pieces([this](uint64_t piece) {
      queue_pieces();
      look([&] { return may_write(piece); }, [this] { advance(); });
    });
    look([this] { return error_ != cudaSuccess || queued_ == end_; }, [this] { advance(); });
    if (helped) {
      gate_.fetch_sub(kOpen);  // who wakes from now on goes back to sleep
      look([this] { return (gate_ & kInside) == 0; }, [] {});
    }
    if (error_ != cudaSuccess) {  // the slots are free once what was queued has passed
      while (passed_ < queued_) wait_for(passed_);
      passed_ = end_;
    }
    return error_;
  }

  // Copies pieces until the last one has begun; wait(piece) returns when its slot may be written, or
  // there is an error.
  template <typename Wait>
  void copy_pieces(Wait&& wait) {
    for (;;) {
      const uint64_t piece = begun_.fetch_add(1);
      if (piece >= end_) return;
      wait(piece);
      if (error_ != cudaSuccess) return;
      copy_piece(piece);
      stores_before_release();
      there_[piece % slots_].store(piece + 1, std::memory_order_release);
    }
  }

  void copy_piece(uint64_t piece) {
    const int64_t begin = (piece - first_) * piece_bytes_;
    const int64_t end = std::min(begin + piece_bytes_, bytes_);
    char* const to = pinned_ + piece % slots_ * piece_bytes_;
    const llava_host_array* const arrays_end = upload_.arrays + upload_.count;
    for (const llava_host_array* array = upload_.arrays; array != arrays_end; ++array) {
      const int64_t from = std::max(begin, array->place);
      const int64_t until = std::min(end, array->place + array->rows * array->row_bytes);
      if (from < until) {
        copy_rows(to + from - begin, *array, from - array->place, until - array->place);
      }
    }
  }

  bool may_write(uint64_t piece) const {
    return error_ != cudaSuccess || piece < passed_ + slots_;
  }

  // What the caller does while it waits for others: queues pieces, and where slots are lacking,
  // waits for the device to have read some.
  void advance() {
    queue_pieces();
    if (error_ == cudaSuccess && passed_ + slots_ < end_ && passed_ < queued_) {
      error_ = wait_for(passed_);
    }
  }

  bool is_there(uint64_t piece) const {
    return there_[piece % slots_].load(std::memory_order_acquire) == piece + 1;
  }

  // Queues the copies of what is there, in order; one copy for pieces that lie behind each other.
  void queue_pieces() {
    while (error_ == cudaSuccess && queued_ < end_ && is_there(queued_)) {
      const uint64_t begin = queued_, slot = begin % slots_;
      const uint64_t most = std::min(end_, begin + slots_ - slot);
      uint64_t end = begin + 1;
      while (end < most && is_there(end)) ++end;
      const int64_t from = (begin - first_) * piece_bytes_;
      const int64_t until = std::min<int64_t>((end - first_) * piece_bytes_, bytes_);
      error_ = cudaMemcpyAsync(upload_.there + from, pinned_ + slot * piece_bytes_, until - from,
                               cudaMemcpyHostToDevice, upload_.stream);
      if (error_ != cudaSuccess) return;
      std::fill_n(run_end_.begin() + slot, end - begin, end);
      queued_ = end;
      error_ = cudaEventRecord(event_behind(end), upload_.stream);
    }
  }

  // Until the device has read a piece, and with it all that was queued in the same copy.
  cudaError_t wait_for(uint64_t piece) {
    const uint64_t end = run_end_[piece % slots_];
    const cudaError_t error = cudaEventSynchronize(event_behind(end));
    passed_ = end;
    return error;
  }

  cudaEvent_t event_behind(uint64_t end) const {
    return static_cast<cudaEvent_t>(copied_[(end - 1) % slots_]);
  }

  void help() {
    char name[16];
    std::snprintf(name, sizeof(name), "llava-copy:%d", device_);
    pthread_setname_np(pthread_self(), name);
    uint32_t seen = 0;  // the gate's number when this thread was through it, or at the beginning
    for (;;) {
      uint32_t gate = gate_;
      while (gate / kNext == seen / kNext && !closing_) {
        gate_.wait(gate);
        gate = gate_;
      }
      if (closing_) return;
      if ((gate & kOpen) == 0) {
        seen = gate;
      } else if (gate_.compare_exchange_weak(gate, gate + 1)) {
        seen = gate;
        copy_pieces([this](uint64_t piece) {
          look([&] { return may_write(piece); }, [] {});
        });
        gate_.fetch_sub(1);
      }
    }
  }

  // Fewer pieces are copied before a helper is awake.
  static constexpr uint64_t kFewest = 4;
  // The gate: how many helpers are inside, whether more may come in, and behind that a number.
  static constexpr uint32_t kInside = (1 << 8) - 1, kOpen = 1 << 8, kNext = 1 << 9;

  const int device_;
  char* const pinned_;
  const std::vector<void*> copied_;
  const uint64_t slots_;
  const int64_t piece_bytes_;
  std::vector<std::thread> helpers_;

  // Written by the caller while nobody is inside, or for itself alone.
  Upload upload_{};
  int64_t bytes_ = 0;
  uint64_t first_ = 0, end_ = 0;   // this upload's pieces
  uint64_t queued_ = 0;            // up to which pieces the device's copies are queued
  std::vector<uint64_t> run_end_;  // of a slot: up to which piece it was queued in one copy
  // Shared.
  std::atomic<uint32_t> gate_ = 0;
  std::atomic<bool> closing_ = false;
  std::atomic<uint64_t> begun_ = 0;   // up to which pieces are somebody's
  std::atomic<uint64_t> passed_ = 0;  // up to which the device has read them
  std::atomic<cudaError_t> error_ = cudaSuccess;
  std::vector<std::atomic<uint64_t>> there_;  // of a slot: one more than the piece that it holds
};

}  // namespace

// The rest of the library is compiled with hidden symbols.
#define LLAVA_EXPORT extern "C" __attribute__((visibility("default")))

// A copier to `device` through `pinned`, pieces * piece_bytes, which outlives it as the events do: one
// for each piece, for the copier to record behind its copies. At most `threads` copy, of which the
// caller of `upload` is one; fewer where the system has no more, and never more than `pieces`. NULL
// if there is no memory.
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
