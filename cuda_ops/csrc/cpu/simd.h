// Fixed-width vectors and the functions that the scans need, written with the compilers' vector extensions, so that one
// source supports every instruction set. Included by kernels that are compiled once per capability.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace cuda_ops {
namespace SSM_CPU_CAPABILITY {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// For what a loop over positions calls with vectors at hand: around a call all of them would go through memory.
#define SSM_ALWAYS_INLINE __attribute__((always_inline)) inline

template <class S>
struct Vector {
  static constexpr int kLanes = kVectorBytes / int(sizeof(S));
  typedef S type __attribute__((vector_size(kVectorBytes)));
};
template <class S>
using Vec = typename Vector<S>::type;

typedef int32_t IntVec __attribute__((vector_size(kVectorBytes)));
typedef uint32_t UIntVec __attribute__((vector_size(kVectorBytes)));

template <class To, class From>
static inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

template <class S>
static inline Vec<S> splat(S value) {
  return value - Vec<S>{};
}

// 16-bit types, represented by their bits.

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class T>
struct HalfBits {
  static constexpr int kLanes = Vector<float>::kLanes;
  typedef uint16_t type __attribute__((vector_size(kVectorBytes / 2)));
};

static inline Vec<float> widen(UIntVec bits, BFloat16*) { return bit_cast<Vec<float>>(bits << 16); }

static inline UIntVec narrow(Vec<float> value, BFloat16*) {
  const UIntVec bits = bit_cast<UIntVec>(value);
  const UIntVec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  return (value == value) ? rounded : (bits >> 16) | 0x40;             // NaN stays NaN
}

static inline Vec<float> widen(UIntVec bits, Float16*) {
  // The exponents' biases differ by 112. A multiplication corrects that, also for subnormal numbers.
  const UIntVec magnitude = (bits & 0x7fff) << 13;
  const UIntVec scaled = bit_cast<UIntVec>(bit_cast<Vec<float>>(magnitude) * 0x1p112f);
  const UIntVec finite_or_not = ((bits & 0x7c00) == 0x7c00) ? magnitude | 0x7f800000u : scaled;
  return bit_cast<Vec<float>>(finite_or_not | ((bits & 0x8000) << 16));
}

static inline UIntVec narrow(Vec<float> value, Float16*) {
  const UIntVec bits = bit_cast<UIntVec>(value);
  const UIntVec sign = (bits >> 16) & 0x8000;
  const UIntVec magnitude = bits & 0x7fffffff;
  const UIntVec rounded = (magnitude + 0xfff + ((magnitude >> 13) & 1) - 0x38000000u) >> 13;
  // Adding 0.5 aligns a subnormal result with the last bit of the sum's mantissa, which rounds it.
  const UIntVec subnormal = bit_cast<UIntVec>(bit_cast<Vec<float>>(magnitude) + 0.5f) - 0x3f000000u;
  UIntVec result = (magnitude < 0x38800000u) ? subnormal : rounded;
  result = (magnitude >= 0x477ff000u) ? UIntVec{} + 0x7c00u : result;
  result = (magnitude > 0x7f800000u) ? UIntVec{} + 0x7e00u : result;
  return result | sign;
}

// Loads and stores of `count` elements, at most a vector. Loads set the other lanes to zero.

template <class S>
static inline Vec<S> load_state(const S* source, int count) {
  Vec<S> value{};
  if (count == Vector<S>::kLanes) {
    std::memcpy(&value, source, sizeof(value));
  } else {
    std::memcpy(&value, source, size_t(count) * sizeof(S));
  }
  return value;
}

template <class Half>
static inline Vec<float> load_half(const Half* source, int count) {
  typename HalfBits<Half>::type raw{};
  if (count == HalfBits<Half>::kLanes) {
    std::memcpy(&raw, source, sizeof(raw));
  } else {
    std::memcpy(&raw, source, size_t(count) * sizeof(Half));
  }
  return widen(__builtin_convertvector(raw, UIntVec), static_cast<Half*>(nullptr));
}
static inline Vec<float> load(const float* source, int count) { return load_state(source, count); }
static inline Vec<double> load(const double* source, int count) { return load_state(source, count); }
static inline Vec<float> load(const BFloat16* source, int count) { return load_half(source, count); }
static inline Vec<float> load(const Float16* source, int count) { return load_half(source, count); }

template <class S>
static inline void store_state(S* target, Vec<S> value, int count) {
  if (count == Vector<S>::kLanes) {
    std::memcpy(target, &value, sizeof(value));
  } else {
    std::memcpy(target, &value, size_t(count) * sizeof(S));
  }
}

template <class Half>
static inline void store_half(Half* target, Vec<float> value, int count) {
  const auto raw = __builtin_convertvector(narrow(value, static_cast<Half*>(nullptr)), typename HalfBits<Half>::type);
  std::memcpy(target, &raw, size_t(count) * sizeof(Half));
}
static inline void store(float* target, Vec<float> value, int count) { store_state(target, value, count); }
static inline void store(double* target, Vec<double> value, int count) { store_state(target, value, count); }
static inline void store(BFloat16* target, Vec<float> value, int count) { store_half(target, value, count); }
static inline void store(Float16* target, Vec<float> value, int count) { store_half(target, value, count); }

// Loads one element as a state scalar.
static inline float scalar(const float* source) { return *source; }
static inline double scalar(const double* source) { return *source; }
static inline float scalar(const BFloat16* source) { return bit_cast<float>(uint32_t(source->bits) << 16); }
static inline float scalar(const Float16* source) { return load_half(source, 1)[0]; }

// Sums the lanes, by halves.
template <class S, int Lanes = Vector<S>::kLanes, class V = Vec<S>>
static inline S sum_lanes(V value) {
  if constexpr (Lanes == 2) {
    return value[0] + value[1];
  } else {
    typedef S Half __attribute__((vector_size(Lanes / 2 * sizeof(S))));
    Half halves[2];
    std::memcpy(halves, &value, sizeof(value));
    return sum_lanes<S, Lanes / 2, Half>(halves[0] + halves[1]);
  }
}

// Lane l of the result is element I[l] of the concatenation of `a` and `b`.
template <class V, size_t... I>
static inline V shuffle(V a, V b, std::index_sequence<I...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, int(I)...);
#else
  using Index = std::conditional_t<sizeof(a[0]) == 4, int32_t, int64_t>;
  typedef Index Indices __attribute__((vector_size(sizeof(V))));
  return __builtin_shuffle(a, b, Indices{Index(I)...});
#endif
}

// Adds pairs of lanes `Step` apart. Lanes whose number lacks that bit hold sums of `a`, the others sums of `b`.
template <class S, size_t Step, size_t... Lane>
static inline Vec<S> add_pairs(Vec<S> a, Vec<S> b, std::index_sequence<Lane...>) {
  constexpr size_t kLanes = sizeof...(Lane);
  return shuffle(a, b, std::index_sequence<(Lane & Step ? kLanes + Lane : Lane)...>()) +
         shuffle(a, b, std::index_sequence<(Lane & Step ? kLanes + (Lane ^ Step) : Lane ^ Step)...>());
}

// Sums each of as many vectors as a vector has lanes; lane l gets the sum of vector l. A tree of pairs takes three
// operations per sum.
template <class S, size_t Step = Vector<S>::kLanes / 2>
static inline Vec<S> sum_each(const Vec<S>* vectors) {
  constexpr auto lanes = std::make_index_sequence<Vector<S>::kLanes>();
  if constexpr (Step == 1) {
    return add_pairs<S, 1>(vectors[0], vectors[1], lanes);
  } else {
    return add_pairs<S, Step>(sum_each<S, Step / 2>(vectors), sum_each<S, Step / 2>(vectors + Step), lanes);
  }
}

// 2^f on [-1/2, 1/2], by a minimax polynomial.
static inline Vec<float> exp2_fraction(Vec<float> f) {
  Vec<float> p = splat(1.5060982408e-4f);
  p = p * f + 1.3371712153e-3f;
  p = p * f + 9.6191232425e-3f;
  p = p * f + 5.5504084531e-2f;
  p = p * f + 2.4022650574e-1f;
  p = p * f + 6.9314718058e-1f;
  return p * f + 1.0f;
}

// 2^x. Relative error below 2e-7 where the result is a normal number; below 2^-126 the result is 2^-126. Compilers must
// be told to inline what a loop calls more than once: around a call all vectors would go through memory.
__attribute__((always_inline)) static inline Vec<float> exp2(Vec<float> x) {
  const Vec<float> low = splat(-126.f);
#if defined(__AVX512F__)
  // These instructions round, and scale by a power of two with correct overflow.
  constexpr __mmask16 all = 0xffff;  // GCC 12 warns about the unmasked forms in its own header
  const Vec<float> clamped = _mm512_maskz_max_ps(all, low, x);  // the second operand if one is NaN
  const Vec<float> rounded = _mm512_maskz_roundscale_ps(all, clamped, _MM_FROUND_TO_NEAREST_INT);
  return _mm512_maskz_scalef_ps(all, exp2_fraction(clamped - rounded), rounded);
#elif defined(__AVX2__)
  // Both bounds return the second operand if one is NaN, whose integer is 2^31: shifted out, it leaves NaN as it is.
  // The exponent of 128, whose fraction is 0, is that of infinity.
  const Vec<float> clamped = _mm256_max_ps(low, _mm256_min_ps(splat(128.f), x));
  const __m256i rounded = _mm256_cvtps_epi32(clamped);
  const Vec<float> p = exp2_fraction(clamped - Vec<float>(_mm256_cvtepi32_ps(rounded)));
  return bit_cast<Vec<float>>(bit_cast<UIntVec>(p) + (bit_cast<UIntVec>(rounded) << 23));
#else
  const Vec<float> clamped = (x < low) ? low : x;
  const Vec<float> magic = splat(0x1.8p23f);  // adding it rounds to an integer in the low bits
  const Vec<float> shifted = clamped + magic;
  const Vec<float> p = exp2_fraction(clamped - (shifted - magic));
  const UIntVec exponent = bit_cast<UIntVec>(shifted) << 23;
  const Vec<float> result = bit_cast<Vec<float>>(bit_cast<UIntVec>(p) + exponent);
  return (x < splat(128.f)) ? result : x + INFINITY;  // NaN stays NaN
#endif
}

static inline Vec<double> exp2(Vec<double> x) {
  for (int lane = 0; lane < Vector<double>::kLanes; ++lane) x[lane] = std::exp2(x[lane]);
  return x;
}

template <class S>
struct Softplus {
  Vec<S> value;       // log(1 + exp(v))
  Vec<S> derivative;  // 1 / (1 + exp(-v))
};

constexpr double kLog2E = 1.4426950408889634;

static inline Softplus<float> softplus(Vec<float> v) {
  const auto positive = v > Vec<float>{};
  // With its sign bit set v is -|v|, and without its bits where it is negative, max(v, 0).
  const Vec<float> negative = bit_cast<Vec<float>>(bit_cast<UIntVec>(v) | 0x80000000u);
  const Vec<float> above = bit_cast<Vec<float>>(bit_cast<UIntVec>(v) & bit_cast<UIntVec>(positive));
  const Vec<float> t = exp2(negative * float(kLog2E));
  // log(1 + t) = 2 atanh(t / (2 + t)), by a minimax polynomial for t in [0, 1].
  const Vec<float> s = t / (t + 2.f);
  const Vec<float> z = s * s;
  Vec<float> q = splat(2.5848155178e-1f);
  q = q * z + 2.8405319656e-1f;
  q = q * z + 4.0001240873e-1f;
  q = q * z + 6.6666665228e-1f;
  q = q * z + 2.0f;
  const Vec<float> value = q * s + above;
  const Vec<float> reciprocal = 1.f / (t + 1.f);
  return {value, positive ? reciprocal : t * reciprocal};
}

static inline Softplus<double> softplus(Vec<double> v) {
  Softplus<double> result;
  for (int lane = 0; lane < Vector<double>::kLanes; ++lane) {
    const bool linear = v[lane] > 20;
    result.value[lane] = linear ? v[lane] : std::log1p(std::exp(v[lane]));
    result.derivative[lane] = linear ? 1 : 1 / (1 + std::exp(-v[lane]));
  }
  return result;
}

}  // namespace SSM_CPU_CAPABILITY
}  // namespace cuda_ops
