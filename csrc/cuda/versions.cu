// What the CUDA module was built with, and what the driver can run.
#include "launch.cuh"

#ifndef LDMFAST_CUDA_HOST
namespace ldmfast {

// 1000 * major + 10 * minor, as CUDA counts them; the driver's is 0 where there is none
void cuda_versions(int& runtime, int& driver) {
  runtime = CUDART_VERSION;
  if (cudaDriverGetVersion(&driver) != cudaSuccess) driver = 0;
}
}  // namespace ldmfast
#endif
