/* What torch asks of CUDA's driver before it computes: whether a context is there. */

int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { return *flags = 0, *active = 1, 0; }
int cuCtxGetCurrent(void **context) { return *context = 0, 0; }
int cuGetErrorString(int error, const char **text) { return *text = "the pretended driver does not do this", 0; }
