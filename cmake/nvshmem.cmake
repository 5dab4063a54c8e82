# NVSHMEM's headers, 3.4 or later, for the host code that initialises it: NVSHMEM_HOME's, or those of the package beside
# the Python that builds. With them the CUDA half reaches other GPUs. The library is looked for when it is needed, and
# never linked; what is built with one version's headers runs with that library and with later ones.

if(NOT NVSHMEM_HOME)
  set(NVSHMEM_HOME "$ENV{NVSHMEM_HOME}")
endif()
execute_process(
  COMMAND ${Python_EXECUTABLE} -c "import sysconfig; print(sysconfig.get_path('purelib'))"
  OUTPUT_VARIABLE site_packages OUTPUT_STRIP_TRAILING_WHITESPACE)
unset(nvshmem_host_include)
find_path(nvshmem_host_include nvshmem_host.h NO_DEFAULT_PATH NO_CACHE
  PATHS ${NVSHMEM_HOME}/include ${site_packages}/nvidia/nvshmem/include)

set(nvshmem_host_version 0)
if(EXISTS "${nvshmem_host_include}/non_abi/nvshmem_version.h")
  file(STRINGS "${nvshmem_host_include}/non_abi/nvshmem_version.h" lines
    REGEX "define NVSHMEM_VENDOR_(MAJOR|MINOR|PATCH)_VERSION")
  string(REGEX REPLACE "[^0-9;]" "" lines "${lines}")
  string(REPLACE ";" "." nvshmem_host_version "${lines}")
endif()

if(nvshmem_host_version VERSION_LESS 3.4)
  message(STATUS "flashmoe is built for single GPUs: no headers of NVSHMEM 3.4 or later were found")
else()
  add_library(flashmoe_nvshmem OBJECT csrc/runtime/nvshmem_adaptor.cpp)
  # System folders, since their warnings are not ours; CUDA's C++ library lies beside or below its headers.
  target_include_directories(flashmoe_nvshmem SYSTEM PRIVATE ${nvshmem_host_include} ${CUDAToolkit_INCLUDE_DIRS})
  foreach(folder ${CUDAToolkit_INCLUDE_DIRS})
    target_include_directories(flashmoe_nvshmem SYSTEM PRIVATE ${folder}/cccl)
  endforeach()
  target_sources(_C PRIVATE $<TARGET_OBJECTS:flashmoe_nvshmem>)
  target_compile_definitions(_C PRIVATE FLASHMOE_WITH_NVSHMEM)
  # Of the kernels that call it, which may have been built with other headers.
  if(TARGET flashmoe_cuda_nvshmem)
    string(REPLACE "." "," device_version "${nvshmem_version}")
    target_compile_definitions(_C PRIVATE "FLASHMOE_NVSHMEM_DEVICE=${device_version}")
  endif()
endif()
