// The blocks of an encoder of the BERT kind in one call: attention, norm, dense or routed
// feed-forward network, norm. Shapes: B texts, L tokens of each, T = B * L, D model, H heads,
// E experts, K of them for a token, S = T * K slots.

#include "gate.h"

#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <vector>

namespace moe_dist {
namespace {

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

struct Layer {
  Linear qkv, attention_out;
  Norm attention_norm, out_norm;
  Networks networks;
  Gate gate;
};

class Encoder : public torch::CustomClassHolder {
 public:
  Encoder(int64_t num_heads, int64_t activation, int64_t precision)
      : num_heads_(num_heads), activation_(activation), precision_(static_cast<Precision>(precision)) {}

  // Weights are (outputs, inputs), float32; those of the experts, then of shared neurons, if any.
  void add_layer(const Tensor& w_qkv, const Tensor& b_qkv, const Tensor& w_o, const Tensor& b_o,
                 const std::vector<Tensor>& norms, double attention_epsilon, double out_epsilon,
                 const std::vector<Tensor>& w_in, const std::vector<MaybeTensor>& b_in,
                 const std::vector<Tensor>& w_out, const std::vector<MaybeTensor>& b_out,
                 bool has_shared, const MaybeTensor& gate, int64_t top_k, bool weighs, bool by_text) {
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
    layer.attention_norm = {own_floats(norms[0]), own_floats(norms[1]), attention_epsilon};
    layer.out_norm = {own_floats(norms[2]), own_floats(norms[3]), out_epsilon};
    layer.networks.activation = activation_;
    layer.networks.precision = precision_;
    const size_t E = w_in.size() - has_shared;
    for (size_t e = 0; e < w_in.size(); ++e) {
      auto& place = e < E ? layer.networks.experts : layer.networks.shared;
      place.push_back({Linear(w_in[e], b_in[e], precision_), Linear(w_out[e], b_out[e], precision_)});
    }
    if (gate) {
      layer.gate = Gate(*gate, top_k, weighs, by_text);
      layer.gate.check(E, D);
    }
    layers_.push_back(std::move(layer));
  }

  // All layers. A routed one has a gate, or the experts of each token are given: for each layer ids
  // (T, K) and weights of that shape, or none. The mask is added or, of bool, says what is seen; it
  // goes with (B, H, L, L). Gates that choose for a text read `shares`, see `Gate`.
  Tensor forward(const Tensor& hidden, const MaybeTensor& mask, const MaybeTensor& shares, const MaybeTensors& ids,
                 const MaybeTensors& weights) const {
    c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    for (const Layer& layer : layers_) check(layer, hidden);
    const int64_t B = hidden.size(0), L = hidden.size(1);
    const std::vector<Route> routes = checked_routes(layers_, ids, weights, B * L);
    MaybeTensor own_shares;
    if (shares) {
      TORCH_CHECK(shares->dim() == 2 && shares->size(0) == B && shares->size(1) == L, "shares are ", shares->sizes());
      own_shares = shares->to(at::kFloat).contiguous();
    }
    const MaybeTensor own_mask = prepared(mask);
    Tensor rows = float_rows(hidden);
    for (size_t i = 0; i < layers_.size(); ++i) {
      const Layer& layer = layers_[i];
      rows = attend(layer, rows, B, L, own_mask);
      rows = feed_forward(layer, rows, routes[i].ids.defined() ? routes[i] : layer.gate.route(rows, own_shares));
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
    const Tensor x = float_rows(hidden);
    return feed_forward(layer, x, checked_route(layer.networks, ids_TK, weights_TK, x.size(0))).view(hidden.sizes());
  }

 private:
  static void check(const Layer& layer, const Tensor& hidden) {
    TORCH_CHECK(hidden.dim() == 3 && hidden.size(2) == layer.qkv.K && hidden.is_floating_point(),
                "hidden states are ", hidden.scalar_type(), " ", hidden.sizes());
  }

  MaybeTensor prepared(const MaybeTensor& mask) const {
    return mask ? MaybeTensor(prepared_mask(*mask, attention_type(precision_))) : mask;
  }

  Tensor attend(const Layer& layer, const Tensor& x, int64_t B, int64_t L, const MaybeTensor& mask) const {
    const int64_t T = B * L, D = layer.qkv.N / 3, width = D / num_heads_;
    const Rows rows = encode(x, precision_);
    Tensor qkv = at::empty({T, 3 * D}, x.options().dtype(attention_type(precision_)));
    if (attention_type(precision_) == at::kFloat)
      layer.qkv.apply(rows, qkv.data_ptr<float>(), 3 * D);
    else
      layer.qkv.apply(rows, qkv.data_ptr<at::BFloat16>(), 3 * D);
    const Tensor parts = qkv.view({B, L, 3, num_heads_, width}).permute({2, 0, 3, 1, 4});
    const Tensor seen = at::scaled_dot_product_attention(parts[0], parts[1], parts[2], mask);
    Tensor out = matrix(T, x.size(1), at::kFloat);
    layer.attention_out.apply(context_rows(seen.transpose(1, 2).reshape({T, D}), precision_), out.data_ptr<float>(), x.size(1));
    return layer.attention_norm(out, x);
  }

  Tensor feed_forward(const Layer& layer, const Tensor& x, const Route& route) const {
    const Networks::Result out = layer.networks(x, route.ids, route.given_weights());
    return layer.out_norm(out.rows, x, out.places());
  }

  int64_t num_heads_, activation_;
  Precision precision_;
  std::vector<Layer> layers_;
};

// Whether this processor has products of a precision.
bool multiplies(int64_t precision) {
  try {
    const Linear linear(at::ones({4, 4}), std::nullopt, static_cast<Precision>(precision));
    // As many as a block's product is asked for.
    const Tensor rows = matrix(2 * kFewRows, 4, at::kFloat).fill_(1.);
    float out[2 * kFewRows * 4];
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
