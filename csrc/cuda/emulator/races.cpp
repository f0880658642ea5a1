// Race detection (LDMFAST_CUDA_HOST_RACES=1): two accesses to the same 2 bytes of shared or global memory in one launch,
// of which one writes, that no barrier orders. It does not depend on the order in which the fibers happen to run.
//
// The kernels are compiled with -fsanitize=thread, which calls __tsan_read4(address) and the like before each access;
// the functions at the end of this file are those calls, and GCC's own run-time library is not linked. What orders:
//
//   within a warp     __syncwarp and __syncthreads; not a shuffle or an mma. ldmatrix reads for all lanes at once, so
//                     that what the warp writes after it comes after it
//   within a block    __syncthreads
//   within a cluster  an arrive after the one access, which must release where that writes, and a wait before the other
//   between blocks    nothing else, until the launch ends
//
// What cp.async writes belongs to nobody until the copy is waited for. A block's end writes to all its shared memory.
#include <dlfcn.h>

#include <cstdio>
#include <cstring>

#include "machine.h"

namespace ldmfast {
namespace host {
namespace {

constexpr uint32_t kNone = 0xFFFFFFFF, kManyBlocks = 0xFFFFFFFE;
constexpr int16_t kManyWarps = -1;
constexpr int8_t kManyLanes = -1, kWholeWarp = -2;   // the latter: a read of all lanes at once

struct Record {                        // an access
  uint32_t block = kNone, epoch = 0, warp_epoch = 0, arrivals = 0;
  int16_t warp = 0;
  int8_t lane = 0;
  const void* pc = nullptr;
};
struct Cell {                          // of 2 bytes
  Record write, read, remote;          // remote: by another block of the cluster
  bool flying = false;                 // an asynchronous copy is on its way
};
constexpr size_t kCell = 2, kLine = 16;

struct Shadow {                        // of one launch
  std::vector<std::vector<Cell>> shared;                  // of each block of the cluster
  std::vector<uintptr_t> keys;                            // global memory by 16 bytes, hashed; 0: free
  std::vector<Cell> cells;
  size_t used = 0;
};
thread_local Shadow shadow;
bool tracing = false;                  // whether any launch looks for races: a read that is cheap

std::string place(const void* pc) {
  Dl_info info;
  if (!dladdr(pc, &info)) return "?";
  char command[1024], line[512] = "";
  const auto offset = static_cast<const char*>(pc) - static_cast<const char*>(info.dli_fbase) - 1;
  std::snprintf(command, sizeof(command), "addr2line -s -i -e '%s' 0x%zx 2>/dev/null", info.dli_fname, size_t(offset));
  if (FILE* pipe = popen(command, "r")) {
    char next[512];
    while (std::fgets(next, sizeof(next), pipe)) {   // the primitive's own line first, then where it was called from
      std::strcpy(line, next);
      if (!std::strstr(line, "host_primitives.h") && !std::strstr(line, "common.cuh")) break;
    }
    pclose(pipe);
  }
  line[std::strcspn(line, "\n ")] = 0;
  return line[0] ? line : "offset " + std::to_string(offset);
}
std::string who(const Record& r) {
  std::string text = r.block == kManyBlocks ? "several blocks" : "block " + std::to_string(r.block);
  if (r.block == kManyBlocks) return text;
  text += r.warp == kManyWarps ? ", several warps" : ", warp " + std::to_string(r.warp);
  if (r.warp != kManyWarps && r.lane >= 0) text += ", lane " + std::to_string(r.lane);
  return text;
}
[[noreturn]] void report(const char* now, const Record& mine, const char* before, const Record& other) {
  stop(std::string("race: ") + now + " (" + who(mine) + ", " + place(mine.pc) + ") and " + before + " (" + who(other) +
       ", " + place(other.pc) + ") without a barrier between them");
}

Record record_of(const Thread& t, const void* pc, bool collective) {
  Record r;
  r.block = t.block->id, r.epoch = t.epoch, r.warp_epoch = t.warp_epoch, r.arrivals = t.cluster_arrivals;
  r.warp = static_cast<int16_t>(t.index.x / kWarp);
  r.lane = collective ? kWholeWarp : static_cast<int8_t>(t.index.x % kWarp);
  r.pc = pc;
  return r;
}
// whether a phase of the cluster's barrier lies between them; published: whether the first one's writes must be seen
bool cluster_orders(const Record& first, const Thread& t, bool published) {
  for (uint32_t phase = first.arrivals + 1; phase <= t.cluster_waits; ++phase)
    if (!published || !(machine()->relaxed_phases >> phase % 64 & 1)) return true;
  return false;
}
bool conflicts(const Record& first, const Record& mine, const Thread& t, bool published) {
  if (first.block == kNone) return false;
  if (first.block != mine.block) return true;
  if (first.epoch < mine.epoch) return false;
  if (cluster_orders(first, t, published)) return false;
  if (first.warp != mine.warp) return true;
  if (first.warp_epoch < mine.warp_epoch) return false;
  if (first.lane == kWholeWarp) return false;
  return first.lane != mine.lane;
}
void merge_read(Record& read, const Record& mine) {
  if (read.block == kNone || (read.block == mine.block && read.epoch < mine.epoch)) {
    read = mine;
    return;
  }
  const Record before = read;
  read = mine;
  if (before.block != mine.block) read.block = kManyBlocks;
  else if (before.warp != mine.warp) read.warp = kManyWarps;
  else if (before.warp_epoch == mine.warp_epoch && before.lane != mine.lane) {
    if (before.lane == kWholeWarp) read.lane = mine.lane;            // the lane alone can still conflict
    else if (mine.lane == kWholeWarp) read.lane = before.lane;
    else read.lane = kManyLanes;
  }
}

void touch(Cell& cell, const Record& mine, const Thread& t, bool write) {
  if (cell.flying) report(write ? "a write" : "a read", mine, "an asynchronous copy on its way", cell.write);
  if (conflicts(cell.write, mine, t, true)) report(write ? "a write" : "a read", mine, "a write", cell.write);
  if (!write) return merge_read(cell.read, mine);
  if (conflicts(cell.read, mine, t, false)) report("a write", mine, "a read", cell.read);
  if (cell.remote.block != kNone && !cluster_orders(cell.remote, t, false))
    report("a write", mine, "a read from another block of the cluster", cell.remote);
  cell.write = mine;
}

void grow() {
  std::vector<uintptr_t> keys(shadow.keys.size() * 2);
  std::vector<Cell> cells(keys.size() * (kLine / kCell));
  keys.swap(shadow.keys), cells.swap(shadow.cells);
  for (size_t i = 0; i < keys.size(); ++i) {
    if (!keys[i]) continue;
    size_t at = keys[i] * 0x9E3779B97F4A7C15ULL >> 20 & (shadow.keys.size() - 1);
    while (shadow.keys[at]) at = (at + 1) & (shadow.keys.size() - 1);
    shadow.keys[at] = keys[i];
    for (size_t c = 0; c < kLine / kCell; ++c)
      shadow.cells[at * (kLine / kCell) + c] = cells[i * (kLine / kCell) + c];
  }
}
Cell* line_of(uintptr_t key) {
  const size_t mask = shadow.keys.size() - 1;
  size_t at = key * 0x9E3779B97F4A7C15ULL >> 20 & mask;
  while (shadow.keys[at] && shadow.keys[at] != key) at = (at + 1) & mask;
  if (!shadow.keys[at]) {
    if (++shadow.used * 2 > shadow.keys.size()) {
      grow();
      return line_of(key);
    }
    shadow.keys[at] = key;
  }
  return &shadow.cells[at * (kLine / kCell)];
}

Cell* shared_cell(Machine& m, const void* p, size_t bytes) {
  for (int r = 0; r < m.cluster_size; ++r) {
    const size_t at = reinterpret_cast<uintptr_t>(p) - reinterpret_cast<uintptr_t>(m.blocks[r].shared);
    if (at < m.blocks[r].shared_bytes && at + bytes <= m.blocks[r].shared_bytes) return &shadow.shared[r][at / kCell];
  }
  return nullptr;
}
bool within(const void* p, const void* from, size_t bytes) {
  return reinterpret_cast<uintptr_t>(p) - reinterpret_cast<uintptr_t>(from) < bytes;
}
size_t cells_of(const void* p, size_t bytes) {
  return (reinterpret_cast<uintptr_t>(p) % kCell + bytes + kCell - 1) / kCell;
}
}  // namespace

void traced(const void* p, size_t bytes, bool write, const void* pc, bool collective) {
  Machine& m = *machine();
  if (within(p, m.arena.get(), m.arena_bytes) || within(p, m.params, m.params_bytes)) return;
  const Thread& t = *m.current;
  const Record mine = record_of(t, pc, collective);
  if (Cell* cell = shared_cell(m, p, bytes)) {
    if (!within(p, t.block->shared, t.block->shared_bytes)) stop("another block's shared memory without cluster_load");
    for (size_t i = 0; i < cells_of(p, bytes); ++i) touch(cell[i], mine, t, write);
    return;
  }
  if (within(p, m.shared.data(), m.shared.size())) stop("an access outside shared memory at " + place(pc));
  if (!t.waited)
    stop("race: " + std::string(write ? "a write" : "a read") + " of global memory (" + who(mine) + ", " + place(pc) +
         ") that does not wait for the kernels before");
  uintptr_t at = reinterpret_cast<uintptr_t>(p) / kCell;
  for (const uintptr_t end = at + cells_of(p, bytes); at < end; ++at)
    touch(line_of(at / (kLine / kCell))[at % (kLine / kCell)], mine, t, write);
}
void traced_copy_begin(const void* to, size_t bytes, const void* pc) {
  traced(to, bytes, true, pc);
  Cell* cell = shared_cell(*machine(), to, bytes);
  for (size_t i = 0; i < bytes / kCell; ++i) cell[i].flying = true;
}
void traced_copy_end(const void* to, size_t bytes, const void* pc) {
  Cell* cell = shared_cell(*machine(), to, bytes);
  for (size_t i = 0; i < bytes / kCell; ++i) cell[i].flying = false;
  traced(to, bytes, true, pc);
}
void traced_remote(const void* p, Block& of, const void* pc) {
  Machine& m = *machine();
  const Thread& t = *m.current;
  const Record mine = record_of(t, pc, false);
  Cell* cell = shared_cell(m, p, 4);
  for (size_t i = 0; i < 4 / kCell; ++i) {
    const Record& write = cell[i].write;
    if (&of == t.block) {
      touch(cell[i], mine, t, false);
      continue;
    }
    if (cell[i].flying || (write.block != kNone && !cluster_orders(write, t, true)))
      report("a read from another block of the cluster", mine, "a write", write);
    cell[i].remote = mine;
  }
}

void races_begin(Machine& m) {
  tracing = true;
  shadow.keys.assign(1 << 12, 0);
  shadow.cells.assign(shadow.keys.size() * (kLine / kCell), Cell{});
  shadow.used = 0;
  shadow.shared.resize(m.cluster_size);
}
void races_begin_cluster(Machine& m) {
  for (int r = 0; r < m.cluster_size; ++r) shadow.shared[r].assign(m.blocks[r].shared_bytes / kCell + 1, Cell{});
}
void races_end_block(Machine& m, Block& b) {
  const Record mine = record_of(*m.current, nullptr, false);
  for (const Cell& cell : shadow.shared[b.rank])
    if (cell.remote.block != kNone && !cluster_orders(cell.remote, *m.current, false))
      stop("race: block " + std::to_string(mine.block) + " may end before it is read by another of its cluster (" +
           who(cell.remote) + ", " + place(cell.remote.pc) + ")");
}
}  // namespace host
}  // namespace ldmfast

// AddressSanitizer (make sanitize) has the compiler declare these functions, differently; nothing calls them there.
#if !defined(__SANITIZE_ADDRESS__)
using ldmfast::host::machine;
#define LDMFAST_ACCESS(p, bytes, write)                                                            \
  if (ldmfast::host::tracing && machine() && machine()->races && machine()->current)              \
  ldmfast::host::traced(p, bytes, write, __builtin_return_address(0))
#define LDMFAST_SIZE(n)                                                                            \
  void __tsan_read##n(void* p) { LDMFAST_ACCESS(p, n, false); }                                    \
  void __tsan_write##n(void* p) { LDMFAST_ACCESS(p, n, true); }                                    \
  void __tsan_unaligned_read##n(void* p) { LDMFAST_ACCESS(p, n, false); }                          \
  void __tsan_unaligned_write##n(void* p) { LDMFAST_ACCESS(p, n, true); }
extern "C" {
LDMFAST_SIZE(1) LDMFAST_SIZE(2) LDMFAST_SIZE(4) LDMFAST_SIZE(8) LDMFAST_SIZE(16)
void __tsan_read_range(void* p, size_t bytes) { LDMFAST_ACCESS(p, bytes, false); }
void __tsan_write_range(void* p, size_t bytes) { LDMFAST_ACCESS(p, bytes, true); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}
}
#endif
