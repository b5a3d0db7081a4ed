// Arithmetic: what each instruction does to the lanes' registers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <map>
#include <string>
#include <type_traits>

#include "approximate.h"
#include "program.h"

namespace ptx {

// Registers have 64 bits, of which an instruction reads as many as its type has; [slot][lane].
using Function = void (*)(uint64_t* registers, const int32_t* operands, uint32_t lanes);

template <class T>
T from_register(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
// Signed values are extended, so that wider reads of the register see them.
template <class T>
uint64_t to_register(T value) {
  if constexpr (std::is_integral_v<T>) {
    return uint64_t(int64_t(value));
  } else {
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    return bits;
  }
}
template <>
inline bool from_register<bool>(uint64_t bits) {
  return bits != 0;
}

template <class Out, class... In>
struct Lanewise {
  template <class Operation, size_t... I>
  static Function of(Operation, std::index_sequence<I...>) {
    return [](uint64_t* registers, const int32_t* operands, uint32_t lanes) {
      uint64_t* const target = registers + int64_t(operands[0]) * kLanes;
      for (int lane = 0; lane < kLanes; ++lane) {
        if (lanes >> lane & 1)
          target[lane] =
              to_register<Out>(Operation{}(from_register<In>(registers[int64_t(operands[1 + I]) * kLanes + lane])...));
      }
    };
  }
};

class Instructions {
 public:
  Instructions() {
    integers<uint16_t, int16_t>("16");
    integers<uint32_t, int32_t>("32");
    integers<uint64_t, int64_t>("64");
    wide<uint32_t, int32_t, uint64_t, int64_t>("32");
    wide<uint16_t, int16_t, uint32_t, int32_t>("16");
    predicates();
    floats();
    conversions();
  }
  const std::map<std::string, Function>& table() const { return table_; }

 private:
  template <class Out, class... In, class Operation>
  void add(const std::string& name, Operation operation) {
    table_[name] = Lanewise<Out, In...>::of(operation, std::index_sequence_for<In...>());
  }

  // Instructions of one width, some of which tell signed from unsigned.
  template <class U, class S>
  void integers(const std::string& bits) {
    for (const char* type : {"u", "s", "b"}) {
      const std::string suffix = "." + std::string(type) + bits;
      add<U, U>("mov" + suffix, [](U a) { return a; });
      add<U, U, U, bool>("selp" + suffix, [](U a, U b, bool p) { return p ? a : b; });
      add<bool, U, U>("setp.eq" + suffix, [](U a, U b) { return a == b; });
      add<bool, U, U>("setp.ne" + suffix, [](U a, U b) { return a != b; });
      if (*type == 'b') continue;
      add<U, U, U>("add" + suffix, [](U a, U b) { return U(a + b); });
      add<U, U, U>("sub" + suffix, [](U a, U b) { return U(a - b); });
      add<U, U, U>("mul.lo" + suffix, [](U a, U b) { return U(uint64_t(a) * b); });
      add<U, U, U, U>("mad.lo" + suffix, [](U a, U b, U c) { return U(uint64_t(a) * b + c); });
    }
    add<U, U, U>("and.b" + bits, [](U a, U b) { return U(a & b); });
    add<U, U, U>("or.b" + bits, [](U a, U b) { return U(a | b); });
    add<U, U, U>("xor.b" + bits, [](U a, U b) { return U(a ^ b); });
    add<U, U>("not.b" + bits, [](U a) { return U(~a); });
    add<U, S>("neg.s" + bits, [](S a) { return U(0 - uint64_t(a)); });
    add<U, S>("abs.s" + bits, [](S a) { return U(a < 0 ? 0 - uint64_t(a) : uint64_t(a)); });
    // Shifts by as much as the width or more give 0, or the sign.
    constexpr uint32_t kWidth = 8 * sizeof(U);
    add<U, U, uint32_t>("shl.b" + bits, [](U a, uint32_t n) { return n < kWidth ? U(uint64_t(a) << n) : U(0); });
    for (const char* type : {"u", "b"})
      add<U, U, uint32_t>("shr." + (type + bits), [](U a, uint32_t n) { return n < kWidth ? U(a >> n) : U(0); });
    add<S, S, uint32_t>("shr.s" + bits, [](S a, uint32_t n) { return S(a >> (n < kWidth ? n : kWidth - 1)); });
    ordered<U>("u" + bits);
    ordered<S>("s" + bits);
  }

  template <class T>
  void ordered(const std::string& type) {
    comparisons<T>(type);
    add<T, T, T>("min." + type, [](T a, T b) { return a < b ? a : b; });
    add<T, T, T>("max." + type, [](T a, T b) { return a > b ? a : b; });
    // Of a division by zero the manual says nothing: all bits set, as GPUs have it.
    add<T, T, T>("div." + type, [](T a, T b) {
      if (b == 0) return T(-1);
      if (std::is_signed_v<T> && b == T(-1)) return T(0 - uint64_t(a));
      return T(a / b);
    });
    add<T, T, T>("rem." + type, [](T a, T b) {
      if (b == 0) return a;
      if (std::is_signed_v<T> && b == T(-1)) return T(0);
      return T(a % b);
    });
  }

  template <class T>
  void comparisons(const std::string& type) {
    add<bool, T, T>("setp.lt." + type, [](T a, T b) { return a < b; });
    add<bool, T, T>("setp.le." + type, [](T a, T b) { return a <= b; });
    add<bool, T, T>("setp.gt." + type, [](T a, T b) { return a > b; });
    add<bool, T, T>("setp.ge." + type, [](T a, T b) { return a >= b; });
  }

  template <class U, class S, class WideU, class WideS>
  void wide(const std::string& bits) {
    add<WideU, U, U>("mul.wide.u" + bits, [](U a, U b) { return WideU(a) * b; });
    add<WideS, S, S>("mul.wide.s" + bits, [](S a, S b) { return WideS(a) * b; });
    add<WideU, U, U, WideU>("mad.wide.u" + bits, [](U a, U b, WideU c) { return WideU(WideU(a) * b + c); });
    add<WideU, S, S, WideU>("mad.wide.s" + bits, [](S a, S b, WideU c) { return WideU(WideU(WideS(a) * b) + c); });
    add<U, U, U>("mul.hi.u" + bits, [](U a, U b) { return U(WideU(a) * b >> 8 * sizeof(U)); });
    add<S, S, S>("mul.hi.s" + bits, [](S a, S b) { return S(WideS(a) * b >> 8 * sizeof(S)); });
  }

  void predicates() {
    add<bool, bool>("mov.pred", [](bool a) { return a; });
    add<bool, bool>("not.pred", [](bool a) { return !a; });
    add<bool, bool, bool>("and.pred", [](bool a, bool b) { return a && b; });
    add<bool, bool, bool>("or.pred", [](bool a, bool b) { return a || b; });
    add<bool, bool, bool>("xor.pred", [](bool a, bool b) { return a != b; });
  }

  void floats() {
    const std::string f = "f32";
    add<float, float>("mov.f32", [](float a) { return a; });
    add<float, float, float, bool>("selp.f32", [](float a, float b, bool p) { return p ? a : b; });
    for (const char* rounding : {"", "rn."}) {
      add<float, float, float>("add." + (rounding + f), [](float a, float b) { return a + b; });
      add<float, float, float>("sub." + (rounding + f), [](float a, float b) { return a - b; });
      add<float, float, float>("mul." + (rounding + f), [](float a, float b) { return a * b; });
    }
    add<float, float, float, float>("fma.rn.f32", [](float a, float b, float c) { return std::fma(a, b, c); });
    add<float, float>("neg.f32", [](float a) { return -a; });
    add<float, float>("abs.f32", [](float a) { return std::fabs(a); });
    // The other operand where one is NaN.
    add<float, float, float>("max.f32", [](float a, float b) { return std::fmax(a, b); });
    add<float, float, float>("min.f32", [](float a, float b) { return std::fmin(a, b); });
    comparisons<float>(f);
    add<bool, float, float>("setp.eq.f32", [](float a, float b) { return a == b; });
    add<bool, float, float>("setp.ne.f32", [](float a, float b) { return a < b || a > b; });
    // These hold where an operand is NaN.
    add<bool, float, float>("setp.equ.f32", [](float a, float b) { return !(a < b || a > b); });
    add<bool, float, float>("setp.neu.f32", [](float a, float b) { return a != b; });
    add<bool, float, float>("setp.ltu.f32", [](float a, float b) { return !(a >= b); });
    add<bool, float, float>("setp.leu.f32", [](float a, float b) { return !(a > b); });
    add<bool, float, float>("setp.gtu.f32", [](float a, float b) { return !(a <= b); });
    add<bool, float, float>("setp.geu.f32", [](float a, float b) { return !(a < b); });
    add<bool, float, float>("setp.nan.f32", [](float a, float b) { return a != a || b != b; });
    add<bool, float, float>("setp.num.f32", [](float a, float b) { return a == a && b == b; });
    add<float, float>("ex2.approx.ftz.f32", [](float a) { return approximate_exp2(a); });
    add<float, float>("rcp.approx.ftz.f32", [](float a) {
      const float result = approximate_reciprocal(std::fabs(a) < 0x1p-126f ? std::copysign(0.f, a) : a);
      return std::fabs(result) < 0x1p-126f ? std::copysign(0.f, result) : result;
    });
  }

  template <class To, class From>
  void convert(const std::string& to, const std::string& from) {
    if (to != from) add<To, From>("cvt." + to + "." + from, [](From a) { return To(a); });
  }
  template <class To>
  void convert_to(const std::string& to) {
    convert<To, uint8_t>(to, "u8");
    convert<To, int8_t>(to, "s8");
    convert<To, uint16_t>(to, "u16");
    convert<To, int16_t>(to, "s16");
    convert<To, uint32_t>(to, "u32");
    convert<To, int32_t>(to, "s32");
    convert<To, uint64_t>(to, "u64");
    convert<To, int64_t>(to, "s64");
  }
  void conversions() {
    convert_to<uint16_t>("u16");
    convert_to<int16_t>("s16");
    convert_to<uint32_t>("u32");
    convert_to<int32_t>("s32");
    convert_to<uint64_t>("u64");
    convert_to<int64_t>("s64");
    add<float, uint16_t>("cvt.f32.f16", [](uint16_t a) { return __half2float(__half{a}); });
    add<float, uint16_t>("cvt.f32.bf16", [](uint16_t a) { return __bfloat162float(__nv_bfloat16{a}); });
    add<uint16_t, float>("cvt.rn.f16.f32", [](float a) { return __float2half_rn(a).bits; });
    add<uint16_t, float>("cvt.rn.bf16.f32", [](float a) { return __float2bfloat16_rn(a).bits; });
    // A register made of two, the first one lowest, as parse.py calls it.
    add<uint32_t, uint16_t, uint16_t>("mov.b32.pack", [](uint16_t a, uint16_t b) { return uint32_t(b) << 16 | a; });
    add<uint64_t, uint32_t, uint32_t>("mov.b64.pack", [](uint32_t a, uint32_t b) { return uint64_t(b) << 32 | a; });
    add<uint64_t, uint64_t>("cvta.to.global.u64", [](uint64_t a) { return a; });
    add<uint32_t, uint32_t, uint32_t, uint32_t, uint32_t>(
        "bfi.b32", [](uint32_t a, uint32_t b, uint32_t position, uint32_t length) {
          position &= 255;
          length &= 255;
          if (position >= 32 || length == 0) return b;
          const uint32_t ones = length >= 32 ? ~0u : (1u << length) - 1;
          return (b & ~(ones << position)) | ((a & ones) << position);
        });
  }

  std::map<std::string, Function> table_;
};

}  // namespace ptx
