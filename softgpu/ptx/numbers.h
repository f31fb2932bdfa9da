// SPDX-License-Identifier: Apache-2.0
// Floating-point formats that C++ lacks.
#pragma once
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace ptx {

enum class Rounding : uint8_t { nearest, zero, down, up, away };  // away: ties from zero

struct Format {
  int exponent, mantissa;  // bits
};
constexpr Format kF16{5, 10}, kBF16{8, 7}, kTF32{8, 10}, kF32{8, 23}, kF64{11, 52}, kE5M2{5, 2},
    kE4M3{4, 3};

// The bits of x in a format (of tf32: the upper 19 of 32). finite: too large numbers and infinities
// become the largest number. NaN is the canonical one.
uint64_t narrowed(long double x, Format format, Rounding rounding, bool finite = false);

inline float of_f16(uint16_t h) { return _cvtsh_ss(h); }
inline float of_bf16(uint16_t h) {
  const uint32_t b = uint32_t(h) << 16;
  float f;
  memcpy(&f, &b, 4);
  return f;
}
inline uint16_t f16_of(float f) { return f != f ? 0x7fff : _cvtss_sh(f, 0); }
inline uint16_t bf16_of(float f) {
  if (f != f) return 0x7fff;
  uint32_t b;
  memcpy(&b, &f, 4);
  return uint16_t((b + 0x7fff + (b >> 16 & 1)) >> 16);
}

// maximumNumber and its like: a NaN gives way to a number, and -0 is less than +0.
template <class T>
T greater(T a, T b) {
  if (a != a) return b != b ? T(NAN) : b;
  if (a == b) return std::signbit(a) ? b : a;
  return b != b || a > b ? a : b;
}
template <class T>
T lesser(T a, T b) {
  if (a != a) return b != b ? T(NAN) : b;
  if (a == b) return std::signbit(a) ? a : b;
  return b != b || a < b ? a : b;
}

}  // namespace ptx
