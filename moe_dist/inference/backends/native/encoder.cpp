// The blocks of an encoder of the BERT kind in one call: attention, norm, dense or routed
// feed-forward network, norm. Shapes: B texts, L tokens of each as they are given, T of all texts together
// (B * L with their padding), D model, H heads, E experts, K of them for a token.

#include "gate.h"
#include "text_attention.h"

#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <limits>
#include <vector>

namespace moe_dist {
namespace {

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

struct Norm {
  Tensor weight, bias;
  double epsilon = 0;

  // y = norm(a + b), a row each.
  void apply(const float* a, const float* b, float* y) const {
    add_norm(a, b, weight.numel(), weight.const_data_ptr<float>(), bias.const_data_ptr<float>(), epsilon, y);
  }

  // norm(a[place[t]] + b[t]), row by row, as float32; without places a's rows lie as b's.
  Tensor operator()(const Tensor& a, const Tensor& b, const int64_t* place = nullptr) const {
    const int64_t T = b.size(0), D = b.size(1);
    Tensor y = matrix(T, D, at::kFloat);
    const float *pa = a.const_data_ptr<float>(), *pb = b.const_data_ptr<float>();
    float* out = y.data_ptr<float>();
    at::parallel_for(0, T, 32, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t) apply(pa + (place ? place[t] : t) * D, pb + t * D, out + t * D);
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
  // (B * L, K) and weights of that shape, or none. The mask is added or, of bool, says what is seen; it
  // goes with (B, H, L, L). What it hides from all is left out and gives 0, see `Texts::seen`. Gates that
  // choose for a text read `shares` (B, L), see `Gate`.
  Tensor forward(const Tensor& hidden, const MaybeTensor& mask, const MaybeTensor& shares, const MaybeTensors& ids,
                 const MaybeTensors& weights) const {
    c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    for (const Layer& layer : layers_) check(layer, hidden);
    const int64_t B = hidden.size(0), L = hidden.size(1);
    std::vector<Route> routes = checked_routes(layers_, ids, weights, B * L);
    MaybeTensor own_shares;
    if (shares) {
      TORCH_CHECK(shares->dim() == 2 && shares->size(0) == B && shares->size(1) == L, "shares are ", shares->sizes());
      own_shares = shares->to(at::kFloat).reshape({B * L}).contiguous();
    }
    const std::optional<Texts> seen = mask ? Texts::seen(*mask, B, L) : std::nullopt;
    const Texts texts = seen ? *seen : Texts::whole(B, L);
    const MaybeTensor own_mask = seen ? std::nullopt : prepared(mask);
    Tensor rows = float_rows(texts.kept.defined() ? hidden.reshape({B * L, -1}).index_select(0, texts.kept) : hidden);
    if (texts.kept.defined()) {
      if (own_shares) own_shares = own_shares->index_select(0, texts.kept);
      for (Route& route : routes) route = route.of(texts.kept);
    }
    for (size_t i = 0; i < layers_.size(); ++i) {
      const Layer& layer = layers_[i];
      rows = attend(layer, rows, texts, own_mask);
      rows = feed_forward(layer, rows, routes[i].ids.defined() ? routes[i] : layer.gate.route(rows, &texts, own_shares));
    }
    if (!texts.kept.defined()) return rows.to(hidden.scalar_type()).view(hidden.sizes());
    const Tensor out = at::zeros({B * L, hidden.size(2)}, hidden.options());
    return out.index_copy_(0, texts.kept, rows.to(hidden.scalar_type())).view(hidden.sizes());
  }

  // The first half of a layer: (B, L, D) to float32 of that shape.
  Tensor attention_half(int64_t index, const Tensor& hidden, const MaybeTensor& mask) const {
    c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const Layer& layer = layers_.at(index);
    check(layer, hidden);
    const Texts texts = Texts::whole(hidden.size(0), hidden.size(1));
    return attend(layer, float_rows(hidden), texts, prepared(mask)).view(hidden.sizes());
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
    if (!mask || attention_type(precision_) == at::kFloat)
      return mask ? MaybeTensor(prepared_mask(*mask, at::kFloat)) : mask;
    // Added in float32, whatever it was.
    const Tensor own = prepared_mask(*mask, at::kBFloat16);
    if (own.scalar_type() != at::kBool) return own.to(at::kFloat);
    return at::zeros(own.sizes(), at::kFloat).masked_fill_(own.logical_not(), -std::numeric_limits<float>::infinity());
  }

  // Whether texts of this length are attended to by our own products.
  bool has_own_attention(int64_t L) const {
    if (layers_.empty() || attention_type(precision_) == at::kFloat) return false;
    return TextAttention::takes(L, layers_[0].qkv.N / 3 / num_heads_, has_bfloat16_);
  }

  // Like `feed_forward`, it may write over x. A mask goes with (B, H, longest, longest).
  Tensor attend(const Layer& layer, const Tensor& x, const Texts& texts, const MaybeTensor& mask) const {
    const int64_t B = texts.count(), L = texts.longest;
    if (!has_own_attention(L)) return attend_by_torch(layer, x, texts, mask);
    Tensor own_mask;
    if (mask) {
      own_mask = mask->expand({B, num_heads_, L, L});
      if (own_mask.stride(3) != 1) own_mask = own_mask.contiguous();
    }
    const std::vector<int64_t> parts = parts_of(texts);
    return static_cast<int64_t>(parts.size()) <= at::get_num_threads() ? attend_by_heads(layer, x, texts, own_mask)
                                                                       : attend_by_texts(layer, x, texts, own_mask, parts);
  }

  // Where parts of whole texts begin, and where the last one ends: about `kPartRows` rows each.
  static std::vector<int64_t> parts_of(const Texts& texts) {
    std::vector<int64_t> parts{0};
    for (int64_t b = 1; b < texts.count(); ++b)
      if (texts.starts[b + 1] - texts.starts[parts.back()] > kPartRows) parts.push_back(b);
    parts.push_back(texts.count());
    return parts;
  }

  // Attention of one head of text b, whose queries, keys and values begin at `qkv`.
  static void attend_head(TextAttention& attention, const at::BFloat16* qkv, const Tensor& mask, int64_t b, int64_t h,
                          int64_t D, int64_t width, at::BFloat16* context) {
    const at::BFloat16* own = qkv + h * width;
    const float* row = mask.defined() ? mask.const_data_ptr<float>() + b * mask.stride(0) + h * mask.stride(1) : nullptr;
    attention(own, own + D, own + 2 * D, 3 * D, row, row ? mask.stride(2) : 0, context + h * width, D);
  }

  // Some texts after the other in one thread, so that what lies between the products stays near its
  // core. Written over x.
  Tensor attend_by_texts(const Layer& layer, const Tensor& x, const Texts& texts, const Tensor& mask,
                         const std::vector<int64_t>& parts) const {
    const int64_t D = layer.qkv.N / 3, own_D = x.size(1), number = parts.size() - 1;
    const auto first_row = [&](int64_t part) { return texts.starts[parts[part]]; };
    int64_t most = 0;
    for (int64_t part = 0; part < number; ++part) most = std::max(most, first_row(part + 1) - first_row(part));
    float* all = x.data_ptr<float>();
    take_turns(number, [&](auto take) {
      const BlockProducts products(false);
      TextAttention attention(texts.longest, D / num_heads_);
      OwnCodes codes(most, std::max(D, own_D), precision_);
      std::vector<at::BFloat16> qkv((most + 15) * 3 * D), context(most * D);
      std::vector<float> results(most * own_D);
      for (int64_t part = take(), next; part < number; part = next) {
        const int64_t first = first_row(part), rows = first_row(part + 1) - first;
        float* x_rows = all + first * own_D;
        for (int64_t r = 0; r < rows; ++r) codes.put(r, x_rows + r * own_D, own_D);
        layer.qkv.apply_rows(codes.from(0, own_D), rows, qkv.data(), 3 * D);
        for (int64_t b = parts[part]; b < parts[part + 1]; ++b) {
          const int64_t row = texts.starts[b] - first;
          attention.set_length(texts.length(b));
          for (int64_t h = 0; h < num_heads_; ++h)
            attend_head(attention, &qkv[row * 3 * D], mask, b, h, D, D / num_heads_, &context[row * D]);
        }
        for (int64_t r = 0; r < rows; ++r) codes.put(r, &context[r * D], D);
        layer.attention_out.apply_rows(codes.from(0, D), rows, results.data(), own_D);
        next = take();  // Not before, or one thread takes what another could begin.
        const int64_t next_rows = next < number ? first_row(next + 1) - first_row(next) : 0;
        for (int64_t r = 0; r < rows; ++r) {
          if (r < next_rows) prefetch_row(all + (first_row(next) + r) * own_D, own_D);
          layer.attention_norm.apply(&results[r * own_D], x_rows + r * own_D, x_rows + r * own_D);
        }
      }
    });
    return x;
  }

  // All threads together, where there are fewer parts than these.
  Tensor attend_by_heads(const Layer& layer, const Tensor& x, const Texts& texts, const Tensor& mask) const {
    const int64_t D = layer.qkv.N / 3;
    const Tensor qkv = products(layer, x), context = matrix(x.size(0), D, at::kBFloat16);
    at::parallel_for(0, texts.count() * num_heads_, 1, [&](int64_t first, int64_t last) {
      const BlockProducts products(false);
      TextAttention attention(texts.longest, D / num_heads_);
      for (int64_t i = first; i < last; ++i) {
        const int64_t b = i / num_heads_, h = i % num_heads_, row = texts.starts[b];
        attention.set_length(texts.length(b));
        attend_head(attention, qkv.const_data_ptr<at::BFloat16>() + row * 3 * D, mask, b, h, D, D / num_heads_,
                    context.data_ptr<at::BFloat16>() + row * D);
      }
    });
    return attended(layer, context, x);
  }

  Tensor attend_by_torch(const Layer& layer, const Tensor& x, const Texts& texts, const MaybeTensor& mask) const {
    const int64_t D = layer.qkv.N / 3;
    const Tensor qkv = products(layer, x);
    const auto attention = [&](const Tensor& rows, int64_t count, int64_t length) {
      const Tensor parts = rows.view({count, length, 3, num_heads_, D / num_heads_}).permute({2, 0, 3, 1, 4});
      const MaybeTensor own = mask && mask->scalar_type() != at::kBool ? MaybeTensor(mask->to(rows.scalar_type())) : mask;
      const Tensor seen = at::scaled_dot_product_attention(parts[0], parts[1], parts[2], own);
      return seen.transpose(1, 2).reshape({count * length, D});
    };
    if (texts.all_alike()) return attended(layer, attention(qkv, texts.count(), texts.longest), x);
    const Tensor context = matrix(x.size(0), D, qkv.scalar_type());
    char* to = static_cast<char*>(context.data_ptr());
    const int64_t bytes = D * context.element_size();
    const auto attend_run = [&](int64_t first, int64_t last) {
      const int64_t start = texts.starts[first], rows = texts.starts[last] - start;
      const Tensor found = attention(qkv.narrow(0, start, rows), last - first, texts.length(first)).contiguous();
      std::memcpy(to + start * bytes, found.const_data_ptr(), rows * bytes);
    };
    // Torch's threads share what is in one call, so few calls are made one after the other.
    const std::vector<int64_t> runs = texts.runs();
    const int64_t number = runs.size() - 1;
    if (number < std::max<int64_t>(at::get_num_threads(), texts.count() / 4)) {
      for (int64_t run = 0; run < number; ++run) attend_run(runs[run], runs[run + 1]);
    } else {
      at::parallel_for(0, texts.count(), 1, [&](int64_t first, int64_t last) {
        const at::NoGradGuard answers_only;
        for (int64_t b = first; b < last; ++b) attend_run(b, b + 1);
      });
    }
    return attended(layer, context, x);
  }

  // Queries, keys and values of all rows: (T, 3 D), with 15 more rows, since a text begins at any row
  // and its tiles are read whole.
  Tensor products(const Layer& layer, const Tensor& x) const {
    const Rows rows = encode(x, precision_);
    const Tensor qkv = matrix(x.size(0) + 15, layer.qkv.N, attention_type(precision_)).narrow(0, 0, x.size(0));
    if (attention_type(precision_) == at::kFloat)
      layer.qkv.apply(rows, qkv.data_ptr<float>(), layer.qkv.N);
    else
      layer.qkv.apply(rows, qkv.data_ptr<at::BFloat16>(), layer.qkv.N);
    return qkv;
  }

  // What follows attention, to the norm.
  Tensor attended(const Layer& layer, const Tensor& context, const Tensor& x) const {
    const Tensor out = matrix(x.size(0), x.size(1), at::kFloat);
    layer.attention_out.apply(context_rows(context, precision_), out.data_ptr<float>(), x.size(1));
    return layer.attention_norm(out, x);
  }

  Tensor feed_forward(const Layer& layer, const Tensor& x, const Route& route) const {
    const MaybeTensor weights = route.given_weights();
    if (layer.networks.is_single(route.ids, weights)) {
      float* rows = x.data_ptr<float>();
      layer.networks.each_token(x, route.ids, [&, D = x.size(1)](int64_t t, const float* row) {
        layer.out_norm.apply(row, rows + t * D, rows + t * D);
      });
      return x;
    }
    const Networks::Result out = layer.networks(x, route.ids, weights);
    return layer.out_norm(out.rows, x, out.places());
  }

  int64_t num_heads_, activation_;
  Precision precision_;
  bool has_bfloat16_ = multiplies(static_cast<int64_t>(Precision::kBFloat16));  // as attention wants it
  std::vector<Layer> layers_;
};

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
