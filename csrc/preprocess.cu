// Decoded pixels to rows of patches: Pillow's resampling of 8-bit channels, one axis a pass, and in
// the last pass what a level becomes and where it goes. Bytes are read one by one: the lanes of a
// warp read neighbours, the taps of a pixel come from the L1 cache, and all of it takes a tenth of
// the time in which the pixels come over from the host.
#include <torch/csrc/stable/ops.h>

#include <limits>
#include <vector>

#include "common.cuh"
#include "ops.h"

namespace llava_engine {
namespace {

constexpr int kThreads = 256;
constexpr int kPrecisionBits = 22;  // of a weight's fraction
constexpr int kChannels = 3;
constexpr int kRows = 0;    // axes
constexpr int kLines = 4;   // of a picture that one thread resamples with the weights it has read
constexpr int kHeader = 4;  // rows of a table before the weights: first, and a sum's three starts
constexpr int64_t kMost = std::numeric_limits<int>::max();

// An axis's table, int32 [kHeader + count, outputs].
struct Taps {
  const int* table;
  int outputs;
  int count;

  __device__ int at(int row, int output) const { return __ldg(table + row * outputs + output); }
};

__device__ int clip8(int sum) { return min(max(sum >> kPrecisionBits, 0), 255); }

// The pixel `output` of N lines in one channel. `from` is where pixel 0 of the first line lies,
// `step` the bytes between pixels of the axis, `line` those between lines.
template <int N>
__device__ void resampled(const uint8_t* __restrict__ from, int step, const int (&line)[N],
                          const Taps& taps, int output, int channel, int (&level)[N]) {
  from += taps.at(0, output) * step;
#pragma unroll
  for (int i = 0; i < N; ++i) level[i] = taps.at(1 + channel, output);
#pragma unroll 4
  for (int tap = 0; tap < taps.count; ++tap, from += step) {
    const int weight = taps.at(kHeader + tap, output);
#pragma unroll
    for (int i = 0; i < N; ++i) level[i] += weight * __ldg(from + line[i]);
  }
#pragma unroll
  for (int i = 0; i < N; ++i) level[i] = clip8(level[i]);
}

// A thread makes one byte of N lines. The step between pixels also says which pixel and channel a
// byte of the output belongs to: it is 3 along columns, and a whole line along rows, where the
// picture is a single line of n * step bytes.
template <int N>
__global__ void resample_kernel(uint8_t* __restrict__ out, const uint8_t* __restrict__ pixels,
                                Taps taps, int step, int lines, int line_in, int line_out) {
  const int blocks = ceil_div(line_out, kThreads);  // beside each other
  const int first_line = blockIdx.x / blocks * N;
  const int byte = blockIdx.x % blocks * kThreads + threadIdx.x;
  if (byte >= line_out) return;
  const int output = byte / step, within = byte % step;
  int line[N], level[N];
#pragma unroll
  for (int i = 0; i < N; ++i) line[i] = min(first_line + i, lines - 1) * line_in;
  resampled(pixels + within, step, line, taps, output, within % kChannels, level);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (first_line + i < lines) out[(first_line + i) * line_out + byte] = level[i];
  }
}

struct Place {
  int patch;          // pixels of a patch's side
  int across;         // patches in a row of the picture
  int top, left;      // of the resampled pixels
  int height, width;  // of the resampled pixels
};

template <typename T>
__global__ void write_patches_kernel(T* __restrict__ out, const uint8_t* __restrict__ pixels,
                                     Taps taps, bool by_rows, int line,
                                     const float* __restrict__ levels, Place place, int rows,
                                     int columns) {
  const int index = blockIdx.x * kThreads + threadIdx.x;
  if (index >= rows * columns) return;
  const int row = index / columns, column = index % columns;
  const int area = place.patch * place.patch;
  const int channel = column / area, within = column % area;
  float value = 0.0f;
  if (channel < kChannels) {
    const int y = row / place.across * place.patch + within / place.patch - place.top;
    const int x = row % place.across * place.patch + within % place.patch - place.left;
    int level[1] = {0};
    if (y >= 0 && y < place.height && x >= 0 && x < place.width) {
      const int start[1] = {channel + (by_rows ? x * kChannels : y * line)};
      resampled(pixels, by_rows ? line : kChannels, start, taps, by_rows ? y : x, channel, level);
    }
    value = levels[level[0] * kChannels + channel];
  }
  out[index] = from_float<T>(value);
}

// What was uploaded, in one piece of the device's memory.
struct Uploaded {
  const uint8_t* bytes;
  int64_t count;

  // n values that begin at byte `place`.
  template <typename T>
  const T* at(int64_t place, int64_t n) const {
    STD_TORCH_CHECK(place >= 0 && place % sizeof(T) == 0 && n <= kMost &&
                        place + n * static_cast<int64_t>(sizeof(T)) <= count,
                    "what is to be read was not uploaded");
    return reinterpret_cast<const T*>(bytes + place);
  }
};

struct Pixels {
  const uint8_t* data;
  int64_t height, width;
};

// One of `passes`.
struct Pass {
  bool by_rows;
  Taps taps;
};

// What a pass makes of so many rows and columns.
Pixels size_of(const Pass& pass, const Pixels& pixels) {
  return {nullptr, pass.by_rows ? pass.taps.outputs : pixels.height,
          pass.by_rows ? pixels.width : pass.taps.outputs};
}

void resample(uint8_t* out, const Pixels& pixels, const Pass& pass, cudaStream_t stream) {
  const int line_in = pixels.width * kChannels;
  if (pass.by_rows) {
    const int bytes = pass.taps.outputs * line_in;
    resample_kernel<1><<<ceil_div(bytes, kThreads), kThreads, 0, stream>>>(
        out, pixels.data, pass.taps, line_in, 1, 0, bytes);
  } else {
    const int lines = pixels.height, bytes = pass.taps.outputs * kChannels;
    const int grid = ceil_div(lines, kLines) * ceil_div(bytes, kThreads);
    resample_kernel<kLines><<<grid, kThreads, 0, stream>>>(out, pixels.data, pass.taps, kChannels,
                                                           lines, line_in, bytes);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

void preprocess(Tensor out, Tensor uploaded, std::vector<int64_t> pixels, int64_t levels,
                std::vector<int64_t> passes, int64_t patch, std::vector<int64_t> place) {
  check_dense(uploaded, "uploaded");
  check_type(uploaded, ScalarType::Byte, "uploaded");
  check_dense(out, "out");
  STD_TORCH_CHECK(pixels.size() == 3 && pixels[1] > 0 && pixels[2] > 0 &&
                      pixels[2] <= kMost / kChannels / pixels[1],
                  "pixels must be a place, a height and a width");
  STD_TORCH_CHECK(passes.size() == 4 || passes.size() == 8, "there must be one or two passes");
  STD_TORCH_CHECK(place.size() == 4, "place must be height, width, top and left");
  const Uploaded bytes{data<const uint8_t>(uploaded), uploaded.numel()};
  const Launch to(out);

  const auto pass = [&](size_t i) {
    const int64_t *const it = passes.data() + 4 * i, header = it[2], outputs = it[3];
    STD_TORCH_CHECK(header > kHeader && header <= kMost && outputs > 0 && outputs <= kMost,
                    "taps must be [4 + k, n]");
    return Pass{it[0] == kRows,
                {bytes.at<int>(it[1], header * outputs), static_cast<int>(outputs),
                 static_cast<int>(header) - kHeader}};
  };
  Pixels shown{bytes.at<uint8_t>(pixels[0], pixels[1] * pixels[2] * kChannels), pixels[1],
               pixels[2]};
  Pass last = pass(0);
  Tensor between = uploaded;
  if (passes.size() == 8) {
    Pixels resampled = size_of(last, shown);
    const int64_t size = resampled.height * resampled.width * kChannels;
    STD_TORCH_CHECK(size <= kMost, "the picture is too large");
    between = torch::stable::new_empty(uploaded, {size});
    resample(data<uint8_t>(between), shown, last, to.stream());
    resampled.data = data<const uint8_t>(between);
    shown = resampled;
    last = pass(1);
  }

  const Pixels size = size_of(last, shown);
  const int64_t height = place[0], width = place[1], top = place[2], left = place[3];
  STD_TORCH_CHECK(patch > 0 && height >= patch && width >= patch, "no patch fits");
  STD_TORCH_CHECK(
      top >= 0 && left >= 0 && top + size.height <= height && left + size.width <= width,
      "the picture does not fit into its size");
  STD_TORCH_CHECK(out.dim() == 2 && out.size(0) == (height / patch) * (width / patch) &&
                      out.size(1) >= kChannels * patch * patch,
                  "out has the wrong size");
  STD_TORCH_CHECK(out.numel() <= kMost, "out is too large");
  const Place there{static_cast<int>(patch),       static_cast<int>(width / patch),
                    static_cast<int>(top),         static_cast<int>(left),
                    static_cast<int>(size.height), static_cast<int>(size.width)};
  const float* const values = bytes.at<float>(levels, 256 * kChannels);
  by_type(out, [&](auto zero) {
    using T = decltype(zero);
    const int rows = out.size(0), columns = out.size(1), line = shown.width * kChannels;
    write_patches_kernel<T><<<ceil_div(rows * columns, kThreads), kThreads, 0, to.stream()>>>(
        data<T>(out), shown.data, last.taps, last.by_rows, line, values, there, rows, columns);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

}  // namespace llava_engine
