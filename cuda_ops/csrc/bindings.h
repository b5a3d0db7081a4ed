// Helpers shared by the bindings: checks, strides and the thread pool. Only binding files include torch.
#pragma once

#include <ATen/Parallel.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/library.h>
#include <torch/types.h>

#include <limits>
#include <optional>

#include "cuda_kernels.h"
#include "scan_types.h"

namespace cuda_ops {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

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
      TORCH_CHECK_VALUE(x.is_cuda(), "x must be on the CPU or a CUDA device, got ", x.device());
      kernels_ = &kCompiledCudaKernels;
      guard_.reset_device(x.device());
      stream_ = c10::impl::VirtualGuardImpl(x.device().type()).getStream(x.device()).native_handle();
#else
      TORCH_CHECK_VALUE(false, "x must be on the CPU, got ", x.device());
#endif
    }
    TORCH_CHECK_TYPE(!kernels_ || x.scalar_type() != at::kDouble,
                     "x is float64, which the scans serve on the CPU "
                     "alone; use float32 on ",
                     x.device());
  }
  explicit operator bool() const { return kernels_ != nullptr; }
  const CudaKernels* operator->() const { return kernels_; }
  void* stream() const { return stream_; }

  // Raises if a launch, or the plan before it, failed.
  void check(int code, const char* op) const {
    TORCH_CHECK(code == 0, op, ": CUDA error ", code, ": ", kernels_->error_string(code),
                ". An error before it may be "
                "the cause (CUDA_LAUNCH_BLOCKING=1 shows which). \"no kernel image\" means that the library was not "
                "compiled for this GPU: build it with TORCH_CUDA_ARCH_LIST naming its compute capability. \"invalid "
                "configuration\" means that a chunk's states do not fit into shared memory: pass a smaller chunk.");
  }

 private:
  const CudaKernels* kernels_ = nullptr;
  void* stream_ = nullptr;
  c10::OptionalDeviceGuard guard_;
};

inline void parallel_for(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, const void*),
                         const void* context) {
  at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { body(begin, end, context); });
}

inline DataType data_type(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat: return DataType::kFloat32;
    case at::kBFloat16: return DataType::kBFloat16;
    case at::kHalf: return DataType::kFloat16;
    case at::kDouble: return DataType::kFloat64;
    default: TORCH_CHECK_TYPE(false, "x must be float32, bfloat16, float16 or float64, got ", x.scalar_type());
  }
}

inline at::ScalarType state_type(const Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

// Kernels need unit stride along the last dimension, and support any other stride.
inline bool has_unit_stride(const Tensor& tensor) { return tensor.size(-1) <= 1 || tensor.stride(-1) == 1; }

inline Tensor last_contiguous(const Tensor& tensor) { return has_unit_stride(tensor) ? tensor : tensor.contiguous(); }

inline OptionalTensor last_contiguous(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(last_contiguous(*tensor)) : std::nullopt;
}

inline OptionalTensor contiguous(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(tensor->contiguous()) : std::nullopt;
}

inline void check_shape(const char* name, const OptionalTensor& tensor, at::IntArrayRef expected, at::ScalarType type,
                        at::Device device) {
  if (!tensor) return;
  TORCH_CHECK_VALUE(tensor->sizes() == expected, name, " must have shape ", expected, ", got ", tensor->sizes());
  TORCH_CHECK_TYPE(tensor->scalar_type() == type, name, " must be ", type, ", got ", tensor->scalar_type());
  TORCH_CHECK_VALUE(tensor->device() == device, name, " must be on ", device, " like x, got ", tensor->device());
}

inline void check_decay_rates(const char* name, const Tensor& A) {
  if (!A.is_cpu()) return;  // reading the values would synchronize
  AT_DISPATCH_FLOATING_TYPES(A.scalar_type(), "check_decay_rates", [&] {
    const scalar_t* rates = A.const_data_ptr<scalar_t>();
    for (int64_t i = 0; i < A.numel(); ++i)
      TORCH_CHECK_VALUE(rates[i] <= 0 && rates[i] >= std::numeric_limits<scalar_t>::lowest(), name,
                        " must be finite and not positive, got ", rates[i], "; ", name,
                        " is usually minus the exponential of a parameter, and a NaN there means that training has "
                        "diverged");
  });
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

inline const void* address_of(const OptionalTensor& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }

}  // namespace cuda_ops
