// CUDA on the host: what a kernel's threads wait for, barriers and asynchronous copies, and the checks of addresses.
#include <cstring>

#include "machine.h"

namespace ldmfast {
namespace host {

// true for the last to come, which must then open() the gate
static bool arrive(Gate& gate, const char* what, Site site) {
  if (gate.arrived == 0) { gate.what = what; gate.site = site; }
  if (gate.what != what || gate.site.line != site.line || std::strcmp(gate.site.file, site.file))
    stop("threads meet at different places: " + described(gate.what, gate.site) + ", " + described(what, site));
  return ++gate.arrived == gate.expected;
}
static void open(Gate& gate) { gate.arrived = 0; ++gate.generation; }

void collective(const char* what, Site site, const void* in, size_t in_bytes, void* out, size_t out_bytes,
                void (*compute)(Gate&, const void*), const void* argument) {
  Thread& t = self();
  Gate& gate = *t.warp;
  const int lane = t.index.x % kWarp;
  if (in_bytes) std::memcpy(gate.in[lane], in, in_bytes);
  const uint64_t generation = gate.generation;
  if (arrive(gate, what, site)) {
    if (compute) compute(gate, argument);
    open(gate);
    if (machine()->seeded) reorder(*machine(), gate, false);
  } else {
    wait_for(gate, generation);
  }
  if (out_bytes) std::memcpy(out, gate.out[lane], out_bytes);
}
void synchronise_block(Site site) {
  if (machine()->skip.is(site)) return;
  Thread& t = self();
  Gate& gate = t.block->barrier;
  const uint64_t generation = gate.generation;
  if (arrive(gate, "__syncthreads", site)) open(gate);
  else wait_for(gate, generation);
  ++t.epoch, ++t.warp_epoch;
}
void synchronise_warp(Site site) {
  if (machine()->skip.is(site)) return;
  collective("__syncwarp", site, nullptr, 0, nullptr, 0, nullptr, nullptr);
  ++self().warp_epoch;
}
void cluster_arrive(Site site, bool relaxed) {
  Machine& m = *machine();
  if (m.skip.is(site)) return;
  Thread& t = self();
  t.cluster_ticket = m.cluster.generation;
  ++t.cluster_arrivals;
  if (relaxed || m.relax.is(site)) m.relaxed_phases |= uint64_t(1) << t.cluster_arrivals % 64;
  if (arrive(m.cluster, "cluster barrier", {"", 0})) open(m.cluster);
}
void cluster_wait(Site site) {
  if (machine()->skip.is(site)) return;
  Thread& t = self();
  wait_for(machine()->cluster, t.cluster_ticket);
  t.cluster_waits = t.cluster_arrivals;
}

void wait_for_previous_kernel(Site site) {
  if (!machine()->skip.is(site)) self().waited = true;
}

void check_shared(const void* p, size_t bytes, size_t alignment, const char* what) {
  const Block& b = *self().block;
  const auto* c = static_cast<const unsigned char*>(p);
  if (c < b.shared || c + bytes > b.shared + b.shared_bytes) stop(std::string(what) + " outside shared memory");
  if (reinterpret_cast<uintptr_t>(p) % alignment) stop(std::string(what) + " not aligned");
}
void check_alignment(const void* p, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes) stop("an access of " + std::to_string(bytes) + " bytes not aligned");
}
float cluster_load(const float* own, unsigned rank) {
  check_shared(own, 4, 4, "cluster_load");
  Machine& m = *machine();
  if (rank >= unsigned(m.cluster_size)) stop("cluster_load from a block that the cluster does not have");
  Block& other = m.blocks[rank];
  if (other.live == 0) stop("cluster_load from a block that has ended");
  const void* p = other.shared + (reinterpret_cast<const unsigned char*>(own) - self().block->shared);
  if (m.races) traced_remote(p, other, __builtin_return_address(0));
  return *static_cast<const float*>(p);
}

void copy(void* to, const void* from, int bytes, bool valid) {
  check_shared(to, bytes, bytes, "cp.async");
  if (valid && reinterpret_cast<uintptr_t>(from) % bytes) stop("cp.async source not aligned");
  if (machine()->races) {
    if (valid) traced(from, bytes, false, __builtin_return_address(0));
    traced_copy_begin(to, bytes, __builtin_return_address(0));
  }
  std::memset(to, 0xFF, bytes);
  self().copies.push_back({to, from, bytes, valid});
}
void commit_copies(Site site) {
  if (machine()->skip.is(site)) return;
  Thread& t = self();
  size_t grouped = 0;
  for (size_t g : t.groups) grouped += g;
  t.groups.push_back(t.copies.size() - grouped);
}
void wait_for_copies(size_t pending, Site site) {
  if (machine()->skip.is(site)) return;
  Thread& t = self();
  while (t.groups.size() > pending) {
    for (size_t i = 0; i < t.groups.front(); ++i) {
      const Copy& c = t.copies[i];
      if (machine()->races) traced_copy_end(c.to, c.bytes, __builtin_return_address(0));
      if (c.valid) std::memcpy(c.to, c.from, c.bytes);
      else std::memset(c.to, 0, c.bytes);
    }
    t.copies.erase(t.copies.begin(), t.copies.begin() + t.groups.front());
    t.groups.erase(t.groups.begin());
  }
}
}  // namespace host
}  // namespace ldmfast
