/// @file
/// What linear_gradient, linear_gradient_fp8 and linear_relu2_gradient share: grad @ w, checked and prepared. `Args`
/// are those of any.
#pragma once

#include "tensor.h"

namespace sparse24::torch_ops {

/// A tensor beside grad: same device and dtype, two dimensions.
inline void check_beside(OpName op, const char* argument, const Tensor& t, const Tensor& grad, DType dtype) {
  check_device(op, argument, t, "grad", grad);
  check_sizes(op, argument, t, 2);
  expect(t.scalar_type() == grad.scalar_type(), op, argument, " to be ", name_of(dtype), " (the dtype of grad), got ",
         dtype_text(t.scalar_type()));
}

/// Checks the sizes and dtypes of grad and w.
template <class Args>
Args check_product(OpName op, const Tensor& grad, const Tensor& w) {
  Args args{};
  check_sizes(op, "grad", grad, 2);
  args.dtype = args.hidden_dtype = check_dtype(op, "grad", grad, {DType::kBFloat16, DType::kFloat16, DType::kFloat32});
  args.tokens = grad.size(0);
  args.in = grad.size(1);
  check_beside(op, "w", w, grad, args.dtype);
  expect(w.size(0) == args.in, op, "w to have ", args.in, " rows (columns of grad), got ", w.size(0));
  args.features = w.size(1);
  return args;
}

/// Training in float16 stores roots, which no other kernel knows. float32 is for the CPU.
inline bool check_roots(OpName op, DType dtype, bool roots) {
  const bool allowed = dtype == DType::kFloat16 || dtype == DType::kFloat32;
  expect(allowed || !roots, op, "roots to be False (", name_of(dtype), " grad), got True");
  return roots;
}

/// Checks and returns the number of dense features, of `of_w` w has.
inline int64_t check_hot(OpName op, const Tensor& hot, const Tensor& grad, int64_t features, const char* of_w) {
  check_device(op, "hot", hot, "grad", grad);
  check_sizes(op, "hot", hot, 1);
  expect(hot.scalar_type() == ScalarType::Long, op, "hot to be int64, got ", dtype_text(hot.scalar_type()));
  expect(hot.size(0) <= features, op, "hot to have at most ", features, " elements (", of_w, "), got ", hot.size(0));
  return hot.size(0);
}

/// Makes LinearGradientArgs::grad_tail of the prepared gradient.
template <class Args>
Tensor new_grad_tail(Tensor grad, const Args& args) {
  const int64_t first = first_of_tail(args.tokens, kGradTailTile);
  Tensor tail = new_zeros(grad, {round_up(args.tokens - first, kGradTokenMultiple), args.ld_grad}, grad.scalar_type());
  copy_rows(torch::stable::narrow(tail, 1, 0, args.in), torch::stable::narrow(grad, 1, 0, args.in), args.interleaved,
            first);
  return tail;
}

/// Owns the memory of grad and w that `Args` point to.
struct ProductOwners {
  Tensor grad, w;
};

/// Copies what the kernels cannot read, and points `args` to it. They always have something to multiply, if only zeros.
template <class Args>
ProductOwners prepare_product(const Tensor& grad, const Tensor& w, Args& args) {
  ProductOwners owners{grad, w};
  const int64_t step = 16 / size_of(args.dtype), in = args.in;
  args.ld_grad = in;
  if (grad.is_cuda() && in == 0) {
    args.in = args.ld_grad = step;
    owners.grad = new_zeros(grad, {args.tokens, step}, grad.scalar_type());
    owners.w = new_zeros(w, {step, args.features}, w.scalar_type());
  } else if (grad.is_cuda() && in % step != 0) {
    args.ld_grad = round_up(in, step);
    owners.grad = new_empty(grad, {args.tokens, args.ld_grad}, grad.scalar_type());
    copy_rows(torch::stable::narrow(owners.grad, 1, 0, in), grad, false);
    owners.w = contiguous_aligned(w);
  } else {
    owners.grad = contiguous_aligned(grad);
    owners.w = contiguous_aligned(w);
  }
  args.grad = owners.grad.const_data_ptr();
  args.w = owners.w.const_data_ptr();
  return owners;
}

/// Owns the memory of grad and of a packed w that `Args` point to.
struct PackedProductOwners {
  Tensor grad, w, w_meta;
};

/// Points `args` to grad and to a packed w of `dtype`. The kernels always have something to multiply, if only zeros.
template <class Args>
PackedProductOwners prepare_packed_product(const Tensor& grad, const Tensor& w, const Tensor& w_meta, DType dtype,
                                           Args& args) {
  PackedProductOwners owners{contiguous_aligned(grad), contiguous_aligned(w), contiguous_aligned(w_meta)};
  if (grad.is_cuda() && args.in == 0) {
    args.in = feature_alignment(dtype, Dim::kFeatures);
    const Operand zeros = Operand::of(args.features, args.in, dtype, Dim::kFeatures);
    owners.grad = new_zeros(grad, {args.tokens, args.in}, grad.scalar_type());
    owners.w = new_zeros(w, {zeros.values_rows(), zeros.values_cols()}, w.scalar_type());
    owners.w_meta = new_empty(w, {zeros.meta_bytes()}, ScalarType::Byte);
    torch::stable::fill_(owners.w_meta, kMetaPaddingByte);
  }
  args.grad = owners.grad.const_data_ptr();
  args.ld_grad = args.in;
  args.w = owners.w.const_data_ptr();
  return owners;
}

/// Owns what the arguments point to of the dense features.
struct HotOwners {
  Tensor hot, slots;
};

/// Points `args`, if it has dense features, to their indices, to the rows of y and dh that they get, and to the places
/// where kernels note which row a feature has.
template <class Args>
HotOwners prepare_hot(const std::optional<Tensor>& hot, const Tensor& y_hot, const Tensor& dh_hot, Args& args) {
  HotOwners owners;
  if (args.hot_count == 0) return owners;
  owners.hot = as_contiguous(*hot);
  owners.slots = new_empty(y_hot, {y_hot.is_cuda() ? args.features : 0}, ScalarType::Int);
  args.hot = owners.hot.template const_data_ptr<int64_t>();
  args.hot_slots = owners.slots.template mutable_data_ptr<int32_t>();
  args.y_hot = y_hot.mutable_data_ptr();
  args.dh_hot = dh_hot.mutable_data_ptr();
  return owners;
}

}  // namespace sparse24::torch_ops
