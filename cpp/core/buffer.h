/// @file
/// Memory of the CPU functions. An allocation that fails throws an error that states its size.
#pragma once

#include <cstdint>
#include <exception>
#include <vector>

#include "sparse24/error.h"

namespace sparse24 {

/// Returns `count` elements of `value`, or throws `OutOfMemory`.
template <class T>
std::vector<T> make_buffer(int64_t count, T value = T{}) {
  try {
    return std::vector<T>(static_cast<size_t>(count), value);
  } catch (const std::exception&) {  // bad_alloc, or length_error beyond any memory
    throw OutOfMemory(static_cast<uint64_t>(count) * sizeof(T));
  }
}

}  // namespace sparse24
