// Helpers shared by the bindings: checks and strides.
#pragma once

#include <limits>
#include <optional>

#include "cuda_kernels.h"
#include "scan_types.h"
#include "signatures.h"
#include "tensor.h"

namespace cuda_ops {

#if defined(SSM_EMULATION)
// The tests compile the CUDA kernels for the CPU and bind them to operators of a namespace of their own.
#define SSM_OPS_NAMESPACE cuda_ops_emulation
extern const CudaKernels* emulated_kernels;
#else
#define SSM_OPS_NAMESPACE cuda_ops
#endif

// The CUDA kernels for a map, or null if it is on the CPU. They run on the device's current stream.
class Cuda {
 public:
  explicit Cuda(const Tensor& x) {
    if (x.is_cpu()) {
#if defined(SSM_EMULATION)
      kernels_ = emulated_kernels;
#endif
    } else {
#if defined(SSM_WITH_CUDA)
      SSM_CHECK(x.is_cuda(), "x must be on the CPU or a CUDA device, got ", device_name(x));
      kernels_ = &kCompiledCudaKernels;
      guard_.emplace(x);
      if (!aoti_torch_get_current_cuda_stream)
        raise<std::runtime_error>("this torch does not tell its current CUDA stream; the CUDA kernels need torch 2.4");
      if (aoti_torch_get_current_cuda_stream(device_index(x), &stream_))
        raise<std::runtime_error>("torch does not tell the current stream of ", device_name(x));
#else
      SSM_CHECK(false, "x must be on the CPU, got ", device_name(x));
#endif
    }
    SSM_CHECK(!kernels_ || x.scalar_type() != ScalarType::Double,
              "x is float64, which the scans serve on the CPU alone; use float32 on ", device_name(x));
  }
  explicit operator bool() const { return kernels_ != nullptr; }
  const CudaKernels* operator->() const { return kernels_; }
  void* stream() const { return stream_; }

  // Raises if a launch, or the plan before it, failed.
  void check(int code, const char* op) const {
    if (code)
      raise<std::runtime_error>(
          op, ": CUDA error ", code, ": ", kernels_->error_string(code),
          ". An error before it may be the cause (CUDA_LAUNCH_BLOCKING=1 shows which). \"no kernel image\" means that "
          "the library was not compiled for this GPU: build it with TORCH_CUDA_ARCH_LIST naming its compute "
          "capability. \"invalid configuration\" means that a chunk's states do not fit into shared memory: pass a "
          "smaller chunk.");
  }

 private:
  const CudaKernels* kernels_ = nullptr;
  void* stream_ = nullptr;
  std::optional<DeviceGuard> guard_;
};

inline DataType data_type(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return DataType::kFloat32;
    case ScalarType::BFloat16: return DataType::kBFloat16;
    case ScalarType::Half: return DataType::kFloat16;
    case ScalarType::Double: return DataType::kFloat64;
    default: raise<std::invalid_argument>("x must be float32, bfloat16, float16 or float64, got ", x.scalar_type());
  }
}

inline ScalarType state_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Kernels need unit stride along the last dimension, and support any other stride.
inline bool has_unit_stride(const Tensor& tensor) { return tensor.size(-1) <= 1 || tensor.stride(-1) == 1; }

inline Tensor last_contiguous(const Tensor& tensor) {
  return has_unit_stride(tensor) ? tensor : ops::contiguous(tensor);
}

inline OptionalTensor last_contiguous(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(last_contiguous(*tensor)) : OptionalTensor();
}

namespace ops {
inline OptionalTensor contiguous(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(contiguous(*tensor)) : OptionalTensor();
}
}  // namespace ops

// A tensor, where one was given, must have this shape and type, and the device of x.
inline void check_shape(const char* name, const OptionalTensor& tensor, Sizes expected, ScalarType type,
                        const Tensor& x) {
  if (!tensor) return;
  SSM_CHECK(tensor->sizes().equals(expected), name, " must have shape ", expected, ", got ", tensor->sizes());
  SSM_CHECK(tensor->scalar_type() == type, name, " must be ", type, ", got ", tensor->scalar_type());
  SSM_CHECK(same_device(*tensor, x), name, " must be on ", device_name(x), " like x, got ", device_name(*tensor));
}

template <typename T>
void check_decay_rates_of(const char* name, const Tensor& A) {
  const T* rates = static_cast<const T*>(A.const_data_ptr());
  const int64_t count = A.numel();
  for (int64_t i = 0; i < count; ++i)
    SSM_CHECK(rates[i] <= 0 && rates[i] >= std::numeric_limits<T>::lowest(), name,
              " must be finite and not positive, got ", double(rates[i]), "; ", name,
              " is usually minus the exponential of a parameter, and a NaN there means that training has diverged");
}

inline void check_decay_rates(const char* name, const Tensor& A) {
  if (!A.is_cpu()) return;  // reading the values would synchronize
  A.scalar_type() == ScalarType::Double ? check_decay_rates_of<double>(name, A) : check_decay_rates_of<float>(name, A);
}

// Address and strides of a (B, H, W, [K, [G,]] ...) tensor; the strides of missing dimensions are 0.
inline GridTensor grid_tensor(const OptionalTensor& tensor) {
  GridTensor grid;
  if (!tensor) return grid;
  const auto strides = tensor->strides();
  // An empty tensor has no address, but must not look like one that was not given.
  static char no_elements;
  grid.data = tensor->numel() ? tensor->data_ptr() : &no_elements;
  grid.batch = strides[0];
  grid.row = strides[1];
  grid.column = strides[2];
  grid.route = strides.size() > 4 ? strides[3] : 0;
  grid.group = strides.size() > 5 ? strides[4] : 0;
  return grid;
}

// The names that torch.FunctionSchema has for the types.
template <typename T>
struct TypeName;
template <>
struct TypeName<Tensor> {
  static constexpr const char* value = "Tensor";
};
template <>
struct TypeName<OptionalTensor> {
  static constexpr const char* value = "Optional[Tensor]";
};
template <>
struct TypeName<IntList> {
  static constexpr const char* value = "List[int]";
};
template <>
struct TypeName<int64_t> {
  static constexpr const char* value = "int";
};
template <>
struct TypeName<bool> {
  static constexpr const char* value = "bool";
};

template <typename Result, typename... Arguments>
std::string signature(Result (*)(Arguments...)) {
  std::string types;
  ((types += std::string(types.empty() ? "" : ", ") + TypeName<std::decay_t<Arguments>>::value), ...);
  return types;
}

// Registers a kernel of the operator that has its name.
#define SSM_REGISTER(library, name)                \
  library.impl(#name, SSM_KERNEL(cuda_ops::name)); \
  cuda_ops::signatures()[#name] = cuda_ops::signature(&cuda_ops::name)

inline const void* address_of(const OptionalTensor& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }

}  // namespace cuda_ops
