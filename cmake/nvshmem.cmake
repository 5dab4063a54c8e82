# NVSHMEM's headers: with them the CUDA half reaches other GPUs. Its library is looked for when it is needed, and never
# linked. What is built with one version's headers runs with that library and with later ones.
#
# FLASHMOE_NVSHMEM_INCLUDE is for host code, 3.4 or later: NVSHMEM_HOME's, or those of the package beside the Python that
# builds. FLASHMOE_NVSHMEM_DEVICE_INCLUDE is for GPU code that calls NVSHMEM, 3.7 or later: the same, if they will do.

if(NOT NVSHMEM_HOME)
  set(NVSHMEM_HOME "$ENV{NVSHMEM_HOME}")
endif()
execute_process(
  COMMAND ${Python_EXECUTABLE} -c "import sysconfig; print(sysconfig.get_path('purelib'))"
  OUTPUT_VARIABLE site_packages OUTPUT_STRIP_TRAILING_WHITESPACE)
unset(FLASHMOE_NVSHMEM_INCLUDE CACHE)  # the package comes and goes, and an isolated build's moves
find_path(FLASHMOE_NVSHMEM_INCLUDE nvshmem_host.h
  PATHS ${NVSHMEM_HOME}/include ${site_packages}/nvidia/nvshmem/include NO_DEFAULT_PATH)

function(flashmoe_nvshmem_version folder out)
  set(${out} 0 PARENT_SCOPE)
  if(EXISTS "${folder}/non_abi/nvshmem_version.h")
    file(STRINGS "${folder}/non_abi/nvshmem_version.h" lines REGEX "define NVSHMEM_VENDOR_(MAJOR|MINOR|PATCH)_VERSION")
    string(REGEX REPLACE "[^0-9;]" "" numbers "${lines}")
    string(REPLACE ";" "." version "${numbers}")
    set(${out} ${version} PARENT_SCOPE)
  endif()
endfunction()

flashmoe_nvshmem_version("${FLASHMOE_NVSHMEM_INCLUDE}" version)
if(NOT FLASHMOE_NVSHMEM_DEVICE_INCLUDE AND version VERSION_GREATER_EQUAL 3.7)
  set(FLASHMOE_NVSHMEM_DEVICE_INCLUDE "${FLASHMOE_NVSHMEM_INCLUDE}")
endif()

if(version VERSION_LESS 3.4)
  message(STATUS "flashmoe is built for single GPUs: no headers of NVSHMEM 3.4 or later were found")
else()
  add_library(flashmoe_nvshmem OBJECT csrc/runtime/nvshmem_adaptor.cpp)
  # System folders, since their warnings are not ours; CUDA's C++ library lies beside or below its headers.
  target_include_directories(flashmoe_nvshmem SYSTEM PRIVATE ${FLASHMOE_NVSHMEM_INCLUDE} ${CUDAToolkit_INCLUDE_DIRS})
  foreach(folder ${CUDAToolkit_INCLUDE_DIRS})
    target_include_directories(flashmoe_nvshmem SYSTEM PRIVATE ${folder}/cccl)
  endforeach()
  target_sources(_C PRIVATE $<TARGET_OBJECTS:flashmoe_nvshmem>)
  target_compile_definitions(_C PRIVATE FLASHMOE_WITH_NVSHMEM)
  if(FLASHMOE_NVSHMEM_DEVICE_INCLUDE)
    flashmoe_nvshmem_version("${FLASHMOE_NVSHMEM_DEVICE_INCLUDE}" device_version)
    string(REPLACE "." "," device_numbers "${device_version}")
    target_compile_definitions(_C PRIVATE "FLASHMOE_NVSHMEM_DEVICE=${device_numbers}")
  endif()
endif()
