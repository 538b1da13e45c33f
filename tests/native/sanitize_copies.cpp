// Copies of arrays by one to eight threads through few small pieces, for the sanitizers: by two
// copiers at a time, each with many uploads one right after the other, by threads that are prompt,
// late or slow. The arrays are freed as soon as an upload returns. Prints how many bytes
// came; a wrong one ends it.
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <thread>
#include <vector>

struct FakeDevice;
struct FakeEvent;
struct llava_host_array {
  const char* source;
  int64_t rows, row_bytes, stride, place;
};

extern "C" {
FakeDevice* fake_stream_new();
void fake_stream_free(FakeDevice* stream);
FakeEvent* fake_event_new();
void fake_event_free(FakeEvent* event);
void fake_finish(FakeDevice* stream);
void fake_helpers(int kind);
void fake_refuse(FakeDevice* stream, int64_t count);
void* llava_host_copier_open(int device, void* pinned, void* const* copied, int pieces,
                             int64_t piece_bytes, int threads);
int llava_host_copier_upload(void* copier, void* stream, void* there,
                             const llava_host_array* arrays, int count);
void llava_host_copier_close(void* copier);
}

namespace {

constexpr int kDevice = 3, kPieces = 16, kThreads = 8, kUploads = 24, kRowBytes = 77, kStride = 101;
constexpr int64_t kPieceBytes = 512, kPlace = 256;
constexpr int kPrompt = 0, kHeld = 1, kSlow = 2;  // of fake_copies.cpp

std::atomic<int64_t> bytes = 0;

void must(bool good, int code) {
  if (!good) std::_Exit(code);
}

char byte_of(int64_t index, int upload) { return static_cast<char>(index * 7 + upload); }

// From one piece, which wakes nobody, to thirty.
int rows_of(int upload) { return 1 + upload * 53 % 200; }

int send(void* copier, FakeDevice* stream, char* there, int upload) {
  const int rows = rows_of(upload);
  const int64_t size = int64_t{rows} * kStride - (kStride - kRowBytes);
  const auto source = std::make_unique<char[]>(size), first = std::make_unique<char[]>(kPlace - 50);
  for (int64_t i = 0; i < size; ++i) source[i] = byte_of(i, upload);
  const auto arrays = std::make_unique<llava_host_array[]>(2);
  arrays[0] = {first.get(), 1, kPlace - 50, 0, 0};
  arrays[1] = {source.get(), rows, kRowBytes, kStride, kPlace};
  return llava_host_copier_upload(copier, stream, there, arrays.get(), 2);
}

void copy(int threads, bool held) {
  FakeDevice* const stream = fake_stream_new();
  void* copied[kPieces];
  for (void*& event : copied) event = fake_event_new();
  std::vector<char> pinned(kPieces * kPieceBytes);
  void* const copier =
      llava_host_copier_open(kDevice, pinned.data(), copied, kPieces, kPieceBytes, threads);
  must(copier != nullptr, 2);
  std::vector<std::vector<char>> there(kUploads);
  for (int upload = 0; upload < kUploads; ++upload) {
    there[upload].resize(kPlace + int64_t{rows_of(upload)} * kRowBytes);
    must(send(copier, stream, there[upload].data(), upload) == 0, 3);
    // Those that wake now find that all has been copied, or what the next uploads leave to them.
    if (held && upload == kUploads / 2) fake_helpers(kPrompt);
  }
  fake_finish(stream);
  for (int upload = 0; upload < kUploads; ++upload) {
    const int64_t count = int64_t{rows_of(upload)} * kRowBytes;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t from = i / kRowBytes * kStride + i % kRowBytes;
      must(there[upload][kPlace + i] == byte_of(from, upload), 4);
    }
    bytes += count;
  }
  fake_refuse(stream, kUploads);  // that many have been queued long since
  must(send(copier, stream, there[kUploads - 1].data(), kUploads - 1) != 0, 5);
  llava_host_copier_close(copier);
  for (void* event : copied) fake_event_free(static_cast<FakeEvent*>(event));
  fake_stream_free(stream);
}

}  // namespace

int main() {
  for (const int helpers : {kPrompt, kHeld, kSlow}) {
    for (int threads = 1; threads <= kThreads; ++threads) {
      fake_helpers(helpers);
      std::thread other(copy, kThreads + 1 - threads, helpers == kHeld);
      copy(threads, helpers == kHeld);
      other.join();
    }
  }
  // One that nobody uses, and one whose threads may not have come to sleep yet.
  fake_helpers(kPrompt);
  for (const int milliseconds : {5, 0}) {
    char pinned[2];
    void* const copied[2] = {};
    void* const copier = llava_host_copier_open(kDevice, pinned, copied, 2, 1, 2);
    std::this_thread::sleep_for(std::chrono::milliseconds(milliseconds));
    llava_host_copier_close(copier);
  }
  std::printf("copied: %lld\n", static_cast<long long>(bytes));
}
