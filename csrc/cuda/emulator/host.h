// CUDA on the host: runs a kernel block by block with g++ alone, so that its numbers are checked on any machine.
//
// Every CUDA thread is a fiber. A fiber runs as far as it can (to a barrier, a warp collective or its end) before the
// next one starts. Shared memory starts as NaN, ends in canaries, and is NaN again when the block's last thread ends; an
// asynchronous copy poisons its destination at once and lands only when it is waited for. A barrier that some thread of
// the block never reaches throws. The environment, read at each launch, makes it adversarial:
//
//   LDMFAST_CUDA_HOST_SEED=N    blocks, warps after each barrier and lanes after each collective in a random order of
//                               their own; approximate functions are off by up to 2 ulp, sums of mma are truncated.
//                               Without it: ascending, and descending in every other cluster
//   LDMFAST_CUDA_HOST_RACES=1   two accesses of which one writes, without a barrier between them, throw (races.cpp); so
//                               does an access of global memory before wait_for_previous_kernel
//   LDMFAST_CUDA_HOST_SKIP=F:L  the barrier, wait or commit in line L of file F does nothing: tests/emulator
//   LDMFAST_CUDA_HOST_RELAX=F:L the cluster_arrive there releases no writes
//   LDMFAST_CUDA_HOST_ARCH=80   a chip without clusters (launch.cuh)
//   LDMFAST_CUDA_HOST_SLAB=N    bytes of a slab of GroupNorm's two launches (group_norm_silu_plan.h)
//   LDMFAST_CUDA_HOST_BLOCKS=N  blocks of each of these launches: with few, a block has several slabs
#pragma once
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct float2 { float x, y; };
struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct dim3 { unsigned x = 1, y = 1, z = 1; };

namespace ldmfast {
namespace host {

constexpr int kWarp = 32;

struct Site { const char* file; int line; };         // of a barrier in a kernel's source
struct Copy { void* to; const void* from; int bytes; bool valid; };

struct Gate {                          // where a set of threads meets; also the exchange buffer of a warp collective
  int expected = 0, arrived = 0;
  Site site = {"", 0};
  const char* what = "";
  uint64_t generation = 0;
  uint8_t order[kWarp], place[kWarp];  // of a warp: which lane runs when, and the inverse
  alignas(16) unsigned char in[kWarp][64], out[kWarp][64];
};

struct Block;
struct Thread {
#if defined(__x86_64__)
  void* sp = nullptr;
#else
  ucontext_t context;
#endif
  Block* block = nullptr;
  Gate* warp = nullptr;
  const Gate* waiting = nullptr;
  unsigned char* stack = nullptr;
  uint64_t generation = 0, cluster_ticket = 0;
  uint32_t epoch = 0, warp_epoch = 0;             // barriers of the block, and of the warp, that it has passed
  uint32_t cluster_arrivals = 0, cluster_waits = 0;
  bool done = false, waited = false;              // for the kernels before
  dim3 index;
  std::vector<Copy> copies;
  std::vector<size_t> groups;          // how many copies each committed group holds, oldest first
};
struct Block {
  dim3 index, dim, grid;
  uint32_t id = 0;                     // in the grid
  unsigned rank = 0;                   // in the cluster
  int live = 0;                        // threads that have not ended
  Gate barrier;
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
};

// of the fiber that asks, for which it never changes
Thread& self() __attribute__((const));

[[noreturn]] void fail(const std::string& what);
void check_alignment(const void* p, size_t bytes);
void wait_for_previous_kernel(Site site);
void synchronise_block(Site site);
void synchronise_warp(Site site);
void cluster_arrive(Site site, bool relaxed);
void cluster_wait(Site site);
float cluster_load(const float* own, unsigned rank);
void copy(void* to, const void* from, int bytes, bool valid);
void commit_copies(Site site);
void wait_for_copies(size_t pending, Site site);
float shuffle_xor(float v, int mask, Site site);
bool warp_any(bool v, Site site);
void ldmatrix(uint32_t* r, const void* row, int matrices, bool transpose, Site site);
void mma(float* c, const uint32_t* a, const uint32_t* b, int k, bool bfloat16, Site site);
float exp2(float x);
float reciprocal(float x);
float reciprocal_root(float x);

// cluster: consecutive blocks in x that run together and see each other's shared memory
void run(void (*entry)(const void*), const void* params, size_t params_bytes, dim3 grid, int block, size_t shared,
         int cluster);
}  // namespace host
}  // namespace ldmfast
