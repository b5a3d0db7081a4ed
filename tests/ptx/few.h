// Included before the kernels of the wavefront scan, to compile those for bfloat16 and four states alone.
#define SSM_DISPATCH(DTYPE, NS_VALUE, CALL)                                           \
  if (DTYPE == DataType::kBFloat16 && (NS_VALUE) == 4) return CALL(__nv_bfloat16, 4); \
  return int(cudaErrorInvalidValue);
