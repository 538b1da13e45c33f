// Copies of arrays by one to eight threads through few small pieces, for the sanitizers. Prints how
// many bytes came; a wrong one ends it.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
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
int llava_engine_upload(int device, void* stream, void* there, const llava_host_array* arrays,
                        int count, void* pinned, void* const* copied, int pieces,
                        int64_t piece_bytes, int threads);
}

namespace {

constexpr int kPieces = 16, kThreads = 8, kRows = 200, kRowBytes = 77, kStride = 101;
constexpr int64_t kPieceBytes = 512, kPlace = 256;

}  // namespace

int main() {
  FakeDevice* stream = fake_stream_new();
  void* copied[kPieces];
  for (void*& event : copied) event = fake_event_new();
  std::vector<char> pinned(kPieces * kPieceBytes);
  int64_t count = 0;
  for (int turn = 0; turn < 50; ++turn) {
    std::vector<char> source(kRows * kStride - (kStride - kRowBytes)), first(kPlace - 50);
    for (size_t i = 0; i < source.size(); ++i) source[i] = static_cast<char>(i * 7 + turn);
    std::vector<char> there(kPlace + kRows * kRowBytes);
    const llava_host_array arrays[] = {
        {first.data(), 1, static_cast<int64_t>(first.size()), 0, 0},
        {source.data(), kRows, kRowBytes, kStride, kPlace},
    };
    if (llava_engine_upload(3, stream, there.data(), arrays, 2, pinned.data(), copied, kPieces,
                            kPieceBytes, 1 + turn % kThreads) != 0) {
      return 1;
    }
    fake_finish(stream);
    for (int i = 0; i < kRows * kRowBytes; ++i) {
      if (there[kPlace + i] != source[i / kRowBytes * kStride + i % kRowBytes]) return 2;
      ++count;
    }
  }
  for (void* event : copied) fake_event_free(static_cast<FakeEvent*>(event));
  fake_stream_free(stream);
  std::printf("copied: %lld\n", static_cast<long long>(count));
}
