// A routed feed-forward network on a CPU in one call: tokens to experts, products, results back.
// Shapes: T tokens, K experts of each, D model, E experts, S = T * K slots.

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <cstring>
#include <vector>

namespace {

using at::Tensor;
using Biases = c10::List<std::optional<Tensor>>;

// oneDNN compiles a kernel for each number of rows, so in bfloat16 it gets few different ones.
int64_t rounded(int64_t rows) {
  int64_t step = 16;
  while (rows >= 16 * step) step *= 2;
  return (rows + step - 1) / step * step;
}

Tensor packed_linear(const Tensor& rows, const Tensor& weight, const std::optional<Tensor>& bias) {
  static auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("mkldnn::_linear_pointwise", "")
          .typed<Tensor(const Tensor&, const Tensor&, const std::optional<Tensor>&,
                        std::string_view, c10::List<std::optional<at::Scalar>>,
                        std::optional<std::string_view>)>();
  return op.call(rows, weight, bias, "none", c10::List<std::optional<at::Scalar>>(), "");
}

Tensor multiply(const Tensor& rows, const Tensor& weight, const std::optional<Tensor>& bias) {
  if (weight.is_mkldnn()) return packed_linear(rows, weight, bias);
  return at::linear(rows, weight, bias);
}

void activate(Tensor& hidden, int64_t activation) {
  switch (activation) {
    case 0: at::gelu_(hidden); break;
    case 1: at::gelu_(hidden, "tanh"); break;
    case 2: at::relu_(hidden); break;
    case 3: at::silu_(hidden); break;
    default: at::tanh_(hidden);
  }
}

Tensor network(const Tensor& rows, int64_t e, at::TensorList w_in, const Biases& b_in,
               at::TensorList w_gate, const Biases& b_gate, at::TensorList w_out,
               const Biases& b_out, int64_t activation) {
  Tensor hidden = multiply(rows, w_in[e], b_in.get(e));
  if (w_gate.empty()) {
    activate(hidden, activation);
  } else {
    Tensor gate = multiply(rows, w_gate[e], b_gate.get(e));
    activate(gate, activation);
    hidden.mul_(gate);
  }
  return multiply(hidden, w_out[e], b_out.get(e));
}

Tensor routed_ffn(const Tensor& hidden_TD, const Tensor& ids_TK,
                  const std::optional<Tensor>& weights_TK, at::TensorList w_in, Biases b_in,
                  at::TensorList w_gate, Biases b_gate, at::TensorList w_out, Biases b_out,
                  int64_t activation) {
  // The weights say what is computed in.
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  TORCH_CHECK(hidden_TD.dim() == 2 && ids_TK.dim() == 2 && ids_TK.size(0) == hidden_TD.size(0),
              "hidden is ", hidden_TD.sizes(), " and ids ", ids_TK.sizes());
  const int64_t T = hidden_TD.size(0), D = hidden_TD.size(1), K = ids_TK.size(1);
  const int64_t E = w_in.size(), S = T * K;
  const int64_t gates = w_gate.empty() ? 0 : E;
  TORCH_CHECK(w_out.size() == w_in.size() && (int64_t)w_gate.size() == gates &&
                  (int64_t)b_in.size() == E && (int64_t)b_out.size() == E &&
                  (int64_t)b_gate.size() >= gates,
              "the lists are not of ", E, " experts each");
  TORCH_CHECK(!weights_TK || weights_TK->sizes() == ids_TK.sizes(), "weights and ids differ");
  const Tensor hidden = hidden_TD.contiguous(), ids = ids_TK.contiguous();
  const int64_t* expert_of = ids.const_data_ptr<int64_t>();
  std::vector<int64_t> sizes(E, 0);
  for (int64_t s = 0; s < S; ++s) {
    TORCH_CHECK_INDEX(expert_of[s] >= 0 && expert_of[s] < E, "expert ", expert_of[s], " of ", E);
    ++sizes[expert_of[s]];
  }
  const size_t row_bytes = D * hidden.element_size();
  const char* source = static_cast<const char*>(hidden.const_data_ptr());
  const bool rounds = hidden.scalar_type() == at::kBFloat16;
  const bool copies = K == 1 && !weights_TK;
  Tensor out = copies ? at::empty_like(hidden) : at::zeros_like(hidden);
  char* target = static_cast<char*>(out.data_ptr());
  Tensor weights;
  if (weights_TK) weights = weights_TK->to(hidden.scalar_type()).contiguous().view({S, 1});
  std::vector<int64_t> slots(S), next(E, 0);
  for (int64_t e = 1; e < E; ++e) next[e] = next[e - 1] + sizes[e - 1];
  const std::vector<int64_t> starts = next;
  for (int64_t s = 0; s < S; ++s) slots[next[expert_of[s]]++] = s;
  for (int64_t e = 0; e < E; ++e) {
    const int64_t n = sizes[e];
    if (!n) continue;
    const int64_t* own = slots.data() + starts[e];
    const int64_t span = rounds ? rounded(n) : n;
    Tensor rows = at::empty({span, D}, hidden.options());
    char* place = static_cast<char*>(rows.data_ptr());
    for (int64_t i = 0; i < n; ++i)
      std::memcpy(place + i * row_bytes, source + own[i] / K * row_bytes, row_bytes);
    if (span > n) std::memset(place + n * row_bytes, 0, (span - n) * row_bytes);
    Tensor result = network(rows, e, w_in, b_in, w_gate, b_gate, w_out, b_out, activation);
    TORCH_CHECK(result.scalar_type() == hidden.scalar_type() && result.size(0) == span &&
                    result.size(1) == D,
                "expert ", e, " gives ", result.scalar_type(), " ", result.sizes(), " for ",
                hidden.scalar_type(), " ", rows.sizes());
    if (copies) {
      result = result.contiguous();
      const char* found = static_cast<const char*>(result.const_data_ptr());
      for (int64_t i = 0; i < n; ++i)
        std::memcpy(target + own[i] * row_bytes, found + i * row_bytes, row_bytes);
      continue;
    }
    const Tensor own_slots = at::from_blob(const_cast<int64_t*>(own), {n}, at::kLong);
    result = result.narrow(0, 0, n);
    if (weights.defined()) result = result.mul(weights.index_select(0, own_slots));
    out.index_add_(0, own_slots.div(K, "floor"), result);
  }
  return out;
}

}  // namespace

TORCH_LIBRARY(moe_dist, library) {
  library.def(
      "routed_ffn(Tensor hidden, Tensor ids, Tensor? weights, Tensor[] w_in, Tensor?[] b_in, "
      "Tensor[] w_gate, Tensor?[] b_gate, Tensor[] w_out, Tensor?[] b_out, int activation) "
      "-> Tensor");
}

// Packed weights are oneDNN's own tensors.
TORCH_LIBRARY_IMPL(moe_dist, CPU, library) { library.impl("routed_ffn", routed_ffn); }
TORCH_LIBRARY_IMPL(moe_dist, MkldnnCPU, library) { library.impl("routed_ffn", routed_ffn); }
