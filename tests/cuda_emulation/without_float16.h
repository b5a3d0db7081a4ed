// Included before the kernels, to compile those for float32 and bfloat16 alone; the ones for one state are few.
#define SSM_DISPATCH(DTYPE, NS_VALUE, CALL)                                      \
  switch (DTYPE) {                                                               \
    case DataType::kFloat32: SSM_DISPATCH_STATES(NS_VALUE, float, CALL)          \
    case DataType::kBFloat16: SSM_DISPATCH_STATES(NS_VALUE, __nv_bfloat16, CALL) \
    default: return int(cudaErrorInvalidValue);                                  \
  }
