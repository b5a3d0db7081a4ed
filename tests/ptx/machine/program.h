// A kernel as tests/ptx/parse.py hands it over.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace ptx {

constexpr int kLanes = 32;

enum class Kind : int32_t {
  kArithmetic,
  kLoad,
  kStore,
  kAtomicAdd,
  kBranch,
  kReturn,
  kBarrier,
  kWarpBarrier,
  kShuffle,
  kSleep,
};
enum class Space : int32_t { kParameters, kShared, kGlobal };
// How an access takes part in synchronization. Relaxed ones are strong, that is no data race, and order nothing.
enum class Order : int32_t { kWeak, kRelaxed, kSynchronizing };

// Every operand is a register; constants and special registers are registers that are set before the kernel starts.
struct Instruction {
  Kind kind;
  int32_t function;  // of arithmetic: index in the table; of a shuffle: 0 by index, 1 by exclusive or
  int32_t guard;     // register of a predicate, or -1
  int32_t negated;   // whether the guard must be false
  int32_t target;    // of a branch
  int32_t joins;     // whether it has a label: lanes may come here from elsewhere
  // Memory.
  Space space;
  int32_t bytes;  // of one element
  int32_t is_signed;
  int32_t count;  // of elements
  Order order;
  int32_t address;  // register
  int64_t offset;
  int32_t operands[6];
};

struct Constant {
  int32_t slot;
  uint64_t value;
};

enum Special { kThread, kThreads, kBlock, kBlocks, kLane, kSpecials };

struct Program {
  std::vector<Instruction> code;
  std::vector<Constant> constants;
  int32_t slots = 0;
  int32_t specials[kSpecials] = {-1, -1, -1, -1, -1};  // their slots
};

// What the kernel did wrong. `<n>` in the message stands for instruction n.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline std::string instruction(int32_t pc) { return "<" + std::to_string(pc) + ">"; }

}  // namespace ptx
