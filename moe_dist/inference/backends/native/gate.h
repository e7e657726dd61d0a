// Who chooses the experts of tokens: a gate, or a caller who gives them. Shapes: T tokens, D model,
// E experts, K of them for a token, B texts, L tokens of each.
#pragma once

#include "routed_network.h"
#include "texts.h"

#include <algorithm>
#include <limits>

namespace moe_dist {

using MaybeTensors = std::vector<MaybeTensor>;

// Experts of each token: ids (T, K) int64, weights float32, or none where all are 1. Without ids
// there is one network.
struct Route {
  Tensor ids, weights;

  MaybeTensor given_weights() const { return weights.defined() ? MaybeTensor(weights) : std::nullopt; }

  // That of some of the tokens.
  Route of(const Tensor& rows) const {
    if (!ids.defined()) return {};
    return {ids.index_select(0, rows), weights.defined() ? weights.index_select(0, rows) : Tensor()};
  }
};

// Chooses each token's experts by the scores of a linear layer, in float32, or those of a whole text by
// the scores of its mean.
struct Gate {
  Tensor weight;  // (E, D); undefined where others choose, or nobody
  int64_t top_k = 1;
  bool weighs = false;  // else one expert counts whole
  bool by_text = false;

  Gate() = default;
  Gate(const Tensor& weight, int64_t top_k, bool weighs, bool by_text = false)
      : weight(own_floats(weight)), top_k(top_k), weighs(weighs), by_text(by_text) {}

  void check(int64_t E, int64_t D) const {
    TORCH_CHECK(weight.dim() == 2 && weight.size(0) == E && weight.size(1) == D && top_k >= 1 && top_k <= E,
                "a gate of ", weight.sizes(), " for ", E, " experts");
  }

  // Experts of one row, best first, and their weights: `top_k` of each. `scores` has room for E.
  // They are distinct whatever the scores are, NaN too.
  void choose(const float* x, float* scores, int64_t* ids, float* weights) const {
    const int64_t E = weight.size(0), D = weight.size(1);
    const float* rows = weight.const_data_ptr<float>();
    float largest = -std::numeric_limits<float>::infinity(), sum = 0;
    for (int64_t e = 0; e < E; ++e) {
      scores[e] = dot(x, rows + e * D, D);
      largest = std::max(largest, scores[e]);
    }
    if (weighs)
      for (int64_t e = 0; e < E; ++e) sum += std::exp(scores[e] - largest);
    float chosen = 0;
    for (int64_t k = 0; k < top_k; ++k) {
      int64_t best = -1;
      for (int64_t e = 0; e < E; ++e)
        if ((best < 0 || scores[e] > scores[best]) && std::find(ids, ids + k, e) == ids + k) best = e;
      ids[k] = best;
      weights[k] = weighs ? std::exp(scores[ids[k]] - largest) / sum : 1.f;
      chosen += weights[k];
    }
    if (top_k > 1)
      for (int64_t k = 0; k < top_k; ++k) weights[k] /= chosen;
  }

  // The experts of x (T, D). A gate that chooses for texts is told where they lie and `shares` (T,)
  // float32: the part that a token has in the mean of its text.
  Route route(const Tensor& x, const Texts* texts = nullptr, const MaybeTensor& shares = std::nullopt) const {
    if (!weight.defined()) return {};
    TORCH_CHECK(!by_text || (texts && shares), "a gate chooses for a text, and nothing says where texts end");
    const int64_t T = x.size(0), D = x.size(1), K = top_k;
    Tensor ids = at::empty({T, K}, at::kLong), weights = at::empty({T, K}, at::kFloat);
    const float* from = x.const_data_ptr<float>();
    const float* share = by_text ? shares->const_data_ptr<float>() : nullptr;
    int64_t* to_ids = ids.data_ptr<int64_t>();
    float* to_weights = weights.data_ptr<float>();
    at::parallel_for(0, by_text ? texts->count() : T, by_text ? 1 : 16, [&](int64_t first, int64_t last) {
      std::vector<float> scores(weight.size(0)), mean(by_text ? D : 0);
      for (int64_t row = first; row < last; ++row) {
        const int64_t t = by_text ? texts->starts[row] : row, length = by_text ? texts->length(row) : 1;
        if (length == 0) continue;
        const float* own = from + t * D;
        if (by_text) {
          mix(share + t, own, length, D, mean.data());
          own = mean.data();
        }
        choose(own, scores.data(), to_ids + t * K, to_weights + t * K);
        for (int64_t i = 1; i < length; ++i) {
          std::copy_n(to_ids + t * K, K, to_ids + (t + i) * K);
          std::copy_n(to_weights + t * K, K, to_weights + (t + i) * K);
        }
      }
    });
    return {ids, weighs ? weights : Tensor()};
  }
};

inline Route checked_route(const Networks& networks, const MaybeTensor& ids, const MaybeTensor& weights, int64_t T) {
  if (!ids) return {};
  check_routing(*ids, weights, T);
  const int64_t E = networks.experts.size();
  Route route{ids->contiguous(), weights ? weights->to(at::kFloat).contiguous() : Tensor()};
  const int64_t* expert = route.ids.const_data_ptr<int64_t>();
  for (int64_t s = 0; s < route.ids.numel(); ++s)
    TORCH_CHECK_INDEX(expert[s] >= 0 && expert[s] < E, "expert ", expert[s], " of ", E);
  return route;
}

// What a caller chose for each layer, or nothing at all.
template <typename Layer>
std::vector<Route> checked_routes(const std::vector<Layer>& layers, const MaybeTensors& ids,
                                  const MaybeTensors& weights, int64_t T) {
  TORCH_CHECK(ids.size() == weights.size() && (ids.empty() || ids.size() == layers.size()), "experts of ",
              ids.size(), " layers");
  std::vector<Route> routes(layers.size());
  for (size_t i = 0; i < layers.size(); ++i) {
    if (!ids.empty()) routes[i] = checked_route(layers[i].networks, ids[i], weights[i], T);
    TORCH_CHECK(routes[i].ids.defined() || layers[i].gate.weight.defined() || layers[i].networks.experts.size() == 1,
                "there are several experts, and no ids");
  }
  return routes;
}

}  // namespace moe_dist
