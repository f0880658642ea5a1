// The launchers of ops.h: each runs the fastest compiled instruction set that this processor has.
// LDMFAST_CPU_ISA=generic|avx2|avx512|avx512_bf16|amx takes another one.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(LDMFAST_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "../ops.h"

#define LDMFAST_ALL_OPS(OP) LDMFAST_OPS(OP) LDMFAST_CPU_OPS(OP)

namespace ldmfast {

const char* compiled_isas();
const char* active_isa();

namespace {

// An instruction set: its kernels of every op.
struct Isa {
  const char* name;
  bool (*runs_here)();
  bool (*pays_here)();  // or a lower one is faster
#define LDMFAST_POINTER(op, Args, W) \
  void (*op)(const Args&);           \
  LDMFAST_IF_##W(size_t (*op##_workspace)(const Args&);)
  LDMFAST_ALL_OPS(LDMFAST_POINTER)
};

#if defined(LDMFAST_X86)
// the compiler's built-in also asks the operating system whether it saves the wider registers
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
#endif
#if defined(LDMFAST_AVX512)
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
// Intel's processors with AMX multiply pairs of bfloat16 in vectors at half the rate of float32's multiply-adds (Emerald
// Rapids: 172 GFLOP/s, and 356 of float32). Where the tiles are kept from a process, as by some hypervisors, bfloat16
// is faster widened. Cooper Lake, whose pairs are fast, lacks VBMI2.
bool has_fast_pairs() { return !(__builtin_cpu_is("intel") && __builtin_cpu_supports("avx512vbmi2")); }
#if defined(LDMFAST_AMX)
// Linux gives a process the tiles' registers when it asks for them.
bool has_amx() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return has_avx512_bf16() && __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("amx-tile") &&
         __builtin_cpu_supports("amx-bf16") && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif
#endif
bool always() { return true; }

}  // namespace

// Each instruction set is a namespace, compiled from the same files.
#define LDMFAST_KERNEL(op, Args, W) \
  void op(const Args&);             \
  LDMFAST_IF_##W(size_t op##_workspace(const Args&);)
#define LDMFAST_ADDRESS(op, Args, W) op, LDMFAST_IF_##W(op##_workspace, )
#define LDMFAST_ISA_ENTRY(isa, runs_here, pays_here)                                      \
  namespace isa {                                                                         \
  LDMFAST_ALL_OPS(LDMFAST_KERNEL)                                                         \
  static const Isa kernels = {#isa, runs_here, pays_here, LDMFAST_ALL_OPS(LDMFAST_ADDRESS)};  \
  }
LDMFAST_ISA_ENTRY(generic, always, always)
#if defined(LDMFAST_X86)
LDMFAST_ISA_ENTRY(avx2, has_avx2, always)
#endif
#if defined(LDMFAST_AVX512)
LDMFAST_ISA_ENTRY(avx512, has_avx512, always)
LDMFAST_ISA_ENTRY(avx512_bf16, has_avx512_bf16, has_fast_pairs)
#if defined(LDMFAST_AMX)
LDMFAST_ISA_ENTRY(amx, has_amx, always)
#endif
#endif

namespace {

const Isa* const kIsas[] = {  // the fastest first
#if defined(LDMFAST_AMX)
    &amx::kernels,
#endif
#if defined(LDMFAST_AVX512)
    &avx512_bf16::kernels, &avx512::kernels,
#endif
#if defined(LDMFAST_X86)
    &avx2::kernels,
#endif
    &generic::kernels,
};

const Isa& choose() {
  const char* wanted = std::getenv("LDMFAST_CPU_ISA");
  if (wanted && !*wanted) wanted = nullptr;
  for (const Isa* isa : kIsas) {
    if (!wanted && isa->runs_here() && isa->pays_here()) return *isa;
    if (!wanted || std::strcmp(wanted, isa->name)) continue;
    if (isa->runs_here()) return *isa;
    throw std::runtime_error(std::string("LDMFAST_CPU_ISA=") + wanted + ": this processor does not have it");
  }
  throw std::runtime_error(std::string("LDMFAST_CPU_ISA=") + wanted + " is not one of " + compiled_isas());
}

const Isa& active() {
  static const Isa& isa = choose();  // after an exception the next call tries again
  return isa;
}

}  // namespace

const char* compiled_isas() {
#if defined(LDMFAST_AMX)
  return "amx avx512_bf16 avx512 avx2 generic";
#elif defined(LDMFAST_AVX512)
  return "avx512_bf16 avx512 avx2 generic";
#elif defined(LDMFAST_X86)
  return "avx2 generic";
#else
  return "generic";
#endif
}

const char* active_isa() { return active().name; }

#define LDMFAST_LAUNCHER(op, Args, W)                              \
  void op(const Args& args, const Launch&) { active().op(args); }  \
  LDMFAST_IF_##W(size_t op##_workspace(const Args& args) { return active().op##_workspace(args); })
LDMFAST_ALL_OPS(LDMFAST_LAUNCHER)

}  // namespace ldmfast
