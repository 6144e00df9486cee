/// @file
/// What a call was kept for, compared with what is there now.
#pragma once

#include <pybind11/pybind11.h>

namespace sparse24::python {

void bind_unchanged(pybind11::module_& module);

}  // namespace sparse24::python
