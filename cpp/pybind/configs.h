/// @file
/// The choice of GEMM configurations for Python.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "sparse24/types.h"

namespace sparse24::python {

DType parse_dtype(const std::string& name);
void bind_configs(pybind11::module_& module);

}  // namespace sparse24::python
