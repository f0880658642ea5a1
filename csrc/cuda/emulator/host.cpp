// CUDA on the host: the scheduler (host.h). Which fiber runs when, block by block.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

#include "machine.h"

namespace ldmfast {
namespace host {

Machine*& machine() { static thread_local Machine* m = nullptr; return m; }
Thread& self() { return *machine()->current; }
void fail(const std::string& what) { throw std::runtime_error("emulated CUDA: " + what); }

static std::string base_name(const std::string& path) { return path.substr(path.find_last_of('/') + 1); }
bool Place::is(Site site) const { return line && line == site.line && base_name(site.file) == file; }
std::string described(const char* what, Site site) {
  return std::string(what) + " in line " + std::to_string(site.line) + " of " + base_name(site.file);
}
static Place place_of(const char* name) {
  const char* value = std::getenv(name);
  const char* colon = value ? std::strrchr(value, ':') : nullptr;
  if (!colon) return {};
  return {std::string(value, colon), std::atoi(colon + 1)};
}

#if defined(__x86_64__)
// saves the callee-saved registers on the old stack and restores them from the new one (System V ABI)
__attribute__((naked, noinline)) static void switch_stack(void** /*save*/, void* /*to*/) {
  __asm__ volatile(
      "pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15;"
      "movq %rsp, (%rdi); movq %rsi, %rsp;"
      "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; ret");
}
static void jump(Thread& from, Thread& to) { switch_stack(&from.sp, to.sp); }
#else
static void jump(Thread& from, Thread& to) { swapcontext(&from.context, &to.context); }
#endif

void stop(const std::string& what) {
  Machine& m = *machine();
  if (m.error.empty()) m.error = "emulated CUDA: " + what;
  jump(*m.current, m.scheduler);
  std::abort();                        // a stopped fiber is never resumed
}

static void end_block(Machine& m, Block& b) {
  if (m.races) races_end_block(m, b);
  for (size_t i = 0; i < kCanary; ++i)
    if (b.shared[b.shared_bytes + i] != 0xFF) stop("a write behind the block's shared memory");
  std::memset(b.shared, 0xFF, b.shared_bytes);   // another block's memory from here on
}
static void fiber_main() {
  Machine& m = *machine();
  try {
    m.entry(m.params);
  } catch (const std::exception& e) {
    if (m.error.empty()) m.error = e.what();
  }
  Thread& t = *m.current;
  if (std::memcmp(t.stack, "guard", 5)) stop("a fiber's stack is too small");
  t.done = true;
  if (--t.block->live == 0) end_block(m, *t.block);
  jump(t, m.scheduler);
  std::abort();
}
static void prepare(Thread& t) {
  std::memcpy(t.stack, "guard", 5);
#if defined(__x86_64__)
  void** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(t.stack) + kStack) & ~uintptr_t(15));
  *--top = nullptr;                    // keeps the alignment that a call would leave
  *--top = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  t.sp = top;
#else
  getcontext(&t.context);
  t.context.uc_stack.ss_sp = t.stack;
  t.context.uc_stack.ss_size = kStack;
  t.context.uc_link = nullptr;
  makecontext(&t.context, fiber_main, 0);
#endif
}

static bool runnable(const Thread& t) { return !t.done && !(t.waiting && t.waiting->generation == t.generation); }
void wait_for(const Gate& gate, uint64_t generation) {
  Machine& m = *machine();
  Thread& t = *m.current;
  t.waiting = &gate;
  t.generation = generation;
  if (gate.generation == generation) {
    // straight to the warp's next lane, which spares half of the switches; the scheduler takes over behind the last
    const unsigned lane = t.index.x % kWarp, place = t.warp->place[lane] + 1;
    Thread* next = place < kWarp ? &t - lane + t.warp->order[place] : nullptr;
    if (next && runnable(*next)) {
      m.current = next;
      jump(t, *next);
    } else {
      jump(t, m.scheduler);
    }
  }
  t.waiting = nullptr;
}
void reorder(Machine& m, Gate& warp, bool descending) {
  for (int i = 0; i < kWarp; ++i) warp.order[i] = descending ? kWarp - 1 - i : i;
  if (m.seeded) m.random.shuffle(warp.order, kWarp);
  for (int i = 0; i < kWarp; ++i) warp.place[warp.order[i]] = i;
}
static void reset(Gate& gate, int threads) { gate.expected = threads, gate.arrived = 0, gate.generation = 0; }

static std::string stuck(const Machine& m) {
  std::string found = "deadlock:";
  int done = 0;
  const Gate* last = nullptr;
  for (int i = 0; i < m.thread_count; ++i) {
    const Thread& t = m.threads[i];
    done += t.done;
    if (t.waiting && t.waiting != last && found.size() < 400) {
      last = t.waiting;
      found += " [" + described(last->what, last->site) + ": " + std::to_string(last->arrived) + " of " +
               std::to_string(last->expected) + " came]";
    }
  }
  return found + ", " + std::to_string(done) + " threads ended";
}

// one warp as far as it goes; true if it went anywhere
static bool run_warp(Machine& m, int w) {
  bool progress = false;
  for (bool again = true; again;) {
    again = false;
    for (int i = 0; i < kWarp; ++i) {
      Thread& t = m.threads[w * kWarp + m.warps[w].order[i]];
      if (!runnable(t)) continue;
      m.current = &t;
      jump(m.scheduler, t);
      if (!m.error.empty()) throw std::runtime_error(m.error);
      again = progress = true;
    }
  }
  return progress;
}
// Sets of warps, one after the other, each as far as it goes: a block; with a seed and by chance all warps in turn
static std::vector<std::vector<int>> turns(Machine& m, bool descending) {
  const int warps = m.warp_count / m.cluster_size;
  std::vector<std::vector<int>> blocks(m.cluster_size);
  for (int i = 0; i < m.warp_count; ++i) {
    const int w = descending ? m.warp_count - 1 - i : i;
    blocks[i / warps].push_back(w);
  }
  if (!m.seeded) return blocks;
  m.random.shuffle(blocks.data(), blocks.size());
  for (auto& block : blocks) m.random.shuffle(block.data(), block.size());
  if (m.random.below(2)) return blocks;
  std::vector<int> all;
  for (const auto& block : blocks) all.insert(all.end(), block.begin(), block.end());
  m.random.shuffle(all.data(), all.size());
  return {all};
}
static void run_cluster(Machine& m, bool descending) {
  for (bool running = true; running;) {
    bool progress = false;
    for (const auto& warps : turns(m, descending))
      for (bool again = true; again; progress = progress || again) {
        again = false;
        for (int w : warps) again = run_warp(m, w) || again;
      }
    running = false;
    for (int i = 0; i < m.thread_count; ++i) running = running || !m.threads[i].done;
    if (running && !progress) fail(stuck(m));
  }
}

Machine::~Machine() {
  for (int i = 0; i < thread_count; ++i) threads[i].~Thread();
}
static void allocate(Machine& m, int cluster, int block, size_t shared) {
  m.cluster_size = cluster;
  const int threads = cluster * block, warps = threads / kWarp;
  const auto round = [](size_t bytes) { return (bytes + 63) / 64 * 64; };
  const size_t of_blocks = round(cluster * sizeof(Block)), of_threads = round(threads * sizeof(Thread));
  m.arena_bytes = of_blocks + of_threads + round(warps * sizeof(Gate)) + threads * kStack + 64;
  m.arena.reset(new unsigned char[m.arena_bytes]);
  auto* at = reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(m.arena.get()) + 63) / 64 * 64);
  m.blocks = reinterpret_cast<Block*>(at);
  m.threads = reinterpret_cast<Thread*>(at + of_blocks);
  m.warps = reinterpret_cast<Gate*>(at + of_blocks + of_threads);
  unsigned char* stacks = m.arena.get() + m.arena_bytes - threads * kStack;
  for (int i = 0; i < cluster; ++i) new (m.blocks + i) Block;
  for (int i = 0; i < warps; ++i) new (m.warps + i) Gate;
  for (int i = 0; i < threads; ++i) new (m.threads + i) Thread, m.threads[i].stack = stacks + i * kStack;
  m.thread_count = threads, m.warp_count = warps;
  const size_t each = (shared + kCanary + 127) / 128 * 128;
  m.shared.resize(cluster * each + 128);
  auto* memory = reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(m.shared.data()) + 127) / 128 * 128);
  for (int i = 0; i < cluster; ++i) m.blocks[i].shared = memory + i * each, m.blocks[i].shared_bytes = shared;
}
static void begin_block(Machine& m, int r, uint64_t id, dim3 grid, int block, bool descending) {
  Block& b = m.blocks[r];
  b.index = {unsigned(id % grid.x), unsigned(id / grid.x % grid.y), unsigned(id / grid.x / grid.y)};
  b.dim = {unsigned(block), 1, 1};
  b.grid = grid;
  b.id = static_cast<uint32_t>(id);
  b.rank = r;
  b.live = block;
  reset(b.barrier, block);
  std::memset(b.shared, 0xFF, b.shared_bytes + kCanary);
  for (int i = 0; i < block; ++i) {
    const int at = r * block + i;
    Thread fresh;
    fresh.block = &b;
    fresh.warp = &m.warps[at / kWarp];
    fresh.index = {unsigned(i), 0, 0};
    fresh.stack = m.threads[at].stack;
    if (i % kWarp == 0) reset(*fresh.warp, kWarp), reorder(m, *fresh.warp, descending);
    m.threads[at] = std::move(fresh);
    prepare(m.threads[at]);
  }
}

void run(void (*entry)(const void*), const void* params, size_t params_bytes, dim3 grid, int block, size_t shared,
         int cluster) {
  if (block % kWarp || block > 1024 || grid.x % cluster) fail("bad launch shape");
  Machine m;
  m.entry = entry, m.params = params, m.params_bytes = params_bytes;
  const char* seed = std::getenv("LDMFAST_CUDA_HOST_SEED");
  const char* races = std::getenv("LDMFAST_CUDA_HOST_RACES");
  m.seeded = seed && *seed;
  m.seed = m.seeded ? std::strtoull(seed, nullptr, 10) : 0;
  m.random.state = (m.seed + 1) * 0x9E3779B97F4A7C15ULL;
  m.races = races && *races == '1';
  m.skip = place_of("LDMFAST_CUDA_HOST_SKIP"), m.relax = place_of("LDMFAST_CUDA_HOST_RELAX");
  allocate(m, cluster, block, shared);
  struct Restore { Machine* to; ~Restore() { machine() = to; } } restore{machine()};
  machine() = &m;
  if (m.races) races_begin(m);
  std::vector<uint64_t> firsts;
  for (uint64_t first = 0; first < uint64_t(grid.x) * grid.y * grid.z; first += cluster) firsts.push_back(first);
  if (m.seeded) m.random.shuffle(firsts.data(), firsts.size());
  for (uint64_t first : firsts) {
    const bool descending = (first / cluster) % 2 == 1;
    reset(m.cluster, m.thread_count);
    m.relaxed_phases = 0;
    for (int r = 0; r < cluster; ++r) begin_block(m, r, first + r, grid, block, descending);
    if (m.races) races_begin_cluster(m);
    run_cluster(m, descending);
  }
}
}  // namespace host
}  // namespace ldmfast
