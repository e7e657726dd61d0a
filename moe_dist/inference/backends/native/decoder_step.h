// All layers of a decoder for a few tokens, as when it writes: threads go through the layers
// together. Small work (norms, gates, codes of rows) each of them does for itself, so that they
// wait for each other only where rows of weights or heads are shared out. Shapes: T tokens, R rows
// of feed-forward networks (a token and one of its experts).
#pragma once

#include "decoder_layer.h"
#include "team.h"

#include <utility>

namespace moe_dist {

constexpr int64_t kStepTokens = 16;

// Rows that one network multiplies, at most `kBlockM`.
struct RowsOfNetwork {
  const FeedForward* network;
  int64_t first, count;
};

class DecoderStep {
 public:
  DecoderStep(const std::vector<DecoderLayer>& layers, const Heads& heads, Precision precision, const Call& call)
      : layers_(layers), heads_(heads), precision_(precision), call_(call) {
    T_ = call.tokens();
    D_ = layers[0].qkv.K;
    for (size_t i = 0; i < layers.size(); ++i) {
      const DecoderLayer& layer = layers[i];
      rows_ = std::max(rows_, T_ * (chosen(i) + !layer.networks.shared.empty()));
      for (const auto* networks : {&layer.networks.experts, &layer.networks.shared})
        for (const FeedForward& network : *networks) neurons_ = std::max(neurons_, network.in.N);
      experts_ = std::max<int64_t>(experts_, layer.networks.experts.size());
    }
    widest_ = std::max({D_, heads.queries(), neurons_});
  }

  // x (T, D) becomes what the last layer gives. Every routed layer has a gate or a route.
  void run(float* x, const std::vector<LayerCache>& caches) {
    const int64_t widths = heads_.all() + 2 * heads_.queries() + D_;
    const auto room = std::make_unique_for_overwrite<float[]>(T_ * widths + rows_ * (neurons_ + D_));
    float* next = room.get();
    const auto take = [&](int64_t count) { return std::exchange(next, next + count); };
    qkv_ = take(T_ * heads_.all());
    queries_ = take(T_ * heads_.queries());
    context_ = take(T_ * heads_.queries());
    attended_ = take(T_ * D_);
    inner_ = take(rows_ * neurons_);
    results_ = take(rows_ * D_);
    in_team([&](Member member) {
      const BlockProducts products(precision_ == Precision::kFloat);
      Own own(*this);
      std::copy(x, x + T_ * D_, own.x.begin());
      for (size_t i = 0; i < layers_.size(); ++i) {
        attend(layers_[i], caches[i], member, own);
        feed_forward(i, member, own);
      }
      if (member.number == 0) std::copy(own.x.begin(), own.x.end(), x);
    });
  }

 private:
  // What a thread has for itself. Its x is as all others'.
  struct Own {
    std::vector<float> x, normed, scores;
    OwnCodes codes;
    std::vector<int64_t> ids, tokens, place;
    std::vector<float> weights;
    std::vector<RowsOfNetwork> parts;

    explicit Own(const DecoderStep& step)
        : x(step.T_ * step.D_),
          normed(step.T_ * step.D_),
          scores(std::max({step.call_.sight.n(), step.experts_, 2 * step.heads_.width})),
          codes(step.rows_, step.widest_, step.precision_),
          ids(step.rows_),
          tokens(step.rows_),
          place(step.rows_),
          weights(step.rows_) {
      parts.reserve(step.experts_ + 1 + step.rows_ / kBlockM);
    }
  };

  void attend(const DecoderLayer& layer, const LayerCache& cache, Member member, Own& own) {
    for (int64_t t = 0; t < T_; ++t) {
      layer.input_norm.apply(&own.x[t * D_], &own.normed[t * D_]);
      own.codes.put(t, &own.normed[t * D_], D_);
    }
    member.share(layer.qkv.blocks, [&](int64_t block) {
      layer.qkv.apply_block(block, own.codes.from(0, D_), T_, qkv_, heads_.all());
    });
    member.meet();
    with_cache_type(cache.keys.scalar_type(), [&](auto kind) {
      using T = decltype(kind);
      member.share(T_, [&](int64_t t) {
        place_token<T>(layer, heads_, call_, cache, t, qkv_ + t * heads_.all(),
                       queries_ + t * heads_.queries(), own.scores.data());
      });
      member.meet();
      const int64_t width = heads_.width, room = cache.keys.size(2);
      member.share(T_ * heads_.number, [&](int64_t i) {
        const int64_t t = i / heads_.number, h = i % heads_.number, text = t / call_.L, l = t % call_.L;
        const int64_t row = (text * heads_.of_keys + h / heads_.group()) * room * width;
        attend_one(queries_ + i * width, cache.keys.const_data_ptr<T>() + row,
                   cache.values.const_data_ptr<T>() + row, call_.sight.first(l, layer.window),
                   call_.past + l, call_.sight.seen(text), width, heads_.scale,
                   own.scores.data(), context_ + i * width);
      });
    });
    member.meet();
    const int64_t K = heads_.queries();
    for (int64_t t = 0; t < T_; ++t) own.codes.put(t, context_ + t * K, K);
    member.share(layer.attention_out.blocks, [&](int64_t block) {
      layer.attention_out.apply_block(block, own.codes.from(0, K), T_, attended_, D_);
    });
    member.meet();
    for (int64_t i = 0; i < T_ * D_; ++i) own.x[i] += attended_[i];
  }

  void feed_forward(int64_t index, Member member, Own& own) {
    const DecoderLayer& layer = layers_[index];
    for (int64_t t = 0; t < T_; ++t) layer.network_norm.apply(&own.x[t * D_], &own.normed[t * D_]);
    route(index, own);
    const int64_t R = own.parts.back().first + own.parts.back().count;
    for (int64_t r = 0; r < R; ++r) own.codes.put(r, &own.normed[own.tokens[r] * D_], D_);
    each_block(own.parts, &FeedForward::in, member, [&](const RowsOfNetwork& part, int64_t block) {
      const Linear& in = part.network->in;
      in.apply_block(block, own.codes.from(part.first, D_), part.count,
                     inner_ + part.first * neurons_, in.N, layer.networks.activation);
    });
    member.meet();
    for (const RowsOfNetwork& part : own.parts) {
      // Parts lie as if all were as wide as the widest.
      const int64_t F = part.network->in.N;
      for (int64_t r = 0; r < part.count; ++r)
        own.codes.put(r, inner_ + part.first * neurons_ + r * F, F);
      const Linear& out = part.network->out;
      share_of(part, own.parts, &FeedForward::out, member, [&](int64_t block) {
        out.apply_block(block, own.codes.from(0, F), part.count,
                        results_ + part.first * D_, D_);
      });
    }
    member.meet();
    add_results(index, own);
  }

  // Experts of each token.
  int64_t chosen(int64_t index) const {
    const Route& given = call_.routes[index];
    return given.ids.defined() ? given.ids.size(1) : layers_[index].gate.top_k;
  }

  // Which rows each network multiplies: those of the chosen experts, then all for shared neurons.
  void route(int64_t index, Own& own) const {
    const DecoderLayer& layer = layers_[index];
    const Route& given = call_.routes[index];
    const int64_t K = chosen(index), S = T_ * K;
    own.parts.clear();
    if (!given.ids.defined() && !layer.gate.weight.defined()) {
      for (int64_t t = 0; t < T_; ++t) own.tokens[t] = own.place[t] = t;
      std::fill(own.weights.begin(), own.weights.begin() + T_, 1.f);
      own.parts.push_back({&layer.networks.experts[0], 0, T_});
    } else {
      const int64_t E = layer.networks.experts.size();
      if (given.ids.defined()) {
        std::copy_n(given.ids.const_data_ptr<int64_t>(), S, own.ids.begin());
        if (given.weights.defined())
          std::copy_n(given.weights.const_data_ptr<float>(), S, own.weights.begin());
        else
          std::fill_n(own.weights.begin(), S, 1.f);
      }
      for (int64_t t = 0; t < T_ && !given.ids.defined(); ++t)
        layer.gate.choose(&own.normed[t * D_], own.scores.data(), &own.ids[t * K], &own.weights[t * K]);
      int64_t row = 0;
      for (int64_t e = 0; e < E; ++e) {
        const int64_t first = row;
        for (int64_t s = 0; s < S; ++s)
          if (own.ids[s] == e) {
            own.tokens[row] = s / K;
            own.place[s] = row++;
          }
        // More rows than tokens where given ids name an expert twice.
        for (int64_t part = first; part < row; part += kBlockM)
          own.parts.push_back({&layer.networks.experts[e], part, std::min(kBlockM, row - part)});
      }
    }
    if (layer.networks.shared.empty()) return;
    for (int64_t t = 0; t < T_; ++t) own.tokens[S + t] = t;
    own.parts.push_back({&layer.networks.shared[0], S, T_});
  }

  void add_results(int64_t index, Own& own) const {
    const DecoderLayer& layer = layers_[index];
    const int64_t K = chosen(index);
    for (int64_t t = 0; t < T_; ++t) {
      float* to = &own.x[t * D_];
      for (int64_t s = t * K; s < (t + 1) * K; ++s) {
        const float* from = results_ + own.place[s] * D_;
        const float weight = own.weights[s];
        for (int64_t d = 0; d < D_; ++d) to[d] += weight * from[d];
      }
      if (layer.networks.shared.empty()) continue;
      const float* from = results_ + (T_ * K + t) * D_;
      for (int64_t d = 0; d < D_; ++d) to[d] += from[d];
    }
  }

  // This thread's part of all blocks of all networks, one after the other.
  template <typename Function>
  static void each_block(const std::vector<RowsOfNetwork>& parts, Linear FeedForward::* which,
                         Member member, Function&& function) {
    for (const RowsOfNetwork& part : parts)
      share_of(part, parts, which, member, [&](int64_t block) { function(part, block); });
  }

  // The same of one network.
  template <typename Function>
  static void share_of(const RowsOfNetwork& part, const std::vector<RowsOfNetwork>& parts,
                       Linear FeedForward::* which, Member member, Function&& function) {
    int64_t all = 0, before = 0;
    for (const RowsOfNetwork& one : parts) {
      if (&one == &part) before = all;
      all += (one.network->*which).blocks;
    }
    const int64_t first = all * member.number / member.of, last = all * (member.number + 1) / member.of;
    const int64_t end = std::min(last - before, (part.network->*which).blocks);
    for (int64_t block = std::max<int64_t>(0, first - before); block < end; ++block) function(block);
  }

  const std::vector<DecoderLayer>& layers_;
  const Heads& heads_;
  Precision precision_;
  const Call& call_;
  int64_t T_, D_, rows_ = 0, neurons_ = 0, experts_ = 1, widest_;
  float *qkv_, *queries_, *context_, *attended_, *inner_, *results_;  // written by all threads
};

}  // namespace moe_dist
