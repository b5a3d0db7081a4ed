// Routes and sizes shared by the CPU kernels, the CUDA kernels and the bindings.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define SSM_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define SSM_HOST_DEVICE inline
#endif

namespace cuda_ops {

// Routes over a grid. Bit 0 selects the axis, bit 1 the direction.
enum Route : int32_t { kRow = 0, kColumn = 1, kRowReversed = 2, kColumnReversed = 3 };

SSM_HOST_DEVICE bool runs_along_columns(int32_t route) { return (route & 1) != 0; }
SSM_HOST_DEVICE bool is_reversed(int32_t route) { return (route & 2) != 0; }

SSM_HOST_DEVICE int64_t ceil_div(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

// A route as lines of positions: one line per image, or one per row or column.
struct RouteShape {
  int64_t lines;
  int64_t length;
};

SSM_HOST_DEVICE RouteShape route_shape(int32_t route, bool per_line, int64_t height, int64_t width) {
  if (!per_line) return {1, height * width};
  return runs_along_columns(route) ? RouteShape{width, height} : RouteShape{height, width};
}

// Number of states saved along a line: one after each chunk of positions except the last.
SSM_HOST_DEVICE int64_t saved_state_count(int64_t length, int64_t chunk) {
  return chunk > 0 ? (length - 1) / chunk : 0;
}

// CUDA kernels are specialised for these numbers of states. Any other number is processed in groups.
constexpr int64_t kSpecializedStates[] = {1, 2, 4, 8, 16};
constexpr int kStateGroup = 8;

inline bool is_specialized(int64_t states) {
  for (const int64_t specialized : kSpecializedStates) {
    if (states == specialized) return true;
  }
  return false;
}

// States that a thread of a CUDA kernel holds at a time.
inline int64_t states_per_pass(int64_t states) { return is_specialized(states) ? states : kStateGroup; }

struct Pixel {
  int64_t row;
  int64_t column;
};

// The pixel at a position of a line of a route.
SSM_HOST_DEVICE Pixel route_pixel(int32_t route, bool per_line, int64_t height, int64_t width, int64_t line,
                                  int64_t position) {
  const bool columns = runs_along_columns(route);
  const int64_t inner = columns ? height : width;
  const int64_t length = per_line ? inner : height * width;
  if (is_reversed(route)) position = length - 1 - position;
  const int64_t outer_index = per_line ? line : position / inner;
  const int64_t inner_index = per_line ? position : position % inner;
  return columns ? Pixel{inner_index, outer_index} : Pixel{outer_index, inner_index};
}

}  // namespace cuda_ops
