// The end of a decoding step: sampled tokens into the host's ring, and each row's next input.
#include "common.cuh"
#include "ops.h"

namespace llava_engine {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kFinished = 1;  // bit 0 of an entry's flags

struct AdvanceArguments {
  int64_t* token;
  int64_t* position;
  int64_t* slot;
  int32_t* context_len;
  int64_t* sample_position;
  int32_t* remaining;
  bool* seen;
  int64_t* step;
  int4* ring;
  const int64_t* sampled;
  const int64_t* eos;
  const int32_t* block_table;
  int rows, ring_steps, ring_rows, eos_width, table_width, block_size;
  int64_t vocab;
};

// The host polls for an entry's first word and then takes the rest as given, so all 16 bytes go out
// as one store, past every cache of the device, when all that the row's next step reads is written.
__device__ void publish(int4* to, int4 entry) {
  __threadfence_system();
  asm volatile("st.volatile.global.v4.s32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(entry.x),
               "r"(entry.y), "r"(entry.z), "r"(entry.w)
               : "memory");
}

__device__ void advance_row(const AdvanceArguments& a, int row, int64_t step) {
  const int context_len = a.context_len[row];
  if (context_len <= 0) return;
  const int64_t token = a.sampled[row];
  const int remaining = a.remaining[row] - 1;
  bool finished = remaining <= 0;
  for (int i = 0; i < a.eos_width; ++i) finished |= a.eos[row * a.eos_width + i] == token;
  if (finished) {
    a.context_len[row] = 0;
    a.slot[row] = -1;
  } else {
    const int64_t position = a.position[row] + 1;
    const int64_t index = position / a.block_size;
    // Behind the table's end no step follows; the entry is read all the same.
    const int64_t block =
        index < a.table_width ? a.block_table[row * int64_t{a.table_width} + index] : 0;
    a.token[row] = token;
    a.position[row] = position;
    a.slot[row] = block * a.block_size + position % a.block_size;
    a.context_len[row] = context_len + 1;
    a.sample_position[row] += 1;
    a.remaining[row] = remaining;
    a.seen[row * a.vocab + token] = true;
  }
  int4* entry = a.ring + step % a.ring_steps * a.ring_rows + row;
  publish(entry, make_int4(static_cast<int>(step + 1), static_cast<int>(token),
                           finished ? kFinished : 0, 0));
}

__global__ void advance_kernel(AdvanceArguments a) {
  launch_dependents();
  wait_for_predecessor();
  const int64_t step = *a.step;
  for (int row = threadIdx.x; row < a.rows; row += blockDim.x) advance_row(a, row, step);
  __syncthreads();  // every thread has read the step
  if (threadIdx.x == 0) *a.step = step + 1;
}

}  // namespace

void advance(Tensor token, Tensor position, Tensor slot, Tensor context_len,
             Tensor sample_position, Tensor remaining, Tensor seen, Tensor step, Tensor ring,
             Tensor sampled, Tensor eos, Tensor block_table, int64_t block_size) {
  STD_TORCH_CHECK(eos.dim() == 2 && block_table.dim() == 2 && seen.dim() == 2 && ring.dim() == 3,
                  "eos, block_table and seen must be matrices, ring [ring_steps, rows, 4]");
  const int64_t rows = token.size(0);
  check_column(token, ScalarType::Long, rows, "token");
  check_column(position, ScalarType::Long, rows, "position");
  check_column(slot, ScalarType::Long, rows, "slot");
  check_column(context_len, ScalarType::Int, rows, "context_len");
  check_column(sample_position, ScalarType::Long, rows, "sample_position");
  check_column(remaining, ScalarType::Int, rows, "remaining");
  check_column(seen, ScalarType::Bool, rows * seen.size(1), "seen");
  check_column(step, ScalarType::Long, 1, "step");
  check_column(sampled, ScalarType::Long, rows, "sampled");
  check_column(eos, ScalarType::Long, rows * eos.size(1), "eos");
  check_column(block_table, ScalarType::Int, rows * block_table.size(1), "block_table");
  check_type(ring, ScalarType::Int, "ring");
  STD_TORCH_CHECK(ring.is_contiguous() && aligned(ring) && ring.size(0) > 0 &&
                      ring.size(1) >= rows && ring.size(2) == 4,
                  "ring must be a dense [ring_steps, at least R, 4], aligned to 16 bytes");
  STD_TORCH_CHECK(block_size > 0, "block_size must be above 0");
  if (rows == 0) return;
  const Launch to(token);
  // The ring is host memory: the device must be able to write there.
  cudaPointerAttributes attributes{};
  STD_CUDA_CHECK(cudaPointerGetAttributes(&attributes, ring.data_ptr()));
  STD_TORCH_CHECK(attributes.devicePointer != nullptr, "ring must be pinned");
  const AdvanceArguments arguments{
      data<int64_t>(token),
      data<int64_t>(position),
      data<int64_t>(slot),
      data<int32_t>(context_len),
      data<int64_t>(sample_position),
      data<int32_t>(remaining),
      data<bool>(seen),
      data<int64_t>(step),
      static_cast<int4*>(attributes.devicePointer),
      data<int64_t>(sampled),
      data<int64_t>(eos),
      data<int32_t>(block_table),
      static_cast<int>(rows),
      static_cast<int>(ring.size(0)),
      static_cast<int>(ring.size(1)),
      static_cast<int>(eos.size(1)),
      static_cast<int>(block_table.size(1)),
      static_cast<int>(block_size),
      seen.size(1),
  };
  const int threads = static_cast<int>(
      rows < kMaxThreads ? ceil_div<int64_t>(rows, kWarp) * kWarp : kMaxThreads);
  launch_chained(advance_kernel, 1, threads, 0, to.stream(), arguments);
}

}  // namespace llava_engine
