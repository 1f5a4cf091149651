/* Stands in for NVIDIA's driver library where the device is only asked what it is and for memory: one device of 132 SMs
 * and 139 GiB. Like a client of MPS it keeps CUDA_MPS_PINNED_DEVICE_MEM_LIMIT (in MiB, for device 0), unless
 * STANDIN_IGNORES_MEMORY_LIMIT is set. */
#include <stdio.h>
#include <stdlib.h>

enum { SUCCESS = 0, OUT_OF_MEMORY = 2 };

int cuInit(unsigned flags) { return SUCCESS; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return SUCCESS; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = context; return SUCCESS; }
int cuDevicePrimaryCtxRelease_v2(int device) { return SUCCESS; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = attribute == 16 ? 132 : attribute; return SUCCESS; }
int cuDeviceGetName(char *name, int length, int device) { snprintf(name, length, "stand-in"); return SUCCESS; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = (size_t)139 << 30; return SUCCESS; }
int cuMemFree_v2(void *address) { return SUCCESS; }
int cuGetErrorName(int status, const char **name) { *name = "CUDA_ERROR_STANDIN"; return SUCCESS; }

static void *current;
int cuCtxSetCurrent(void *context) { current = context; return SUCCESS; }

int cuMemAlloc_v2(void **address, size_t bytes) {
    if (!current) return 201; /* CUDA_ERROR_INVALID_CONTEXT: a retained context is not a current one */
  const char *setting = getenv("CUDA_MPS_PINNED_DEVICE_MEM_LIMIT");
  size_t limit = (size_t)139 << 30, mebibytes;
  if (setting && !getenv("STANDIN_IGNORES_MEMORY_LIMIT") && sscanf(setting, "0=%zuM", &mebibytes) == 1)
    limit = mebibytes << 20;
  if (bytes > limit) return OUT_OF_MEMORY;
  *address = address;
  return SUCCESS;
}
