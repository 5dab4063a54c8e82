# FLASHMOE_SANITIZE: which sanitizer every object of this build folder is made with.

if(FLASHMOE_SANITIZE STREQUAL "thread")
  set(sanitizers thread)
elseif(FLASHMOE_SANITIZE STREQUAL "address")
  set(sanitizers address,undefined)
elseif(NOT FLASHMOE_SANITIZE STREQUAL "")
  message(FATAL_ERROR "FLASHMOE_SANITIZE must be 'thread', 'address' or empty, got '${FLASHMOE_SANITIZE}'")
endif()

if(sanitizers)
  # -O1 -g1: a trace that names the line; -fno-sanitize-recover: undefined behaviour fails the test and not only prints.
  set(CMAKE_CXX_FLAGS_RELEASE "-O1 -g1")
  add_compile_options(-fsanitize=${sanitizers} -fno-sanitize-recover=all -fno-omit-frame-pointer)
  add_link_options(-fsanitize=${sanitizers})
endif()
