// The kernels for a C++ compiler: tests run them, also on CPU tensors.
#include "rows.h"
