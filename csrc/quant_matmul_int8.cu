#include "quant_matmul_launch.cuh"

namespace llava_engine {

template void run_quant_matmul<kInt8>(const Tensor&, const Tensor&, const Tensor&, Work<__half>);
template void run_quant_matmul<kInt8>(const Tensor&, const Tensor&, const Tensor&,
                                   Work<__nv_bfloat16>);

}  // namespace llava_engine
