#include "matmul_launch.cuh"

namespace llava_engine {

template void run_matmul<__nv_bfloat16>(const Tensor&, const Tensor&, Work<__nv_bfloat16>);
template void run_matmul<__nv_fp8_e4m3>(const Tensor&, const Tensor&, Work<__nv_bfloat16>);

}  // namespace llava_engine
