# FLASHMOE_UCX: the network between hosts for ranks on CPUs, if UCX's headers are here (AUTO), in any case (ON), or not
# at all (OFF). The library itself is looked for at run time.

set(FLASHMOE_UCX "AUTO" CACHE STRING "Build the network between hosts: AUTO (if UCX's headers are found), ON or OFF")
set(FLASHMOE_WITH_UCX FALSE)

if(NOT FLASHMOE_UCX STREQUAL "OFF")
  # The PyPI package of the interpreter that this is built for, else the system's.
  if(Python_EXECUTABLE)
    execute_process(
      COMMAND ${Python_EXECUTABLE} -c
        "import importlib.util as u; s = u.find_spec('libucx'); print(s.submodule_search_locations[0] if s else '', end='')"
      OUTPUT_VARIABLE ucx_package ERROR_QUIET)
  endif()
  unset(ucx_include CACHE)  # an isolated build's package moves
  find_path(ucx_include ucp/api/ucp.h HINTS "${ucx_package}/include")
  if(ucx_include)
    set(FLASHMOE_WITH_UCX TRUE)
  elseif(FLASHMOE_UCX STREQUAL "ON")
    message(FATAL_ERROR "FLASHMOE_UCX is ON, and ucp/api/ucp.h was not found: pip install libucx-cu12, or your system's libucx-dev")
  else()
    message(STATUS "flashmoe is built for ranks of one host: ucp/api/ucp.h was not found; pip install libucx-cu12, "
                   "or your system's libucx-dev, has it")
  endif()
endif()

# Where the headers lie beside the library, tests take that one.
set(ucx_library "libucp.so.0")
if(EXISTS "${ucx_package}/lib/libucp.so.0")
  set(ucx_library "${ucx_package}/lib/libucp.so.0")
endif()

function(flashmoe_use_ucx target)
  if(FLASHMOE_WITH_UCX)
    target_include_directories(${target} SYSTEM PRIVATE ${ucx_include})
    target_compile_definitions(${target} PRIVATE FLASHMOE_WITH_UCX)
  endif()
endfunction()
