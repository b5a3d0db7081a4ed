// Tensors by torch's stable ABI. TORCH_TARGET_VERSION names the oldest torch that the library serves.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#define SSM_LIBRARY_IMPL(ns, key, library) STABLE_TORCH_LIBRARY_IMPL(ns, key, library)
#define SSM_KERNEL(function) TORCH_BOX(&function)

namespace cuda_ops {

using torch::headeronly::ScalarType;
using torch::headeronly::toString;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;
using IntList = std::vector<int64_t>;

// torch has printed the error itself by then; its text comes through the ABI from torch 2.13 on alone.
inline void check_torch(AOTITorchError code, const char* operation) {
  if (code != AOTI_TORCH_SUCCESS) throw std::runtime_error(std::string("cuda_ops: torch failed in ") + operation);
}

// Hidden, as what it holds is.
class __attribute__((visibility("hidden"))) DeviceGuard {
 public:
  explicit DeviceGuard(const Tensor& tensor) : guard_(tensor.get_device_index()) {}

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

inline int32_t device_type(const Tensor& tensor) {
  int32_t type = 0;
  check_torch(aoti_torch_get_device_type(tensor.get(), &type), "device_type");
  return type;
}
inline int32_t device_index(const Tensor& tensor) { return tensor.get_device_index(); }
inline bool same_device(const Tensor& one, const Tensor& other) {
  return device_type(one) == device_type(other) && device_index(one) == device_index(other);
}
inline std::string device_name(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  const std::string type = tensor.is_cuda() ? "cuda" : "device type " + std::to_string(device_type(tensor));
  return type + ":" + std::to_string(device_index(tensor));
}

namespace ops {

// Calls an ATen operator that returns one tensor.
template <typename... Arguments>
Tensor call(const char* name, const char* overload, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(arguments)> stack{torch::stable::detail::from(arguments)...};
  check_torch(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION), name);
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// By the dispatcher, because the C function for it does not fill the memory as deterministic mode wants it.
inline Tensor empty_strided(const Tensor& like, Sizes sizes, Sizes strides, ScalarType type) {
  using torch::stable::detail::from;
  constexpr auto none = std::nullopt;
  std::array<StableIValue, 7> stack{from(like), from(sizes), from(strides), from(std::optional(type)),
                                    from(none), from(none),  from(none)};
  if (torch_call_dispatcher("aten::new_empty_strided", "", stack.data(), TORCH_ABI_VERSION)) {
    std::string shape;
    for (const int64_t size : sizes) shape += (shape.empty() ? "" : ", ") + std::to_string(size);
    throw std::runtime_error("cuda_ops: out of memory on " + device_name(like) + " while allocating (" + shape + ") " +
                             toString(type));
  }
  return torch::stable::detail::to<Tensor>(stack[0]);
}
inline Tensor empty(const Tensor& like, Sizes sizes, ScalarType type) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t dim = sizes.size(); dim-- > 0; stride *= sizes[dim] > 0 ? sizes[dim] : 1) strides[dim] = stride;
  return empty_strided(like, sizes, strides, type);
}
inline Tensor zeros(const Tensor& like, Sizes sizes, ScalarType type) {
  return call("aten::zero_", "", empty(like, sizes, type));
}
inline Tensor empty_like(const Tensor& tensor) {
  constexpr auto none = std::nullopt;
  return call("aten::empty_like", "", tensor, none, none, none, none, none);
}
inline void copy(Tensor& target, const Tensor& source) { call("aten::copy_", "", target, source, false); }
// By allocations of our own, whose failure can be told from other errors.
inline Tensor clone(const Tensor& tensor, ScalarType type) {
  Tensor result = empty(tensor, tensor.sizes(), type);
  copy(result, tensor);
  return result;
}
inline Tensor clone(const Tensor& tensor) { return clone(tensor, tensor.scalar_type()); }
inline Tensor contiguous(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : clone(tensor); }
inline Tensor to(const Tensor& tensor, ScalarType type) {
  return tensor.scalar_type() == type ? tensor : clone(tensor, type);
}
inline Tensor sum(const Tensor& tensor, Sizes dims) {
  return call("aten::sum", "dim_IntList", tensor, std::optional<Sizes>(dims), false, std::nullopt);
}
inline Tensor squeeze(const Tensor& tensor, int64_t dim) { return call("aten::squeeze", "dim", tensor, dim); }
inline Tensor flatten(const Tensor& tensor, int64_t first, int64_t last) {
  return call("aten::flatten", "using_ints", tensor, first, last);
}
inline Tensor transpose(const Tensor& tensor, int64_t one, int64_t other) {
  return call("aten::transpose", "int", tensor, one, other);
}
inline void bmm_out(Tensor& out, const Tensor& one, const Tensor& other) { call("aten::bmm", "out", one, other, out); }

}  // namespace ops

inline void parallel_for(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, const void*),
                         const void* context) {
  struct Work {
    void (*body)(int64_t, int64_t, const void*);
    const void* context;
  } work{body, context};
  const auto run = [](int64_t begin, int64_t end, void* given) {
    const Work& work = *static_cast<const Work*>(given);
    work.body(begin, end, work.context);
  };
  check_torch(torch_parallel_for(0, count, grain, run, &work), "parallel_for");
}

}  // namespace cuda_ops
