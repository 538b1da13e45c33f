#include "matmul_launch.cuh"

namespace llava_engine {

template void run_matmul<__half>(const Tensor&, const Tensor&, Work<__half>);
template void run_matmul<__nv_fp8_e4m3>(const Tensor&, const Tensor&, Work<__half>);

}  // namespace llava_engine
