// The kernels for a C++ compiler, for tests, also with CPU tensors.
#include "rows.h"
