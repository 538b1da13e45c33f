// Describes matrices to the tensor copies. The driver's function is asked for at run time, so that
// the library needs no libcuda to be loaded.
#include <torch/csrc/stable/macros.h>

#include "common.cuh"
#include "wgmma.cuh"

namespace llava_engine {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

Encode encoder() {
  static const Encode found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result{};
    STD_CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                    cudaEnableDefault, &result));
    STD_TORCH_CHECK(result == cudaDriverEntryPointSuccess,
                    "the driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<Encode>(function);
  }();
  return found;
}

CUtensorMap encode(const void* matrix, CUtensorMapDataType type, int element_bytes, int rank,
                   int64_t parts, int64_t rows, int64_t columns, int64_t row_stride,
                   int box_rows) {
  CUtensorMap map;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows),
                              static_cast<cuuint64_t>(parts)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(row_stride),
                                static_cast<cuuint64_t>(rows * row_stride)};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(kSwizzleBytes / element_bytes),
                            static_cast<cuuint32_t>(box_rows), static_cast<cuuint32_t>(parts)};
  const cuuint32_t steps[] = {1, 1, 1};
  const CUresult error =
      encoder()(&map, type, rank, const_cast<void*>(matrix), sizes, strides, box, steps,
                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  STD_TORCH_CHECK(error == CUDA_SUCCESS, "a matrix of ", parts * rows, " x ", columns,
                  " cannot be described to the tensor copies: CUDA error ", static_cast<int>(error));
  return map;
}

}  // namespace

CUtensorMap matrix_map(const void* matrix, CUtensorMapDataType type, int element_bytes,
                       int64_t rows, int64_t columns, int64_t row_stride, int box_rows) {
  return encode(matrix, type, element_bytes, 2, 1, rows, columns, row_stride, box_rows);
}

CUtensorMap parts_map(const void* matrix, CUtensorMapDataType type, int element_bytes, int parts,
                      int64_t rows, int64_t columns, int64_t row_stride, int box_rows) {
  return encode(matrix, type, element_bytes, 3, parts, rows, columns, row_stride, box_rows);
}

}  // namespace llava_engine
