// SPDX-License-Identifier: Apache-2.0
#include "ptx/numbers.h"

#include <algorithm>

namespace ptx {
namespace {

bool is_even(uint64_t n) { return n % 2 == 0; }

}  // namespace

uint64_t narrowed(long double x, Format f, Rounding rounding, bool finite) {
  const uint64_t sign = std::signbit(x) ? uint64_t(1) << (f.exponent + f.mantissa) : 0;
  const bool has_infinity = !(f.exponent == 4 && f.mantissa == 3);
  const uint64_t infinity =
      has_infinity ? ((uint64_t(1) << f.exponent) - 1) << f.mantissa : 0x7f;  // e4m3: NaN
  if (x != x) {
    if (f.mantissa == kF64.mantissa) return 0x7ff8000000000000;
    return (uint64_t(1) << (f.exponent + f.mantissa)) - 1;
  }
  x = std::fabs(x);
  uint64_t bits = infinity;
  if (!std::isinf(x)) {
    int exponent;
    frexpl(x, &exponent);
    const int least = 2 - (1 << (f.exponent - 1));  // of a normal number
    const int scale = std::max(exponent - 1, least);
    const long double scaled = ldexpl(x, f.mantissa - scale), whole = floorl(scaled);
    const long double rest = scaled - whole;
    uint64_t significand = uint64_t(whole);
    const bool up = rounding == Rounding::nearest
                        ? rest > 0.5L || (rest == 0.5L && !is_even(significand))
                    : rounding == Rounding::away ? rest >= 0.5L
                    : rounding == Rounding::down ? rest > 0 && sign
                    : rounding == Rounding::up   ? rest > 0 && !sign
                                                 : false;
    significand += up;
    // A normal number's leading one counts as one in the exponent's field.
    if (x != 0) bits = (uint64_t(scale - least) << f.mantissa) + significand;
    if (x == 0) bits = 0;
    const bool towards_zero = rounding == Rounding::zero || (rounding == Rounding::down && !sign) ||
                              (rounding == Rounding::up && sign);
    if (bits >= infinity) bits = towards_zero ? infinity - 1 : infinity;
  }
  if (finite && bits >= infinity) bits = infinity - 1;
  return sign | bits;
}

}  // namespace ptx
