// Runs the CPU kernels, without torch, over drawn shapes, dtypes and flags, for the sanitizers. Every buffer has
// exactly the size that the bindings allocate, results begin as NaN, and each call is repeated by one thread: a result
// that was not written, or depends on the threads, is an error.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "route_scan.h"
#include "wavefront_scan.h"

namespace {

using namespace cuda_ops;

std::mt19937 generator(7);
int64_t draw(int64_t low, int64_t high) { return low + int64_t(generator() % uint64_t(high - low + 1)); }
template <class... Values>
int64_t one_of(Values... values) {
  const int64_t list[] = {int64_t(values)...};
  return list[draw(0, int64_t(sizeof...(values)) - 1)];
}

// Threads of their own, because OpenMP's are not annotated for the thread sanitizer. The grain is ignored, so that
// small cases have several threads, too.
int64_t threads = 1;
void parallel_for(int64_t count, int64_t, void (*body)(int64_t, int64_t, const void*), const void* context) {
  std::vector<std::thread> running;
  for (int64_t t = 0; t < threads; ++t) {
    const int64_t begin = count * t / threads, end = count * (t + 1) / threads;
    if (begin < end) running.emplace_back(body, begin, end, context);
  }
  for (std::thread& thread : running) thread.join();
}

int64_t element_size(DataType type) { return type == DataType::kFloat64 ? 8 : type == DataType::kFloat32 ? 4 : 2; }
DataType state_of(DataType type) { return type == DataType::kFloat64 ? type : DataType::kFloat32; }

struct Result {
  std::string name;
  DataType type;
  char* data;
  int64_t count;
};

// The buffers of one case.
class Memory {
 public:
  // Values of magnitude 1/8 to 1, of either sign or of one.
  void* values(DataType type, int64_t count, int sign = 0) {
    char* data = allocate(count * element_size(type));
    for (int64_t i = 0; i < count; ++i) {
      const bool negative = sign ? sign < 0 : draw(0, 1);
      const uint64_t exponent = uint64_t(draw(-3, -1)), mantissa = uint64_t(generator()) << 20;
      switch (type) {
        case DataType::kFloat64: put(data, i, uint64_t(negative) << 63 | (1023 + exponent) << 52 | mantissa); break;
        case DataType::kFloat32:
          put(data, i, uint32_t(negative) << 31 | uint32_t(127 + exponent) << 23 | uint32_t(mantissa) >> 20 << 9);
          break;
        case DataType::kBFloat16:
          put(data, i, uint16_t(negative << 15 | (127 + exponent) << 7 | mantissa >> 45));
          break;
        case DataType::kFloat16: put(data, i, uint16_t(negative << 15 | (15 + exponent) << 10 | mantissa >> 42)); break;
      }
    }
    return data;
  }
  void* result(const char* name, DataType type, int64_t count) {
    char* data = allocate(count * element_size(type));
    results.push_back({name, type, data, count});
    return data;
  }
  std::vector<Result> results;

 private:
  char* allocate(int64_t bytes) {
    buffers_.emplace_back(new char[size_t(bytes)]);
    return buffers_.back().get();
  }
  template <class Bits>
  static void put(char* data, int64_t i, Bits bits) {
    std::memcpy(data + i * int64_t(sizeof(bits)), &bits, sizeof(bits));
  }
  std::vector<std::unique_ptr<char[]>> buffers_;
};

bool is_nan(const Result& result, int64_t i) {
  uint64_t bits = 0;
  std::memcpy(&bits, result.data + i * element_size(result.type), size_t(element_size(result.type)));
  switch (result.type) {
    case DataType::kFloat64: return (bits & 0x7fffffffffffffff) > 0x7ff0000000000000;
    case DataType::kFloat32: return (bits & 0x7fffffff) > 0x7f800000;
    case DataType::kBFloat16: return (bits & 0x7fff) > 0x7f80;
    case DataType::kFloat16: return (bits & 0x7fff) > 0x7c00;
  }
  return true;
}

void fail(const std::string& what) {
  std::fprintf(stderr, "%s\n", what.c_str());
  std::exit(1);
}

// Whether results are looked at; where a fault is planted, the sanitizers alone are to find it.
bool check_results = true;

// Calls a kernel with several threads and with one, and compares the results.
template <class Kernel>
void call(Kernel kernel, std::vector<Result> results) {
  std::vector<std::string> first;
  for (const int64_t count : {draw(2, 5), int64_t(1)}) {
    for (const Result& result : results)
      std::memset(result.data, 0xff, size_t(result.count * element_size(result.type)));
    threads = count;
    kernel();
    if (!check_results) continue;
    for (size_t r = 0; r < results.size(); ++r) {
      const Result& result = results[r];
      const std::string bytes(result.data, size_t(result.count * element_size(result.type)));
      for (int64_t i = 0; i < result.count; ++i)
        if (is_nan(result, i)) fail(result.name + " is not written, or NaN");
      if (first.size() == results.size() && first[r] != bytes) fail(result.name + " depends on the threads");
      if (first.size() < results.size()) first.push_back(bytes);
    }
  }
}

struct Sizes {
  int64_t batch, height, width, routes, groups, last;
};

// Strides as the bindings give them: the last dimension is contiguous, others may leave gaps.
GridTensor strided(const Sizes& s, int64_t gap) {
  GridTensor grid;
  grid.group = s.last + gap;
  grid.route = s.groups * grid.group;
  grid.column = s.routes * grid.route;
  grid.row = s.width * grid.column;
  grid.batch = s.height * grid.row;
  return grid;
}
int64_t elements(const Sizes& s, int64_t gap) {
  const int64_t rows = s.batch * s.height * s.width * s.routes * s.groups;
  return rows ? rows * (s.last + gap) - gap : 0;
}
GridTensor input(Memory& memory, DataType type, const Sizes& s, int sign = 0) {
  const int64_t gap = one_of(0, 0, 3);
  GridTensor grid = strided(s, gap);
  grid.data = memory.values(type, elements(s, gap), sign);
  return grid;
}
GridTensor output(Memory& memory, const char* name, DataType type, const Sizes& s) {
  GridTensor grid = strided(s, 0);
  grid.data = memory.result(name, type, elements(s, 0));
  return grid;
}

// From the opposite corner.
GridTensor reversed(GridTensor grid, const Sizes& s, DataType type) {
  const int64_t corner = (s.height - 1) * grid.row + (s.width - 1) * grid.column;
  grid.data = static_cast<char*>(grid.data) + (s.batch ? corner : 0) * element_size(type);
  grid.row = -grid.row;
  grid.column = -grid.column;
  return grid;
}

void draw_map(int64_t& batch, int64_t& height, int64_t& width) {
  batch = one_of(0, 1, 1, 2);
  height = one_of(1, 2, 5, 9);
  width = one_of(1, 3, 7, 33);
}

void route_case() {
  Memory memory;
  RouteScanParams p{};
  p.dtype = DataType(draw(0, 3));
  const DataType state = state_of(p.dtype);
  draw_map(p.batch, p.height, p.width);
  p.per_line = one_of(0, 0, 1);
  p.routes = p.per_line ? 1 : draw(1, kMaxRoutes);
  for (int64_t k = 0; k < p.routes; ++k) p.route[k] = int32_t(draw(0, 3));
  p.groups = one_of(1, 1, 2, 3);
  p.channels = p.groups * one_of(1, 5, 16, 17, 48, 65, 130);
  p.states = one_of(1, 1, 2, 5, 16, 17);
  p.both_ways = p.per_line && one_of(0, 1);
  p.chunk = p.both_ways ? 64 : one_of(1, 2, 7, 64);
  p.delta_softplus = one_of(0, 1);
  const Sizes map{p.batch, p.height, p.width, 1, 1, p.channels};
  const Sizes per_route{p.batch, p.height, p.width, p.routes, 1, p.channels};
  const Sizes projection{p.batch, p.height, p.width, p.routes, p.groups, p.states};
  const bool has_B = one_of(0, 1, 1), has_C = has_B || p.groups > 1 || one_of(0, 1);
  p.x = input(memory, p.dtype, map);
  // The low-rank dt in the place of delta, or delta itself.
  p.dt_rank = one_of(0, 0, 1, 2, 7, 32);
  if (p.dt_rank) {
    p.delta = input(memory, p.dtype, {p.batch, p.height, p.width, p.routes, 1, p.dt_rank}, 1);
    p.dt_weight = memory.values(state, p.routes * p.channels * p.dt_rank, 1);
  } else {
    p.delta = input(memory, p.dtype, per_route, 1);
  }
  if (has_B) p.B = input(memory, p.dtype, projection);
  if (has_C) p.C = input(memory, p.dtype, projection);
  p.A = memory.values(state, p.routes * p.channels * p.states, -1);
  if (one_of(0, 1)) p.D = memory.values(state, p.routes * p.channels);
  // Without softplus a negative step lets a state grow without bounds.
  if (one_of(0, 1)) p.delta_bias = memory.values(state, p.routes * p.channels, p.delta_softplus ? 0 : 1);
  // Per line, all routes have lines of the same shape, since there is one.
  const RouteShape shape = route_shape(p.route[0], p.per_line, p.height, p.width);
  const int64_t saved =
      p.batch * p.routes * shape.lines * saved_state_count(shape.length, p.chunk) * p.states * p.channels;
  p.saved_states = memory.result("saved_states", state, saved);
  if (!p.per_line) p.last_state = memory.result("last_state", state, p.batch * p.routes * p.channels * p.states);
  p.y = output(memory, "y", state, map).data;
  call([&] { route_scan_forward_cpu(p, parallel_for); }, std::move(memory.results));

  memory.results.clear();
  const RouteScanSplit split = route_scan_split(p);
  const int64_t per_channel = split.parts * p.batch * p.routes * p.channels;
  p.grad_y = input(memory, p.dtype, map);
  if (!p.per_line && one_of(0, 1)) p.grad_last_state = memory.values(state, p.batch * p.routes * p.channels * p.states);
  p.grad_x = memory.result("grad_x", state, elements(map, 0));
  p.grad_delta = output(memory, "grad_delta", p.dtype, per_route);
  p.grad_A = memory.result("grad_A", state, per_channel * p.states);
  if (p.D) p.grad_D = memory.result("grad_D", state, per_channel);
  if (p.delta_bias) p.grad_delta_bias = memory.result("grad_delta_bias", state, per_channel);
  if (has_B) p.grad_B = memory.result("grad_B", state, split.tiles * elements(projection, 0));
  if (has_C) p.grad_C = memory.result("grad_C", state, split.tiles * elements(projection, 0));
  call([&] { route_scan_backward_cpu(p, parallel_for); }, std::move(memory.results));
}

void wavefront_case() {
  Memory memory;
  WavefrontScanParams p{};
  p.dtype = DataType(draw(0, 3));
  const DataType state = state_of(p.dtype);
  draw_map(p.batch, p.height, p.width);
  p.channels = one_of(1, 15, 16, 40, 130);
  p.states = one_of(1, 3, 8, 16, 17);
  p.chunk = one_of(1, 4, 64);
  p.starts_from_above = one_of(0, 1);
  const bool reverse = one_of(0, 1);
  const Sizes map{p.batch, p.height, p.width, 1, 1, p.channels}, projection{p.batch, p.height, p.width, 1, 1, p.states};
  const auto oriented = [&](const GridTensor& grid, DataType type) {
    return reverse ? reversed(grid, map, type) : grid;
  };
  p.x = oriented(input(memory, p.dtype, map), p.dtype);
  p.C = oriented(input(memory, p.dtype, projection), p.dtype);
  for (Neighbour* neighbour : {&p.above, &p.before}) {
    neighbour->delta = oriented(input(memory, p.dtype, map, 1), p.dtype);
    neighbour->B = oriented(input(memory, p.dtype, projection), p.dtype);
    neighbour->A = memory.values(state, p.channels * p.states, -1);
  }
  if (one_of(0, 1)) p.D = memory.values(state, p.channels);
  p.y = oriented(output(memory, "y", p.dtype, map), p.dtype);
  p.saved_rows = memory.result("saved_rows", state,
                               p.batch * saved_state_count(p.height, p.chunk) * p.width * p.states * p.channels);
  call([&] { wavefront_scan_forward_cpu(p, parallel_for); }, std::move(memory.results));

  memory.results.clear();
  const int64_t parts = wavefront_scan_tiles(p, kMinBackwardItems);
  const Sizes in_parts{parts * p.batch, p.height, p.width, 1, 1, p.states};
  const auto sums = [&](const char* name) {
    GridTensor grid = oriented(output(memory, name, state, in_parts), state);
    grid.route = p.batch * grid.batch;
    return grid;
  };
  p.grad_y = oriented(input(memory, p.dtype, map), p.dtype);
  p.grad_x = oriented(output(memory, "grad_x", p.dtype, map), p.dtype);
  p.grad_C = sums("grad_C");
  for (Neighbour* neighbour : {&p.above, &p.before}) {
    neighbour->grad_delta = oriented(output(memory, "grad_delta", p.dtype, map), p.dtype);
    neighbour->grad_B = sums("grad_B");
    neighbour->grad_A = memory.result("grad_A", state, p.batch * p.channels * p.states);
  }
  if (p.D) p.grad_D = memory.result("grad_D", state, p.batch * p.channels);
  call([&] { wavefront_scan_backward_cpu(p, parallel_for); }, std::move(memory.results));
}

}  // namespace

// Arguments: the number of cases, and anything more to leave results unchecked.
int main(int count, char** arguments) {
  const int64_t cases = std::atoll(arguments[1]);
  check_results = count < 3;
  for (int64_t i = 0; i < cases; ++i) i % 2 ? route_case() : wavefront_case();
  std::printf("%lld cases by %s\n", static_cast<long long>(cases), cuda_ops::cpu_capability());
}
