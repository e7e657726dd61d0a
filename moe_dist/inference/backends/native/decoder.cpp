// The layers of a decoder of the Llama kind in one call: norm, attention with rotated queries and
// keys and a cache, norm, dense or routed feed-forward network; after the last layer a norm. Shapes:
// B texts, L new tokens of each, T = B * L, D model.

#include "decoder_step.h"

#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <map>

namespace moe_dist {
namespace {

using Tensors = std::vector<Tensor>;

class Decoder : public torch::CustomClassHolder {
 public:
  Decoder(int64_t num_heads, int64_t num_key_heads, int64_t width, double scale, int64_t activation,
          int64_t precision, const Tensor& norm, double epsilon)
      : heads_{num_heads, num_key_heads, width, scale},
        activation_(activation),
        precision_(static_cast<Precision>(precision)),
        norm_{own_floats(norm), epsilon} {
    TORCH_CHECK(num_key_heads > 0 && num_heads % num_key_heads == 0 && width > 0 && width % 2 == 0,
                num_heads, " heads of ", width, " for ", num_key_heads);
  }

  // Weights are (outputs, inputs), float32; those of the experts, then of shared neurons, if any.
  // Norms: before attention, before the network, of queries, of keys; the last two may be missing.
  void add_layer(const Tensor& w_qkv, const MaybeTensor& b_qkv, const Tensor& w_o, const MaybeTensor& b_o,
                 const MaybeTensors& norms, const std::vector<double>& epsilons, const Tensors& w_gate,
                 const MaybeTensors& b_gate, const Tensors& w_in, const MaybeTensors& b_in,
                 const Tensors& w_out, const MaybeTensors& b_out, bool has_shared,
                 const MaybeTensor& gate, int64_t top_k, bool weighs, int64_t window) {
    const int64_t D = norm_.weight.numel();
    TORCH_CHECK(norms.size() == 4 && epsilons.size() == 4 && norms[0] && norms[1], "norms are missing");
    TORCH_CHECK(!w_in.empty() && w_gate.size() == w_in.size() && w_out.size() == w_in.size() &&
                    b_gate.size() == w_in.size() && b_in.size() == w_in.size() && b_out.size() == w_in.size(),
                "lists of weights differ in length");
    TORCH_CHECK(w_qkv.size(0) == heads_.all() && w_qkv.size(1) == D && w_o.size(0) == D &&
                    w_o.size(1) == heads_.queries(),
                "widths of attention do not fit");
    for (size_t i = 0; i < 4; ++i)
      TORCH_CHECK(!norms[i] || norms[i]->numel() == (i < 2 ? D : heads_.width), "a norm does not fit");
    for (size_t i = 0; i < w_in.size(); ++i)
      TORCH_CHECK(w_in[i].size(1) == D && w_out[i].size(0) == D && w_in[i].size(0) == w_out[i].size(1),
                  "widths of a feed-forward network do not fit");
    DecoderLayer layer;
    layer.qkv = Linear(w_qkv, b_qkv, precision_);
    layer.attention_out = Linear(w_o, b_o, precision_);
    RmsNorm* const own[] = {&layer.input_norm, &layer.network_norm, &layer.query_norm, &layer.key_norm};
    for (size_t i = 0; i < 4; ++i)
      if (norms[i]) *own[i] = {own_floats(*norms[i]), epsilons[i]};
    layer.networks.activation = activation_;
    layer.networks.precision = precision_;
    const size_t E = w_in.size() - has_shared;
    for (size_t e = 0; e < w_in.size(); ++e) {
      auto& place = e < E ? layer.networks.experts : layer.networks.shared;
      place.push_back({Linear(w_in[e], b_in[e], precision_, w_gate[e], b_gate[e]),
                       Linear(w_out[e], b_out[e], precision_)});
    }
    if (gate) {
      layer.gate = Gate(*gate, top_k, weighs);
      layer.gate.check(E, D);
    }
    layer.window = window;
    layers_.push_back(std::move(layer));
  }

  // All layers and the last norm. A routed layer has a gate, or the experts of each token are given:
  // for each layer ids (T, K) and weights of that shape, or none. Places are rows of `cos` and `sin`.
  // Keys and values are written behind the `past` tokens of each layer's buffers; without buffers
  // they are not kept. The mask, (B, tokens) or of four dimensions as attention takes it, may be
  // missing.
  Tensor forward(const Tensor& hidden, const Tensor& cos, const Tensor& sin, const Tensor& positions,
                 const MaybeTensor& mask, const Tensors& keys, const Tensors& values, int64_t past,
                 const MaybeTensors& ids, const MaybeTensors& weights) const {
    c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    Call call = begun(hidden, cos, sin, positions, mask, past);
    if (!call.tokens()) return hidden.clone();
    const std::vector<LayerCache> caches = checked(keys, values, call);
    call.routes = checked_routes(layers_, ids, weights, call.tokens());
    Tensor x = float_rows(hidden);
    if (call.tokens() <= kStepTokens && !call.sight.is_of_pairs()) {
      DecoderStep(layers_, heads_, precision_, call).run(x.data_ptr<float>(), caches);
    } else {
      Masks masks;
      for (size_t i = 0; i < layers_.size(); ++i) {
        const Tensor normed = normal(layers_[i].network_norm, x, attended(layers_[i], call, caches[i], x, masks));
        const Route route = call.routes[i].ids.defined() ? call.routes[i] : layers_[i].gate.route(normed);
        feed_forward(layers_[i], normed, route, x);
      }
    }
    return finished(x, hidden);
  }

  // The first half of a layer: what (B, L, D) becomes, and what the network and a router read of it;
  // float32.
  std::tuple<Tensor, Tensor> attention_half(int64_t index, const Tensor& hidden, const Tensor& cos,
                                            const Tensor& sin, const Tensor& positions,
                                            const MaybeTensor& mask, const Tensors& keys,
                                            const Tensors& values, int64_t past) const {
    c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const DecoderLayer& layer = layers_.at(index);
    const Call call = begun(hidden, cos, sin, positions, mask, past);
    const std::vector<LayerCache> caches = checked(keys, values, call);
    const Tensor x = float_rows(hidden);
    Masks masks;
    const Tensor added = call.tokens() ? attended(layer, call, caches[index], x, masks) : Tensor();
    const Tensor normed = normal(layer.network_norm, x, added);
    return {x.view(hidden.sizes()), normed.view(hidden.sizes())};
  }

  // The second half, each token's experts given: ids (T, K), weights of the same shape, or ones.
  // Without ids there is one network.
  Tensor feed_forward_half(int64_t index, const Tensor& hidden, const Tensor& normed,
                           const MaybeTensor& ids_TK, const MaybeTensor& weights_TK) const {
    c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const DecoderLayer& layer = layers_.at(index);
    check(hidden);
    TORCH_CHECK(normed.sizes() == hidden.sizes(), "two inputs differ in shape");
    const Tensor x = float_rows(hidden);
    if (x.size(0)) feed_forward(layer, float_rows(normed), checked_route(layer.networks, ids_TK, weights_TK, x.size(0)), x);
    return x.view(hidden.sizes());
  }

  // The norm after the last layer, in the type of `like`.
  Tensor last_norm(const Tensor& hidden, const Tensor& like) const {
    check(hidden);
    return finished(float_rows(hidden), like);
  }

 private:
  // By the window of a layer.
  using Masks = std::map<int64_t, MaybeTensor>;

  void check(const Tensor& hidden) const {
    TORCH_CHECK(hidden.dim() == 3 && hidden.size(2) == norm_.weight.numel() && hidden.is_floating_point(),
                "hidden states are ", hidden.scalar_type(), " ", hidden.sizes());
  }

  Call begun(const Tensor& hidden, const Tensor& cos, const Tensor& sin, const Tensor& positions,
             const MaybeTensor& mask, int64_t past) const {
    check(hidden);
    const int64_t B = hidden.size(0), L = hidden.size(1);
    TORCH_CHECK(past >= 0, past, " tokens before");
    for (const Tensor* table : {&cos, &sin})
      TORCH_CHECK(table->dim() == 2 && table->size(0) == cos.size(0) && table->size(1) == heads_.width &&
                      table->scalar_type() == at::kFloat && table->is_contiguous(),
                  "places are ", table->scalar_type(), " ", table->sizes());
    TORCH_CHECK(positions.dim() == 2 && (positions.size(0) == B || positions.size(0) == 1) &&
                    positions.size(1) == L && positions.scalar_type() == at::kLong,
                "positions are ", positions.scalar_type(), " ", positions.sizes());
    const Tensor own = positions.contiguous();
    const int64_t* place = own.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < own.numel(); ++i)
      TORCH_CHECK_INDEX(place[i] >= 0 && place[i] < cos.size(0), "position ", place[i], " of ", cos.size(0));
    return {B, L, past, Sight(mask, B, L, past), cos, sin, own};
  }

  std::vector<LayerCache> checked(const Tensors& keys, const Tensors& values, const Call& call) const {
    const size_t number = layers_.size();
    if (keys.empty() && values.empty()) {
      TORCH_CHECK(!call.past, "there are tokens before, and no buffers");
      const auto options = at::TensorOptions().dtype(attention_type(precision_));
      const std::vector<int64_t> sizes{call.B, heads_.of_keys, call.L, heads_.width};
      return std::vector<LayerCache>(number, {at::empty(sizes, options), at::empty(sizes, options)});
    }
    TORCH_CHECK(keys.size() == number && values.size() == number, "buffers for ", keys.size(), " layers");
    std::vector<LayerCache> caches;
    for (size_t i = 0; i < number; ++i) {
      for (const Tensor* one : {&keys[i], &values[i]})
        TORCH_CHECK(one->dim() == 4 && one->size(0) == call.B && one->size(1) == heads_.of_keys &&
                        one->size(2) >= call.sight.n() && one->size(3) == heads_.width &&
                        one->sizes() == keys[i].sizes() && one->is_contiguous() &&
                        one->scalar_type() == attention_type(precision_),
                    "a buffer is ", one->scalar_type(), " ", one->sizes(), " for ", call.sight.n(), " tokens");
      caches.push_back({keys[i], values[i]});
    }
    return caches;
  }

  // norm(x), where `added` is added to x before.
  static Tensor normal(const RmsNorm& norm, const Tensor& x, const Tensor& added = {}) {
    const int64_t T = x.size(0), D = x.size(1);
    Tensor y = matrix(T, D, at::kFloat);
    float *from = x.data_ptr<float>(), *to = y.data_ptr<float>();
    const float* more = added.defined() ? added.const_data_ptr<float>() : nullptr;
    at::parallel_for(0, T, 32, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t) {
        for (int64_t d = 0; d < D && more; ++d) from[t * D + d] += more[t * D + d];
        norm.apply(from + t * D, to + t * D);
      }
    });
    return y;
  }

  Tensor finished(const Tensor& x, const Tensor& like) const {
    return normal(norm_, x).to(like.scalar_type()).view(like.sizes());
  }

  // What attention adds to x: (T, D).
  Tensor attended(const DecoderLayer& layer, const Call& call, const LayerCache& cache, const Tensor& x,
                  Masks& masks) const {
    const int64_t T = call.tokens(), D = x.size(1), n = call.sight.n();
    const auto type = attention_type(precision_);
    Tensor qkv = at::empty({T, heads_.all()}, x.options());
    layer.qkv.apply(encode(normal(layer.input_norm, x), precision_), qkv.data_ptr<float>(), heads_.all());
    Tensor queries = at::empty({call.B, call.L, heads_.number, heads_.width}, x.options().dtype(type));
    with_cache_type(type, [&](auto kind) {
      using Kind = decltype(kind);
      const float* from = qkv.const_data_ptr<float>();
      Kind* to = queries.data_ptr<Kind>();
      at::parallel_for(0, T, 8, [&](int64_t first, int64_t last) {
        std::vector<float> room(2 * heads_.width);
        for (int64_t t = first; t < last; ++t)
          place_token<Kind>(layer, heads_, call, cache, t, from + t * heads_.all(),
                            to + t * heads_.queries(), room.data());
      });
    });
    if (!masks.count(layer.window)) masks[layer.window] = call.sight.for_pairs(layer.window, type);
    const MaybeTensor& mask = masks[layer.window];
    const auto all_heads = [&](const Tensor& buffer) {
      if (heads_.group() == 1) return buffer.narrow(2, 0, n);
      return buffer.narrow(2, 0, n)
          .unsqueeze(2)
          .expand({call.B, heads_.of_keys, heads_.group(), n, heads_.width})
          .reshape({call.B, heads_.number, n, heads_.width});
    };
    const Tensor seen = at::scaled_dot_product_attention(queries.transpose(1, 2), all_heads(cache.keys), all_heads(cache.values),
                                                         mask, 0., !mask && !call.past, heads_.scale);
    Tensor out = matrix(T, D, at::kFloat);
    layer.attention_out.apply(context_rows(seen.transpose(1, 2).reshape({T, heads_.queries()}), precision_),
                              out.data_ptr<float>(), D);
    return out;
  }

  static void feed_forward(const DecoderLayer& layer, const Tensor& normed, const Route& route, const Tensor& x) {
    const Networks::Result out = layer.networks(normed, route.ids, route.given_weights());
    const int64_t T = x.size(0), D = x.size(1), *place = out.places();
    const float* from = out.rows.const_data_ptr<float>();
    float* to = x.data_ptr<float>();
    at::parallel_for(0, T, 32, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t) {
        const float* own = from + (place ? place[t] : t) * D;
        for (int64_t d = 0; d < D; ++d) to[t * D + d] += own[d];
      }
    });
  }

  Heads heads_;
  int64_t activation_;
  Precision precision_;
  RmsNorm norm_;
  std::vector<DecoderLayer> layers_;
};

// One packed product, such as the head of a language model.
class Product : public torch::CustomClassHolder {
 public:
  Product(const Tensor& weight, const MaybeTensor& bias, int64_t precision)
      : linear_(weight, bias, static_cast<Precision>(precision)) {}

  // (..., inputs) to (..., outputs), float32.
  Tensor apply(const Tensor& hidden) const {
    TORCH_CHECK(hidden.dim() >= 1 && hidden.size(-1) == linear_.K && hidden.is_floating_point(),
                "rows are ", hidden.scalar_type(), " ", hidden.sizes());
    std::vector<int64_t> sizes = hidden.sizes().vec();
    sizes.back() = linear_.N;
    Tensor out = at::empty(sizes, at::kFloat);
    if (out.numel())
      linear_.apply(encode(float_rows(hidden), linear_.precision), out.data_ptr<float>(), linear_.N);
    return out;
  }

 private:
  Linear linear_;
};

}  // namespace
}  // namespace moe_dist

TORCH_LIBRARY_FRAGMENT(moe_dist, library) {
  using moe_dist::Decoder;
  using moe_dist::MaybeTensor;
  using moe_dist::Product;
  library.class_<Decoder>("Decoder")
      .def(torch::init<int64_t, int64_t, int64_t, double, int64_t, int64_t, const at::Tensor&, double>())
      .def("add_layer", &Decoder::add_layer)
      .def("forward", &Decoder::forward)
      .def("attention_half", &Decoder::attention_half)
      .def("feed_forward_half", &Decoder::feed_forward_half)
      .def("last_norm", &Decoder::last_norm);
  library.class_<Product>("Product")
      .def(torch::init<const at::Tensor&, const MaybeTensor&, int64_t>())
      .def("apply", &Product::apply);
}
