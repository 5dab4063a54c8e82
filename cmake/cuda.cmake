# FLASHMOE_CUDA: the CUDA half of the Python module, if a compiler for it is here (AUTO), in any case (ON), or not at
# all (OFF). With AUTO a compiler that will not do is no error: what is built then is the half for CPUs.

function(flashmoe_without_cuda why)
  if(FLASHMOE_CUDA STREQUAL "ON")
    message(FATAL_ERROR "FLASHMOE_CUDA is ON, and ${why}")
  endif()
  message(STATUS "flashmoe is built without its CUDA half: ${why}")
endfunction()

set(with_cuda FALSE)
if(NOT FLASHMOE_CUDA STREQUAL "OFF")
  include(CheckLanguage)
  # In a project of its own, so that a compiler that fails does not fail ours.
  check_language(CUDA)
  if(NOT CMAKE_CUDA_COMPILER)
    flashmoe_without_cuda("no CUDA compiler that works was found; CMAKE_CUDA_COMPILER names one")
  else()
    enable_language(CUDA)
    find_package(CUDAToolkit QUIET)
    if(NOT CMAKE_CUDA_COMPILER_ID STREQUAL "NVIDIA" OR CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.4)
      set(found "${CMAKE_CUDA_COMPILER_ID} ${CMAKE_CUDA_COMPILER_VERSION}")
      flashmoe_without_cuda("${CMAKE_CUDA_COMPILER} is ${found}, NVIDIA 12.4 is the least")
    elseif(NOT "cuda_std_20" IN_LIST CMAKE_CUDA_COMPILE_FEATURES)
      flashmoe_without_cuda("CMake ${CMAKE_VERSION} knows no C++20 of ${CMAKE_CUDA_COMPILER} and its host compiler")
    elseif(NOT TARGET CUDA::cudart_static)
      flashmoe_without_cuda("no cudart_static was found beside ${CMAKE_CUDA_COMPILER}")
    else()
      set(with_cuda TRUE)
    endif()
  endif()
endif()

if(with_cuda)
  # Machine code for Ampere, Hopper and Blackwell, and PTX of 8.0 for every GPU that has none of them for itself.
  set(architectures "80;90a-real")
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.8)
    list(APPEND architectures "100-real")
  endif()
  set(FLASHMOE_CUDA_ARCHITECTURES "${architectures}" CACHE STRING "What nvcc compiles for")
  set(CMAKE_CUDA_ARCHITECTURES ${FLASHMOE_CUDA_ARCHITECTURES})
  # NDEBUG: an assert in a kernel serialises its matrix products.
  set(CMAKE_CUDA_FLAGS_RELEASE "-O3 -DNDEBUG")

  function(flashmoe_add_cuda name architectures)
    add_library(${name} OBJECT ${ARGN})
    # Not relocatable: ptxas would drop setmaxnreg.
    set_target_properties(${name} PROPERTIES CUDA_ARCHITECTURES "${architectures}"
      CUDA_STANDARD 20 CUDA_STANDARD_REQUIRED ON CUDA_VISIBILITY_PRESET hidden CUDA_SEPARABLE_COMPILATION OFF)
    target_compile_options(${name} PRIVATE -Xcompiler=-Wall $<$<BOOL:${FLASHMOE_WERROR}>:-Werror=all-warnings>)
    target_sources(_C PRIVATE $<TARGET_OBJECTS:${name}>)
  endfunction()

  # Ninja starts them in this order: those that compile longest first, so that at the end no core has nothing to do.
  include(cmake/nvshmem_device.cmake)
  flashmoe_add_cuda(flashmoe_cuda_sm90 90a-real csrc/runtime/moe_cuda_sm90.cu)
  set(host_sources csrc/runtime/moe_cuda.cu csrc/runtime/cuda_kernel.cu)
  file(GLOB cuda_sources RELATIVE ${CMAKE_SOURCE_DIR} CONFIGURE_DEPENDS csrc/runtime/*.cu)
  list(FILTER cuda_sources EXCLUDE REGEX "/moe_cuda_[a-z0-9_]*\\.cu$")
  list(REMOVE_ITEM cuda_sources ${host_sources})
  flashmoe_add_cuda(flashmoe_cuda "${CMAKE_CUDA_ARCHITECTURES}"
    csrc/runtime/moe_cuda_sm80_backward.cu csrc/runtime/moe_cuda_sm80.cu csrc/runtime/moe_cuda_exact_backward.cu
    csrc/runtime/moe_cuda_exact.cu ${cuda_sources})
  # These hold no kernels: one architecture is as good as all.
  list(GET CMAKE_CUDA_ARCHITECTURES 0 any)
  flashmoe_add_cuda(flashmoe_cuda_host ${any} ${host_sources})
  if(TARGET flashmoe_cuda_nvshmem)
    target_compile_definitions(flashmoe_cuda_host PRIVATE FLASHMOE_NVSHMEM_KERNELS)
  endif()
  include(cmake/nvshmem.cmake)
  target_link_libraries(_C PRIVATE CUDA::cudart_static)
  list(JOIN FLASHMOE_CUDA_ARCHITECTURES " " architectures)
  target_compile_definitions(_C PRIVATE
    FLASHMOE_WITH_CUDA="${architectures}" FLASHMOE_CUDA_COMPILER="${CMAKE_CUDA_COMPILER_VERSION}")
endif()
