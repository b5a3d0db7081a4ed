// Compares arithmetic of the kernels with the exact results. Errors here would not show in the results of the scans.
#include <cmath>
#include <cstdio>

#include "cuda/device.cuh"

namespace cuda_ops {

// Counts wrong quotients: for small divisors, those near powers of two and the largest, at the ends of their ranges.
int wrong_quotients() {
  constexpr int64_t kEnd = int64_t(1) << 31;
  int wrong = 0;
  auto check = [&](int64_t divisor) {
    const FastDivisor by(divisor);
    auto divide = [&](int64_t numerator) {
      if (numerator >= 0 && numerator < kEnd) wrong += by.divide(int32_t(numerator)) != numerator / divisor;
    };
    for (int64_t n = 0; n < 100; ++n) {
      divide(n);
      divide(kEnd - 1 - n);
    }
    for (int64_t multiple = divisor; multiple < kEnd; multiple += divisor * (1 + (kEnd / divisor >> 8))) {
      divide(multiple - 1);
      divide(multiple);
      divide(multiple + 1);
    }
  };
  for (int64_t divisor = 1; divisor < 3000; ++divisor) check(divisor);
  for (int shift = 12; shift < 32; ++shift) {
    for (int64_t beside = -3; beside <= 3; ++beside) {
      const int64_t divisor = (int64_t(1) << shift) + beside;
      if (divisor < kEnd) check(divisor);
    }
  }
  return wrong;
}

// The largest relative error of log(1 + t), in units of 2^-24.
double error_of_logarithm(float scale) {
  double largest = 0;
  for (int i = 1; i <= 1 << 20; ++i) {
    const float t = float(i) / (1 << 20);
    const double exact = double(scale) * std::log1p(double(t));
    largest = std::fmax(largest, std::fabs(scaled_log1p(t, scale) - exact) / exact);
  }
  return largest * (1 << 24);
}

}  // namespace cuda_ops

int main() {
  std::printf("%d %g %g\n", cuda_ops::wrong_quotients(), cuda_ops::error_of_logarithm(1.f),
              cuda_ops::error_of_logarithm(cuda_ops::kLog2E));
}
