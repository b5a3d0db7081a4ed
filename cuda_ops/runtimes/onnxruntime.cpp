// The scans as onnxruntime's custom operators: SessionOptions.register_custom_ops_library loads this library.
#include <exception>
#include <memory>
#include <type_traits>

#include "onnxruntime_api.h"
#include "scans.h"

namespace {

using namespace ssm_runtimes;
using ort::Api;

// A status that onnxruntime returned, to be given back to it.
struct Failure {
  ort::Status* status;
};

void check(ort::Status* status) {
  if (status) throw Failure{status};
}

// Runs body and makes its exceptions statuses: none may leave this library.
template <typename Body>
ort::Status* guarded(const Api& api, Body&& body) {
  try {
    body();
    return nullptr;
  } catch (const Failure& failure) {
    return failure.status;
  } catch (const std::invalid_argument& error) {
    return api.CreateStatus(ort::kInvalidArgument, error.what());
  } catch (const std::exception& error) {
    return api.CreateStatus(ort::kFail, error.what());
  }
}

// What parallel_for uses on this thread: the kernels hand no context of the runtime on.
struct Running {
  const Api* api;
  const ort::KernelContext* context;
};
thread_local Running running;

void parallel_for(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, const void*), const void* context) {
  struct Work {
    int64_t count, grain;
    void (*body)(int64_t, int64_t, const void*);
    const void* context;
  } work{count, std::max<int64_t>(grain, 1), body, context};
  const auto run = [](void* data, size_t index) {
    const Work& work = *static_cast<const Work*>(data);
    const int64_t begin = int64_t(index) * work.grain;
    work.body(begin, std::min(begin + work.grain, work.count), work.context);
  };
  check(running.api->KernelContext_ParallelFor(running.context, run, cuda_ops::ceil_div(count, work.grain), 0, &work));
}

int64_t integer(const Api& api, const ort::KernelInfo* info, const char* name) {
  int64_t value = 0;
  check(api.KernelInfoGetAttribute_int64(info, name, &value));
  return value;
}

void read_attributes(const Api& api, const ort::KernelInfo* info, RouteScan& scan) {
  size_t count = 0;
  check(api.KernelInfoGetAttributeArray_int64(info, "routes", nullptr, &count));
  scan.routes.resize(count);
  check(api.KernelInfoGetAttributeArray_int64(info, "routes", scan.routes.data(), &count));
  scan.per_line = integer(api, info, "per_line");
  scan.delta_softplus = integer(api, info, "delta_softplus");
}

void read_attributes(const Api& api, const ort::KernelInfo* info, WavefrontScan& scan) {
  scan.reverse = integer(api, info, "reverse");
}

Shape shape_of(const Api& api, const ort::Value* value) {
  ort::TensorTypeAndShapeInfo* info = nullptr;
  check(api.GetTensorTypeAndShape(value, &info));
  size_t count = 0;
  ort::Status* status = api.GetDimensionsCount(info, &count);
  Shape shape(count);
  if (!status) status = api.GetDimensions(info, shape.data(), count);
  api.ReleaseTensorTypeAndShapeInfo(info);
  check(status);
  return shape;
}

float* elements(const Api& api, const ort::Value* value) {
  void* data = nullptr;
  check(api.GetTensorMutableData(const_cast<ort::Value*>(value), &data));
  return static_cast<float*>(data);
}

template <class Scan>
struct Kernel {
  const Api& api;
  Scan scan;

  ort::Status* run(ort::KernelContext* context) {
    return guarded(api, [&] {
      std::vector<Array> inputs;
      for (size_t i = 0; i < Scan::kInputs; ++i) {
        const ort::Value* value = nullptr;
        check(api.KernelContext_GetInput(context, i, &value));
        inputs.push_back({elements(api, value), shape_of(api, value)});
      }
      const Shape& shape = inputs[Scan::kX].shape;
      ort::Value* y = nullptr;
      check(api.KernelContext_GetOutput(context, 0, shape.data(), shape.size(), &y));
      running = {&api, context};
      scan.run(inputs, elements(api, y), parallel_for);
    });
  }
};

// onnxruntime keeps addresses of operators and domains, so that they live as long as the library.
template <class Scan>
struct Operator : ort::CustomOp {
  const Api* api = nullptr;

  Operator() : ort::CustomOp{} {
    using ort::CustomOp;
    version = ort::kApiVersion;
    GetName = [](const CustomOp*) { return Scan::kName; };
    GetExecutionProviderType = [](const CustomOp*) -> const char* { return nullptr; };  // the CPU's
    GetInputType = [](const CustomOp*, size_t) { return ort::kFloat; };
    GetInputTypeCount = [](const CustomOp*) { return size_t(Scan::kInputs); };
    GetOutputType = GetInputType;
    GetOutputTypeCount = [](const CustomOp*) { return size_t(1); };
    GetInputCharacteristic = [](const CustomOp*, size_t) { return ort::kRequired; };
    GetOutputCharacteristic = GetInputCharacteristic;
    GetInputMemoryType = [](const CustomOp*, size_t) { return ort::kDefaultMemory; };
    GetStartVersion = [](const CustomOp*) { return 1; };
    GetEndVersion = GetStartVersion;
    GetVariadicInputMinArity = GetVariadicInputHomogeneity = GetStartVersion;
    GetVariadicOutputMinArity = GetVariadicOutputHomogeneity = GetStartVersion;
    CreateKernelV2 = [](const CustomOp*, const Api* api, const ort::KernelInfo* info, void** kernel) {
      return guarded(*api, [&] {
        auto created = std::make_unique<Kernel<Scan>>(Kernel<Scan>{*api, {}});
        read_attributes(*api, info, created->scan);
        *kernel = created.release();
      });
    };
    KernelComputeV2 = [](void* kernel, ort::KernelContext* context) {
      return static_cast<Kernel<Scan>*>(kernel)->run(context);
    };
    KernelDestroy = [](void* kernel) { delete static_cast<Kernel<Scan>*>(kernel); };
    InferOutputShapeFn = [](const CustomOp* op, ort::ShapeInferContext* context) -> ort::Status* {
      const Api& api = *static_cast<const Operator*>(op)->api;
      ort::TensorTypeAndShapeInfo* info = nullptr;
      if (ort::Status* status = api.ShapeInferContext_GetInputTypeShape(context, Scan::kX, &info)) return status;
      return api.ShapeInferContext_SetOutputTypeShape(context, 0, info);
    };
  }
};

Operator<RouteScan> route_scan;
Operator<WavefrontScan> wavefront_scan;
struct Domain {
  const Api* api = nullptr;
  ort::CustomOpDomain* domain = nullptr;
  ~Domain() {
    if (domain) api->ReleaseCustomOpDomain(domain);
  }
} domain;

}  // namespace

extern "C" __attribute__((visibility("default"))) ort::Status* RegisterCustomOps(ort::SessionOptions* options,
                                                                                 const ort::ApiBase* base) {
  // Null for versions before 1.17, which have nothing to make a status with but through an older table.
  const Api* api = base->GetApi(ort::kApiVersion);
  if (!api) {
    const Api* older = base->GetApi(1);
    return older->CreateStatus(ort::kFail, "the scans of ssm_backbones need onnxruntime 1.17 or newer");
  }
  return guarded(*api, [&] {
    if (!domain.domain) {
      route_scan.api = wavefront_scan.api = domain.api = api;
      check(api->CreateCustomOpDomain(kDomain, &domain.domain));
      check(api->CustomOpDomain_Add(domain.domain, &route_scan));
      check(api->CustomOpDomain_Add(domain.domain, &wavefront_scan));
    }
    check(api->AddCustomOpDomain(options, domain.domain));
  });
}
