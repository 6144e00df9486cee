/// @file
/// What linear_gradient_fp8 and linear_relu2_gradient_fp8 share: grad @ w.T of float8, checked and prepared.
#pragma once

#include "gradient.h"

namespace sparse24::torch_ops {

/// Checks a float8 matrix beside grad.
inline void check_fp8_beside(OpName op, const char* argument, const Tensor& t, const Tensor& grad) {
  check_device(op, argument, t, "grad", grad);
  check_sizes(op, argument, t, 2);
  expect(t.scalar_type() == ScalarType::Float8_e4m3fn, op, argument, " to be float8_e4m3fn, got ",
         dtype_text(t.scalar_type()));
}

/// Checks the sizes and dtypes of grad and w, whose rows are a multiple of `multiple`. `packed`: w is the values of a
/// packed weight.
template <class Args>
Args check_fp8_product(OpName op, const Tensor& grad, const Tensor& w, int64_t multiple, bool packed = false) {
  // As every fp8 GEMM wants its rows aligned.
  const int64_t of_columns = packed ? feature_alignment(DType::kFloat8E4M3, Dim::kFeatures) : 16;
  Args args{};
  check_sizes(op, "grad", grad, 2);
  expect(grad.scalar_type() == ScalarType::Float8_e4m3fn, op, "grad to be float8_e4m3fn, got ",
         dtype_text(grad.scalar_type()));
  args.tokens = grad.size(0);
  args.in = args.ld_grad = grad.size(1);
  expect(args.in % of_columns == 0, op, "grad to have a multiple of ", of_columns, " columns, got ", args.in);
  check_fp8_beside(op, "w", w, grad);
  expect(w.size(1) == (packed ? args.in / 2 : args.in), op, "w to have ", packed ? args.in / 2 : args.in, " columns (",
         packed ? "half of those" : "columns", " of grad), got ", w.size(1));
  args.features = w.size(0);
  expect(args.features % multiple == 0, op, "w to have a multiple of ", multiple, " rows, got ", args.features);
  return args;
}

inline Tensor check_one_scale(OpName op, const char* argument, const Tensor& scale, const Tensor& grad) {
  check_device(op, argument, scale, "grad", grad);
  check_scale(op, argument, scale, 1, true, "one scale");
  return as_contiguous(scale);
}

/// The scales of grad, w, y and dh.
struct FourScales {
  Tensor grad, w, y, dh;

  FourScales(OpName op, const Tensor& of_grad, const Tensor& of_w, const Tensor& of_y, const Tensor& of_dh,
             const Tensor& beside)
      : grad(check_one_scale(op, "scale_grad", of_grad, beside)),
        w(check_one_scale(op, "scale_w", of_w, beside)),
        y(check_one_scale(op, "scale_y", of_y, beside)),
        dh(check_one_scale(op, "scale_dh", of_dh, beside)) {}

  template <class Args>
  void point(Args& args) const {
    args.scale_grad = grad.template const_data_ptr<float>();
    args.scale_w = w.template const_data_ptr<float>();
    args.scale_y = y.template const_data_ptr<float>();
    args.scale_dh = dh.template const_data_ptr<float>();
  }
};

/// Owns the memory of grad and w that the arguments point to, and of the copied rows of grad.
struct Fp8ProductOwners {
  Tensor grad, w, tail;
};

/// Copies what the kernel cannot read, and points `args` to it. It always has something to multiply, if only zeros.
template <class Args>
Fp8ProductOwners prepare_fp8_product(const Tensor& grad, const Tensor& w, Args& args) {
  Fp8ProductOwners owners{contiguous_aligned(grad), contiguous_aligned(w), {}};
  if (grad.is_cuda() && args.in == 0) {
    args.in = args.ld_grad = 16;
    owners.grad = new_zeros(grad, {args.tokens, args.in}, grad.scalar_type());
    owners.w = new_zeros(w, {args.features, args.in}, w.scalar_type());
  }
  if (grad.is_cuda() && args.tokens % kGradTokenMultiple != 0) {
    owners.tail = new_grad_tail(owners.grad, args);
    args.grad_tail = owners.tail.const_data_ptr();
  }
  args.grad = owners.grad.const_data_ptr();
  args.w = owners.w.const_data_ptr();
  return owners;
}

}  // namespace sparse24::torch_ops
