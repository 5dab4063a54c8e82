# tests/cpp/test_*.cpp and bench/cpp/*_bench.cpp: one program each, linked against the core.

if(TARGET flashmoe_kernels_avx2)
  # AVX-512's sixteen lanes on AVX2, so that their logic is tested on machines without AVX-512 too.
  flashmoe_add_kernels(wide16 16 ${avx2})
  set_target_properties(flashmoe_kernels_wide16 PROPERTIES EXCLUDE_FROM_ALL ON)
endif()

file(GLOB test_sources CONFIGURE_DEPENDS tests/cpp/test_*.cpp)
if(FLASHMOE_SANITIZE STREQUAL "thread")
  # The engine's tests are one thread that computes for minutes: nothing for ThreadSanitizer to see.
  list(FILTER test_sources EXCLUDE REGEX "/test_cpu_[a-z_]*\\.cpp$")
  # So are the GPU's kernels on fibers, and ThreadSanitizer does not follow a change of stacks.
  list(FILTER test_sources EXCLUDE REGEX "/test_simt_[a-z_]*\\.cpp$")
elseif(FLASHMOE_SANITIZE STREQUAL "address")
  # What broken kernels do to memory is no matter, and there are many of them: minutes to compile.
  list(FILTER test_sources EXCLUDE REGEX "/test_simt_[a-z_]*_faults\\.cpp$")
  # The timeline's run the kernels of the other programs again, and check themselves that no note lies outside its list;
  # the engines alone are parts of those kernels, and test_simt_ways is built without optimisation.
  list(FILTER test_sources EXCLUDE REGEX "/test_simt_(trace|engine_alone|ways)\\.cpp$")
endif()
if(NOT FLASHMOE_WITH_UCX)
  list(FILTER test_sources EXCLUDE REGEX "/test_ucx_[a-z_]*\\.cpp$")
endif()
foreach(source ${test_sources})
  get_filename_component(name ${source} NAME_WE)
  add_executable(${name} ${source})
  target_include_directories(${name} PRIVATE tests/cpp tests/cuda)
  if(name MATCHES "^test_ucx_")
    target_compile_definitions(${name} PRIVATE FLASHMOE_UCX_LIBRARY="${ucx_library}")
  endif()
  if(name MATCHES "^test_simt_(.*ampere|engine_alone|hopper|trace|.*faults)$")
    # Many kernels, each run for moments: -O3 would compile them for longer than it spares.
    target_compile_options(${name} PRIVATE -O1)
  endif()
  if(name STREQUAL "test_simt_ways")
    # One place of the source is then one place of the program, and each frame tells who called.
    target_compile_options(${name} PRIVATE -O0 -fno-omit-frame-pointer)
    target_compile_definitions(${name} PRIVATE FLASHMOE_SIMT_WAYS)
  endif()
  flashmoe_link_core(${name})
  if(name MATCHES "^test_cpu_" AND TARGET flashmoe_kernels_wide16)
    target_link_libraries(${name} PRIVATE $<TARGET_OBJECTS:flashmoe_kernels_wide16>)
  endif()
  add_test(NAME ${name} COMMAND ${CMAKE_SOURCE_DIR}/tools/run_cpp_test.sh $<TARGET_FILE:${name}>)
  # An impossible allocation fails as it does without a sanitizer, since its error is under test.
  set_tests_properties(${name} PROPERTIES TIMEOUT 600 ENVIRONMENT
    "TSAN_OPTIONS=allocator_may_return_null=1;ASAN_OPTIONS=allocator_may_return_null=1")
  # The long ones first, so that at the end no core has nothing to do.
  if(name MATCHES "^test_(cpu_engine|simt_(ampere|backward|exact|hopper|kernel|trace|unmapped))")
    set_tests_properties(${name} PROPERTIES COST 1)
  endif()
  # Ranks and workers are threads that meet: such a test has the machine for itself. The others are one thread.
  if(NOT name MATCHES "^test_(cpu|simt)_")
    set_tests_properties(${name} PROPERTIES RUN_SERIAL ON)
  endif()
endforeach()

add_custom_target(benches)
file(GLOB bench_sources CONFIGURE_DEPENDS bench/cpp/*_bench.cpp)
foreach(source ${bench_sources})
  get_filename_component(name ${source} NAME_WE)
  add_executable(${name} EXCLUDE_FROM_ALL ${source})
  target_include_directories(${name} PRIVATE bench/cpp)
  flashmoe_link_core(${name})
  add_dependencies(benches ${name})
endforeach()
