// Tensors by ATen's C++ headers. The library serves the very torch that it was compiled for.
#pragma once

#include <ATen/Parallel.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>
#include <torch/types.h>

#include <string>

#define SSM_LIBRARY_IMPL(ns, key, library) TORCH_LIBRARY_IMPL(ns, key, library)
#define SSM_KERNEL(function) function

namespace cuda_ops {

using at::ScalarType;
using at::Tensor;
using c10::toString;
using OptionalTensor = c10::optional<Tensor>;  // std::optional is another type before torch 2.5
using Sizes = at::IntArrayRef;
using IntList = at::IntArrayRef;

class DeviceGuard {
 public:
  explicit DeviceGuard(const Tensor& tensor) : guard_(tensor.device()) {}

 private:
  c10::DeviceGuard guard_;
};

inline int32_t device_index(const Tensor& tensor) { return tensor.get_device(); }
inline bool same_device(const Tensor& one, const Tensor& other) { return one.device() == other.device(); }
inline std::string device_name(const Tensor& tensor) { return tensor.device().str(); }

namespace ops {

inline Tensor empty(const Tensor& like, Sizes sizes, ScalarType type) {
  return at::empty(sizes, like.options().dtype(type));
}
inline Tensor empty_strided(const Tensor& like, Sizes sizes, Sizes strides, ScalarType type) {
  return at::empty_strided(sizes, strides, like.options().dtype(type));
}
inline Tensor zeros(const Tensor& like, Sizes sizes, ScalarType type) {
  return at::zeros(sizes, like.options().dtype(type));
}
inline Tensor empty_like(const Tensor& tensor) { return at::empty_like(tensor); }
inline Tensor contiguous(const Tensor& tensor) { return tensor.contiguous(); }
inline Tensor clone(const Tensor& tensor) { return tensor.clone(); }
inline Tensor to(const Tensor& tensor, ScalarType type) { return tensor.to(type); }
inline Tensor sum(const Tensor& tensor, Sizes dims) { return tensor.sum(dims); }
inline Tensor squeeze(const Tensor& tensor, int64_t dim) { return tensor.squeeze(dim); }
inline Tensor flatten(const Tensor& tensor, int64_t first, int64_t last) { return tensor.flatten(first, last); }
inline Tensor transpose(const Tensor& tensor, int64_t one, int64_t other) { return tensor.transpose(one, other); }
inline void copy(Tensor& target, const Tensor& source) { target.copy_(source); }
inline void bmm_out(Tensor& out, const Tensor& one, const Tensor& other) { at::bmm_out(out, one, other); }

}  // namespace ops

inline void parallel_for(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, const void*),
                         const void* context) {
  at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { body(begin, end, context); });
}

}  // namespace cuda_ops
