// Stands in for torch_parallel_for under the thread sanitizer, which does not see how OpenMP's threads wait for each
// other. Included before every source; the macro gives torch's own function this name.
#pragma once

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

#define torch_parallel_for sanitized_parallel_for

extern "C" __attribute__((weak)) int32_t sanitized_parallel_for(int64_t begin, int64_t end, int64_t,
                                                                void (*body)(int64_t, int64_t, void*), void* context) {
  // Smaller parts than the grain, so that small cases have several threads, too.
  constexpr int64_t kThreads = 4;
  const int64_t part = std::max<int64_t>(1, (end - begin + kThreads - 1) / kThreads);
  std::vector<std::thread> threads;
  for (int64_t first = begin; first < end; first += part)
    threads.emplace_back([=] { body(first, std::min(first + part, end), context); });
  for (std::thread& thread : threads) thread.join();
  return 0;
}
