// The part of onnxruntime's C API that custom operators need, so that no header of it is needed to compile them.
//
// Names, signatures and places in the tables are those of include/onnxruntime/core/session/onnxruntime_c_api.h at
// github.com/microsoft/onnxruntime (MIT). The tables only grow at their ends, so that version 17 of the API
// (onnxruntime 1.17) is a prefix of every later one.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ort {

constexpr uint32_t kApiVersion = 17;
constexpr int kFail = 1;             // ORT_FAIL
constexpr int kInvalidArgument = 2;  // ORT_INVALID_ARGUMENT
constexpr int kFloat = 1;            // ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT
constexpr int kRequired = 0;         // INPUT_OUTPUT_REQUIRED
constexpr int kDefaultMemory = 0;    // OrtMemTypeDefault

struct Status;
struct SessionOptions;
struct CustomOpDomain;
struct KernelInfo;
struct KernelContext;
struct ShapeInferContext;
struct Value;
struct TensorTypeAndShapeInfo;
struct CustomOp;

// OrtApi: a table of functions, by their places in it.
class Api {
  template <typename Function, typename... Arguments>
  auto call(size_t place, Arguments... arguments) const {
    return reinterpret_cast<Function*>(functions_[place])(arguments...);
  }

 public:
  Status* CreateStatus(int code, const char* message) const {
    return call<Status*(int, const char*)>(0, code, message);
  }
  Status* CreateCustomOpDomain(const char* domain, CustomOpDomain** out) const {
    return call<Status*(const char*, CustomOpDomain**)>(26, domain, out);
  }
  Status* CustomOpDomain_Add(CustomOpDomain* domain, const CustomOp* op) const {
    return call<Status*(CustomOpDomain*, const CustomOp*)>(27, domain, op);
  }
  Status* AddCustomOpDomain(SessionOptions* options, CustomOpDomain* domain) const {
    return call<Status*(SessionOptions*, CustomOpDomain*)>(28, options, domain);
  }
  Status* GetTensorMutableData(Value* value, void** out) const { return call<Status*(Value*, void**)>(51, value, out); }
  Status* GetDimensionsCount(const TensorTypeAndShapeInfo* info, size_t* out) const {
    return call<Status*(const TensorTypeAndShapeInfo*, size_t*)>(61, info, out);
  }
  Status* GetDimensions(const TensorTypeAndShapeInfo* info, int64_t* values, size_t length) const {
    return call<Status*(const TensorTypeAndShapeInfo*, int64_t*, size_t)>(62, info, values, length);
  }
  Status* GetTensorTypeAndShape(const Value* value, TensorTypeAndShapeInfo** out) const {
    return call<Status*(const Value*, TensorTypeAndShapeInfo**)>(65, value, out);
  }
  Status* KernelInfoGetAttribute_int64(const KernelInfo* info, const char* name, int64_t* out) const {
    return call<Status*(const KernelInfo*, const char*, int64_t*)>(86, info, name, out);
  }
  Status* KernelContext_GetInput(const KernelContext* context, size_t index, const Value** out) const {
    return call<Status*(const KernelContext*, size_t, const Value**)>(90, context, index, out);
  }
  Status* KernelContext_GetOutput(KernelContext* context, size_t index, const int64_t* sizes, size_t count,
                                  Value** out) const {
    return call<Status*(KernelContext*, size_t, const int64_t*, size_t, Value**)>(91, context, index, sizes, count,
                                                                                  out);
  }
  void ReleaseTensorTypeAndShapeInfo(TensorTypeAndShapeInfo* info) const {
    call<void(TensorTypeAndShapeInfo*)>(99, info);
  }
  void ReleaseCustomOpDomain(CustomOpDomain* domain) const { call<void(CustomOpDomain*)>(101, domain); }
  Status* KernelInfoGetAttributeArray_int64(const KernelInfo* info, const char* name, int64_t* out,
                                            size_t* count) const {
    return call<Status*(const KernelInfo*, const char*, int64_t*, size_t*)>(163, info, name, out, count);
  }
  Status* ShapeInferContext_GetInputTypeShape(const ShapeInferContext* context, size_t index,
                                              TensorTypeAndShapeInfo** out) const {
    return call<Status*(const ShapeInferContext*, size_t, TensorTypeAndShapeInfo**)>(268, context, index, out);
  }
  Status* ShapeInferContext_SetOutputTypeShape(const ShapeInferContext* context, size_t index,
                                               const TensorTypeAndShapeInfo* info) const {
    return call<Status*(const ShapeInferContext*, size_t, const TensorTypeAndShapeInfo*)>(270, context, index, info);
  }
  // Calls body(data, i) for each i below `count`; with `batches` of 0, onnxruntime divides them among its threads.
  Status* KernelContext_ParallelFor(const KernelContext* context, void (*body)(void*, size_t), size_t count,
                                    size_t batches, void* data) const {
    return call<Status*(const KernelContext*, void (*)(void*, size_t), size_t, size_t, void*)>(274, context, body,
                                                                                               count, batches, data);
  }

 private:
  void (*functions_[275])();
};

struct ApiBase {
  const Api* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

// OrtCustomOp of version 17.
struct CustomOp {
  uint32_t version;
  void* (*CreateKernel)(const CustomOp*, const Api*, const KernelInfo*);
  const char* (*GetName)(const CustomOp*);
  const char* (*GetExecutionProviderType)(const CustomOp*);
  int (*GetInputType)(const CustomOp*, size_t);
  size_t (*GetInputTypeCount)(const CustomOp*);
  int (*GetOutputType)(const CustomOp*, size_t);
  size_t (*GetOutputTypeCount)(const CustomOp*);
  void (*KernelCompute)(void*, KernelContext*);
  void (*KernelDestroy)(void*);
  int (*GetInputCharacteristic)(const CustomOp*, size_t);
  int (*GetOutputCharacteristic)(const CustomOp*, size_t);
  int (*GetInputMemoryType)(const CustomOp*, size_t);
  int (*GetVariadicInputMinArity)(const CustomOp*);
  int (*GetVariadicInputHomogeneity)(const CustomOp*);
  int (*GetVariadicOutputMinArity)(const CustomOp*);
  int (*GetVariadicOutputHomogeneity)(const CustomOp*);
  Status* (*CreateKernelV2)(const CustomOp*, const Api*, const KernelInfo*, void**);
  Status* (*KernelComputeV2)(void*, KernelContext*);
  Status* (*InferOutputShapeFn)(const CustomOp*, ShapeInferContext*);
  int (*GetStartVersion)(const CustomOp*);
  int (*GetEndVersion)(const CustomOp*);
};

}  // namespace ort
