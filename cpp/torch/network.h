/// @file
/// What ops of a whole network share: checks, one allocation for all that lies between its products, and what arguments
/// point to.
#pragma once

#include <vector>

#include "tensor.h"

namespace sparse24::torch_ops {

/// The tensors beside x; scales are float8's.
struct Network {
  const Tensor &w1, &w2;
  const std::optional<Tensor>&b1, &b2, &w1_scale, &w2_scale, &scale_y, &scale_y_factor;
};

struct NetworkSizes {
  int64_t tokens, in, features, out;
  DType dtype;  ///< of x
  bool fp8;

  DType stored() const { return fp8 ? DType::kFloat8E4M3 : dtype; }
};

/// What the columns and the rows of the first weight are multiples of.
struct RowMultiples {
  int64_t columns, rows;
};

/// Checks a bias of so many elements, if there is one: of `dtype`, or of float32 with `or_float`.
void check_bias(OpName op, const char* argument, const std::optional<Tensor>& bias, const Tensor& x, DType dtype,
                bool or_float, int64_t elements, const char* meaning);
/// Checks all of a network but the threshold. `multiples` says what its op asks of weights of a type.
NetworkSizes check_network(OpName op, const Tensor& x, const Network& net, RowMultiples (*multiples)(DType stored));
/// Whether there is a scale for each of so many rows, and not one for all.
bool is_per_row(const std::optional<Tensor>& scale, int64_t rows);
/// The rows of x, contiguous, with zeros up to as many columns as `pad_columns` gives a weight.
Tensor padded_rows(const Tensor& x, const NetworkSizes& s, int64_t padded);

/// What `compute(result)` makes [tokens, out] of, where no size is zero; without features it is the bias alone.
template <class Compute>
Tensor network_result(const Tensor& x, const Network& net, const NetworkSizes& s, const Compute& compute) {
  Tensor result = new_rows(x, s.out);
  if (s.tokens > 0 && s.out > 0 && s.features > 0) {
    compute(result);
  } else if (s.features == 0) {
    torch::stable::zero_(result);
    if (net.b2) torch::stable::copy_(result, *net.b2);
  }
  return result;
}

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
