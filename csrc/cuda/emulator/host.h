// CUDA on the host: runs a kernel block by block with g++ alone, so that its numbers are checked on any machine.
//
// Every CUDA thread is a fiber. A fiber runs as far as it can (to a barrier, a warp collective or its end) before the
// next one starts, warps in ascending order in even blocks and descending in odd ones, so a missing barrier shows as a
// wrong number. Shared memory starts as NaN and ends in canaries; an asynchronous copy poisons its destination at once
// and lands only when it is waited for. A barrier that some thread of the block never reaches throws.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
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
constexpr size_t kStack = 32 << 10;   // bytes a fiber: kernels keep at most a few hundred floats
constexpr size_t kCanary = 128;

[[noreturn]] inline void fail(const std::string& what) { throw std::runtime_error("emulated CUDA: " + what); }

struct Copy { void* to; const void* from; int bytes; bool valid; };

struct Gate {                          // where a set of threads meets; also the exchange buffer of a warp collective
  int expected = 0, arrived = 0, line = 0;
  const char* what = "";
  uint64_t generation = 0;
  alignas(16) unsigned char in[kWarp][64], out[kWarp][64];
  void reset(int threads) { expected = threads, arrived = 0, generation = 0; }
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
  uint64_t generation = 0, cluster_ticket = 0;
  bool done = false;
  dim3 index;
  std::vector<Copy> copies;
  std::vector<size_t> groups;          // how many copies each committed group holds, oldest first
};
struct Block {
  dim3 index, dim, grid;
  unsigned rank = 0;                   // in the cluster
  Gate barrier;
  std::unique_ptr<unsigned char[]> storage;
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
};
struct Machine {                       // one cluster of blocks in flight
  std::vector<Block> blocks;
  std::vector<Thread> threads;
  std::vector<Gate> warps;
  std::unique_ptr<unsigned char[]> stacks;
  bool descending = false;
  Gate cluster;
  Thread* current = nullptr;
  Thread scheduler;
  void (*entry)(const void*) = nullptr;
  const void* params = nullptr;
  std::string error;
};
inline Machine*& machine() { static thread_local Machine* m = nullptr; return m; }
inline Thread& self() { return *machine()->current; }

#if defined(__x86_64__)
// saves the callee-saved registers on the old stack and restores them from the new one (System V ABI)
__attribute__((naked, noinline)) static void switch_stack(void** /*save*/, void* /*to*/) {
  __asm__ volatile(
      "pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15;"
      "movq %rsp, (%rdi); movq %rsi, %rsp;"
      "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; ret");
}
inline void jump(Thread& from, Thread& to) { switch_stack(&from.sp, to.sp); }
#else
inline void jump(Thread& from, Thread& to) { swapcontext(&from.context, &to.context); }
#endif

static void fiber_main() {
  Machine& m = *machine();
  try {
    m.entry(m.params);
  } catch (const std::exception& e) {
    if (m.error.empty()) m.error = e.what();
  }
  m.current->done = true;
  jump(*m.current, m.scheduler);
  std::abort();                        // a finished fiber is never resumed
}
static void prepare(Thread& t, unsigned char* stack) {
#if defined(__x86_64__)
  void** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(stack) + kStack) & ~uintptr_t(15));
  *--top = nullptr;                    // keeps the alignment that a call would leave
  *--top = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  t.sp = top;
#else
  getcontext(&t.context);
  t.context.uc_stack.ss_sp = stack;
  t.context.uc_stack.ss_size = kStack;
  t.context.uc_link = nullptr;
  makecontext(&t.context, fiber_main, 0);
#endif
}
inline bool runnable(const Thread& t) { return !t.done && !(t.waiting && t.waiting->generation == t.generation); }
inline void wait_for(const Gate& gate, uint64_t generation) {
  Machine& m = *machine();
  Thread& t = *m.current;
  t.waiting = &gate;
  t.generation = generation;
  if (gate.generation == generation) {
    // straight to the warp's next lane, which spares half of the switches; the scheduler takes over behind the last
    const unsigned lane = t.index.x % kWarp;
    Thread* next = m.descending ? (lane > 0 ? &t - 1 : nullptr) : (lane + 1 < kWarp ? &t + 1 : nullptr);
    if (next && runnable(*next)) {
      m.current = next;
      jump(t, *next);
    } else {
      jump(t, m.scheduler);
    }
  }
  t.waiting = nullptr;
}
// true for the last to come, which must then open() the gate
inline bool arrive(Gate& gate, const char* what, int line) {
  if (gate.arrived == 0) { gate.what = what; gate.line = line; }
  if (gate.what != what || gate.line != line)
    fail(std::string("threads meet at different places: ") + gate.what + " in line " + std::to_string(gate.line) +
         ", " + what + " in line " + std::to_string(line));
  return ++gate.arrived == gate.expected;
}
inline void open(Gate& gate) { gate.arrived = 0; ++gate.generation; }

// runs compute(in, out) over the 32 lanes' values once all of the warp have come
template <class Out, class In, class F>
Out collective(const char* what, int line, const In& in, F&& compute) {
  static_assert(sizeof(In) <= 64 && sizeof(Out) <= 64, "exchange slot");
  Thread& t = self();
  Gate& gate = *t.warp;
  const int lane = t.index.x % kWarp;
  std::memcpy(gate.in[lane], &in, sizeof(In));
  const uint64_t generation = gate.generation;
  if (arrive(gate, what, line)) {
    compute([&](int l) -> const In& { return *reinterpret_cast<const In*>(gate.in[l]); },
            [&](int l) -> Out& { return *reinterpret_cast<Out*>(gate.out[l]); });
    open(gate);
  } else {
    wait_for(gate, generation);
  }
  return *reinterpret_cast<const Out*>(gate.out[lane]);
}
inline void check_shared(const void* p, size_t bytes, size_t alignment, const char* what) {
  const Block& b = *self().block;
  const auto* c = static_cast<const unsigned char*>(p);
  if (c < b.shared || c + bytes > b.shared + b.shared_bytes) fail(std::string(what) + " outside shared memory");
  if (reinterpret_cast<uintptr_t>(p) % alignment) fail(std::string(what) + " not aligned");
}

}  // namespace host
}  // namespace ldmfast
