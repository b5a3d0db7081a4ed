// Arithmetic and indexing that the CPU and CUDA kernels share.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define SSM_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define SSM_HOST_DEVICE inline
#endif

namespace cuda_ops {

// Routes over a grid. The lowest bit chooses the axis, the next one the direction.
enum Route : int32_t { kRow = 0, kColumn = 1, kRowReversed = 2, kColumnReversed = 3 };

SSM_HOST_DEVICE bool runs_along_columns(int32_t route) { return (route & 1) != 0; }
SSM_HOST_DEVICE bool runs_backwards(int32_t route) { return (route & 2) != 0; }

SSM_HOST_DEVICE int64_t ceil_div(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

// A route as lines of positions: one line an image, or one line for each row or column.
struct RouteShape {
  int64_t lines;
  int64_t length;
};

SSM_HOST_DEVICE RouteShape route_shape(int32_t route, bool per_line, int64_t height, int64_t width) {
  if (!per_line) return {1, height * width};
  return runs_along_columns(route) ? RouteShape{width, height} : RouteShape{height, width};
}

// States saved along a line: one behind each chunk of positions but the last.
SSM_HOST_DEVICE int64_t saved_states(int64_t length, int64_t chunk) { return chunk > 0 ? (length - 1) / chunk : 0; }

// Numbers of states with CUDA kernels of their own; any other goes in groups.
constexpr int kGroup = 8;
inline bool fast_states(int64_t states) {
  return states == 1 || states == 2 || states == 4 || states == 8 || states == 16;
}

// States that a CUDA kernel's thread has at a time.
inline int64_t states_at_a_time(int64_t states) { return fast_states(states) ? states : kGroup; }

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
  if (runs_backwards(route)) position = length - 1 - position;
  const int64_t outer_index = per_line ? line : position / inner;
  const int64_t inner_index = per_line ? position : position % inner;
  return columns ? Pixel{inner_index, outer_index} : Pixel{outer_index, inner_index};
}

}  // namespace cuda_ops
