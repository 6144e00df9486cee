/// @file
/// The plain form of the products of experts: one expert after the other, by the references of one product.
#include "sparse24/experts.h"

#include <cstring>
#include <vector>

#include "core/buffer.h"
#include "reference/experts.h"
#include "reference/product.h"
#include "sparse24/mm.h"

namespace sparse24::cpu {
namespace {

/// Scales of one expert's rows: `per_row` of them, or one for all.
const float* scales_of(const float* scale, bool per_row, int64_t row) {
  return scale != nullptr && per_row ? scale + row : scale;
}
/// Scales of one expert's weight: [experts, n], or [experts].
const float* scales_of_weight(const float* scale, bool per_row, int64_t expert, int64_t n) {
  return scale == nullptr ? nullptr : scale + expert * (per_row ? n : 1);
}

LinearArgs of_group(const LinearArgs& all, const ExpertGroup& group) {
  LinearArgs args = all;
  args.tokens = group.rows;
  args.x = at(all.x, group.begin * all.in * size_of(all.dtype));
  args.w = at(all.w, group.expert * all.out * all.in * size_of(all.dtype));
  args.scale_x = scales_of(all.scale_x, all.scale_x_per_row, group.begin);
  args.scale_w = scales_of_weight(all.scale_w, all.scale_w_per_row, group.expert, all.out);
  args.scale_y = scales_of(all.scale_y, all.scale_y_per_row, group.begin);
  return args;
}

/// Copies the metadata of padded rows: of `part` to that of `whole` from a row on, or back.
void copy_meta(uint8_t* to, const uint8_t* from, const Operand& whole, const Operand& part, int64_t row, bool back) {
  const int64_t width = meta_atom_k(whole.dtype) / 8;  // bytes of a row in each atom
  for (int64_t k = 0; k < whole.k_meta / meta_atom_k(whole.dtype); ++k) {
    const int64_t in_whole = (k * whole.m_meta + row) * width, in_part = k * part.m_meta * width;
    std::memcpy(to + (back ? in_part : in_whole), from + (back ? in_whole : in_part),
                static_cast<size_t>(part.m_meta * width));
  }
}

/// The product of one expert, with its scales of rows made one.
MmArgs product_of(const ExpertsProduct& all, const ExpertGroup& group, int64_t row_of_a,
                  std::vector<float>& row_scales) {
  MmArgs args{};
  args.n = all.out;
  args.b = at(all.w, group.expert * all.out * all.in * size_of(all.dtype));
  args.b_major = all.w_major;
  args.ldb = all.w_major == Major::kColumn ? all.in : all.out;
  args.d = at(all.d, group.begin * all.out * size_of(all.d_dtype));
  args.d_dtype = all.d_dtype;
  args.d_major = Major::kRow;
  args.scale_b = scales_of_weight(all.scale_w, all.scale_w_per_row, group.expert, all.out);
  args.scale_b_per_column = all.scale_w_per_row;
  row_scales.assign(static_cast<size_t>(group.rows), 1.0f);
  for (int64_t i = 0; i < group.rows; ++i) {
    row_scales[static_cast<size_t>(i)] =
        scale_at(all.scale_a, all.scale_a_per_row, row_of_a + i) * scale_at(all.row_scale, true, group.begin + i);
  }
  args.scale_a = row_scales.data();
  args.scale_a_per_row = true;
  return args;
}

/// Writes zeros to the rows of no expert.
void clear(const ExpertsProduct& of, int64_t end) {
  const int64_t row = of.out * size_of(of.d_dtype);
  if (end < of.experts.rows) std::memset(at(of.d, end * row), 0, static_cast<size_t>((of.experts.rows - end) * row));
}

template <class In>
void multiply_dense(const MmArgs& args, const void* x, int64_t rows, int64_t in) {
  const std::vector<float> b = widen<In>(args.b, in, args.n, args.b_major, args.ldb);
  for_each_sum(rows, args.n, in, dense_products<In>(x, in, b, args.n),
               [&](int64_t m, int64_t n_begin, int64_t n_end, const float* sums) {
                 visit_dtype(args.d_dtype, [&](auto type) {
                   using Out = decltype(type);
                   auto* d = static_cast<typename Out::Storage*>(args.d) + m * args.n;
                   for (int64_t n = n_begin; n < n_end; ++n) {
                     d[n] = Out::round(scale_at(args.scale_a, true, m) *
                                       scale_at(args.scale_b, args.scale_b_per_column, n) * sums[n - n_begin]);
                   }
                 });
               });
}

}  // namespace

void experts_linear_relu2(const ExpertsLinearRelu2Args& args) {
  const LinearArgs& all = args.of.linear;
  for_each_expert(args.experts, [&](const ExpertGroup& group) {
    linear_relu2({of_group(all, group), at(args.of.y, group.begin * all.out * size_of(all.y_dtype))});
  });
}

void experts_linear_compress(const ExpertsLinearCompressArgs& args) {
  const LinearArgs& all = args.of.linear;
  const DType dtype = args.of.meta_dtype;
  const Operand whole = Operand::of(args.experts.padded_rows(), all.out, dtype, Dim::kFeatures);
  for_each_expert(args.experts, [&](const ExpertGroup& group) {
    const Operand part = Operand::of(group.rows, all.out, dtype, Dim::kFeatures);
    auto meta = make_buffer<uint8_t>(part.meta_bytes());
    void* values = at(args.of.values, group.padded_row * all.out / 2 * size_of(all.y_dtype));
    linear_compress({of_group(all, group), values, meta.data(), dtype});
    copy_meta(args.of.meta, meta.data(), whole, part, group.padded_row, /*back=*/false);
  });
}

void experts_linear(const ExpertsLinearArgs& args) {
  const ExpertsProduct& of = args.of;
  std::vector<float> row_scales;
  clear(of, for_each_expert(of.experts, [&](const ExpertGroup& group) {
          const MmArgs product = product_of(of, group, group.begin, row_scales);
          visit_dtype(of.dtype, [&](auto type) {
            multiply_dense<decltype(type)>(product, at(args.x, group.begin * of.in * size_of(of.dtype)), group.rows,
                                           of.in);
          });
        }));
}

void experts_mm(const ExpertsMmArgs& args) {
  const ExpertsProduct& of = args.of;
  const Operand whole = Operand::of(of.experts.padded_rows(), of.in, of.dtype, Dim::kFeatures);
  std::vector<float> row_scales;
  clear(of, for_each_expert(of.experts, [&](const ExpertGroup& group) {
          MmArgs product = product_of(of, group, group.padded_row, row_scales);
          product.a = Operand::of(group.rows, of.in, of.dtype, Dim::kFeatures);
          auto meta = make_buffer<uint8_t>(product.a.meta_bytes());
          copy_meta(meta.data(), args.meta, whole, product.a, group.padded_row, /*back=*/true);
          product.meta = meta.data();
          product.values = at(args.values, group.padded_row * of.in / 2 * size_of(of.dtype));
          mm(product);
        }));
}

}  // namespace sparse24::cpu
