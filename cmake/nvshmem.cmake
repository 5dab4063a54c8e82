# NVSHMEM's headers, of NVSHMEM_HOME or of the package beside the Python that builds: with them the CUDA half reaches
# other GPUs. Its library is looked for when it is needed, and never linked.
#
# Code built with one version's headers runs with that library and with later ones. So the host code takes what is
# found from 3.4 on; code that calls NVSHMEM on the GPU needs 3.7 (NVSHMEM_DEVICE_FOUND).

set(NVSHMEM_HOME "$ENV{NVSHMEM_HOME}" CACHE PATH "Where NVSHMEM lies; empty: the package nvidia-nvshmem-cu12 or -cu13")
execute_process(
  COMMAND ${Python_EXECUTABLE} -c "import sysconfig; print(sysconfig.get_path('purelib'))"
  OUTPUT_VARIABLE site_packages OUTPUT_STRIP_TRAILING_WHITESPACE)
find_path(NVSHMEM_INCLUDE_DIR nvshmem_host.h
  PATHS ${NVSHMEM_HOME}/include ${site_packages}/nvidia/nvshmem/include NO_DEFAULT_PATH)

set(NVSHMEM_FOUND FALSE)
set(NVSHMEM_DEVICE_FOUND FALSE)
if(NVSHMEM_INCLUDE_DIR)
  file(STRINGS ${NVSHMEM_INCLUDE_DIR}/non_abi/nvshmem_version.h version_lines REGEX "VENDOR_(MAJOR|MINOR|PATCH)_VERSION")
  string(REGEX REPLACE "[^0-9;]" "" version_numbers "${version_lines}")
  string(REPLACE ";" "." NVSHMEM_VERSION "${version_numbers}")
  if(NVSHMEM_VERSION VERSION_GREATER_EQUAL 3.4 AND NVSHMEM_VERSION VERSION_LESS 4)
    set(NVSHMEM_FOUND TRUE)
  endif()
  if(NVSHMEM_FOUND AND NVSHMEM_VERSION VERSION_GREATER_EQUAL 3.7)
    set(NVSHMEM_DEVICE_FOUND TRUE)
  endif()
endif()

if(NVSHMEM_FOUND)
  add_library(flashmoe_nvshmem OBJECT csrc/runtime/nvshmem_adaptor.cpp)
  # System folders, since their warnings are not ours; CUDA's C++ library lies beside or below its headers.
  target_include_directories(flashmoe_nvshmem SYSTEM PRIVATE ${NVSHMEM_INCLUDE_DIR} ${CUDAToolkit_INCLUDE_DIRS})
  foreach(folder ${CUDAToolkit_INCLUDE_DIRS})
    target_include_directories(flashmoe_nvshmem SYSTEM PRIVATE ${folder}/cccl)
  endforeach()
  target_sources(_C PRIVATE $<TARGET_OBJECTS:flashmoe_nvshmem>)
  target_compile_definitions(_C PRIVATE FLASHMOE_WITH_NVSHMEM)
else()
  message(STATUS "flashmoe is built for single GPUs: no headers of NVSHMEM 3.4 or later were found")
endif()
