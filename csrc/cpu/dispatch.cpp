// The launchers of ops.h: each runs the best compiled instruction set that this processor has.
// LDMFAST_CPU_ISA=generic|avx2|avx512|avx512_bf16 takes a lower one.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "../ops.h"

namespace ldmfast {

#define LDMFAST_DECLARE(isa)                                     \
  namespace isa {                                                \
  size_t group_norm_silu_workspace(const GroupNormSiluArgs&);    \
  void group_norm_silu(const GroupNormSiluArgs&);                \
  size_t attention_workspace(const AttentionArgs&);              \
  void attention(const AttentionArgs&);                          \
  size_t timestep_mlp_workspace(const TimestepMlpArgs&);         \
  void timestep_mlp(const TimestepMlpArgs&);                     \
  void ddim_step(const DdimStepArgs&);                           \
  size_t group_norm_silu_backward_workspace(const GroupNormSiluBackwardArgs&);  \
  void group_norm_silu_backward(const GroupNormSiluBackwardArgs&);              \
  size_t attention_backward_workspace(const AttentionBackwardArgs&);            \
  void attention_backward(const AttentionBackwardArgs&);                        \
  size_t timestep_mlp_backward_workspace(const TimestepMlpBackwardArgs&);       \
  void timestep_mlp_backward(const TimestepMlpBackwardArgs&);                   \
  void ddim_step_backward(const DdimStepBackwardArgs&);                         \
  }
LDMFAST_DECLARE(generic)
#if defined(LDMFAST_X86)
LDMFAST_DECLARE(avx2)
LDMFAST_DECLARE(avx512)
LDMFAST_DECLARE(avx512_bf16)
#endif

const char* compiled_isas();
const char* active_isa();

namespace {

struct Isa {
  const char* name;
  bool (*runs_here)();
  decltype(&generic::group_norm_silu_workspace) group_norm_silu_workspace;
  decltype(&generic::group_norm_silu) group_norm_silu;
  decltype(&generic::attention_workspace) attention_workspace;
  decltype(&generic::attention) attention;
  decltype(&generic::timestep_mlp_workspace) timestep_mlp_workspace;
  decltype(&generic::timestep_mlp) timestep_mlp;
  decltype(&generic::ddim_step) ddim_step;
  decltype(&generic::group_norm_silu_backward_workspace) group_norm_silu_backward_workspace;
  decltype(&generic::group_norm_silu_backward) group_norm_silu_backward;
  decltype(&generic::attention_backward_workspace) attention_backward_workspace;
  decltype(&generic::attention_backward) attention_backward;
  decltype(&generic::timestep_mlp_backward_workspace) timestep_mlp_backward_workspace;
  decltype(&generic::timestep_mlp_backward) timestep_mlp_backward;
  decltype(&generic::ddim_step_backward) ddim_step_backward;
};

#define LDMFAST_ISA_ENTRY(isa, runs_here)                                                                       \
  {#isa, runs_here, isa::group_norm_silu_workspace, isa::group_norm_silu, isa::attention_workspace,             \
   isa::attention, isa::timestep_mlp_workspace, isa::timestep_mlp, isa::ddim_step,        \
   isa::group_norm_silu_backward_workspace, isa::group_norm_silu_backward,                                \
   isa::attention_backward_workspace, isa::attention_backward, isa::timestep_mlp_backward_workspace,            \
   isa::timestep_mlp_backward, isa::ddim_step_backward}

#if defined(LDMFAST_X86)
// the compiler's built-in also asks the operating system whether it saves the wider registers
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif
bool always() { return true; }

const Isa kIsas[] = {  // the best first
#if defined(LDMFAST_X86)
    LDMFAST_ISA_ENTRY(avx512_bf16, has_avx512_bf16),
    LDMFAST_ISA_ENTRY(avx512, has_avx512),
    LDMFAST_ISA_ENTRY(avx2, has_avx2),
#endif
    LDMFAST_ISA_ENTRY(generic, always),
};

const Isa& choose() {
  const char* wanted = std::getenv("LDMFAST_CPU_ISA");
  if (wanted && !*wanted) wanted = nullptr;
  for (const Isa& isa : kIsas) {
    if (!wanted && isa.runs_here()) return isa;
    if (!wanted || std::strcmp(wanted, isa.name)) continue;
    if (isa.runs_here()) return isa;
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
#if defined(LDMFAST_X86)
  return "avx512_bf16 avx512 avx2 generic";
#else
  return "generic";
#endif
}

const char* active_isa() { return active().name; }

size_t group_norm_silu_workspace(const GroupNormSiluArgs& args) { return active().group_norm_silu_workspace(args); }
void group_norm_silu(const GroupNormSiluArgs& args, const Launch&) { active().group_norm_silu(args); }
size_t attention_workspace(const AttentionArgs& args) { return active().attention_workspace(args); }
void attention(const AttentionArgs& args, const Launch&) { active().attention(args); }
size_t timestep_mlp_workspace(const TimestepMlpArgs& args) { return active().timestep_mlp_workspace(args); }
void timestep_mlp(const TimestepMlpArgs& args, const Launch&) { active().timestep_mlp(args); }
void ddim_step(const DdimStepArgs& args, const Launch&) { active().ddim_step(args); }

size_t group_norm_silu_backward_workspace(const GroupNormSiluBackwardArgs& args) {
  return active().group_norm_silu_backward_workspace(args);
}
void group_norm_silu_backward(const GroupNormSiluBackwardArgs& args, const Launch&) {
  active().group_norm_silu_backward(args);
}
size_t attention_backward_workspace(const AttentionBackwardArgs& args) {
  return active().attention_backward_workspace(args);
}
void attention_backward(const AttentionBackwardArgs& args, const Launch&) { active().attention_backward(args); }
size_t timestep_mlp_backward_workspace(const TimestepMlpBackwardArgs& args) {
  return active().timestep_mlp_backward_workspace(args);
}
void timestep_mlp_backward(const TimestepMlpBackwardArgs& args, const Launch&) {
  active().timestep_mlp_backward(args);
}
void ddim_step_backward(const DdimStepBackwardArgs& args, const Launch&) { active().ddim_step_backward(args); }

}  // namespace ldmfast
