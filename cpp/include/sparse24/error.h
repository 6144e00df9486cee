/// @file
/// One exception type and one form of sentence: `op: expected <argument> <rule>, got <value>`.
#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

namespace sparse24 {

/// Every failure of the library is one of these; in Python it becomes a RuntimeError.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// Memory that was asked for and could not be had.
class OutOfMemory : public Error {
 public:
  explicit OutOfMemory(uint64_t bytes)
      : Error("sparse24: out of memory: " + std::to_string(bytes) + " bytes asked for"), bytes_(bytes) {}
  uint64_t bytes() const { return bytes_; }

 private:
  uint64_t bytes_;
};

/// Throws an `Error` with all parts printed one after the other.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw Error(text.str());
}

/// Calls `fail(parts...)` unless `ok`.
template <class... Parts>
void check(bool ok, const Parts&... parts) {
  if (!ok) fail(parts...);
}

}  // namespace sparse24
