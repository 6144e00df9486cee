# Torch without find_package(Torch), which would enable CUDA, change its flags and tie the build to the torch in sight.
# The stable ABI needs headers and two libraries; asking the interpreter for the folder does not import torch.
sparse24_package_dir(torch torch_dir)
if(NOT torch_dir)
  message(FATAL_ERROR "sparse24: ${Python_EXECUTABLE} has no package torch. Install torch>=${SPARSE24_TORCH_FLOOR} "
                      "(a CPU-only one is enough), or build without --no-build-isolation.")
endif()
if(NOT EXISTS "${torch_dir}/include/torch/csrc/stable/library.h")
  message(FATAL_ERROR "sparse24: expected torch>=${SPARSE24_TORCH_FLOOR} with stable-ABI headers, got ${torch_dir}")
endif()

add_library(sparse24_torch_libraries INTERFACE)
target_include_directories(sparse24_torch_libraries SYSTEM INTERFACE "${torch_dir}/include")
target_compile_definitions(sparse24_torch_libraries INTERFACE TORCH_TARGET_VERSION=${SPARSE24_TORCH_TARGET})
# The linker must keep torch among the needed libraries: nothing else makes its symbols visible to a dlopen'ed module.
target_link_options(sparse24_torch_libraries INTERFACE LINKER:--no-as-needed)
target_link_libraries(sparse24_torch_libraries INTERFACE "${torch_dir}/lib/libtorch.so"
                                                          "${torch_dir}/lib/libtorch_cpu.so")
