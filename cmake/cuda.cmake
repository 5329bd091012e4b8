# The CUDA kernels: one object per dtype, so that compilers run side by side. `cuda_emulated` runs them on the host.
set(cuda_dtypes 0 2 3 -1) # DType of csrc/launch.h; -1: all others

add_library(cuda_emulated STATIC csrc/cuda/launch.cpp)
foreach(dtype ${cuda_dtypes})
  add_library(cuda_emulated_${dtype} OBJECT csrc/cuda/emulated.cpp)
  target_compile_definitions(cuda_emulated_${dtype} PRIVATE CUDFAST_DTYPE=${dtype})
  target_compile_options(cuda_emulated_${dtype} PRIVATE -O1) # it is built more often than it runs
  target_sources(cuda_emulated PRIVATE $<TARGET_OBJECTS:cuda_emulated_${dtype}>)
endforeach()
