// One launch of the emulator, for its own sources, none of which is instrumented.
#pragma once
#include <memory>

#include "host.h"

namespace ldmfast {
namespace host {

constexpr size_t kStack = 32 << 10;   // bytes a fiber: kernels keep at most a few hundred floats
constexpr size_t kCanary = 128;

struct Random {                        // xorshift64*
  uint64_t state = 1;
  uint32_t next() {
    state ^= state >> 12, state ^= state << 25, state ^= state >> 27;
    return static_cast<uint32_t>(state * 0x2545F4914F6CDD1DULL >> 32);
  }
  unsigned below(unsigned n) { return next() % n; }
  template <class T> void shuffle(T* values, size_t n) {
    for (size_t i = n; i > 1; --i) std::swap(values[i - 1], values[next() % i]);
  }
};

struct Place {                         // F:L of a setting
  std::string file;
  int line = 0;
  bool is(Site site) const;
};

struct Machine {                       // one cluster of blocks in flight
  std::unique_ptr<unsigned char[]> arena;         // threads, warps, blocks and stacks: no memory of the kernel's
  size_t arena_bytes = 0;
  Block* blocks = nullptr;
  Thread* threads = nullptr;
  Gate* warps = nullptr;
  int cluster_size = 0, thread_count = 0, warp_count = 0;
  std::vector<unsigned char> shared;
  Gate cluster;
  uint64_t relaxed_phases = 0;         // of the cluster's barrier: which released no writes
  uint32_t phase = 0;
  Thread* current = nullptr;
  Thread scheduler;
  void (*entry)(const void*) = nullptr;
  const void* params = nullptr;
  size_t params_bytes = 0;
  std::string error;
  bool seeded = false, races = false;
  uint64_t seed = 0;
  Random random;
  Place skip, relax;
  ~Machine();
};
Machine*& machine();

// a fiber's way out with an error; it does not run again
[[noreturn]] void stop(const std::string& what);

// host.cpp: lets others run until the gate opens; a new order of a warp's lanes
void wait_for(const Gate& gate, uint64_t generation);
void reorder(Machine& m, Gate& warp, bool descending);
std::string described(const char* what, Site site);

// races.cpp. collective: by the warp, as ldmatrix reads
void races_begin(Machine& m);
void races_begin_cluster(Machine& m);
void races_end_block(Machine& m, Block& b);
void traced(const void* p, size_t bytes, bool write, const void* pc, bool collective = false);
void traced_copy_begin(const void* to, size_t bytes, const void* pc);
void traced_copy_end(const void* to, size_t bytes, const void* pc);
void traced_remote(const void* p, Block& of, const void* pc);

// runs compute(gate, argument) over the 32 lanes' values once all of the warp have come
void collective(const char* what, Site site, const void* in, size_t in_bytes, void* out, size_t out_bytes,
                void (*compute)(Gate&, const void*), const void* argument);
void check_shared(const void* p, size_t bytes, size_t alignment, const char* what);
}  // namespace host
}  // namespace ldmfast
