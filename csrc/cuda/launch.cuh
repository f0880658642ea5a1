// The one way a kernel is started. Nothing here allocates device memory or waits, so a CUDA graph can capture it.
#pragma once
#include "common.cuh"

namespace ldmfast {

struct Device {
  int multiprocessors, shared_limit, major;   // shared_limit: bytes a block may ask for
};

struct Blocks {                               // the grid
  int64_t x, y = 1, z = 1;
  Blocks(int64_t x, int64_t y = 1, int64_t z = 1) : x(x), y(y), z(z) {}
};
constexpr int64_t kMaxBlocksYZ = 65535;

#ifdef LDMFAST_CUDA_HOST
// LDMFAST_CUDA_HOST_ARCH=80 walks the paths of a chip without clusters
inline Device device_of(const char*, const Launch&) {
  const char* arch = std::getenv("LDMFAST_CUDA_HOST_ARCH");
  return arch && std::string(arch) == "80" ? Device{108, 163 << 10, 8} : Device{132, 227 << 10, 9};
}

template <auto KERNEL, typename Params>
void launch(const char* op, const Params& params, Blocks blocks, int threads, size_t shared, const Launch& where,
            int cluster = 1) {
  if (shared > size_t(device_of(op, where).shared_limit)) throw std::runtime_error(std::string(op) + ": shared memory");
  try {
    host::run([](const void* p) { KERNEL(*static_cast<const Params*>(p)); }, &params,
              sizeof(params), dim3{unsigned(blocks.x), unsigned(blocks.y), unsigned(blocks.z)}, threads, shared, cluster);
  } catch (const std::runtime_error& e) {
    throw std::runtime_error(std::string(op) + ": " + e.what());
  }
}
#else
inline void check(const char* op, cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();   // cleared, or whoever asks next is told of it as of a failure of its own
  throw std::runtime_error(std::string(op) + ": CUDA: " + cudaGetErrorString(error));
}

constexpr int kDevices = 64;   // what is cached per device; beyond that it is asked for at each call

inline Device device_of(const char* op, const Launch& where) {
  static std::atomic<uint64_t> cache[kDevices] = {};   // packed, so that a reader never sees half of it
  std::atomic<uint64_t>* slot = where.device >= 0 && where.device < kDevices ? &cache[where.device] : nullptr;
  uint64_t packed = slot ? slot->load(std::memory_order_relaxed) : 0;
  if (packed == 0) {
    int sms = 0, shared = 0, major = 0;
    check(op, cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, where.device));
    check(op, cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, where.device));
    check(op, cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, where.device));
    packed = uint64_t(sms) | uint64_t(major) << 16 | uint64_t(shared) << 32;
    if (slot) slot->store(packed, std::memory_order_relaxed);
  }
  return {int(packed & 0xFFFF), int(packed >> 32), int(packed >> 16 & 0xFFFF)};
}

class DeviceGuard {
 public:
  DeviceGuard(const char* op, int device) : wanted_(device) {
    check(op, cudaGetDevice(&before_));
    if (before_ != wanted_) check(op, cudaSetDevice(wanted_));
  }
  ~DeviceGuard() {
    if (before_ != wanted_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0, wanted_;
};

// LDMFAST_CUDA_OVERLAP=1: a kernel's blocks may be placed while the kernel before ends, and wait there
// (wait_for_previous_kernel). Off until a GPU has measured it; CUDA graphs know it since driver 12.3.
inline bool overlapping() {
  static const bool on = [] {
    const char* asked = std::getenv("LDMFAST_CUDA_OVERLAP");
    int driver = 0;
    return asked && std::string(asked) == "1" && cudaDriverGetVersion(&driver) == cudaSuccess && driver >= 12030;
  }();
  return on;
}

// cluster: that many consecutive blocks share their shared memory (sm_90 and above)
template <auto KERNEL, typename Params>
void launch(const char* op, const Params& params, Blocks blocks, int threads, size_t shared, const Launch& where,
            int cluster = 1) {
  if (blocks.x > INT32_MAX || blocks.y > kMaxBlocksYZ || blocks.z > kMaxBlocksYZ)
    throw std::runtime_error(std::string(op) + ": more blocks than a grid holds");
  DeviceGuard guard(op, where.device);
  if (shared > 48 << 10) {
    static std::atomic<uint64_t> raised{0};   // one bit a device
    const uint64_t bit = where.device < kDevices ? uint64_t(1) << where.device : 0;
    if (!(raised.load(std::memory_order_relaxed) & bit)) {
      check(op, cudaFuncSetAttribute(KERNEL, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     device_of(op, where).shared_limit));
      raised.fetch_or(bit, std::memory_order_relaxed);
    }
  }
  cudaLaunchAttribute attributes[2];
  unsigned count = 0;
  if (cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = cluster;
    attributes[count].val.clusterDim.y = attributes[count].val.clusterDim.z = 1;
    ++count;
  }
  if (overlapping() && device_of(op, where).major >= 9) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim.x = static_cast<unsigned>(blocks.x);
  config.gridDim.y = static_cast<unsigned>(blocks.y);
  config.gridDim.z = static_cast<unsigned>(blocks.z);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(where.stream);
  config.attrs = attributes;
  config.numAttrs = count;
  check(op, cudaLaunchKernelEx(&config, KERNEL, params));
}
#endif

// calls f with a value of the element type that d names
template <typename F> void with_type(DType d, F&& f) {
  if (d == DType::kFloat32) f(float{});
  else if (d == DType::kFloat16) f(f16{});
  else f(bf16{});
}
}  // namespace ldmfast
