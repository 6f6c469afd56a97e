// The ops of decode as the dispatcher calls them, without Python: there a call takes 50 us longer
// once the weights have swept the caches. What is not plain goes to the op's Python impl, which
// knows every case and the words of every error.

#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

typedef std::optional<at::Tensor> MaybeTensor;
typedef std::optional<at::ScalarType> MaybeDtype;

static i64 code(at::ScalarType type) {  // as _DTYPES in ops/_cpu.py, or -1
  return type == at::kFloat ? 0 : type == at::kHalf ? 1 : type == at::kBFloat16 ? 2 : -1;
}

static bool plain(const at::Tensor& x, i64 dim) {
  return x.is_cpu() && x.dim() == dim && !(x.requires_grad() && at::GradMode::is_enabled());
}

static bool packed(const MaybeTensor& x, at::IntArrayRef shape, at::ScalarType type) {
  return !x || (plain(*x, shape.size()) && x->sizes() == shape && x->is_contiguous() &&
                x->scalar_type() == type);
}

static bool streams(const at::Tensor& w, i64 h) {  // _streams of ops/_cpu.py
  return w.stride(h) == 1 || (w.stride(h + 1) == 1 && w.size(h + 1) >= BLOCK_G);
}

static void* data(const at::Tensor& x) { return x.data_ptr(); }
static void* data(const MaybeTensor& x) { return x ? x->data_ptr() : nullptr; }

template <class Signature>
static auto python_impl(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

static at::Tensor skinny_mm(const at::Tensor& x, const at::Tensor& w, const MaybeTensor& bias,
                            const MaybeTensor& residual) {
  const at::ScalarType type = x.scalar_type();
  if (!plain(x, 2) || !plain(w, 2) || code(type) < 0 || w.scalar_type() != type ||
      x.size(1) != w.size(0) || x.size(0) < 1 || x.size(0) > 16 || x.stride(1) != 1 ||
      !w.numel() || !streams(w, 0) || !packed(bias, {w.size(1)}, type) || residual) {
    static auto slow =
        python_impl<at::Tensor(const at::Tensor&, const at::Tensor&, const MaybeTensor&,
                               const MaybeTensor&)>("moe_compile::_skinny_mm");
    return slow.call(x, w, bias, residual);
  }
  const i64 M = x.size(0), K = w.size(0), N = w.size(1);
  at::Tensor y = at::empty({M, N}, x.options());
  const int32_t offsets[1] = {(int32_t)M};
  const GroupedMM a{data(y), data(x), data(w), data(bias), offsets, nullptr, code(type), M, M, 1, K,
                    N, 1, x.stride(0), 0, w.stride(0), w.stride(1), 0, M, at::get_num_threads()};
  moe_grouped_mm(&a);
  return y;
}

static at::Tensor experts(const at::Tensor& x, const at::Tensor& ids, const at::Tensor& weights,
                          const at::Tensor& w_up, const at::Tensor& w_down,
                          const MaybeTensor& bias_up, const MaybeTensor& bias_down,
                          bool interleaved, double alpha, std::optional<double> limit,
                          double up_shift, MaybeDtype dtype, const MaybeTensor& residual) {
  const at::ScalarType type = x.scalar_type(), out_type = dtype.value_or(type);
  const bool is_plain =
      plain(x, 2) && plain(ids, 2) && plain(weights, 2) && plain(w_up, 3) && plain(w_down, 3);
  if (!is_plain || code(type) < 0 || code(out_type) < 0 || code(weights.scalar_type()) < 0 ||
      w_up.scalar_type() != type || w_down.scalar_type() != type ||
      (ids.scalar_type() != at::kLong && ids.scalar_type() != at::kInt) ||
      ids.size(0) != x.size(0) || weights.sizes() != ids.sizes() || w_up.size(1) != x.size(1) ||
      w_down.size(0) != w_up.size(0) || w_up.size(2) != 2 * w_down.size(1) || x.stride(1) != 1 ||
      !x.numel() || !ids.numel() || !w_up.numel() || !w_down.numel() || !ids.is_contiguous() ||
      !weights.is_contiguous() || !streams(w_up, 1) || !streams(w_down, 1) ||
      !packed(bias_up, {w_up.size(0), w_up.size(2)}, type) ||
      !packed(bias_down, {w_down.size(0), w_down.size(2)}, type) || residual) {
    static auto slow = python_impl<at::Tensor(
        const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
        const at::Tensor&, const MaybeTensor&, const MaybeTensor&, bool, double,
        std::optional<double>, double, MaybeDtype, const MaybeTensor&)>("moe_compile::_experts");
    return slow.call(x, ids, weights, w_up, w_down, bias_up, bias_down, interleaved, alpha, limit,
                     up_shift, dtype, residual);
  }
  at::Tensor out = at::empty({x.size(0), w_down.size(2)}, x.options().dtype(out_type));
  const Experts a{data(out), data(x), data(ids), data(weights), data(w_up), data(w_down),
                  data(bias_up), data(bias_down), code(type), code(weights.scalar_type()),
                  code(out_type), ids.scalar_type() == at::kLong, ids.size(0), ids.size(1),
                  w_up.size(0), w_up.size(1), w_up.size(2), w_down.size(1), w_down.size(2),
                  x.stride(0), w_up.stride(0), w_up.stride(1), w_up.stride(2), w_down.stride(0),
                  w_down.stride(1), w_down.stride(2), interleaved, limit.has_value(),
                  at::get_num_threads(), alpha, limit.value_or(0.0), up_shift};
  moe_experts(&a);
  return out;
}

static std::tuple<at::Tensor, at::Tensor> route(const at::Tensor& logits, i64 top_k,
                                                std::string_view score, bool score_first,
                                                const MaybeTensor& bias, i64 num_groups,
                                                i64 top_groups, std::string_view group_score,
                                                bool renormalize, double eps, double scale,
                                                MaybeDtype dtype) {
  const at::ScalarType out_type = dtype.value_or(at::kFloat);
  const bool softmax = score == "softmax", sigmoid = score == "sigmoid", best = group_score == "max";
  const i64 E = logits.dim() == 2 ? logits.size(1) : 0;
  const bool grouped = num_groups != 1;
  if (!plain(logits, 2) || code(logits.scalar_type()) < 0 || code(out_type) < 0 ||
      logits.stride(1) != 1 || !(softmax || sigmoid || score == "none") ||
      !(best || group_score == "top2_sum") || num_groups < 1 || E % num_groups || top_groups < 1 ||
      top_groups > num_groups || (grouped && !best && E / num_groups < 2) || top_k < 1 ||
      top_k > top_groups * (E / num_groups) || (!score_first && (bias || grouped)) ||
      (bias && (code(bias->scalar_type()) < 0 || !packed(bias, {E}, bias->scalar_type())))) {
    static auto slow = python_impl<std::tuple<at::Tensor, at::Tensor>(
        const at::Tensor&, i64, std::string_view, bool, const MaybeTensor&, i64, i64,
        std::string_view, bool, double, double, MaybeDtype)>("moe_compile::_route");
    return slow.call(logits, top_k, score, score_first, bias, num_groups, top_groups, group_score,
                     renormalize, eps, scale, dtype);
  }
  const i64 T = logits.size(0);
  at::Tensor weights = at::empty({T, top_k}, logits.options().dtype(out_type));
  at::Tensor ids = at::empty({T, top_k}, logits.options().dtype(at::kLong));
  const Route a{data(weights), ids.data_ptr<i64>(), data(logits), data(bias), code(out_type),
                code(logits.scalar_type()), bias ? code(bias->scalar_type()) : 0, T, E, top_k,
                logits.stride(0), softmax, sigmoid, score_first, num_groups, top_groups,
                best ? 1 : 2, renormalize, at::get_num_threads(), eps, scale};
  moe_route(&a);
  return {weights, ids};
}

// Take over from the Python impls, for good. A kernel that runs elsewhere stays alive meanwhile.
extern "C" int moe_register() {
  struct Silent : c10::WarningHandler {  // that a kernel is replaced is the point
    void process(const c10::Warning&) override {}
  } silent;
  c10::WarningUtils::WarningHandlerGuard guard(&silent);
  static torch::Library library(torch::Library::IMPL, "moe_compile", c10::DispatchKey::CPU,
                                __FILE__, __LINE__);
  library.impl("skinny_mm", skinny_mm);
  library.impl("experts", experts);
  library.impl("route", route);
  return 0;
}
