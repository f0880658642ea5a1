// What is subtracted from float32 before it is summed, which would else lose what the mean is larger than the rest: of
// the first, the middle and the last pixel the value between, since one far from all others costs as many digits.
#pragma once
#include "../simd.h"

namespace ldmfast {
namespace LDMFAST_ISA {
namespace {

inline float between(float a, float b, float c) {
  const float low = a < b ? a : b, high = a > b ? a : b;
  return low > c ? low : high < c ? high : c;
}
LDMFAST_INLINE VecF between(VecF a, VecF b, VecF c) { return vmax(vmin(a, b), vmin(vmax(a, b), c)); }

template <class T> struct Pivot {
  const T* first;        // [C] of the first pixel
  int64_t middle, last;  // elements from there to the same channels of the others
  Pivot at(int64_t c) const { return {first + c, middle, last}; }
};
template <class T> Pivot<T> pivot_of(const T* x, int64_t pixels, int64_t stride) {
  return {x, pixels / 2 * stride, (pixels - 1) * stride};
}
template <class T> float value(const Pivot<T>& p) {
  return between(to_float(p.first[0]), to_float(p.first[p.middle]), to_float(p.first[p.last]));
}

}  // namespace
}  // namespace LDMFAST_ISA
}  // namespace ldmfast
