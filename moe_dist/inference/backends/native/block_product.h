// Products of a block of rows with a block of weights: in tiles of AMX by our own code, else by torch's
// block kernels. Shapes: M rows, N columns, K inputs.
#pragma once

#include "vectors.h"

#include <ATen/native/CPUBlas.h>

#if defined(__AMX_TILE__) && defined(__AMX_INT8__) && defined(__AMX_BF16__) && defined(__linux__)
#define MOE_DIST_TILES
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cstdint>
#include <type_traits>

namespace moe_dist {

constexpr int64_t kPartN = 32;  // columns of a product that are done together

// Kernels are made for each number of rows, so there are few numbers; bfloat16 has tiles from 16 on.
inline int64_t rounded_rows(int64_t rows, bool by_16) {
  if (rows > 8 || (by_16 && rows > 2)) return (rows + 15) / 16 * 16;
  return rows > 4 ? 8 : rows > 2 ? 4 : rows;
}

#if defined(MOE_DIST_TILES)

// Tiles are 16 rows of 64 bytes: 0 to 3 are sums, 4 and 5 of rows, 6 and 7 of weights.
namespace tiles {

constexpr int64_t kRows = 16, kBytes = 64;

// Linux gives a process tiles when it asks.
inline bool exist() {
  constexpr long kRequest = 0x1023, kTileData = 18;
  static const bool granted = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  return granted;
}

inline void configure() {
  struct alignas(64) {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  } shape;
  for (int tile = 0; tile < 8; ++tile) {
    shape.bytes[tile] = kBytes;
    shape.rows[tile] = kRows;
  }
  asm volatile("ldtilecfg %0" ::"m"(shape));
}

// The compiler takes tiles as literal numbers alone.
#define MOE_DIST_ADD(sum, row, weight)          \
  if constexpr (std::is_same_v<A, uint8_t>)     \
    _tile_dpbusd(sum, row, weight);             \
  else                                          \
    _tile_dpbf16ps(sum, row, weight)

// Sums of one or two tiles of rows and two of columns. Steps of 64 bytes, the last of which may lie
// elsewhere: at `rest`, where there is one, whose rows are 64 bytes.
template <bool kTwo, typename A>
void multiply(const char* a, int64_t lda, int64_t steps, const char* rest, const char* b, int64_t ldb) {
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (kTwo) {
    _tile_zero(2);
    _tile_zero(3);
  }
  const auto step = [&](const char* rows, int64_t ld) {
    _tile_loadd(6, b, ldb);
    _tile_loadd(4, rows, ld);
    MOE_DIST_ADD(0, 4, 6);
    _tile_loadd(7, b + kBytes, ldb);
    MOE_DIST_ADD(1, 4, 7);
    if constexpr (kTwo) {
      _tile_loadd(5, rows + kRows * ld, ld);
      MOE_DIST_ADD(2, 5, 6);
      MOE_DIST_ADD(3, 5, 7);
    }
    b += kRows * ldb;
  };
  for (int64_t i = 0; i < steps; ++i) step(a + i * kBytes, lda);
  if (rest) step(rest, kBytes);
}

#undef MOE_DIST_ADD

template <bool kTwo>
void store(char* c, int64_t ldc) {
  _tile_stored(0, c, ldc);
  _tile_stored(1, c + kBytes, ldc);
  if constexpr (kTwo) {
    _tile_stored(2, c + kRows * ldc, ldc);
    _tile_stored(3, c + kRows * ldc + kBytes, ldc);
  }
}

// See `multiply_block`. What is done after a part runs while the next one is multiplied.
template <typename A, typename C, typename After>
void multiply_block(int64_t M, int64_t N, int64_t K, int64_t lda, int64_t ldb, int64_t ldc, const A* a, const void* b,
                    C* c, After&& after) {
  const int64_t bytes = K * sizeof(A), whole = bytes / kBytes, left = bytes % kBytes;
  alignas(64) char rest[2 * kRows * kBytes];
  int64_t last_row = -1, last_column = 0;
  const auto finish_last = [&] {
    if (last_row >= 0) after(last_row, std::min(M, last_row + 2 * kRows), last_column);
  };
  for (int64_t row = 0; row < M; row += 2 * kRows) {
    const char* rows = reinterpret_cast<const char*>(a + row * lda);
    const bool two = M - row > kRows;
    if (left) {
      std::memset(rest, 0, sizeof rest);
      for (int64_t r = 0; r < std::min(M - row, 2 * kRows); ++r)
        std::memcpy(rest + r * kBytes, rows + r * lda * sizeof(A) + whole * kBytes, left);
    }
    for (int64_t column = 0; column < N; column += kPartN) {
      const char* weights = static_cast<const char*>(b) + column * 4;
      char* to = reinterpret_cast<char*>(c + row * ldc + column);
      asm volatile("" ::: "memory");  // tiles read what was written before
      if (two)
        multiply<true, A>(rows, lda * sizeof(A), whole, left ? rest : nullptr, weights, ldb);
      else
        multiply<false, A>(rows, lda * sizeof(A), whole, left ? rest : nullptr, weights, ldb);
      finish_last();
      if (two)
        store<true>(to, ldc * sizeof(C));
      else
        store<false>(to, ldc * sizeof(C));
      asm volatile("" ::: "memory");
      last_row = row;
      last_column = column;
    }
  }
  finish_last();
}

}  // namespace tiles

#endif

// What a thread needs around products of blocks; nothing else that uses tiles may run inside of it.
class BlockProducts {
 public:
  explicit BlockProducts(bool is_float) : is_float_(is_float) {
#if defined(MOE_DIST_TILES)
    if (!is_float && tiles::exist()) tiles::configure();
#endif
  }

  ~BlockProducts() {
#if defined(MOE_DIST_TILES)
    if (!is_float_ && tiles::exist()) {
      _tile_release();
      return;
    }
#endif
    at::native::cpublas::brgemm_release(!is_float_);
  }

  BlockProducts(const BlockProducts&) = delete;

 private:
  bool is_float_;
};

// c (M, N) = a (M, K) x b, where N is a multiple of 32 and rows are `ld` apart: of a and c in their own
// numbers, of b, whose rows hold what is multiplied with 4 bytes of a, in bytes. There are 15 more rows
// of a and c than M, and in b those for K rounded up to 64 bytes, of zeros. Calls `after(first row, end
// row, column)` with parts that are done, 32 columns wide.
template <typename A, typename B, typename C, typename After>
void multiply_block(int64_t M, int64_t N, int64_t K, int64_t lda, int64_t ldb, int64_t ldc, const A* a, const B* b,
                    C* c, After&& after) {
#if defined(MOE_DIST_TILES)
  if constexpr (!std::is_same_v<A, float>)
    if (tiles::exist()) return tiles::multiply_block(M, N, K, lda, ldb, ldc, a, b, c, after);
#endif
  at::native::cpublas::brgemm(rounded_rows(M, std::is_same_v<A, at::BFloat16>), N, K, lda, ldb / 4, ldc, false, a, b, c,
                              !std::is_same_v<A, float>);
  for (int64_t column = 0; column < N; column += kPartN) after(0, M, column);
}

}  // namespace moe_dist
