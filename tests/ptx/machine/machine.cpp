// Interface of the tests.
#include "machine.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

struct Table {
  std::vector<std::string> names;
  std::vector<ptx::Function> functions;
  Table() {
    const ptx::Instructions instructions;
    for (const auto& [name, function] : instructions.table()) {
      names.push_back(name);
      functions.push_back(function);
    }
  }
};
const Table& table() {
  static const Table table;
  return table;
}
std::string message;

}  // namespace

// Names of the arithmetic instructions, by their numbers; null after the last one.
EXPORT const char* ptx_name(int32_t function) {
  return size_t(function) < table().names.size() ? table().names[function].c_str() : nullptr;
}

// Runs a kernel. Returns the number of warps' instructions, or -1 after a fault, whose message is then in ptx_message.
EXPORT int64_t ptx_run(const ptx::Instruction* code, int64_t instructions, const ptx::Constant* constants,
                       int64_t constant_count, int32_t slots, const int32_t* specials, const ptx::Settings* settings,
                       ptx::Extent extent, int64_t blocks, int32_t threads, int64_t shared, const uint8_t* arguments,
                       int64_t argument_bytes) {
  ptx::Program program;
  program.code.assign(code, code + instructions);
  program.constants.assign(constants, constants + constant_count);
  program.slots = slots;
  std::copy(specials, specials + ptx::kSpecials, program.specials);
  try {
    return ptx::Launch(program, table().functions, *settings, extent, blocks, threads, size_t(shared), arguments,
                       size_t(argument_bytes))
        .run();
  } catch (const ptx::Fault& fault) {
    message = fault.what();
    return -1;
  }
}
EXPORT const char* ptx_message() { return message.c_str(); }
EXPORT uint64_t ptx_parameters() { return ptx::Launch::kParameters; }
EXPORT uint64_t ptx_shared() { return ptx::SharedMemory::kBase; }
