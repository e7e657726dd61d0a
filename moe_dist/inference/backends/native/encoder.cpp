// The blocks of an encoder of the BERT kind in one call: attention, norm, dense or routed
// feed-forward network, norm. Shapes: B texts, L tokens of each, T = B * L, D model, H heads,
// E experts, K of them for a token, S = T * K slots.

#include "packed_gemm.h"

#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <vector>

namespace moe_dist {
namespace {

using MaybeTensor = std::optional<Tensor>;

struct Norm {
  Tensor weight, bias;
  double epsilon = 0;

  // norm(a[place[t]] + b[t]), row by row, as float32; without places a's rows lie as b's.
  Tensor operator()(const Tensor& a, const Tensor& b, const int64_t* place = nullptr) const {
    const int64_t T = b.size(0), D = b.size(1);
    Tensor y = matrix(T, D, at::kFloat);
    const float *pa = a.const_data_ptr<float>(), *pb = b.const_data_ptr<float>();
    const float *w = weight.const_data_ptr<float>(), *c = bias.const_data_ptr<float>();
    float* out = y.data_ptr<float>();
    at::parallel_for(0, T, 32, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t)
        add_norm(pa + (place ? place[t] : t) * D, pb + t * D, D, w, c, epsilon, out + t * D);
    });
    return y;
  }
};

struct FeedForward {
  Linear in, out;
};

struct Layer {
  Linear qkv, attention_out;
  Norm attention_norm, out_norm;
  std::vector<FeedForward> experts;
  std::vector<FeedForward> shared;  // one, or none
  Tensor gate;                      // (E, D) float32 where the best score decides, else undefined
};

Tensor own(const Tensor& values) {
  return values.detach().to(at::kFloat).clone(at::MemoryFormat::Contiguous);
}

Tensor float_rows(const Tensor& hidden) {
  const Tensor flat = hidden.reshape({-1, hidden.size(-1)});
  Tensor rows = matrix(flat.size(0), flat.size(1), at::kFloat);
  rows.copy_(flat);
  return rows;
}

class Encoder : public torch::CustomClassHolder {
 public:
  Encoder(int64_t num_heads, int64_t activation, int64_t precision)
      : num_heads_(num_heads), activation_(activation), precision_(static_cast<Precision>(precision)) {}

  // Weights are (outputs, inputs), float32; those of the experts, then of shared neurons, if any.
  void add_layer(const Tensor& w_qkv, const Tensor& b_qkv, const Tensor& w_o, const Tensor& b_o,
                 const std::vector<Tensor>& norms, double attention_epsilon, double out_epsilon,
                 const std::vector<Tensor>& w_in, const std::vector<MaybeTensor>& b_in,
                 const std::vector<Tensor>& w_out, const std::vector<MaybeTensor>& b_out,
                 bool has_shared, const MaybeTensor& gate) {
    TORCH_CHECK(norms.size() == 4 && !w_in.empty() && w_in.size() == w_out.size() &&
                    b_in.size() == w_in.size() && b_out.size() == w_in.size(),
                "lists of weights differ in length");
    const int64_t D = w_o.size(0);
    TORCH_CHECK(w_qkv.size(0) % (3 * num_heads_) == 0 && w_qkv.size(0) == 3 * w_o.size(1) &&
                    w_qkv.size(1) == D,
                "widths of attention do not fit");
    for (const Tensor& values : norms) TORCH_CHECK(values.numel() == D, "a norm is not of ", D);
    for (size_t i = 0; i < w_in.size(); ++i)
      TORCH_CHECK(w_in[i].size(1) == D && w_out[i].size(0) == D && w_in[i].size(0) == w_out[i].size(1),
                  "widths of a feed-forward network do not fit");
    Layer layer;
    layer.qkv = Linear(w_qkv, b_qkv, precision_);
    layer.attention_out = Linear(w_o, b_o, precision_);
    layer.attention_norm = {own(norms[0]), own(norms[1]), attention_epsilon};
    layer.out_norm = {own(norms[2]), own(norms[3]), out_epsilon};
    const size_t E = w_in.size() - has_shared;
    for (size_t e = 0; e < w_in.size(); ++e) {
      auto& place = e < E ? layer.experts : layer.shared;
      place.push_back({Linear(w_in[e], b_in[e], precision_), Linear(w_out[e], b_out[e], precision_)});
    }
    if (gate) layer.gate = own(*gate);
    layers_.push_back(std::move(layer));
  }

  // All layers; every routed one has a gate. The mask is added or, of bool, says what is seen; it
  // goes with (B, H, L, L).
  Tensor forward(const Tensor& hidden, const MaybeTensor& mask) const {
    c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    for (const Layer& layer : layers_) check(layer, hidden);
    const int64_t B = hidden.size(0), L = hidden.size(1);
    const MaybeTensor own_mask = prepared(mask);
    Tensor rows = float_rows(hidden);
    for (const Layer& layer : layers_) {
      rows = attend(layer, rows, B, L, own_mask);
      rows = feed_forward(layer, rows, chosen(layer, rows), std::nullopt);
    }
    return rows.to(hidden.scalar_type()).view(hidden.sizes());
  }

  // The first half of a layer: (B, L, D) to float32 of that shape.
  Tensor attention_half(int64_t index, const Tensor& hidden, const MaybeTensor& mask) const {
    c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const Layer& layer = layers_.at(index);
    check(layer, hidden);
    return attend(layer, float_rows(hidden), hidden.size(0), hidden.size(1), prepared(mask))
        .view(hidden.sizes());
  }

  // The second half, each token's experts given: ids (T, K), weights of the same shape, or ones.
  // Without ids there is one network.
  Tensor feed_forward_half(int64_t index, const Tensor& hidden, const MaybeTensor& ids_TK,
                           const MaybeTensor& weights_TK) const {
    c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const Layer& layer = layers_.at(index);
    check(layer, hidden);
    const Tensor ids = ids_TK ? ids_TK->contiguous() : Tensor();
    return feed_forward(layer, float_rows(hidden), ids, weights_TK).view(hidden.sizes());
  }

 private:
  at::ScalarType attention_type() const {
    return precision_ == Precision::kFloat ? at::kFloat : at::kBFloat16;
  }

  static void check(const Layer& layer, const Tensor& hidden) {
    TORCH_CHECK(hidden.dim() == 3 && hidden.size(2) == layer.qkv.K && hidden.is_floating_point(),
                "hidden states are ", hidden.scalar_type(), " ", hidden.sizes());
  }

  MaybeTensor prepared(const MaybeTensor& mask) const {
    if (!mask || mask->scalar_type() == at::kBool) return mask;
    TORCH_CHECK(mask->is_floating_point(), "a mask is of bools, or of numbers that are added");
    // The lowest float32 is infinite in bfloat16, and a row of those has no mean.
    const double lowest = attention_type() == at::kFloat ? -3.4028234663852886e38 : -3.38e38;
    return mask->clamp_min(lowest).to(attention_type());
  }

  Tensor attend(const Layer& layer, const Tensor& x, int64_t B, int64_t L, const MaybeTensor& mask) const {
    const int64_t T = B * L, D = layer.qkv.N / 3, width = D / num_heads_;
    const Rows rows = encode(x, precision_);
    Tensor qkv = at::empty({T, 3 * D}, x.options().dtype(attention_type()));
    if (attention_type() == at::kFloat)
      layer.qkv.apply(rows, qkv.data_ptr<float>(), 3 * D);
    else
      layer.qkv.apply(rows, qkv.data_ptr<at::BFloat16>(), 3 * D);
    const Tensor parts = qkv.view({B, L, 3, num_heads_, width}).permute({2, 0, 3, 1, 4});
    const Tensor seen = at::scaled_dot_product_attention(parts[0], parts[1], parts[2], mask);
    Tensor out = matrix(T, x.size(1), at::kFloat);
    layer.attention_out.apply(context_rows(seen.transpose(1, 2).reshape({T, D})), out.data_ptr<float>(), x.size(1));
    return layer.attention_norm(out, x);
  }

  Rows context_rows(const Tensor& context) const {
    if (precision_ != Precision::kBFloat16) return encode(float_rows(context), precision_);
    Rows rows{matrix(context.size(0), context.size(1), at::kBFloat16), {}, {}};
    rows.codes.copy_(context);
    return rows;
  }

  // The expert with the best score for each token: (T, 1), or undefined where nothing is routed.
  Tensor chosen(const Layer& layer, const Tensor& x) const {
    if (!layer.gate.defined()) return {};
    return at::linear(x, layer.gate).argmax(1, true);
  }

  // Rows that one network multiplies, and where they lie in its input and output.
  struct Part {
    const FeedForward* network;
    int64_t first, count;
  };

  static void add_parts(const FeedForward& network, int64_t first, int64_t last, std::vector<Part>& parts) {
    for (; first < last; first += kBlockM)
      parts.push_back({&network, first, std::min(kBlockM, last - first)});
  }

  // Part by part, so that what lies between the two products stays near the core that made it.
  Tensor apply(const std::vector<Part>& parts, const Rows& rows) const {
    const int64_t T = rows.codes.size(0), number = parts.size();
    const int64_t D = layers_[0].qkv.K;
    Tensor out = matrix(T, D, at::kFloat);
    float* to = out.data_ptr<float>();
    const auto apply_some = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) apply_one(parts[i], rows, to + parts[i].first * D);
    };
    if (number < at::get_num_threads())
      apply_some(0, number);  // each is shared out then
    else
      at::parallel_for(0, number, 1, apply_some);
    return out;
  }

  void apply_one(const Part& part, const Rows& rows, float* to) const {
    const Linear &in = part.network->in, &out = part.network->out;
    const Rows own = slice(rows, part.first, part.count);
    if (precision_ == Precision::kBFloat16) {  // the first product writes what the second reads
      const Tensor inner = matrix(part.count, in.N, at::kBFloat16);
      in.apply(own, inner.data_ptr<at::BFloat16>(), in.N, activation_);
      out.apply({inner, {}, {}}, to, out.N);
    } else {
      const Tensor inner = matrix(part.count, in.N, at::kFloat);
      in.apply(own, inner.data_ptr<float>(), in.N, activation_);
      out.apply(encode(inner, precision_), to, out.N);
    }
  }

  Tensor feed_forward(const Layer& layer, const Tensor& x, const Tensor& ids, const MaybeTensor& weights) const {
    const Rows rows = encode(x, precision_);
    const int64_t T = x.size(0);
    const auto whole = [&](const FeedForward& network) {
      std::vector<Part> parts;
      add_parts(network, 0, T, parts);
      return apply(parts, rows);
    };
    if (!ids.defined()) {
      TORCH_CHECK(layer.experts.size() == 1, "there are several experts, and no ids");
      const Tensor out = whole(layer.experts[0]);
      if (!layer.shared.empty()) out.add_(whole(layer.shared[0]));
      return layer.out_norm(out, x);
    }
    TORCH_CHECK(ids.dim() == 2 && ids.size(0) == T, "ids are ", ids.sizes(), " for ", T, " tokens");
    TORCH_CHECK(!weights || weights->sizes() == ids.sizes(), "weights and ids differ");
    const int64_t K = ids.size(1), S = T * K, E = layer.experts.size();
    const int64_t* expert_of = ids.const_data_ptr<int64_t>();
    std::vector<int64_t> starts(E + 1, 0), tokens(S), place(S);
    for (int64_t s = 0; s < S; ++s) {
      TORCH_CHECK_INDEX(expert_of[s] >= 0 && expert_of[s] < E, "expert ", expert_of[s], " of ", E);
      ++starts[expert_of[s] + 1];
    }
    for (int64_t e = 0; e < E; ++e) starts[e + 1] += starts[e];
    std::vector<int64_t> next(starts.begin(), starts.end() - 1);
    for (int64_t s = 0; s < S; ++s) {
      place[s] = next[expert_of[s]]++;
      tokens[place[s]] = s / K;
    }
    std::vector<Part> parts;
    for (int64_t e = 0; e < E; ++e) add_parts(layer.experts[e], starts[e], starts[e + 1], parts);
    const Tensor sorted = apply(parts, gather(rows, tokens));
    if (K == 1 && !weights && layer.shared.empty()) return layer.out_norm(sorted, x, place.data());
    const Tensor out = weighted_sum(sorted, place, K, weights, T);
    if (!layer.shared.empty()) out.add_(whole(layer.shared[0]));
    return layer.out_norm(out, x);
  }

  // Each token's results, which lie where `place` says, times their weights: (T, D).
  static Tensor weighted_sum(const Tensor& sorted, const std::vector<int64_t>& place, int64_t K,
                             const MaybeTensor& weights, int64_t T) {
    const int64_t D = sorted.size(1);
    Tensor out = matrix(T, D, at::kFloat).zero_(), own_weights;
    if (weights) own_weights = weights->to(at::kFloat).contiguous();
    const float* weight = weights ? own_weights.const_data_ptr<float>() : nullptr;
    const float* from = sorted.const_data_ptr<float>();
    float* to = out.data_ptr<float>();
    at::parallel_for(0, T, 32, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t)
        for (int64_t s = t * K; s < (t + 1) * K; ++s) {
          const float w = weight ? weight[s] : 1.f;
          for (int64_t d = 0; d < D; ++d) to[t * D + d] += w * from[place[s] * D + d];
        }
    });
    return out;
  }

  int64_t num_heads_, activation_;
  Precision precision_;
  std::vector<Layer> layers_;
};

// Whether this processor has products of a precision.
bool multiplies(int64_t precision) {
  try {
    const Linear linear(at::ones({4, 4}), std::nullopt, static_cast<Precision>(precision));
    const Tensor rows = matrix(1, 4, at::kFloat).fill_(1.);
    float out[4];
    linear.apply(encode(rows, linear.precision), out, 4);
    return std::abs(out[0] - 4.f) < .1f;
  } catch (const std::exception&) {
    return false;
  }
}

}  // namespace
}  // namespace moe_dist

TORCH_LIBRARY_FRAGMENT(moe_dist, library) {
  using moe_dist::Encoder;
  library.def("multiplies(int precision) -> bool", &moe_dist::multiplies);
  library.class_<Encoder>("Encoder")
      .def(torch::init<int64_t, int64_t, int64_t>())
      .def("add_layer", &Encoder::add_layer)
      .def("forward", &Encoder::forward)
      .def("attention_half", &Encoder::attention_half)
      .def("feed_forward_half", &Encoder::feed_forward_half);
}
