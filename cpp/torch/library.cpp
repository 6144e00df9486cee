/// @file
/// The schemas of torch.ops.sparse24 and their registration. One function serves both devices (tensor.h).
#include "tensor.h"

/// Takes over the string of an argument and, unlike torch's conversion to std::string, frees what it took.
template <>
struct torch::stable::detail::ToImpl<sparse24::torch_ops::Word> {
  static sparse24::torch_ops::Word call(StableIValue value, uint64_t, bool) {
    const auto handle = torch::stable::detail::to<StringHandle>(value);
    size_t length = 0;
    const char* data = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    sparse24::torch_ops::Word word{std::string(data, length)};
    TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return word;
  }
};

STABLE_TORCH_LIBRARY(sparse24, library) {
  library.def(R"(compress(Tensor x, str activation="none", int dim=-1) -> (Tensor values, Tensor meta))");
  library.def(R"(compress_fp8(Tensor x, Tensor? scale=None, str activation="none", int dim=-1, str scaling="row") )"
              R"(-> (Tensor values, Tensor meta, Tensor scale))");
  library.def("compress_like(Tensor x, Tensor meta, int dim=-1) -> Tensor");
  library.def("decompress(Tensor values, Tensor meta, SymInt rows, SymInt cols, int dim=-1) -> Tensor");
  library.def("densest_features(Tensor counts, SymInt k) -> Tensor");
  library.def("feature_counts(Tensor values, Tensor meta, SymInt samples=1024, bool fp8_meta=False) -> Tensor");
  library.def("gather_features(Tensor values, Tensor meta, Tensor features, bool fp8_meta=False) -> Tensor");
  library.def(
      "mm(Tensor values, Tensor meta, Tensor b, Tensor? scale_a=None, Tensor? scale_b=None, Tensor? bias=None, *, int "
      "dim=-1, "
      "ScalarType? out_dtype=None, bool transpose_out=False, bool interleaved=False) -> Tensor");
  library.def("put_features(Tensor(a!) out, Tensor parts, Tensor features, int dim) -> ()");
  library.def(R"(quantize_fp8(Tensor x, Tensor? scale=None, str scaling="row") -> (Tensor values, Tensor scale))");
  library.def("quantize_fp8_predict(Tensor x, Tensor factor) -> (Tensor values, Tensor scale, Tensor predicted)");
  library.def(
      "linear_relu2(Tensor x, Tensor w, Tensor? scale_x=None, Tensor? scale_w=None, Tensor? bias=None, Tensor? "
      "scale_out=None, *, "
      R"(ScalarType? out_dtype=None, bool statistics=True, str activation="relu2") )"
      "-> (Tensor y, Tensor amax, Tensor saturated)");
  library.def(
      "linear_compress(Tensor x, Tensor w, Tensor? scale_x=None, Tensor? scale_w=None, Tensor? bias=None, Tensor? "
      "scale_out=None, *, "
      R"(str activation="relu2", str scaling="given", ScalarType? out_dtype=None, bool statistics=True) )"
      "-> (Tensor values, Tensor meta, Tensor scale, Tensor amax, Tensor saturated)");
  library.def(
      "linear_gradient(Tensor grad, Tensor w, Tensor values, Tensor meta, bool interleaved=False, bool tokens=True, "
      "bool fp8_meta=False, Tensor? hot=None, bool roots=False) -> (Tensor dh_values, Tensor dh_tokens, "
      "Tensor dh_tokens_meta, Tensor y_tokens, Tensor y_tokens_meta, Tensor counts, Tensor y_hot, Tensor dh_hot)");
  library.def("linear_relu2_gradient(Tensor grad, Tensor w, Tensor y, bool roots=False) -> Tensor");
}

namespace {

void register_ops(torch::stable::detail::StableLibrary& library) {
  using namespace sparse24;
  library.impl("compress", TORCH_BOX(&torch_ops::compress));
  library.impl("compress_fp8", TORCH_BOX(&torch_ops::compress_fp8));
  library.impl("compress_like", TORCH_BOX(&torch_ops::compress_like));
  library.impl("decompress", TORCH_BOX(&torch_ops::decompress));
  library.impl("densest_features", TORCH_BOX(&torch_ops::densest_features));
  library.impl("feature_counts", TORCH_BOX(&torch_ops::feature_counts));
  library.impl("gather_features", TORCH_BOX(&torch_ops::gather_features));
  library.impl("mm", TORCH_BOX(&torch_ops::mm));
  library.impl("put_features", TORCH_BOX(&torch_ops::put_features));
  library.impl("quantize_fp8", TORCH_BOX(&torch_ops::quantize_fp8));
  library.impl("quantize_fp8_predict", TORCH_BOX(&torch_ops::quantize_fp8_predict));
  library.impl("linear_relu2", TORCH_BOX(&torch_ops::linear_relu2));
  library.impl("linear_compress", TORCH_BOX(&torch_ops::linear_compress));
  library.impl("linear_gradient", TORCH_BOX(&torch_ops::linear_gradient));
  library.impl("linear_relu2_gradient", TORCH_BOX(&torch_ops::linear_relu2_gradient));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparse24, CPU, library) { register_ops(library); }
STABLE_TORCH_LIBRARY_IMPL(sparse24, CUDA, library) { register_ops(library); }
