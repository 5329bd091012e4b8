# The CUDA kernels: one object per dtype, so that compilers run side by side. `cuda_emulated` runs them on the host.
set(cuda_dtypes 0 2 3 -1) # DType of csrc/launch.h; -1: all others

find_package(Threads REQUIRED)
add_library(cuda_emulated STATIC EXCLUDE_FROM_ALL csrc/cuda/launch.cpp)
target_link_libraries(cuda_emulated PUBLIC Threads::Threads)
foreach(dtype ${cuda_dtypes})
  add_library(cuda_emulated_${dtype} OBJECT EXCLUDE_FROM_ALL csrc/cuda/emulated.cpp)
  target_compile_definitions(cuda_emulated_${dtype} PRIVATE CUDFAST_DTYPE=${dtype})
  target_compile_options(cuda_emulated_${dtype} PRIVATE -O1) # it is built more often than it runs
  target_sources(cuda_emulated PRIVATE $<TARGET_OBJECTS:cuda_emulated_${dtype}>)
endforeach()

# nvcc: CUDFAST_CUDA=0 leaves it out, 1 makes its absence an error; CUDFAST_CUDA_ARCHS replaces the list.
foreach(name CUDFAST_CUDA CUDFAST_CUDA_ARCHS)
  if(NOT DEFINED ${name})
    set(${name} "$ENV{${name}}")
  endif()
endforeach()
set(CUDFAST_HAS_CUDA FALSE)
if(NOT CUDFAST_CUDA STREQUAL "0" AND NOT CUDFAST_TESTS) # the tests run the emulation
  include(CheckLanguage)
  set(CMAKE_CUDA_ARCHITECTURES OFF)
  set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
  if(NOT CMAKE_CUDA_COMPILER)
    unset(CMAKE_CUDA_COMPILER CACHE) # there may be one by now
  endif()
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    enable_language(CUDA)
  endif()
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.0) # __grid_constant__, C++17, clusters
    set(CUDFAST_HAS_CUDA TRUE)
  elseif(CUDFAST_CUDA STREQUAL "1")
    message(FATAL_ERROR "CUDFAST_CUDA=1, and no nvcc of CUDA 12.0 or newer was found that works: put it on the PATH, or "
                        "set CUDACXX")
  endif()
endif()

if(CUDFAST_HAS_CUDA)
  if(CUDFAST_CUDA_ARCHS STREQUAL "")
    set(CUDFAST_CUDA_ARCHS "75 80 86 89 90")
    if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.8)
      string(APPEND CUDFAST_CUDA_ARCHS " 100 120")
    endif()
  endif()
  separate_arguments(CUDFAST_CUDA_ARCHS)
  list(REMOVE_DUPLICATES CUDFAST_CUDA_ARCHS)
  list(SORT CUDFAST_CUDA_ARCHS COMPARE NATURAL)

  # What the kernels use comes in three steps: 75, 80 (copies), 90 (clusters). The first half of nvcc runs once for each of
  # them, not once for each architecture, and the highest goes along as PTX for what comes.
  set(cuda_flags)
  foreach(arch ${CUDFAST_CUDA_ARCHS})
    if(arch LESS 80)
      set(virtual 75)
    elseif(arch LESS 90)
      set(virtual 80)
    else()
      set(virtual 90)
    endif()
    list(APPEND cuda_flags "SHELL:-gencode arch=compute_${virtual},code=sm_${arch}")
  endforeach()
  list(APPEND cuda_flags "SHELL:-gencode arch=compute_${virtual},code=compute_${virtual}")

  find_package(CUDAToolkit REQUIRED)
  add_library(cuda_device STATIC)
  set_target_properties(cuda_device PROPERTIES CUDA_STANDARD 17 LINKER_LANGUAGE CXX)
  foreach(dtype ${cuda_dtypes})
    add_library(cuda_device_${dtype} OBJECT csrc/cuda/device.cu)
    set_target_properties(cuda_device_${dtype} PROPERTIES CUDA_STANDARD 17)
    target_compile_definitions(cuda_device_${dtype} PRIVATE CUDFAST_DTYPE=${dtype})
    target_compile_options(cuda_device_${dtype} PRIVATE --expt-relaxed-constexpr -Werror all-warnings ${cuda_flags})
    target_sources(cuda_device PRIVATE $<TARGET_OBJECTS:cuda_device_${dtype}>)
  endforeach()
endif()
