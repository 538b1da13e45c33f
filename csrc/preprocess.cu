// Decoded pixels to rows of patches: Pillow's resampling of 8-bit channels, one axis a pass, and in
// the last pass what a level becomes and where it goes. Bytes are read one by one: the lanes of a
// warp read neighbours, the taps of a pixel come from the L1 cache, and all of it takes a tenth of
// the time in which the pixels come over from the host.
#include <limits>

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

Taps taps_of(const Tensor& taps) {
  check_dense(taps, "taps");
  check_type(taps, ScalarType::Int, "taps");
  STD_TORCH_CHECK(taps.dim() == 2 && taps.size(0) > kHeader, "taps must be [4 + k, n]");
  return {data<const int>(taps), static_cast<int>(taps.size(1)),
          static_cast<int>(taps.size(0)) - kHeader};
}

void check_pixels(const Tensor& pixels, const char* name) {
  check_dense(pixels, name);
  check_type(pixels, ScalarType::Byte, name);
  STD_TORCH_CHECK(pixels.dim() == 3 && pixels.size(2) == kChannels, name, " must be [h, w, 3]");
  STD_TORCH_CHECK(pixels.numel() <= std::numeric_limits<int>::max(), name, " is too large");
}

}  // namespace

void resample(Tensor out, Tensor pixels, Tensor taps, int64_t axis) {
  check_pixels(out, "out");
  check_pixels(pixels, "pixels");
  const Taps table = taps_of(taps);
  const bool by_rows = axis == kRows;
  STD_TORCH_CHECK(out.size(by_rows ? 0 : 1) == table.outputs &&
                      out.size(by_rows ? 1 : 0) == pixels.size(by_rows ? 1 : 0),
                  "out has the wrong size");
  if (out.numel() == 0) return;
  const int line_in = pixels.size(1) * kChannels;
  const Launch to(out);
  if (by_rows) {
    const int bytes = out.numel();
    resample_kernel<1><<<ceil_div(bytes, kThreads), kThreads, 0, to.stream()>>>(
        data<uint8_t>(out), data<const uint8_t>(pixels), table, line_in, 1, 0, bytes);
  } else {
    const int lines = out.size(0), bytes = out.size(1) * kChannels;
    const int grid = ceil_div(lines, kLines) * ceil_div(bytes, kThreads);
    resample_kernel<kLines><<<grid, kThreads, 0, to.stream()>>>(
        data<uint8_t>(out), data<const uint8_t>(pixels), table, kChannels, lines, line_in, bytes);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void write_patches(Tensor out, Tensor pixels, Tensor taps, int64_t axis, Tensor levels,
                   int64_t patch, int64_t height, int64_t width, int64_t top, int64_t left) {
  check_pixels(pixels, "pixels");
  check_dense(out, "out");
  check_column(levels, ScalarType::Float, 256 * kChannels, "levels");
  const Taps table = taps_of(taps);
  const bool by_rows = axis == kRows;
  const int64_t shown_height = by_rows ? table.outputs : pixels.size(0);
  const int64_t shown_width = by_rows ? pixels.size(1) : table.outputs;
  STD_TORCH_CHECK(patch > 0 && height >= patch && width >= patch, "no patch fits");
  STD_TORCH_CHECK(top >= 0 && left >= 0 && top + shown_height <= height &&
                      left + shown_width <= width,
                  "the picture does not fit into its size");
  STD_TORCH_CHECK(out.dim() == 2 && out.size(0) == (height / patch) * (width / patch) &&
                      out.size(1) >= kChannels * patch * patch,
                  "out has the wrong size");
  STD_TORCH_CHECK(out.numel() <= std::numeric_limits<int>::max(), "out is too large");
  const Place place{static_cast<int>(patch),        static_cast<int>(width / patch),
                    static_cast<int>(top),          static_cast<int>(left),
                    static_cast<int>(shown_height), static_cast<int>(shown_width)};
  const Launch to(out);
  by_type(out, [&](auto zero) {
    using T = decltype(zero);
    const int rows = out.size(0), columns = out.size(1), line = pixels.size(1) * kChannels;
    write_patches_kernel<T><<<ceil_div(rows * columns, kThreads), kThreads, 0, to.stream()>>>(
        data<T>(out), data<const uint8_t>(pixels), table, by_rows, line, data<const float>(levels),
        place, rows, columns);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

}  // namespace llava_engine
