// The projector: two products and the exact GELU between them, the second product through cuBLAS
// straight into the rows that the caller gives. cuBLASLt's own GELU epilogue is the tanh form, so
// for several pictures the first product is our own, where it takes the matrices; otherwise it is
// cuBLAS's, too, and the GELU a kernel between them. The bias is in the products' epilogues.
//
// The class tokens between the pictures' patches are dropped by addressing. Our product goes
// picture by picture. cuBLAS takes all rows from the first picture's first patch to the last one's
// last, and the GELU, which has to read and write every row anyway, leaves out the few between.
#include <torch/csrc/stable/ops.h>

#include <array>

#include "aten.h"
#include "common.cuh"
#include "ops.h"

namespace llava_engine {
namespace {

constexpr int kThreads = 256;

// Block (elements, picture). count: elements of a picture in out, where pictures lie one behind the
// other. stride: from a picture to the next in x. Not __restrict__: out may be x.
template <typename T, int N>
__global__ void gelu_kernel(T* out, const T* x, int64_t count, int64_t stride) {
  launch_dependents();
  wait_for_predecessor();
  const int64_t picture = blockIdx.y;
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * N;
  if (i >= count) return;
  float values[N];
  load(x + picture * stride + i, values);
#pragma unroll
  for (int j = 0; j < N; ++j) {
    values[j] = values[j] * 0.5f * (1.0f + erff(values[j] * 0.70710678118654752440f));
  }
  store(out + picture * count + i, values);
}

// A matrix of dense rows in the memory of `tensor`.
Tensor rows_of(const Tensor& tensor, int64_t rows, int64_t columns) {
  const std::array<int64_t, 2> sizes{rows, columns}, strides{columns, 1};
  return torch::stable::from_blob(tensor.data_ptr(), sizes, strides, tensor.device(),
                                  tensor.scalar_type());
}

// How many rows lie from one picture to the next; the rows themselves have to be dense.
int64_t picture_rows(const Tensor& tensor, const char* name) {
  const int64_t pictures = tensor.size(0), rows = tensor.size(1), columns = tensor.size(2);
  STD_TORCH_CHECK(tensor.is_cuda(), name, " must be on the GPU");
  STD_TORCH_CHECK(tensor.stride(2) == 1 && (rows == 1 || tensor.stride(1) == columns), name,
                  " must have dense rows, one behind the other");
  if (pictures == 1) return rows;
  STD_TORCH_CHECK(tensor.stride(0) % columns == 0 && tensor.stride(0) >= rows * columns, name,
                  " must have its pictures apart by whole rows");
  return tensor.stride(0) / columns;
}

// The second product has nothing to be fused with but the bias, and there cuBLAS is the faster.
void project_by_matmul(const Tensor& out, const Tensor& features, const Tensor& w1,
                       const std::optional<Tensor>& b1, const Tensor& w2,
                       const std::optional<Tensor>& b2) {
  constexpr int64_t kGelu = 1;  // kernels/matmul.py
  const int64_t pictures = features.size(0), patches = features.size(1), hidden = w1.size(0);
  Tensor middle = torch::stable::new_empty(features, {pictures * patches, hidden});
  for (int64_t picture = 0; picture < pictures; ++picture) {
    matmul_store(torch::stable::narrow(middle, 0, picture * patches, patches),
                 torch::stable::select(features, 0, picture), w1, b1, kGelu);
  }
  linear_out(rows_of(out, pictures * patches, out.size(2)), middle, w2, b2);
}

void project_by_cublas(const Tensor& out, const Tensor& features, const Tensor& w1,
                       const std::optional<Tensor>& b1, const Tensor& w2,
                       const std::optional<Tensor>& b2) {
  const int64_t pictures = features.size(0), patches = features.size(1), hidden = w1.size(0);
  const int64_t apart = picture_rows(features, "features");
  const int64_t rows = (pictures - 1) * apart + patches;
  Tensor middle = torch::stable::new_empty(features, {rows, hidden});
  linear_out(middle, rows_of(features, rows, features.size(2)), w1, b1);

  const bool dense = apart == patches;
  Tensor active = dense ? middle : torch::stable::new_empty(features, {pictures * patches, hidden});
  const int64_t groups = dense ? 1 : pictures;
  STD_TORCH_CHECK(groups <= 65535, "too many pictures at once");
  const int64_t count = active.numel() / groups, stride = apart * hidden;
  const Launch to(out);
  by_type(middle, [&](auto zero) {
    using T = decltype(zero);
    const bool vectors = count % kVector == 0 && stride % kVector == 0;
    const int64_t items = vectors ? count / kVector : count;
    const dim3 grid(ceil_div<int64_t>(items, kThreads), groups);
    const auto kernel = vectors ? gelu_kernel<T, kVector> : gelu_kernel<T, 1>;
    launch_chained(kernel, grid, kThreads, 0, to.stream(), data<T>(active), data<T>(middle), count,
                   stride);
  });
  linear_out(rows_of(out, pictures * patches, out.size(2)), active, w2, b2);
}

}  // namespace

void project(Tensor out, Tensor features, Tensor w1, std::optional<Tensor> b1, Tensor w2,
             std::optional<Tensor> b2) {
  STD_TORCH_CHECK(features.dim() == 3 && out.dim() == 3 && w1.dim() == 2,
                  "features must be [n, patches, in], out [n, patches, hidden], w1 a matrix");
  STD_TORCH_CHECK(out.size(0) == features.size(0) && out.size(1) == features.size(1),
                  "out must have as many pictures and patches as features");
  check_dense(out, "out");
  if (features.size(0) * features.size(1) == 0) return;
  // Of one picture cuBLAS is the faster even with the GELU behind it (bench/vision.py).
  if (features.size(0) > 1 && matmul_takes(torch::stable::select(features, 0, 0), w1)) {
    project_by_matmul(out, features, w1, b1, w2, b2);
  } else {
    project_by_cublas(out, features, w1, b1, w2, b2);
  }
}

}  // namespace llava_engine
