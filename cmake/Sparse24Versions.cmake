# From pyproject.toml: SPARSE24_VERSION, SPARSE24_TORCH_FLOOR ("2.10") and SPARSE24_TORCH_TARGET, its stable-ABI code.
set(pyproject "${CMAKE_CURRENT_LIST_DIR}/../pyproject.toml")
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${pyproject}")
file(READ "${pyproject}" pyproject_text)

if(NOT pyproject_text MATCHES "\nversion = \"([0-9.]+)\"")
  message(FATAL_ERROR "sparse24: expected pyproject.toml to have a line 'version = \"x.y.z\"'")
endif()
set(SPARSE24_VERSION "${CMAKE_MATCH_1}")

# The oldest torch that loads the op library: the build requirement and the run-time one must agree.
string(REGEX MATCHALL "\"torch>=[0-9.]+\"" floors "${pyproject_text}")
list(REMOVE_DUPLICATES floors)
if(NOT floors MATCHES "^\"torch>=(([0-9]+)\\.([0-9]+))\"$")
  message(FATAL_ERROR "sparse24: expected pyproject.toml to name one floor \"torch>=x.y\", got: ${floors}")
endif()
set(SPARSE24_TORCH_FLOOR "${CMAKE_MATCH_1}")
math(EXPR SPARSE24_TORCH_TARGET "(${CMAKE_MATCH_2} << 56) | (${CMAKE_MATCH_3} << 48)" OUTPUT_FORMAT HEXADECIMAL)
