// The sinusoid of timestep_mlp, as the layers take it. Source: Vaswani et al. 2017, section 3.5.
#pragma once
#include <math.h>

#include "simd.h"

namespace ldmfast {
namespace LDMFAST_ISA {

template <class T> LDMFAST_INLINE float rounded(float x) {
  T stored[kLanes];
  store(stored, splat(x));
  return load(stored)[0];
}

// row[place(i)] = element i of dim of the sinusoid of t, rounded to T
template <class T, class Place>
LDMFAST_INLINE void sinusoid(float t, const float* freqs, int64_t dim, bool cosines_first, float* row, Place place) {
  const int64_t half = dim / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float angle = t * freqs[i], s = sinf(angle), c = cosf(angle);
    row[place(i)] = rounded<T>(cosines_first ? c : s);
    row[place(half + i)] = rounded<T>(cosines_first ? s : c);
  }
  if (dim % 2) row[place(dim - 1)] = 0.0f;
}

}  // namespace LDMFAST_ISA
}  // namespace ldmfast
