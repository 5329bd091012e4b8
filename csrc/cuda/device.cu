// The kernels for nvcc.
#include "rows.h"
