// Facts about the compiled library, which the Python side reads through ctypes.
#include <exception>
#include <string>
#include <utility>

#include "cuda_kernels.h"
#include "signatures.h"

#define SSM_EXPORT extern "C" __attribute__((visibility("default")))

// The instruction set of the CPU kernels, or null where SSM_OPS_CPU_CAPABILITY names none.
SSM_EXPORT const char* cuda_ops_cpu_capability() {
  try {
    return cuda_ops::cpu_capability();
  } catch (const std::exception&) {
    return nullptr;
  }
}

// JSON: the constants of the CUDA kernels that determine which states are saved, and their shapes; the numbers of
// states that CUDA kernels are specialised for (any other is padded to a multiple of the state group); the operators,
// with the types of their arguments.
SSM_EXPORT const char* cuda_ops_interface() {
  static const std::string json = [] {
    using namespace cuda_ops;
    const std::pair<const char*, int64_t> constants[] = {{"route_n1_chunk", kN1Chunk},
                                                         {"state_group", kStateGroup},
                                                         {"wavefront_checkpoint_steps", kCheckpointSteps},
                                                         {"wavefront_strip_rows", kWavefrontStripRows},
                                                         {"wavefront_tile_channels", kWavefrontTileChannels}};
    std::string numbers, states, operators;
    const auto add = [](std::string& list, const std::string& entry) { list += (list.empty() ? "" : ", ") + entry; };
    const auto quoted = [](const std::string& text) { return "\"" + text + "\""; };
    for (const auto& [name, value] : constants) add(numbers, quoted(name) + ": " + std::to_string(value));
    for (const int64_t count : kSpecializedStates) add(states, std::to_string(count));
    for (const auto& [name, types] : signatures()) add(operators, quoted(name) + ": " + quoted(types));
    return "{\"constants\": {" + numbers + "}, \"specialized_states\": [" + states + "], \"operators\": {" + operators +
           "}}";
  }();
  return json.c_str();
}
