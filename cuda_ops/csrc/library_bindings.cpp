// Facts about the compiled library, for the Python side.
#include <string>
#include <vector>

#include "bindings.h"

namespace cuda_ops {
namespace {

// Constants of the CUDA kernels that determine which states are saved, and their shapes.
c10::Dict<std::string, int64_t> kernel_constants() {
  c10::Dict<std::string, int64_t> constants;
  constants.insert("route_n1_chunk", kN1Chunk);
  constants.insert("state_group", kStateGroup);
  constants.insert("wavefront_checkpoint_steps", kCheckpointSteps);
  constants.insert("wavefront_strip_rows", kWavefrontStripRows);
  constants.insert("wavefront_tile_channels", kWavefrontTileChannels);
  return constants;
}

// The numbers of states that CUDA kernels are specialised for; any other is padded to a multiple of the state group.
std::vector<int64_t> specialized_states() { return {std::begin(kSpecializedStates), std::end(kSpecializedStates)}; }

}  // namespace
}  // namespace cuda_ops

TORCH_LIBRARY_FRAGMENT(cuda_ops, library) {
  library.def("cpu_capability() -> str", [] { return std::string(cuda_ops::cpu_capability()); });
  library.def("kernel_constants() -> Dict(str, int)", cuda_ops::kernel_constants);
  library.def("specialized_states() -> int[]", cuda_ops::specialized_states);
}
