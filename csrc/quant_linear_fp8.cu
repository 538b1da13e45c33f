#include "quant_linear.cuh"

namespace llava_engine {

LLAVA_ENGINE_QUANT_LINEAR(kFp8);

}  // namespace llava_engine
