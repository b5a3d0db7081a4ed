// Scratch memory of the CPU kernels. Included by kernels that are compiled once per capability.
#pragma once

#include <cstdlib>
#include <new>

#include "simd.h"

namespace cuda_ops {
namespace SSM_CPU_CAPABILITY {

// Scratch memory aligned for vectors.
template <class S>
class Scratch {
 public:
  explicit Scratch(int64_t vectors) : data_(allocate(vectors)) {}
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  Vec<S>* data() const { return data_; }

 private:
  static Vec<S>* allocate(int64_t vectors) {
    void* memory = nullptr;
    if (posix_memalign(&memory, kVectorBytes, size_t(vectors > 0 ? vectors : 1) * kVectorBytes)) throw std::bad_alloc();
    return static_cast<Vec<S>*>(memory);
  }
  Vec<S>* data_;
};

}  // namespace SSM_CPU_CAPABILITY
}  // namespace cuda_ops
