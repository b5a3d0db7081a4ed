// Replaces CUDA's header where the tests compile kernels for the CPU.
//
// The threads of a block are fibers of one CPU thread. They switch only at barriers, warp operations and sleeps, in an
// order that a seed decides, so that a missing barrier shows. Between two barriers, warps run in turns or one after the
// other. Some blocks of a launch are resident at a time and take turns, each at its own pace, between and within
// barriers; the others start when those end. Shared memory has the exact size and starts as NaN.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "approximate.h"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) float4 {
  float x, y, z, w;
};

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719
};
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
using cudaStream_t = void*;

namespace emulation {

constexpr unsigned kLanes = 32;
constexpr size_t kStackBytes = 256 * 1024;
constexpr int kSharedWithoutAsking = 48 * 1024;

enum class State { kReady, kAtBlock, kAtWarp, kAsleep, kEnded };
enum class WarpOperation { kNone, kSync, kShuffle, kVote };

struct Fiber {
  State state = State::kReady;
  WarpOperation operation = WarpOperation::kNone;
  unsigned exchanges = 0;
  bool polls = false;  // has slept since it last waited for anything else
  dim3 thread;
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  void* fake_stack = nullptr;
};

using Memory = std::unique_ptr<char, decltype(&std::free)>;

// A resident block. Its stacks are reused by the next one.
struct Block {
  bool runs = false;
  dim3 index;
  unsigned pace = 1;  // it takes one of this many turns
  std::vector<Fiber> fibers;
  std::vector<char*> stacks;
  std::vector<std::array<std::array<uint64_t, kLanes>, 2>> exchange;
  Memory shared{nullptr, &std::free};
  // The threads in the order of this round, and how many of them had their turn.
  std::vector<size_t> order;
  size_t turn = 0;
  // The warps in the order in which they run to the next barrier, if one by one, and the current one.
  std::vector<size_t> warps;
  bool one_by_one = false;
  size_t warp = 0;
  int64_t done_before = 0;  // Machine::done at the start of the round
  int64_t stalled_at = -1;  // Machine::done at the end of the last round without progress
};

struct Machine {
  // Settings.
  unsigned seed = 0;
  int shared_limit = 227 * 1024, multiprocessors = 132;  // of an H200
  int residents = 4;                                     // blocks that run at the same time
  int fail_launch = -1;  // the number of the launch that is made to fail, counted from 0
  // Runs kernels in the emulation's stead, if given.
  void (*launcher)(const void* kernel, unsigned blocks, unsigned threads, size_t shared, const void* argument,
                   size_t bytes) = nullptr;
  // Results.
  cudaError_t error = cudaSuccess;
  std::string message;
  int64_t launches = 0, blocks = 0;
  // The current launch.
  dim3 grid, threads;
  size_t shared = 0;
  std::function<void()> body;
  std::vector<Block> resident;
  Block* block = nullptr;
  Fiber* current = nullptr;
  int64_t done = 0;  // turns of threads that did more than poll
  std::map<const void*, int> allowed_shared;
#if defined(__x86_64__)
  void* scheduler = nullptr;
#else
  ucontext_t scheduler;
#endif
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
};

inline Machine machine;

#if defined(__x86_64__)
extern "C" void emulation_switch(void** saved, void* next);
asm(R"(
.text
.weak emulation_switch
.hidden emulation_switch
.type emulation_switch, @function
emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulation_switch, .-emulation_switch
)");
#endif

inline void enter(Fiber& fiber, const char* stack) {
  machine.current = &fiber;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&machine.scheduler_fake_stack, stack, kStackBytes);
#endif
  (void)stack;
#if defined(__x86_64__)
  emulation_switch(&machine.scheduler, fiber.stack_pointer);
#else
  swapcontext(&machine.scheduler, &fiber.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(machine.scheduler_fake_stack, nullptr, nullptr);
#endif
  machine.current = nullptr;
}

inline void leave(bool for_good) {
  Fiber& fiber = *machine.current;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fiber.fake_stack, machine.scheduler_stack,
                                 machine.scheduler_stack_bytes);
#endif
  (void)for_good;
#if defined(__x86_64__)
  emulation_switch(&fiber.stack_pointer, machine.scheduler);
#else
  swapcontext(&fiber.context, &machine.scheduler);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber.fake_stack, nullptr, nullptr);
#endif
}

[[noreturn]] inline void start() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_stack, &machine.scheduler_stack_bytes);
#endif
  machine.body();
  machine.current->state = State::kEnded;
  leave(true);
  std::abort();
}

inline void prepare(Fiber& fiber, char* stack) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack, kStackBytes);
#endif
#if defined(__x86_64__)
  // The state of a fiber that was left at its start: six saved registers, the return address, and a slot that keeps the
  // stack aligned as after a call.
  void** top = reinterpret_cast<void**>(stack + kStackBytes) - 2;
  top[0] = reinterpret_cast<void*>(&start);
  top[1] = nullptr;
  for (int i = 1; i <= 6; ++i) top[-i] = nullptr;
  fiber.stack_pointer = top - 6;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack;
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, reinterpret_cast<void (*)()>(&start), 0);
#endif
}

inline unsigned flat_thread() { return unsigned(machine.current - machine.block->fibers.data()); }

inline std::string where() {
  return "block " + std::to_string(machine.block->index.x) + " of " + std::to_string(machine.grid.x);
}

// Fisher-Yates shuffle; the standard one differs between libraries.
inline void shuffle(std::vector<size_t>& values, std::mt19937& random) {
  for (size_t i = values.size(); i > 1; --i) std::swap(values[i - 1], values[random() % i]);
}

// Decides how a block's warps run to their next barrier: in turns, or one after the other.
inline void order_warps(Block& block, std::mt19937& random) {
  block.one_by_one = random() % 2;
  shuffle(block.warps, random);
}

// The first warp with a thread that can continue; one that polled only if there is no other.
inline size_t next_warp(const Block& block) {
  size_t polling = block.warps.front();
  for (const size_t warp : block.warps) {
    bool ready = false, polls = false;
    for (size_t i = warp * kLanes; i < std::min((warp + 1) * kLanes, block.fibers.size()); ++i) {
      ready |= block.fibers[i].state == State::kReady;
      polls |= block.fibers[i].polls;
    }
    if (ready && !polls) return warp;
    if (ready) polling = warp;
  }
  return polling;
}

// Resumes the threads whose wait is over. Returns false if the block has ended.
inline bool release(Block& block, std::mt19937& random) {
  bool any = false;
  std::vector<Fiber>& fibers = block.fibers;
  const size_t count = fibers.size();
  for (Fiber& fiber : fibers) {
    if (fiber.state == State::kAsleep) fiber.state = State::kReady;
    any |= fiber.state == State::kReady;
  }
  for (size_t first = 0; first < count; first += kLanes) {
    size_t waiting = 0, ended = 0, present = 0;
    bool same = true;
    WarpOperation operation = WarpOperation::kNone;
    for (size_t i = first; i < first + kLanes && i < count; ++i, ++present) {
      const Fiber& fiber = fibers[i];
      ended += fiber.state == State::kEnded;
      if (fiber.state != State::kAtWarp) continue;
      if (waiting++ && fiber.operation != operation) same = false;
      operation = fiber.operation;
    }
    if (!waiting) continue;
    if (!same) throw std::runtime_error("lanes of a warp meet in different operations in " + where());
    if (ended) throw std::runtime_error("lanes have ended that others of their warp wait for in " + where());
    if (waiting < present) continue;
    for (size_t i = first; i < first + present; ++i) fibers[i].state = State::kReady;
    any = true;
  }
  if (any) return true;
  size_t waiting = 0, ended = 0;
  for (const Fiber& fiber : fibers) {
    waiting += fiber.state == State::kAtBlock;
    ended += fiber.state == State::kEnded;
  }
  if (ended == count) return false;
  if (waiting + ended < count || ended)
    throw std::runtime_error("divergent barrier in " + where() + ": of " + std::to_string(count) + " threads " +
                             std::to_string(waiting) + " wait at __syncthreads, " + std::to_string(ended) +
                             " have ended, the others wait for their warps");
  for (Fiber& fiber : fibers) fiber.state = State::kReady;
  order_warps(block, random);
  return true;
}

// Starts a block of the launch in place of one that has ended.
inline void start_block(Block& block, size_t number, std::mt19937& random) {
  Machine& m = machine;
  const size_t count = size_t(m.threads.x) * m.threads.y * m.threads.z;
  block.runs = true;
  block.turn = count;
  block.stalled_at = -1;
  block.index =
      dim3(unsigned(number % m.grid.x), unsigned(number / m.grid.x % m.grid.y), unsigned(number / m.grid.x / m.grid.y));
  block.pace = 1u << random() % 3 * 3;  // 1, 8 or 64
  while (block.stacks.size() < count) block.stacks.push_back(static_cast<char*>(std::aligned_alloc(64, kStackBytes)));
  block.fibers.assign(count, Fiber());
  block.order.resize(count);
  block.exchange.resize((count + kLanes - 1) / kLanes);
  block.warps.resize(block.exchange.size());
  for (size_t warp = 0; warp < block.warps.size(); ++warp) block.warps[warp] = warp;
  order_warps(block, random);
  for (size_t i = 0; i < count; ++i) {
    block.fibers[i].thread = dim3(unsigned(i) % m.threads.x, unsigned(i) / m.threads.x % m.threads.y,
                                  unsigned(i) / m.threads.x / m.threads.y);
    prepare(block.fibers[i], block.stacks[i]);
    block.order[i] = i;
  }
  // The exact size, so that the address sanitizer detects accesses beyond it.
  block.shared.reset(static_cast<char*>(std::malloc(m.shared ? m.shared : 1)));
  std::memset(block.shared.get(), 0xff, m.shared ? m.shared : 1);
  ++m.blocks;
}

// Runs some of the block's threads until they wait, or all of them if the block is alone. When each has had its turn,
// the round ends, and threads whose wait is over are resumed.
inline void take_turn(Block& block, bool alone, std::mt19937& random) {
  machine.block = &block;
  const size_t count = block.order.size();
  if (block.turn == count) {
    shuffle(block.order, random);
    block.turn = 0;
    block.done_before = machine.done;
    if (block.one_by_one) block.warp = next_warp(block);
  }
  const size_t until = alone ? count : block.turn + 1 + random() % (count - block.turn);
  for (; block.turn < until; ++block.turn) {
    const size_t i = block.order[block.turn];
    Fiber& fiber = block.fibers[i];
    if (fiber.state != State::kReady || (block.one_by_one && i / kLanes != block.warp)) continue;
    const bool polled = fiber.polls;
    fiber.polls = false;
    enter(fiber, block.stacks[i]);
    fiber.polls = fiber.state == State::kAsleep;
    machine.done += !(polled && fiber.polls);
  }
  if (block.turn < count) return;
  block.runs = release(block, random);
  if (block.done_before == machine.done) block.stalled_at = machine.done;
}

// Runs all blocks of the launch: from the first to the last for even seeds, else from the last to the first.
inline void run_blocks(std::mt19937& random) {
  Machine& m = machine;
  const size_t total = size_t(m.grid.x) * m.grid.y * m.grid.z;
  const size_t residents = std::min(total, size_t(m.residents));
  if (m.resident.size() < residents) m.resident.resize(residents);
  for (Block& block : m.resident) block.runs = false;
  size_t started = 0, running = 0;
  while (true) {
    for (size_t i = 0; i < residents && started < total; ++i) {
      if (m.resident[i].runs) continue;
      start_block(m.resident[i], m.seed % 2 ? total - 1 - started : started, random);
      ++started;
      ++running;
    }
    if (!running) return;
    Block& block = m.resident[random() % residents];
    if (!block.runs || (running > 1 && random() % block.pace)) continue;
    take_turn(block, running == 1, random);
    running -= !block.runs;
    if (block.runs && block.stalled_at == m.done &&
        std::all_of(m.resident.begin(), m.resident.end(),
                    [&m](const Block& other) { return !other.runs || other.stalled_at == m.done; }))
      throw std::runtime_error("deadlock in " + where() + ": all of the " + std::to_string(running) +
                               " blocks that are resident poll, for what none of them will do");
  }
}

inline void wait(State state, WarpOperation operation = WarpOperation::kNone) {
  machine.current->state = state;
  machine.current->operation = operation;
  leave(false);
}

// Returns the value of another lane of the warp; all lanes must call.
template <class Value>
Value exchange(Value value, unsigned from, WarpOperation operation) {
  static_assert(sizeof(Value) <= 8);
  const unsigned thread = flat_thread();
  auto& slots = machine.block->exchange[thread / kLanes][machine.current->exchanges++ % 2];
  slots[thread % kLanes] = 0;
  std::memcpy(&slots[thread % kLanes], &value, sizeof(value));
  wait(State::kAtWarp, operation);
  std::memcpy(&value, &slots[from % kLanes], sizeof(value));
  return value;
}

inline void launch_body(const void* kernel, dim3 grid, dim3 threads, size_t shared, std::function<void()> body,
                        const void* argument, size_t bytes) {
  Machine& m = machine;
  const size_t count = size_t(threads.x) * threads.y * threads.z;
  if (m.launches++ == m.fail_launch) {
    m.error = cudaErrorLaunchFailure;
    m.message = "the launch was made to fail";
    return;
  }
  if (!grid.x || grid.x > 0x7fffffffu || !count || count > 1024 || shared > size_t(m.shared_limit) ||
      (shared > size_t(kSharedWithoutAsking) && size_t(m.allowed_shared[kernel]) < shared)) {
    m.error = cudaErrorInvalidConfiguration;
    m.message = "the launch exceeds the limits of the device";
    return;
  }
  if (m.launcher) {
    m.blocks += grid.x;
    return m.launcher(kernel, grid.x, threads.x, shared, argument, bytes);
  }
  m.grid = grid;
  m.threads = threads;
  m.shared = shared;
  m.body = std::move(body);
  std::mt19937 random(m.seed);
  try {
    run_blocks(random);
  } catch (const std::exception& error) {
    m.error = cudaErrorLaunchFailure;
    m.message = error.what();
  }
}

template <class Argument>
void launch(void (*kernel)(Argument), dim3 grid, dim3 threads, size_t shared, cudaStream_t, Argument argument) {
  launch_body(
      reinterpret_cast<const void*>(kernel), grid, threads, shared, [=] { kernel(argument); }, &argument,
      sizeof(argument));
}

}  // namespace emulation

#define SSM_LAUNCH(kernel, blocks, threads, shared, stream, ...) \
  emulation::launch(kernel, (blocks), (threads), (shared), (stream), __VA_ARGS__)
#define SSM_DYNAMIC_SHARED(name) float* name = reinterpret_cast<float*>(emulation::machine.block->shared.get())

#define threadIdx (emulation::machine.current->thread)
#define blockIdx (emulation::machine.block->index)
#define blockDim (emulation::machine.threads)
#define gridDim (emulation::machine.grid)

inline void __syncthreads() { emulation::wait(emulation::State::kAtBlock); }
inline void __syncwarp(unsigned = 0xffffffffu) {
  emulation::wait(emulation::State::kAtWarp, emulation::WarpOperation::kSync);
}
template <class Value>
Value __shfl_xor_sync(unsigned, Value value, int mask) {
  return emulation::exchange(value, emulation::flat_thread() ^ unsigned(mask), emulation::WarpOperation::kShuffle);
}
template <class Value>
Value __shfl_sync(unsigned, Value value, int lane) {
  return emulation::exchange(value, unsigned(lane), emulation::WarpOperation::kShuffle);
}
inline unsigned __ballot_sync(unsigned, int predicate) {
  const unsigned thread = emulation::flat_thread();
  const auto& slots = emulation::machine.block->exchange[thread / 32][emulation::machine.current->exchanges % 2];
  emulation::exchange(uint64_t(predicate != 0), 0, emulation::WarpOperation::kVote);
  unsigned result = 0;
  for (unsigned lane = 0; lane < 32; ++lane) result |= unsigned(slots[lane]) << lane;
  return result;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == 0xffffffffu; }

inline unsigned __umulhi(unsigned left, unsigned right) { return unsigned(uint64_t(left) * right >> 32); }

// Other threads of this block and of others have their turns meanwhile.
inline void __nanosleep(unsigned) { emulation::wait(emulation::State::kAsleep); }
inline unsigned long long atomicAdd(unsigned long long* sum, unsigned long long value) {
  return std::exchange(*sum, *sum + value);
}
template <class Value>
Value __ldcg(const Value* source) {
  return *source;
}
template <class Value>
void __stcs(Value* target, Value value) {
  *target = value;
}

inline cudaError_t cudaGetLastError() { return std::exchange(emulation::machine.error, cudaSuccess); }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess                 ? "no error"
         : emulation::machine.message.empty() ? "invalid argument"
                                              : emulation::machine.message.c_str();
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const emulation::Machine& machine = emulation::machine;
  *value = attribute == cudaDevAttrMultiProcessorCount ? machine.multiprocessors : machine.shared_limit;
  return cudaSuccess;
}
inline cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  if (value > emulation::machine.shared_limit) return cudaErrorInvalidValue;
  emulation::machine.allowed_shared[kernel] = value;
  return cudaSuccess;
}
