# FLASHMOE_CUDA: the CUDA half of the Python module, if nvcc is here (AUTO), in any case (ON), or not at all (OFF).

if(NOT FLASHMOE_CUDA STREQUAL "OFF")
  include(CheckLanguage)
  check_language(CUDA)
  if(FLASHMOE_CUDA STREQUAL "ON" AND NOT CMAKE_CUDA_COMPILER)
    message(FATAL_ERROR "FLASHMOE_CUDA is ON, and no CUDA compiler was found; CMAKE_CUDA_COMPILER names one")
  endif()
endif()

if(CMAKE_CUDA_COMPILER)
  set(FLASHMOE_CUDA_ARCHITECTURES "80-real;90a-real;100a-real" CACHE STRING "What nvcc compiles for")
  set(CMAKE_CUDA_ARCHITECTURES ${FLASHMOE_CUDA_ARCHITECTURES})
  enable_language(CUDA)
  find_package(CUDAToolkit REQUIRED)
  # NDEBUG: an assert in a kernel serialises its matrix products.
  set(CMAKE_CUDA_FLAGS_RELEASE "-O3 -DNDEBUG")

  function(flashmoe_add_cuda name)
    add_library(${name} OBJECT ${ARGN})
    # Not relocatable: ptxas would drop setmaxnreg.
    set_target_properties(${name} PROPERTIES
      CUDA_STANDARD 20 CUDA_STANDARD_REQUIRED ON CUDA_VISIBILITY_PRESET hidden CUDA_SEPARABLE_COMPILATION OFF)
    target_compile_options(${name} PRIVATE -Xcompiler=-Wall $<$<BOOL:${FLASHMOE_WERROR}>:-Werror=all-warnings>)
    target_sources(_C PRIVATE $<TARGET_OBJECTS:${name}>)
  endfunction()

  flashmoe_add_cuda(flashmoe_cuda csrc/runtime/moe_cuda.cu csrc/runtime/moe_cuda_exact.cu csrc/runtime/moe_cuda_sm80.cu)
  # What is Hopper's alone no other architecture can compile.
  flashmoe_add_cuda(flashmoe_cuda_sm90 csrc/runtime/moe_cuda_sm90.cu)
  set_target_properties(flashmoe_cuda_sm90 PROPERTIES CUDA_ARCHITECTURES 90a-real)
  target_link_libraries(_C PRIVATE CUDA::cudart_static)
  target_compile_definitions(_C PRIVATE FLASHMOE_WITH_CUDA)
endif()
