// group_norm_silu: how the work is cut, and the statistics. The kernels are in group_norm_silu.cu.
//
// A task is one sample's bundle of whole groups (channels_last) or one group (contiguous); its elements are cut into
// slices, one thread block each. Channels_last with 10 channels a group has 20 bytes of a group beside each other: a
// bundle of 4 groups is 80 bytes, whole 16-byte vectors that no other block touches. A slice is staged in shared memory
// by slabs, so that memory is read once for both passes of the statistics (and, when fused, for the normalisation).
#pragma once
#include "../launch.cuh"

namespace ldmfast {
namespace group_norm {

constexpr int kThreads = 512;   // one block a multiprocessor in the usual shapes: 16 warps hide latency better than 8
constexpr int kWarps = kThreads / 32;

// 32 bits for what is counted in vectors, pixels or blocks (make_plan throws beyond), 64 for offsets into tensors
struct Params {
  GroupNormSiluArgs a;
  Divisor group_channels;   // C / groups
  int bundle;               // groups a task
  Divisor bundles;          // tasks a sample
  Divisor tiles;            // channels_last: column tiles a group, 1 unless a group is wider than a block can be
  int tile_channels;        // channels a tile
  Divisor columns[2];       // vectors a pixel of a tile, and of the last one
  Divisor slices;           // blocks a task and tile; with clusters, the size of one
  int extent;               // what is sliced: pixels (channels_last) or vectors of the group (contiguous)
  int slice_extent;         // of that, a slice
  int slab_extent;          // and a slab
  Divisor row_vectors;      // contiguous: vectors a channel
  int slab_bytes, coefficients;   // shared memory: staging; channels in a slab
  bool clustered;
};

// The mean is mean + rest: at mean / std 300 one float32 is rounded by 1.5e-5 of a standard deviation, and each merge
// would add as much. m2: sum of squared distances from the mean.
struct Moments { float count, mean, rest, m2; };

// a + b as a float and what its rounding left (Knuth)
__device__ __forceinline__ float2 exact_sum(float a, float b) {
  const float s = a + b, t = s - a;
  return {s, (a - (s - t)) + (b - t)};
}
// Chan, Golub & LeVeque 1979: exact for any split, no E[x^2] - E[x]^2
__device__ __forceinline__ Moments merge(Moments a, Moments b) {
  const float count = a.count + b.count, share = b.count * fast_reciprocal(count);
  const float delta = (b.mean - a.mean) + (b.rest - a.rest);
  const float2 mean = exact_sum(a.mean, a.rest + delta * share);
  const Moments m = {count, mean.x, mean.y, a.m2 + b.m2 + delta * delta * a.count * share};
  return a.count == 0.0f ? b : m;   // from nothing, share is 1 but for its rounding, which would scale the mean itself
}
__device__ __forceinline__ Moments warp_merge(Moments m) {
#pragma unroll 1
  for (int mask = 16; mask > 0; mask >>= 1)
    m = merge(m, {shuffle_xor(m.count, mask), shuffle_xor(m.mean, mask), shuffle_xor(m.rest, mask),
                  shuffle_xor(m.m2, mask)});
  return m;
}

// What is done to a channel of sample n beside the norm: (x + add), and in the end * gain + offset, where gain is
// weight * (1 + scale) and offset bias * (1 + scale) + shift. Args: the op's, or its gradient's. Five loads at once: in
// a step of the U-Net each comes from memory.
struct Affine { float add, gain, offset; };
template <typename Args> __device__ __forceinline__ Affine affine_of(const Args& a, int64_t n, int64_t c) {
  const uint32_t scale = a.scale ? load_bits(a.scale, n * a.stride_scale + c, a.mod_dtype) : 0;
  const uint32_t shift = a.shift ? load_bits(a.shift, n * a.stride_shift + c, a.mod_dtype) : 0;
  const uint32_t add = a.add ? load_bits(a.add, n * a.stride_add + c, a.mod_dtype) : 0;
  const uint32_t weight = a.weight ? load_bits(a.weight, c, a.param_dtype) : 0;
  const uint32_t bias = a.bias ? load_bits(a.bias, c, a.param_dtype) : 0;
  const float factor = 1.0f + bits_as_float(scale, a.mod_dtype);
  return {bits_as_float(add, a.mod_dtype), (a.weight ? bits_as_float(weight, a.param_dtype) : 1.0f) * factor,
          bits_as_float(bias, a.param_dtype) * factor + bits_as_float(shift, a.mod_dtype)};
}

// The same of V neighbouring channels, each parameter by one access of 16 bytes, or two where it is float32 beside
// 16-bit elements: their conversion waits until all are on their way. packed: two 16-bit elements a word.
template <int V> struct Row {
  uint32_t w[V];
  DType d;
  __device__ __forceinline__ Row(const void* p, int64_t at, DType d) : w{}, d(d) {
    if (!p) return;
    if (d == DType::kFloat32) load_pieces(static_cast<const uint32_t*>(p) + at, w);
    else load_words(static_cast<const uint16_t*>(p) + at, reinterpret_cast<uint32_t (&)[V / 2]>(w));
  }
  __device__ __forceinline__ float operator[](int j) const {
    if (d == DType::kFloat32) return bits_to_float(w[j]);
    const uint32_t word = w[j / 2];
    return bits_as_float(j % 2 ? word >> 16 : word & 0xFFFF, d);
  }
  // V words, 4 an access
  static __device__ __forceinline__ void load_pieces(const uint32_t* p, uint32_t (&w)[V]) {
#pragma unroll
    for (int i = 0; i < V; i += 4) load_words(p + i, reinterpret_cast<uint32_t (&)[4]>(w[i]));
  }
};
template <int V, typename Args>
__device__ __forceinline__ void affine_of(const Args& a, int64_t n, int64_t c, Affine (&f)[V]) {
  const Row<V> scale(a.scale, n * a.stride_scale + c, a.mod_dtype), shift(a.shift, n * a.stride_shift + c, a.mod_dtype);
  const Row<V> add(a.add, n * a.stride_add + c, a.mod_dtype);
  const Row<V> weight(a.weight, c, a.param_dtype), bias(a.bias, c, a.param_dtype);
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const float factor = 1.0f + scale[j];
    f[j] = {add[j], (a.weight ? weight[j] : 1.0f) * factor, bias[j] * factor + shift[j]};
  }
}
// whether that can be: c is a multiple of V
template <typename Args> inline bool can_access_rows(const Args& a, int64_t v) {
  const size_t params = v * size_of(a.param_dtype), mods = v * size_of(a.mod_dtype);
  const auto row = [&](const void* p, size_t bytes, int64_t stride) {
    return !p || (aligned(p, bytes < 16 ? bytes : 16) && (a.N == 1 || stride % v == 0));
  };
  return row(a.weight, params, 0) && row(a.bias, params, 0) && row(a.add, mods, a.stride_add) &&
         row(a.scale, mods, a.stride_scale) && row(a.shift, mods, a.stride_shift);
}

// this block's place: sample n, first group and channel, its slice of the task
struct Place {
  int64_t n, group, channel;
  int begin, end;           // of the extent
  int width;                // channels: of the bundle or tile (channels_last), of the group (contiguous)
  int groups;
  int tile, slice;
  bool last_tile;
};
__device__ __forceinline__ Place locate(const Params& p) {
  Place w;
  const Quotient slice = divided(blockIdx.x, p.slices), tile = divided(slice.of, p.tiles);
  const Quotient bundle = divided(tile.of, p.bundles);
  w.slice = slice.rest;
  w.tile = tile.rest;
  w.last_tile = w.tile + 1 == p.tiles.value;
  w.n = bundle.of;
  w.group = int64_t(bundle.rest) * p.bundle;
  w.groups = p.bundle;
  w.channel = w.group * p.group_channels.value + w.tile * p.tile_channels;
  const int all = p.bundle * p.group_channels.value - w.tile * p.tile_channels;
  w.width = all < p.tile_channels ? all : p.tile_channels;
  w.begin = w.slice * p.slice_extent < p.extent ? w.slice * p.slice_extent : p.extent;
  w.end = p.extent - w.begin < p.slice_extent ? p.extent : w.begin + p.slice_extent;
  return w;
}

// Channels_last: this thread's channels of the slab and the one or two groups that they lie in
template <int V> struct Columns {
  int first, low, high, split;   // channel; groups of the bundle; how many of the V channels belong to the lower one
  __device__ __forceinline__ int group(int j) const { return j < split ? low : high; }
};

// A slab, and how the block's threads walk it: thread t takes vectors t / columns * columns + t % columns, stepping by
// whole rows, so that in channels_last its channels never change. Contiguous: one row of vectors, channels change.
template <int V, bool CL> struct Slab {
  const Params* p;
  int begin;                // first pixel or vector
  int count, columns, step; // pixels or vectors; vectors a pixel; pixels or vectors a step of the block
  unsigned column, row;     // channels_last: this thread's vector of a pixel, and its first pixel
  unsigned offset;          // contiguous: the first vector's place in its channel
  int64_t channel;          // of the first vector

  __device__ __forceinline__ Slab(const Params& params, const Place& w, int from) : p(&params), begin(from) {
    count = w.end - from < params.slab_extent ? w.end - from : params.slab_extent;
    if constexpr (CL) {
      const Divisor& by = params.columns[w.last_tile];
      const Quotient mine = divided(threadIdx.x, by);
      columns = by.value, step = kThreads / by, column = mine.rest, row = mine.of;
      channel = w.channel, offset = 0;
    } else {
      const Quotient first = divided(from, params.row_vectors);
      columns = 1, step = kThreads, column = 0, row = threadIdx.x;
      channel = w.channel + first.of, offset = first.rest;
    }
  }
  __device__ __forceinline__ Columns<V> mine(const Place& w) const {
    if constexpr (!CL) return {0, 0, 0, V};
    const int first = column * V, low = unsigned(first) / p->group_channels;
    const int left = (low + 1) * p->group_channels.value - first;
    return {first, low, low + 1 < w.groups ? low + 1 : low, left < V ? left : V};
  }
  __device__ __forceinline__ int channels(const Place& w) const {
    return CL ? w.width : count == 0 ? 0 : (offset + unsigned(count - 1)) / p->row_vectors + 1;
  }
  // f(staging index, channel relative to the slab's first, offset into x, offset into y), in vectors' first elements
  template <typename F> __device__ __forceinline__ void each(int64_t n, F&& f) const {
    const GroupNormSiluArgs& a = p->a;
    const int first = row;
    if (CL && first >= step) return;
    if constexpr (CL) {
      const int c = column * V;
      int64_t x = n * a.stride_xn + (begin + first) * a.stride_xp + channel + c;
      int64_t y = (n * a.P + begin + first) * a.C + channel + c;
      for (int i = first; i < count; i += step, x += step * a.stride_xp, y += step * a.C)
        f((i * columns + column) * V, c, x, y);
    } else {
      for (int i = first; i < count; i += step) {
        const Quotient at = divided(offset + i, p->row_vectors);
        const int64_t in_row = int64_t(at.rest) * V;
        f(i * V, static_cast<int>(at.of), n * a.stride_xn + (channel + at.of) * a.stride_xc + in_row,
          (n * a.C + channel + at.of) * a.P + in_row);
      }
    }
  }
};

// Shared memory of a block, carved from one allocation
template <typename T> struct Storage {
  T* slab;
  float* parts;             // [4, kThreads] partial sums
  float* add;               // [coefficients] each
  float* gain;
  float* offset;
  float* moments;           // [bundle, 4]: this block's moments, which the cluster's other blocks read
  float* pivot;             // [bundle] each: first estimate of the mean, in the end the mean, what is left of it,
  float* rest;
  float* rstd;              // and 1 / sqrt(var + eps)
  __device__ __forceinline__ explicit Storage(const Params& p) {
    unsigned char* at = shared_memory();
    slab = reinterpret_cast<T*>(at);
    parts = reinterpret_cast<float*>(at + p.slab_bytes);
    add = parts + 4 * kThreads;
    gain = add + p.coefficients;
    offset = gain + p.coefficients;
    moments = offset + p.coefficients;
    pivot = moments + 4 * p.bundle;
    rest = pivot + p.bundle;
    rstd = rest + p.bundle;
  }
  __device__ __forceinline__ Moments load(int g) const {
    const float* m = moments + 4 * g;
    return {m[0], m[1], m[2], m[3]};
  }
};
__device__ __forceinline__ void store(float* to, Moments m) {
  to[0] = m.count, to[1] = m.mean, to[2] = m.rest, to[3] = m.m2;
}
inline size_t storage_bytes(const Params& p) {
  return p.slab_bytes + sizeof(float) * (4 * kThreads + 3 * p.coefficients + 7 * p.bundle);
}

// out[g] = sum of every thread's share of group g. A vector touches at most two groups: its lower one's sum is in
// slot 0 of parts, the next one's in slot 1, where a group starts in the middle of a vector.
template <int V>
__device__ __forceinline__ float group_sum(const float* parts, int g, int width, int columns, int step, int gc) {
  const int start = g * gc, stop = gc < width - start ? start + gc : width;
  const int first = start / V, n = (stop - 1) / V - first + 1;
  const bool straddles = start % V != 0;
  const int rows = 32u / unsigned(n), rest = 32 - rows * n;   // 32 shares on
  int row = threadIdx.x % 32 / unsigned(n), column = threadIdx.x % 32 - row * n;
  float sum = 0.0f;
#pragma unroll 1
  for (; row < step; row += rows) {
    sum += parts[(straddles && column == 0 ? kThreads : 0) + row * columns + first + column];
    column += rest;
    if (column >= n) column -= n, ++row;
  }
  return warp_sum(sum);
}
}  // namespace group_norm
}  // namespace ldmfast
