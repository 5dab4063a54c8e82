# FLASHMOE_NVSHMEM_DEVICE_INCLUDE: NVSHMEM's headers, 3.7 or later, for the kernels that reach peers whose memory is not
# mapped. Their device functions are compiled into the kernels; of the library nothing is linked.

set(FLASHMOE_NVSHMEM_DEVICE_INCLUDE "$ENV{FLASHMOE_NVSHMEM_DEVICE_INCLUDE}" CACHE PATH "Folder of NVSHMEM's headers, 3.7 or later; empty: looked for")
set(nvshmem_include ${FLASHMOE_NVSHMEM_DEVICE_INCLUDE})
if(NOT nvshmem_include)
  # NVSHMEM_HOME, the package beside the compiler's, and that beside the Python that builds.
  execute_process(COMMAND ${Python_EXECUTABLE} -c "import sysconfig; print(sysconfig.get_path('purelib'))"
                  OUTPUT_VARIABLE site_packages OUTPUT_STRIP_TRAILING_WHITESPACE)
  find_path(nvshmem_include nvshmem.h NO_DEFAULT_PATH NO_CACHE
    PATHS $ENV{NVSHMEM_HOME}/include ${CUDAToolkit_BIN_DIR}/../../nvshmem/include ${site_packages}/nvidia/nvshmem/include)
endif()

set(nvshmem_version 0)
if(EXISTS "${nvshmem_include}/non_abi/nvshmem_version.h")
  file(STRINGS ${nvshmem_include}/non_abi/nvshmem_version.h lines REGEX "define NVSHMEM_VENDOR_(MAJOR|MINOR|PATCH)_VERSION")
  string(REGEX REPLACE "[^0-9;]" "" lines "${lines}")
  string(REPLACE ";" "." nvshmem_version "${lines}")
endif()

if(nvshmem_version VERSION_GREATER_EQUAL 3.7)
  flashmoe_add_cuda(flashmoe_cuda_nvshmem "${CMAKE_CUDA_ARCHITECTURES}"
    csrc/runtime/moe_cuda_sm80_backward_nvshmem.cu csrc/runtime/moe_cuda_exact_backward_nvshmem.cu
    csrc/runtime/moe_cuda_sm80_nvshmem.cu
    csrc/runtime/moe_cuda_exact_nvshmem.cu)
  # What is Hopper's alone no other architecture can compile.
  flashmoe_add_cuda(flashmoe_cuda_nvshmem_sm90 90a-real csrc/runtime/moe_cuda_sm90_nvshmem.cu)
  foreach(target flashmoe_cuda_nvshmem flashmoe_cuda_nvshmem_sm90)
    # A system folder, since the headers' warnings are not ours.
    target_include_directories(${target} SYSTEM PRIVATE ${nvshmem_include})
    target_compile_definitions(${target} PRIVATE NVSHMEM_ENABLE_ALL_DEVICE_INLINING)
  endforeach()
  message(STATUS "kernels for peers that are not mapped: by NVSHMEM ${nvshmem_version}, ${nvshmem_include}")
else()
  message(STATUS "no kernels for peers that are not mapped: they need the headers of NVSHMEM 3.7 or later "
                 "(FLASHMOE_NVSHMEM_DEVICE_INCLUDE), found: ${nvshmem_version}")
endif()
