// A layer of a decoder of the Llama kind, and what a call gives all layers.
#pragma once

#include "causal_attention.h"
#include "gate.h"

namespace moe_dist {

// Root-mean-square norm; without a weight nothing is done.
struct RmsNorm {
  Tensor weight;
  double epsilon = 0;

  void apply(const float* x, float* y) const {
    rms_norm(x, weight.numel(), weight.const_data_ptr<float>(), epsilon, y);
  }
};

struct DecoderLayer {
  Linear qkv, attention_out;
  RmsNorm input_norm, network_norm;
  RmsNorm query_norm, key_norm;  // of each head, or none
  Networks networks;
  Gate gate;
  int64_t window = 0;  // tokens that one sees; 0 is all before it
};

struct Heads {
  int64_t number, of_keys, width;
  double scale;

  int64_t group() const { return number / of_keys; }
  int64_t queries() const { return number * width; }
  int64_t all() const { return (number + 2 * of_keys) * width; }
};

// Where a layer keeps keys and values: (B, heads of keys, room, width) each, of one type.
struct LayerCache {
  Tensor keys, values;
};

struct Call {
  int64_t B, L, past;
  Sight sight;
  Tensor cos, sin;    // (places, width) float32
  Tensor positions;   // (B, L) or (1, L) int64
  std::vector<Route> routes;  // of each layer

  int64_t tokens() const { return B * L; }

  int64_t position(int64_t t) const {
    return positions.const_data_ptr<int64_t>()[positions.size(0) == 1 ? t % L : t];
  }
};

// Of one token, whose row of all heads is at `qkv`: rotate its queries to `query`, and put its keys
// and values where they belong. Each has the type of its place; `room` is for two heads.
template <typename T, typename Query>
void place_token(const DecoderLayer& layer, const Heads& heads, const Call& call, const LayerCache& cache,
                 int64_t t, const float* qkv, Query* query, float* room) {
  const int64_t width = heads.width, place = call.past + t % call.L, text = t / call.L;
  const float* cos = call.cos.const_data_ptr<float>() + call.position(t) * width;
  const float* sin = call.sin.const_data_ptr<float>() + call.position(t) * width;
  float* const turned = room + width;
  const auto turn = [&](const float* from, const RmsNorm& norm) {
    if (norm.weight.defined()) {
      norm.apply(from, room);
      from = room;
    }
    rotate(from, cos, sin, width, turned);
  };
  for (int64_t h = 0; h < heads.number; ++h) {
    turn(qkv + h * width, layer.query_norm);
    store_row(turned, width, query + h * width);
  }
  const int64_t room_for = cache.keys.size(2);
  T *keys = cache.keys.data_ptr<T>(), *values = cache.values.data_ptr<T>();
  for (int64_t h = 0; h < heads.of_keys; ++h) {
    const int64_t row = ((text * heads.of_keys + h) * room_for + place) * width;
    const float* key = qkv + heads.queries() + h * width;
    turn(key, layer.key_norm);
    store_row(turned, width, keys + row);
    store_row(key + heads.of_keys * width, width, values + row);
  }
}

// Calls back with a value of the type of a cache.
template <typename Function>
void with_cache_type(at::ScalarType type, Function&& function) {
  if (type == at::kFloat) return function(float());
  function(at::BFloat16());
}

}  // namespace moe_dist
