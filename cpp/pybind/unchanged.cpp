/// @file
/// sparse24._C.unchanged: a module and its children have what they had. A step of decoding asks in each layer, about
/// forty times; by statements of Python that takes the host as long as an op.
#include "pybind/unchanged.h"

namespace sparse24::python {
namespace {

/// What is in a flat tuple, `kStep` objects at a time, is as `holds` says.
template <int kStep, class Holds>
bool all_of(PyObject* tuple, const Holds& holds) {
  const Py_ssize_t size = PyTuple_GET_SIZE(tuple);
  PyObject* const* items = &PyTuple_GET_ITEM(tuple, 0);
  for (Py_ssize_t i = 0; i + kStep <= size; i += kStep) {
    if (!holds(items + i)) return false;
  }
  return true;
}

/// The value of a key that is a string, nullptr where there is none.
PyObject* value_of(PyObject* dict, PyObject* key) { return PyDict_GetItemWithError(dict, key); }

bool is_same(PyObject* const* of) { return value_of(of[0], of[1]) == of[2]; }
bool is_absent(PyObject* const* of) { return value_of(of[0], of[1]) == nullptr; }
/// An address in place of an object, which is not kept alive.
bool is_at(PyObject* const* of) { return value_of(of[0], of[1]) == PyLong_AsVoidPtr(of[2]); }
bool is_empty(PyObject* const* of) {
  PyObject* found = value_of(of[0], of[1]);
  return found != nullptr && PyDict_Check(found) && PyDict_Size(found) == 0;
}
bool is_as_long(PyObject* const* of) { return PyDict_Size(of[0]) == PyLong_AsSsize_t(of[1]); }

/// Python gives a class another version whenever an attribute of it, or of a class that it is made from, is set; 0: it
/// has none, and nothing is known.
unsigned long version_of(PyObject* type) { return reinterpret_cast<PyTypeObject*>(type)->tp_version_tag; }
bool is_of_class(PyObject* const* of) {
  return reinterpret_cast<PyObject*>(Py_TYPE(of[0])) == of[1] && version_of(of[1]) == PyLong_AsUnsignedLong(of[2]);
}

PyObject* unchanged(PyObject*, PyObject* facts) {
  constexpr Py_ssize_t kParts = 6;
  bool fits = PyTuple_Check(facts) && PyTuple_GET_SIZE(facts) == kParts;
  for (Py_ssize_t i = 0; fits && i < kParts; ++i) fits = PyTuple_Check(PyTuple_GET_ITEM(facts, i));
  if (!fits) {
    PyErr_SetString(PyExc_TypeError, "sparse24._C.unchanged: expected a tuple of six tuples");
    return nullptr;
  }
  const auto part = [&](Py_ssize_t i) { return PyTuple_GET_ITEM(facts, i); };
  const bool holds = all_of<3>(part(0), is_same) && all_of<2>(part(1), is_absent) && all_of<3>(part(2), is_at) &&
                     all_of<2>(part(3), is_empty) && all_of<2>(part(4), is_as_long) && all_of<3>(part(5), is_of_class);
  if (PyErr_Occurred()) return nullptr;
  return PyBool_FromLong(holds);
}

PyObject* class_version(PyObject*, PyObject* type) {
  if (!PyType_Check(type)) {
    PyErr_SetString(PyExc_TypeError, "sparse24._C.class_version: expected a class");
    return nullptr;
  }
  return PyLong_FromUnsignedLong(version_of(type));
}

// Not through pybind11, whose dispatch of a call takes longer than the call.
PyMethodDef methods[] = {
    {"unchanged", unchanged, METH_O,
     "Whether all of six tuples hold: (dict, key, value)... that are the same; (dict, key)... that are absent; (dict, "
     "key, address)...; (dict, key)... that are empty dicts; (dict, size)...; (object, class, version)..."},
    {"class_version", class_version, METH_O, "A number that changes with the attributes of a class; 0: it has none."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

void bind_unchanged(pybind11::module_& module) {
  if (PyModule_AddFunctions(module.ptr(), methods) != 0) throw pybind11::error_already_set();
}

}  // namespace sparse24::python
