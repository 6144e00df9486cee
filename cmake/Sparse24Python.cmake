# The interpreter, and where its packages are.
if(SPARSE24_PYTHON)
  find_package(Python 3.10 REQUIRED COMPONENTS Interpreter Development.Module)
else()
  find_package(Python 3.10 COMPONENTS Interpreter)  # only to find the CUTLASS headers
endif()

# The folder of an importable package, without importing it: torch takes seconds and may touch the GPU. Empty if none.
function(sparse24_package_dir package result)
  set(script "from importlib.util import find_spec"
             "spec = find_spec('${package}')"
             "print(spec.submodule_search_locations[0] if spec else '')")
  list(JOIN script "\n" script)
  set(directory "")
  if(Python_EXECUTABLE)
    execute_process(COMMAND "${Python_EXECUTABLE}" -c "${script}" OUTPUT_VARIABLE directory
                    OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
  endif()
  set(${result} "${directory}" PARENT_SCOPE)
endfunction()
