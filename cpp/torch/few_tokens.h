/// @file
/// What the ops for few tokens check alike: weights of the activation's type or of float8, their scales and biases.
#pragma once

#include "tensor.h"

namespace sparse24::torch_ops {

/// `t`, with so many tokens, is for the CPU, or has no more than a kernel takes.
void check_few_tokens(OpName op, const char* argument, const Tensor& t, int64_t tokens);
/// A matrix of `dtype`, which is that of `like`, or of float8.
void check_few_weight(OpName op, const char* argument, const Tensor& w, const char* of, const Tensor& like,
                      DType dtype);
DType dtype_of_few_weight(const Tensor& w, DType dtype);
/// A scale is for float8 weights alone.
void check_few_scale(OpName op, const char* argument, const std::optional<Tensor>& scale, const Tensor& w,
                     const char* of, const Tensor& like, int64_t elements, const char* meaning);
/// Of `dtype` or float32.
void check_few_bias(OpName op, const char* argument, const std::optional<Tensor>& bias, const char* of,
                    const Tensor& like, DType dtype, int64_t elements, const char* meaning);

}  // namespace sparse24::torch_ops
