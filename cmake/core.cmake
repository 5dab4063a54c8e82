# The torch-free, Python-free core: runtime, host platform and CPU engine.

file(GLOB core_sources CONFIGURE_DEPENDS csrc/runtime/*.cpp csrc/platform/*.cpp csrc/engine/*.cpp)
list(FILTER core_sources EXCLUDE REGEX "/(cpu_kernels|cpu_backward_kernels|nvshmem_adaptor)\\.cpp$")
if(NOT FLASHMOE_WITH_UCX)
  list(FILTER core_sources EXCLUDE REGEX "/ucx_[a-z_]*\\.cpp$")
endif()
add_library(flashmoe_core OBJECT ${core_sources})
flashmoe_use_ucx(flashmoe_core)

# These are compiled once per instruction set, as cpu_kernels.cpp's first lines say.
function(flashmoe_add_kernels isa lanes)
  add_library(flashmoe_kernels_${isa} OBJECT csrc/engine/cpu_kernels.cpp csrc/engine/cpu_backward_kernels.cpp)
  target_compile_definitions(flashmoe_kernels_${isa} PRIVATE FLASHMOE_ISA=${isa} FLASHMOE_LANES=${lanes})
  # GCC 12 warns about the undefined operands in its own intrinsics' headers.
  target_compile_options(flashmoe_kernels_${isa} PRIVATE
    -ffp-contract=fast -Wno-psabi $<$<CXX_COMPILER_ID:GNU>:-Wno-maybe-uninitialized> ${ARGN})
endfunction()

set(avx2 -mavx2 -mfma -mf16c)
set(avx512 ${avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512)
flashmoe_add_kernels(baseline 4)
set(kernels $<TARGET_OBJECTS:flashmoe_kernels_baseline>)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  flashmoe_add_kernels(avx2 8 ${avx2})
  flashmoe_add_kernels(avx512 16 ${avx512})
  list(APPEND kernels $<TARGET_OBJECTS:flashmoe_kernels_avx2> $<TARGET_OBJECTS:flashmoe_kernels_avx512>)
endif()

function(flashmoe_link_core target)
  target_sources(${target} PRIVATE $<TARGET_OBJECTS:flashmoe_core>)
  # The kernels come last and in this order. Where two objects hold the same inline function the linker keeps the
  # first, and code for a newer instruction set must never stand in for code that every machine runs.
  target_link_libraries(${target} PRIVATE ${kernels} Threads::Threads ${CMAKE_DL_LIBS})
  flashmoe_use_ucx(${target})
  target_compile_definitions(${target} PRIVATE FLASHMOE_VERSION="${FLASHMOE_VERSION}")
endfunction()
