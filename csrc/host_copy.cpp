// Copies arrays to the device from memory that is not pinned, for llava_engine/runtime/streams.py
// through ctypes. Pinning them would take longer than copying them; so a few threads copy them into
// pieces of memory that is pinned already, from which the device reads. One thread alone copies
// slower than the bus.
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <system_error>
#include <thread>
#include <vector>

// The rest of the library is compiled with hidden symbols.
#define LLAVA_EXPORT extern "C" __attribute__((visibility("default")))

// Rows of `row_bytes` that lie `stride` bytes apart, and on the device right behind each other from
// byte `place` on.
struct llava_host_array {
  const char* source;
  int64_t rows, row_bytes, stride, place;
};

namespace {

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

struct Upload {
  int device;
  cudaStream_t stream;
  char* there;
  const llava_host_array* arrays;
  int count;
  char* pinned;
  void* const* copied;
  int64_t piece_bytes, total;
  std::atomic<int64_t> begun = 0;
  std::atomic<int> error = cudaSuccess;

  // Copies what no other thread has begun, through pieces that are this thread's alone.
  void run(int first_piece, int pieces) {
    int result = cudaSetDevice(device);
    for (int turn = 0; result == cudaSuccess && error == cudaSuccess; turn = (turn + 1) % pieces) {
      const int64_t begin = begun.fetch_add(piece_bytes);
      if (begin >= total) return;
      result = send(begin, std::min(begin + piece_bytes, total), first_piece + turn);
    }
    if (result != cudaSuccess) error = result;
  }

  cudaError_t send(int64_t begin, int64_t end, int piece) {
    const auto event = static_cast<cudaEvent_t>(copied[piece]);
    char* const to = pinned + piece * piece_bytes;
    // Until the device has read what the piece held before.
    if (const cudaError_t result = cudaEventSynchronize(event); result != cudaSuccess) {
      return result;
    }
    for (const llava_host_array* array = arrays; array != arrays + count; ++array) {
      const int64_t from = std::max(begin, array->place);
      const int64_t until = std::min(end, array->place + array->rows * array->row_bytes);
      if (from < until) {
        copy_rows(to + from - begin, *array, from - array->place, until - array->place);
      }
    }
    const cudaError_t result =
        cudaMemcpyAsync(there + begin, to, end - begin, cudaMemcpyHostToDevice, stream);
    return result == cudaSuccess ? cudaEventRecord(event, stream) : result;
  }
};

}  // namespace

// Queues on `stream` the copies of `count` arrays to `there`, memory of `device`; when it returns,
// the arrays have been read. They lie there in order. `pinned` is pieces * piece_bytes; a piece is
// written once its event of `copied`, recorded behind its last copy, has passed. `threads`, at most
// `pieces`, copy, of which the caller is one; fewer where the system has no more. Returns a
// cudaError_t.
LLAVA_EXPORT int llava_engine_upload(int device, void* stream, void* there,
                                     const llava_host_array* arrays, int count, void* pinned,
                                     void* const* copied, int pieces, int64_t piece_bytes,
                                     int threads) {
  if (count == 0) return cudaSuccess;
  const llava_host_array& last = arrays[count - 1];
  Upload upload{device,
                static_cast<cudaStream_t>(stream),
                static_cast<char*>(there),
                arrays,
                count,
                static_cast<char*>(pinned),
                copied,
                piece_bytes,
                last.place + last.rows * last.row_bytes};
  const int each = pieces / threads;
  std::vector<std::thread> others;
  others.reserve(threads - 1);
  try {
    while (static_cast<int>(others.size()) < threads - 1) {
      const int first = static_cast<int>(others.size() + 1) * each;
      others.emplace_back(&Upload::run, &upload, first, each);
    }
  } catch (const std::system_error&) {  // no more threads: those there are copy all
  }
  upload.run(0, each);
  for (std::thread& other : others) other.join();
  if (upload.error != cudaSuccess) cudaGetLastError();  // reported here, not by the next launch
  return upload.error;
}
