// Stands in for CUDA's header where kernels are compiled for the CPU. The threads of a block are fibers of one thread of
// the CPU, which change at barriers and warp operations alone, in an order that a seed decides: what should be behind a
// barrier and is not, shows. Blocks follow one another. Shared memory is of the exact size and starts as NaN.
#pragma once

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

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9, cudaErrorLaunchFailure = 719 };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
using cudaStream_t = void*;

namespace emulation {

constexpr unsigned kLanes = 32;
constexpr size_t kStackBytes = 256 * 1024;
constexpr int kSharedWithoutAsking = 48 * 1024;

enum class State { kReady, kAtBlock, kAtWarp, kEnded };
enum class WarpOperation { kNone, kSync, kShuffle, kVote };

struct Fiber {
  State state = State::kReady;
  WarpOperation operation = WarpOperation::kNone;
  unsigned exchanges = 0;
  dim3 thread;
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  void* fake_stack = nullptr;
};

struct Machine {
  // Settings.
  unsigned seed = 0;
  int shared_limit = 227 * 1024;  // of an H200
  int fail_launch = -1;           // the number of the launch that is made to fail, counted from 0
  // What happened.
  cudaError_t error = cudaSuccess;
  std::string message;
  int64_t launches = 0, blocks = 0;
  // The block that runs.
  dim3 block, grid, threads;
  std::vector<Fiber> fibers;
  Fiber* current = nullptr;
  std::function<void()> body;
  char* shared = nullptr;
  std::vector<std::array<std::array<uint64_t, kLanes>, 2>> exchange;
  std::vector<char*> stacks;
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
  // As if the fiber had been left at its start: six saved registers, the address to return to, and that address' own
  // place, which keeps the stack aligned as after a call.
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

inline unsigned flat_thread() { return unsigned(machine.current - machine.fibers.data()); }

inline std::string where() {
  return "block " + std::to_string(machine.block.x) + " of " + std::to_string(machine.grid.x);
}

// Lets go on who waits for nobody any more; whether there is anyone.
inline bool release() {
  bool any = false;
  const size_t count = machine.fibers.size();
  for (size_t first = 0; first < count; first += kLanes) {
    size_t waiting = 0, ended = 0, present = 0;
    bool same = true;
    WarpOperation operation = WarpOperation::kNone;
    for (size_t i = first; i < first + kLanes && i < count; ++i, ++present) {
      const Fiber& fiber = machine.fibers[i];
      ended += fiber.state == State::kEnded;
      if (fiber.state != State::kAtWarp) continue;
      if (waiting++ && fiber.operation != operation) same = false;
      operation = fiber.operation;
    }
    if (!waiting) continue;
    if (!same) throw std::runtime_error("lanes of a warp meet in different operations in " + where());
    if (ended) throw std::runtime_error("lanes have ended that others of their warp wait for in " + where());
    if (waiting < present) continue;
    for (size_t i = first; i < first + present; ++i) machine.fibers[i].state = State::kReady;
    any = true;
  }
  if (any) return true;
  size_t waiting = 0, ended = 0;
  for (const Fiber& fiber : machine.fibers) waiting += fiber.state == State::kAtBlock, ended += fiber.state == State::kEnded;
  if (ended == count) return false;
  if (waiting + ended < count || ended)
    throw std::runtime_error("divergent barrier in " + where() + ": of " + std::to_string(count) + " threads " +
                             std::to_string(waiting) + " wait at __syncthreads, " + std::to_string(ended) +
                             " have ended, the others wait for their warps");
  for (Fiber& fiber : machine.fibers) fiber.state = State::kReady;
  return true;
}

inline void run_block(std::mt19937& random) {
  const size_t count = machine.fibers.size();
  std::vector<size_t> order(count);
  for (size_t i = 0; i < count; ++i) {
    Fiber& fiber = machine.fibers[i] = Fiber();
    fiber.thread = dim3(unsigned(i) % machine.threads.x, unsigned(i) / machine.threads.x % machine.threads.y,
                        unsigned(i) / machine.threads.x / machine.threads.y);
    prepare(fiber, machine.stacks[i]);
    order[i] = i;
  }
  do {
    // Fisher and Yates' shuffle by hand: the standard one differs between libraries.
    for (size_t i = count; i > 1; --i) std::swap(order[i - 1], order[random() % i]);
    for (const size_t i : order)
      if (machine.fibers[i].state == State::kReady) enter(machine.fibers[i], machine.stacks[i]);
  } while (release());
}

inline void wait(State state, WarpOperation operation = WarpOperation::kNone) {
  machine.current->state = state, machine.current->operation = operation;
  leave(false);
}

// What a lane of the own warp gives; all lanes take part.
template <class Value>
Value exchange(Value value, unsigned from, WarpOperation operation) {
  static_assert(sizeof(Value) <= 8);
  const unsigned thread = flat_thread();
  auto& slots = machine.exchange[thread / kLanes][machine.current->exchanges++ % 2];
  slots[thread % kLanes] = 0;
  std::memcpy(&slots[thread % kLanes], &value, sizeof(value));
  wait(State::kAtWarp, operation);
  std::memcpy(&value, &slots[from % kLanes], sizeof(value));
  return value;
}

inline void launch_body(const void* kernel, dim3 grid, dim3 threads, size_t shared, std::function<void()> body) {
  Machine& m = machine;
  const size_t count = size_t(threads.x) * threads.y * threads.z;
  if (m.launches++ == m.fail_launch) {
    m.error = cudaErrorLaunchFailure, m.message = "the launch was made to fail";
    return;
  }
  if (!grid.x || grid.x > 0x7fffffffu || !count || count > 1024 || shared > size_t(m.shared_limit) ||
      (shared > size_t(kSharedWithoutAsking) && size_t(m.allowed_shared[kernel]) < shared)) {
    m.error = cudaErrorInvalidConfiguration, m.message = "the launch asks for what the device does not have";
    return;
  }
  m.grid = grid, m.threads = threads, m.body = std::move(body);
  while (m.stacks.size() < count) m.stacks.push_back(static_cast<char*>(std::aligned_alloc(64, kStackBytes)));
  m.fibers.resize(count);
  m.exchange.resize((count + kLanes - 1) / kLanes);
  std::mt19937 random(m.seed);
  try {
    for (unsigned z = 0; z < grid.z; ++z)
      for (unsigned y = 0; y < grid.y; ++y)
        for (unsigned x = 0; x < grid.x; ++x, ++m.blocks) {
          m.block = dim3(x, y, z);
          // Of the very size, so that the address sanitizer sees what lies beyond.
          const std::unique_ptr<char, decltype(&std::free)> memory(static_cast<char*>(std::malloc(shared ? shared : 1)),
                                                                   &std::free);
          std::memset(memory.get(), 0xff, shared ? shared : 1);
          m.shared = memory.get();
          run_block(random);
        }
  } catch (const std::exception& error) {
    m.error = cudaErrorLaunchFailure, m.message = error.what();
  }
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 threads, size_t shared, cudaStream_t, Arguments... arguments) {
  launch_body(reinterpret_cast<const void*>(kernel), grid, threads, shared, [=] { kernel(arguments...); });
}

}  // namespace emulation

#define SSM_LAUNCH(kernel, blocks, threads, shared, stream, ...) \
  emulation::launch(kernel, (blocks), (threads), (shared), (stream), __VA_ARGS__)
#define SSM_DYNAMIC_SHARED(name) float* name = reinterpret_cast<float*>(emulation::machine.shared)

#define threadIdx (emulation::machine.current->thread)
#define blockIdx (emulation::machine.block)
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
  const auto& slots = emulation::machine.exchange[thread / 32][emulation::machine.current->exchanges % 2];
  emulation::exchange(uint64_t(predicate != 0), 0, emulation::WarpOperation::kVote);
  unsigned result = 0;
  for (unsigned lane = 0; lane < 32; ++lane) result |= unsigned(slots[lane]) << lane;
  return result;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == 0xffffffffu; }

inline float __fdividef(float a, float b) { return a / b; }

inline cudaError_t cudaGetLastError() { return std::exchange(emulation::machine.error, cudaSuccess); }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : emulation::machine.message.empty() ? "invalid argument" : emulation::machine.message.c_str();
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = emulation::machine.shared_limit;
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  if (value > emulation::machine.shared_limit) return cudaErrorInvalidValue;
  emulation::machine.allowed_shared[kernel] = value;
  return cudaSuccess;
}
