/*
 * A libcuda.so.1 for build hosts without an NVIDIA driver.
 *
 * TVM's CUDA runtime library links against the driver, so without one it does not load, and without that library a
 * CUDA build keeps source text instead of a cubin. Nothing here does anything: each entry point reports that there is no
 * device. The functions take no parameters on purpose: none of them looks at its arguments.
 */
#define CUDA_ERROR_NO_DEVICE 100
#define NO_DEVICE(name) \
    int name(void) { return CUDA_ERROR_NO_DEVICE; }

NO_DEVICE(cuInit)
NO_DEVICE(cuDriverGetVersion)
NO_DEVICE(cuGetProcAddress)
NO_DEVICE(cuGetProcAddress_v2)
NO_DEVICE(cuDeviceGetName)
NO_DEVICE(cuFuncSetAttribute)
NO_DEVICE(cuGetErrorName)
NO_DEVICE(cuGetErrorString)
NO_DEVICE(cuLaunchKernelEx)
NO_DEVICE(cuModuleGetFunction)
NO_DEVICE(cuModuleLoadData)
NO_DEVICE(cuModuleUnload)
NO_DEVICE(cuTensorMapEncodeTiled)
