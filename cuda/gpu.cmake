# Decides what becomes of cuda/ in this build: with_cuda, with_sim. Included before any target is made, because CMake gives targets
# made before enable_language(CUDA) no architectures.
set(with_cuda OFF)
set(with_sim OFF)
if(NOT GPU MATCHES "^(CUDA|AUTO|SIM|OFF)$")
  message(FATAL_ERROR "Expected CUDA, AUTO, SIM or OFF for GPU but received ${GPU}")
endif()
if(GPU STREQUAL "OFF")
  return()
endif()

# check_language looks on PATH and nowhere else.
find_program(COUPLET_NVCC nvcc HINTS $ENV{CUDA_PATH}/bin $ENV{CUDA_HOME}/bin /usr/local/cuda/bin)
find_path(COUPLET_CUDA_HEADERS cuda_fp16.h HINTS $ENV{CUDA_PATH}/include $ENV{CUDA_HOME}/include /usr/local/cuda/include)

if(GPU STREQUAL "CUDA" AND NOT COUPLET_NVCC)
  message(FATAL_ERROR "GPU=CUDA, but there is no nvcc on PATH, in $CUDA_PATH/bin, $CUDA_HOME/bin or /usr/local/cuda/bin")
endif()
if(COUPLET_NVCC AND NOT GPU STREQUAL "SIM")
  set(CMAKE_CUDA_COMPILER ${COUPLET_NVCC})
  # Machine code for each size of shared memory and each generation; PTX of 8.0 and of 12.0 for what lies between and beyond. 90a and
  # 100a are 9.0 and 10.0 alone, where warps may hand registers to each other.
  set(CMAKE_CUDA_ARCHITECTURES 80 86-real 89-real 90a-real 100a-real 120 CACHE STRING "As CMake knows it; 80 is enough for checks")
  enable_language(CUDA)
  # CMake before 3.26 does not know that nvcc has C++20.
  foreach(kind STANDARD EXTENSION)
    if(NOT CMAKE_CUDA20_${kind}_COMPILE_OPTION)
      set(CMAKE_CUDA20_${kind}_COMPILE_OPTION -std=c++20)
    endif()
  endforeach()
  set(with_cuda ON)
endif()

if(GPU STREQUAL "SIM" OR (with_cuda AND COUPLET_TESTS))
  if(COUPLET_CUDA_HEADERS)
    set(with_sim ON)
  else()
    message(STATUS "NOT BUILT: the simulator of the CUDA backend, which needs CUDA's headers (there is no cuda_fp16.h)")
  endif()
endif()
