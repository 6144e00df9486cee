/// @file
/// What ops of a whole network share: one allocation for all that lies between its products, and what arguments point
/// to.
#pragma once

#include <vector>

#include "tensor.h"

namespace sparse24::torch_ops {

/// One allocation for all that lies between the products.
class Between {
 public:
  int64_t add(int64_t bytes) {
    const int64_t at = bytes_;
    bytes_ += round_up(bytes, 256);
    return at;
  }
  void allocate(const Tensor& like) {
    memory_ = new_empty(like, {bytes_}, ScalarType::Byte);
    start_ = static_cast<char*>(memory_->mutable_data_ptr());
  }
  template <class T = void>
  T* at(int64_t offset) const {
    return reinterpret_cast<T*>(start_ + offset);
  }

 private:
  int64_t bytes_ = 0;
  std::optional<Tensor> memory_;
  char* start_ = nullptr;
};

/// Keeps what an argument points to, contiguous.
class Kept {
 public:
  const void* data(const std::optional<Tensor>& t) {
    if (!t) return nullptr;
    tensors_.push_back(contiguous_aligned(*t));
    return tensors_.back().const_data_ptr();
  }
  const float* scale(const std::optional<Tensor>& t) { return static_cast<const float*>(data(t)); }

 private:
  std::vector<Tensor> tensors_;
};

}  // namespace sparse24::torch_ops
