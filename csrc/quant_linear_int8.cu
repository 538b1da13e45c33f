#include "quant_linear.cuh"

namespace llava_engine {

LLAVA_ENGINE_QUANT_LINEAR(kInt8);

}  // namespace llava_engine
