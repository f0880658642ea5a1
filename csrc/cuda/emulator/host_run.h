// CUDA on the host: the scheduler. Which fiber runs when, and a launch block by block; the pieces are in host.h.
#pragma once
#include "host.h"

namespace ldmfast {
namespace host {

inline std::string stuck(const Machine& m) {
  std::string text = "deadlock:";
  int done = 0;
  const Gate* last = nullptr;
  for (const Thread& t : m.threads) {
    done += t.done;
    if (t.waiting && t.waiting != last) {
      last = t.waiting;
      text += " [" + std::string(last->what) + " in line " + std::to_string(last->line) + ": " +
              std::to_string(last->arrived) + " of " + std::to_string(last->expected) + " came]";
      if (text.size() > 400) break;
    }
  }
  return text + ", " + std::to_string(done) + " threads ended";
}

// one warp as far as it goes; true if it went anywhere
inline bool run_warp(Machine& m, int w) {
  bool progress = false;
  for (bool again = true; again;) {
    again = false;
    for (int l = 0; l < kWarp; ++l) {
      Thread& t = m.threads[w * kWarp + (m.descending ? kWarp - 1 - l : l)];
      if (!runnable(t)) continue;
      m.current = &t;
      jump(m.scheduler, t);
      if (!m.error.empty()) throw std::runtime_error(m.error);
      again = progress = true;
    }
  }
  return progress;
}
inline void run_cluster(Machine& m) {
  const int warps = static_cast<int>(m.warps.size() / m.blocks.size()), blocks = static_cast<int>(m.blocks.size());
  const auto ordered = [&](int i, int n) { return m.descending ? n - 1 - i : i; };
  for (bool running = true; running;) {
    bool progress = false;
    for (int b = 0; b < blocks; ++b)
      for (bool again = true; again; progress = progress || again) {   // one block as far as it goes
        again = false;
        for (int i = 0; i < warps; ++i) again = run_warp(m, ordered(b, blocks) * warps + ordered(i, warps)) || again;
      }
    running = std::any_of(m.threads.begin(), m.threads.end(), [](const Thread& t) { return !t.done; });
    if (running && !progress) fail(stuck(m));
  }
}

// cluster: consecutive blocks in x that run together and see each other's shared memory
inline void run(void (*entry)(const void*), const void* params, dim3 grid, int block, size_t shared, int cluster) {
  if (block % kWarp || block > 1024 || grid.x % cluster) fail("bad launch shape");
  Machine m;
  m.entry = entry;
  m.params = params;
  m.blocks = std::vector<Block>(cluster);
  m.threads = std::vector<Thread>(size_t(cluster) * block);
  m.warps = std::vector<Gate>(m.threads.size() / kWarp);
  m.stacks.reset(new unsigned char[m.threads.size() * kStack]);
  Machine* outer = machine();
  machine() = &m;
  struct Restore { Machine* to; ~Restore() { machine() = to; } } restore{outer};
  for (Block& b : m.blocks) {
    b.storage.reset(new unsigned char[shared + kCanary + 128]);
    b.shared = reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(b.storage.get()) + 127) & ~uintptr_t(127));
  }
  const uint64_t total = uint64_t(grid.x) * grid.y * grid.z;
  for (uint64_t first = 0; first < total; first += cluster) {
    m.cluster.reset(static_cast<int>(m.threads.size()));
    m.descending = (first / cluster) % 2 == 1;
    for (int r = 0; r < cluster; ++r) {
      Block& b = m.blocks[r];
      const uint64_t id = first + r;
      b.index = {unsigned(id % grid.x), unsigned(id / grid.x % grid.y), unsigned(id / grid.x / grid.y)};
      b.dim = {unsigned(block), 1, 1};
      b.grid = grid;
      b.rank = r;
      b.barrier.reset(block);
      b.shared_bytes = shared;
      std::memset(b.shared, 0xFF, shared + kCanary);
      for (int i = 0; i < block; ++i) {
        const size_t at = size_t(r) * block + i;
        Thread fresh;
        fresh.block = &b;
        fresh.warp = &m.warps[at / kWarp];
        fresh.index = {unsigned(i), 0, 0};
        fresh.warp->reset(kWarp);
        m.threads[at] = std::move(fresh);
        prepare(m.threads[at], m.stacks.get() + at * kStack);
      }
    }
    run_cluster(m);
    for (const Block& b : m.blocks)
      for (size_t i = 0; i < kCanary; ++i)
        if (b.shared[shared + i] != 0xFF) fail("a write behind the block's shared memory");
  }
}
}  // namespace host
}  // namespace ldmfast
