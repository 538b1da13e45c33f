// Runs of the native decode loop that other threads wake, stop and close meanwhile: for the
// sanitizers. Prints how many tokens came; a wrong one ends it.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <thread>
#include <vector>

struct FakeDevice;
struct llava_decode_event {
  int64_t step, time_ns;
  int32_t row, token, flags, reserved;
};

extern "C" {
FakeDevice* fake_new(int32_t* ring, int ring_steps, int max_batch);
void fake_free(FakeDevice* device);
void fake_fill(FakeDevice* device, void* graph, const int32_t* left, int rows,
               const int32_t* tokens, int steps, int64_t first_step);
void fake_allow(FakeDevice* device, int64_t steps);
void fake_break(FakeDevice* device, int64_t completed, int error);
int64_t fake_completed(FakeDevice* device);
void* llava_decode_loop_create(int device, void* stream, const void* ring, int ring_steps,
                               int max_batch, int* error);
int llava_decode_loop_run(void* loop, void* graph_exec, const uint8_t* active, int rows,
                          int64_t first_step, int64_t max_steps, int ahead, int stop_at);
int llava_decode_loop_wait(void* loop, llava_decode_event* events, int capacity, int64_t timeout_ns,
                           int* state, int* error);
void llava_decode_loop_wake(void* loop);
void llava_decode_loop_stop(void* loop);
int64_t llava_decode_loop_launched(void* loop);
void llava_decode_loop_close(void* loop);
void llava_decode_loop_destroy(void* loop);
}

namespace {

constexpr int kRows = 8, kRingSteps = 32, kLoops = 20, kRuns = 20, kCapacity = 5;

void require(bool condition, const char* what) {
  if (condition) return;
  std::printf("failed: %s\n", what);
  std::exit(1);
}

// Waits until the run is over; returns the number of tokens. Tokens are step * 100 + row here.
int64_t drain(void* loop, int* state) {
  int64_t count = 0;
  int error = 0;
  do {
    llava_decode_event events[kCapacity];
    const int got = llava_decode_loop_wait(loop, events, kCapacity, 1000000, state, &error);
    for (int i = 0; i < got; ++i) {
      require(events[i].token == events[i].step * 100 + events[i].row, "token");
    }
    count += got;
  } while (*state == 0);
  return count;
}

}  // namespace

int main() {
  int64_t count = 0;
  for (int turn = 0; turn < kLoops; ++turn) {
    alignas(16) static int32_t ring[kRingSteps * kRows * 4];
    std::fill(std::begin(ring), std::end(ring), 0);
    FakeDevice* device = fake_new(ring, kRingSteps, kRows);
    void* const graph = device;
    fake_allow(device, int64_t{1} << 40);
    int error = 0, state = 0;
    void* loop = llava_decode_loop_create(0, device, ring, kRingSteps, kRows, &error);
    require(loop != nullptr, "create");
    require(llava_decode_loop_create(-1, device, ring, kRingSteps, kRows, &error) == nullptr,
            "no loop on a device that is not there");
    const std::vector<uint8_t> active(kRows, 1);
    const auto start = [&](int64_t first) {
      std::vector<int32_t> left, tokens;
      for (int row = 0; row < kRows; ++row) left.push_back(3 + (turn + row * 5) % kRingSteps);
      for (int64_t step = first; step < first + kRingSteps; ++step) {
        for (int row = 0; row < kRows; ++row) tokens.push_back(step * 100 + row);
      }
      fake_fill(device, graph, left.data(), kRows, tokens.data(), kRingSteps, first);
      require(llava_decode_loop_run(loop, graph, active.data(), kRows, first, kRingSteps,
                                    1 + turn % 3, turn % 4) == 0,
              "run");
    };
    for (int64_t run = 0; run < kRuns; ++run) {
      start(run * kRingSteps);
      std::thread other([&] {
        for (int i = 0; i < 20; ++i) llava_decode_loop_wake(loop);
        if (run % 2 == 1) llava_decode_loop_stop(loop);
        require(llava_decode_loop_launched(loop) <= kRingSteps, "launched");
      });
      count += drain(loop, &state);
      other.join();
      require(state == 1, "ended");
    }
    if (turn % 2 == 1) fake_break(device, fake_completed(device) + 2, 700);
    start(kRuns * kRingSteps);
    if (turn % 4 >= 2) {
      std::thread closer([&] { llava_decode_loop_close(loop); });
      count += drain(loop, &state);
      closer.join();
    }
    llava_decode_loop_destroy(loop);  // in the midst of a run, half the time
    fake_free(device);
  }
  std::printf("tokens: %lld\n", static_cast<long long>(count));
}
