// A step in one call, from what one upload left on the device to the sampled tokens: by some twenty
// Python would give up its lock as often, and wait for it again beside every thread that computes.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "aten.h"
#include "common.cuh"
#include "ops.h"

namespace llava_engine {
namespace {

constexpr int kThreads = 256;

// Views of arrays that lie right behind each other; they own nothing.
class Uploaded {
 public:
  explicit Uploaded(const Tensor& bytes)
      : data_(bytes.data_ptr()), left_(bytes.numel()), device_(bytes.device()) {}

  Tensor next(ScalarType type, std::vector<int64_t> sizes) {
    const int64_t width = type == ScalarType::Long ? 8 : 4;
    std::vector<int64_t> strides(sizes.size());
    int64_t count = 1;
    for (size_t i = sizes.size(); i-- > 0;) {
      strides[i] = std::max<int64_t>(count, 1);
      STD_TORCH_CHECK(sizes[i] >= 0 && sizes[i] <= left_ / width / strides[i],
                      "what is to be read was not uploaded");
      count *= sizes[i];
    }
    // Not through torch's dispatcher, which takes longer; and all from where the bytes begin, since
    // where they end, a view of nothing might be asked which device's memory it is.
    const Tensor view =
        torch::stable::from_blob(data_, sizes, strides, device_, type, at_ / width);
    at_ += count * width;
    left_ -= count * width;
    return view;
  }

 private:
  void* data_;
  int64_t at_ = 0, left_;
  torch::stable::Device device_;
};

// Rows of `from` in place of some embeddings.
void copy_rows(const Tensor& embeds, int64_t row, const Tensor& from, int64_t first, int64_t count,
               cudaStream_t stream) {
  check_dense(from, "features");
  check_type(from, embeds.scalar_type(), "features");
  STD_TORCH_CHECK(from.dim() == 2 && from.size(1) == embeds.size(1),
                  "features must be as wide as embeddings");
  STD_TORCH_CHECK(count >= 0 && row >= 0 && row <= embeds.size(0) - count && first >= 0 &&
                      first <= from.size(0) - count,
                  "features have other rows than these");
  if (count == 0) return;
  const int64_t bytes = embeds.size(1) * static_cast<int64_t>(embeds.element_size());
  STD_CUDA_CHECK(cudaMemcpyAsync(data<char>(embeds) + row * bytes,
                                 data<const char>(from) + first * bytes, count * bytes,
                                 cudaMemcpyDeviceToDevice, stream));
}

__global__ void mark_kernel(bool* __restrict__ marks, int64_t size,
                            const int64_t* __restrict__ places, int64_t count) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= count) return;
  const int64_t place = places[index];
  if (place >= 0 && place < size) marks[place] = true;
}

// bool [rows, columns], true at `places` alone.
Tensor marked(const Tensor& places, int64_t rows, int64_t columns, cudaStream_t stream) {
  const Tensor marks = torch::stable::new_zeros(places, {rows, columns}, ScalarType::Bool);
  const int64_t count = places.numel();
  mark_kernel<<<ceil_div<int64_t>(count, kThreads), kThreads, 0, stream>>>(
      data<bool>(marks), marks.numel(), data<const int64_t>(places), count);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return marks;
}

}  // namespace

void prefill_step(Tensor tokens, Tensor uploaded, std::vector<int64_t> sizes, Tensor embedding,
                  std::vector<Tensor> features, std::vector<int64_t> feature_rows,
                  std::vector<Tensor> k_caches, std::vector<Tensor> v_caches,
                  std::vector<Tensor> weights, std::vector<Tensor> scales, std::vector<Tensor> fp8,
                  Tensor final_norm, Tensor cos_sin, Tensor head, Tensor workspace,
                  int64_t max_query_len, double scale, double eps) {
  check_dense(uploaded, "uploaded");
  check_type(uploaded, ScalarType::Byte, "uploaded");
  check_dense(embedding, "embedding");
  STD_TORCH_CHECK(sizes.size() == 5, "sizes must be tokens, sequences, blocks, sampled and seen");
  STD_TORCH_CHECK(embedding.dim() == 2 && head.dim() == 2 && head.size(1) == embedding.size(1),
                  "embedding and head must have rows of one width");
  STD_TORCH_CHECK(feature_rows.size() == 3 * features.size(),
                  "there must be three numbers for each of the features");
  const int64_t rows = sizes[0], sequences = sizes[1], blocks = sizes[2], sampled = sizes[3],
                seen_count = sizes[4], hidden = embedding.size(1), vocab = head.size(0);
  STD_TORCH_CHECK(rows > 0 && sequences > 0, "there must be tokens and sequences");
  const Launch to(uploaded);

  // In the order of kernels/prefill.py.
  Uploaded inputs(uploaded);
  const Tensor token_ids = inputs.next(ScalarType::Long, {rows});
  const Tensor positions = inputs.next(ScalarType::Long, {rows});
  const Tensor slot_mapping = inputs.next(ScalarType::Long, {rows});
  const Tensor wanted = inputs.next(ScalarType::Long, {sampled});
  const Tensor seed = inputs.next(ScalarType::Long, {sampled});
  const Tensor position = inputs.next(ScalarType::Long, {sampled});
  const Tensor seen_at = inputs.next(ScalarType::Long, {seen_count});
  const Tensor block_table = inputs.next(ScalarType::Int, {sequences, blocks});
  const Tensor query_start = inputs.next(ScalarType::Int, {sequences + 1});
  const Tensor context_lens = inputs.next(ScalarType::Int, {sequences});
  const Tensor top_k = inputs.next(ScalarType::Int, {sampled});
  const Tensor temperature = inputs.next(ScalarType::Float, {sampled});
  const Tensor top_p = inputs.next(ScalarType::Float, {sampled});
  const Tensor repetition_penalty = inputs.next(ScalarType::Float, {sampled});
  check_column(tokens, ScalarType::Long, sampled, "tokens");

  const Tensor embeds = index_select(embedding, token_ids);
  for (size_t i = 0; i < features.size(); ++i) {
    const int64_t* const place = feature_rows.data() + 3 * i;
    copy_rows(embeds, place[0], features[i], place[1], place[2], to.stream());
  }
  const Tensor out = torch::stable::new_empty(embeds, {sampled, hidden});
  decoder_layers(out, embeds, std::move(k_caches), std::move(v_caches), std::move(weights),
                 std::move(scales), std::move(fp8), final_norm, cos_sin, positions, slot_mapping,
                 block_table, query_start, context_lens, wanted, workspace, max_query_len, scale,
                 eps);
  if (sampled == 0) return;
  Tensor logits = torch::stable::new_empty(out, {sampled, vocab});
  linear_out(logits, out, head, {});
  if (logits.scalar_type() != ScalarType::Float) {
    Tensor wide = torch::stable::new_empty(logits, {sampled, vocab}, ScalarType::Float);
    torch::stable::copy_(wide, logits);
    logits = wide;
  }
  std::optional<Tensor> seen;
  if (seen_count > 0) seen = marked(seen_at, sampled, vocab, to.stream());
  sample(tokens, logits, temperature, top_k, top_p, repetition_penalty, seen, seed, position);
}

}  // namespace llava_engine
