// Attention of the engine over pages on a CPU; tests compare it with the XLA form.
//
// T tokens, N query heads, K key heads, H head dim, R rows of the block table, M pages of a row, P
// positions of a page.
//
// Every number of a token is computed in an order that depends on this token only: a sum over keys
// runs from the first to the last whatever else is in the call.

#include "native.h"

namespace {

// Lanes of two vectors: of `a` and `b` in blocks of W, the first ones of each, or the second ones.
template <int W, bool Second>
inline Vec pick(Vec a, Vec b) {
#ifdef __clang__
  return [&]<int... J>(std::integer_sequence<int, J...>) {
    return __builtin_shufflevector(
        a, b, (Second ? ((J & W) ? kLanes + J : J + W) : ((J & W) ? kLanes + J - W : J))...);
  }(std::make_integer_sequence<int, kLanes>{});
#else
  IntVec lanes;
  for (int j = 0; j < kLanes; ++j) {  // a constant once it is unrolled
    if (Second) {
      lanes[j] = (j & W) ? kLanes + j : j + W;
    } else {
      lanes[j] = (j & W) ? kLanes + j - W : j;
    }
  }
  return __builtin_shuffle(a, b, lanes);
#endif
}

template <int W>
inline __attribute__((always_inline)) void transpose_blocks(Vec rows[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & W) continue;
    const Vec a = rows[i], b = rows[i + W];
    rows[i] = pick<W, false>(a, b);
    rows[i + W] = pick<W, true>(a, b);
  }
}

// Exchange rows and lanes of a square of kLanes vectors.
inline __attribute__((always_inline)) void transpose(Vec rows[kLanes]) {
  transpose_blocks<1>(rows);
  transpose_blocks<2>(rows);
  transpose_blocks<4>(rows);
  if constexpr (kLanes == 16) transpose_blocks<8>(rows);
}

constexpr int kTileTokens = 8;

// Sizes of a call, and what its tokens attend to.
struct Pages {
  int64_t N, K, H, P, M;
  const float* kv;
  const int32_t *table, *row, *position;

  int64_t stride() const { return 2 * K * H; }

  // The key of head k at place s of the sequence of token t; its value lies H behind.
  const float* key(int64_t t, int64_t s, int64_t k) const {
    const int64_t page = table[row[t] * M + s / P];
    return kv + (page * P + s % P) * stride() + k * 2 * H;
  }
};

// Following tokens of one sequence, which see the same pages.
struct Tile {
  int64_t first, count;
};

std::vector<Tile> make_tiles(const Pages& pages, int64_t T) {
  std::vector<Tile> tiles;
  for (int64_t t = 0; t < T; ++t) {
    const bool follows = !tiles.empty() && tiles.back().count < kTileTokens && t &&
                         pages.position[t] > 0 && pages.row[t] == pages.row[t - 1] &&
                         pages.position[t] == pages.position[t - 1] + 1;
    if (follows) {
      ++tiles.back().count;
    } else {
      tiles.push_back({t, 1});
    }
  }
  return tiles;
}

// Turn the scores of the `seen` first places into weights that are not yet divided by their sum,
// which is returned. Beyond them are zeros up to the end of the last vector.
float soften(float* scores, int64_t seen) {
  const int64_t end = (seen + kLanes - 1) / kLanes * kLanes;
  for (int64_t s = seen; s < end; ++s) scores[s] = -1e30f;
  Vec tops = load(scores);
  for (int64_t s = kLanes; s < end; s += kLanes) {
    const Vec own = load(scores + s);
    tops = tops > own ? tops : own;
  }
  float top = tops[0];
  for (int lane = 1; lane < kLanes; ++lane) top = std::max(top, tops[lane]);
  Vec total = Vec{};
  for (int64_t s = 0; s < end; s += kLanes) {
    store(scores + s, exp_of(load(scores + s) - top));
    if (s + kLanes > seen) std::fill(scores + seen, scores + end, 0.0f);
    total += load(scores + s);
  }
  return add_lanes<kLanes>(total);
}

// The query heads of one key head, for the tokens of a tile. Keys and values are read once for all
// of them; what is summed for a token, and in which order, does not depend on the tile.
void attend(const Pages& pages, const Tile& tile, int64_t k, const float* q_TNH, float* out_TNH) {
  thread_local std::vector<float> scores, keys;
  const int64_t G = pages.N / pages.K, H = pages.H, P = pages.P;
  const int64_t rows = tile.count * G;
  const int64_t begin = pages.position[tile.first] + 1;  // places that the first token sees
  const int64_t seen = begin + tile.count - 1;
  const int64_t width = (seen + kLanes - 1) / kLanes * kLanes;
  const float scale = 1.0f / std::sqrt(static_cast<float>(H));
  scores.resize(rows * width);
  keys.resize(H * kLanes);
  const auto offset = [&](int64_t r) {
    return ((tile.first + r / G) * pages.N + k * G + r % G) * H;
  };
  for (int64_t s = 0; s < seen; s += kLanes) {
    const float* key[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      key[lane] = pages.key(tile.first, std::min(s + lane, seen - 1), k);
    }
    for (int64_t h = 0; h < H; h += kLanes) {
      Vec square[kLanes];
#pragma GCC unroll 16
      for (int lane = 0; lane < kLanes; ++lane) square[lane] = load(key[lane] + h);
      transpose(square);
#pragma GCC unroll 16
      for (int lane = 0; lane < kLanes; ++lane) {
        store(keys.data() + (h + lane) * kLanes, square[lane]);
      }
    }
    over_rows(rows, [&](auto some, int64_t first) {
      constexpr int Rows = decltype(some)::value;
      const float* query[Rows];
      for (int r = 0; r < Rows; ++r) query[r] = q_TNH + offset(first + r);
      Vec sum[Rows][1];
      multiply_block<Rows, 1>(query, keys.data(), H, kLanes, sum);
      for (int r = 0; r < Rows; ++r) {
        store(scores.data() + (first + r) * width + s, sum[r][0] * scale);
      }
    });
  }
  std::unique_ptr<float[]> totals(new float[rows]);
  for (int64_t r = 0; r < rows; ++r) {
    totals[r] = soften(scores.data() + r * width, begin + r / G);
    std::fill(out_TNH + offset(r), out_TNH + offset(r) + H, 0.0f);
  }
  for (int64_t page = 0; page < seen; page += P) {
    const float* values = pages.key(tile.first, page, k) + H;
    const auto add = [&](auto some, int64_t first, int64_t depth) {
      constexpr int Rows = decltype(some)::value;
      const float* weights[Rows];
      for (int r = 0; r < Rows; ++r) weights[r] = scores.data() + (first + r) * width + page;
      over_columns(0, H, [&](auto wide, int64_t at) {
        constexpr int Wide = decltype(wide)::value;
        Vec sum[Rows][Wide];
        multiply_block<Rows, Wide>(weights, values + at, depth, pages.stride(), sum);
        for (int r = 0; r < Rows; ++r) {
          float* out = out_TNH + offset(first + r) + at;
          for (int v = 0; v < Wide; ++v) {
            store(out + v * kLanes, load(out + v * kLanes) + sum[r][v]);
          }
        }
      });
    };
    // rows before `whole` see a part of this page, or nothing
    const int64_t whole = std::clamp<int64_t>(page + P - begin, 0, tile.count) * G;
    for (int64_t r = 0; r < whole; ++r) {
      const int64_t depth = begin + r / G - page;
      if (depth > 0) add(std::integral_constant<int, 1>{}, r, depth);
    }
    over_rows(rows - whole, [&](auto some, int64_t first) { add(some, whole + first, P); });
  }
  for (int64_t r = 0; r < rows; ++r) {
    float* out = out_TNH + offset(r);
    for (int64_t h = 0; h < H; h += kLanes) store(out + h, load(out + h) / totals[r]);
  }
}

ffi::Error run_attention(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q_TNH,
                         ffi::Buffer<ffi::F32> kv_TKH, ffi::Buffer<ffi::S32> row_T,
                         ffi::Buffer<ffi::S32> position_T, ffi::Buffer<ffi::S32> table_RM,
                         ffi::Buffer<ffi::F32> pages, ffi::ResultBuffer<ffi::F32> out_TNH,
                         ffi::ResultBuffer<ffi::F32> new_pages) {
  const int64_t T = q_TNH.dimensions()[0], N = q_TNH.dimensions()[1], H = q_TNH.dimensions()[2];
  const int64_t K = kv_TKH.dimensions()[1] / 2;
  const int64_t P = pages.dimensions()[1], M = table_RM.dimensions()[1];
  const int64_t stride = 2 * K * H;
  if (H % kLanes) return ffi::Error::InvalidArgument("a head must be whole vectors");
  float* kv = new_pages->typed_data();
  if (kv != pages.typed_data()) std::memcpy(kv, pages.typed_data(), pages.size_bytes());
  const int32_t *row = row_T.typed_data(), *position = position_T.typed_data();
  const int32_t* table = table_RM.typed_data();
  for (int64_t t = 0; t < T; ++t) {
    if (position[t] < 0) continue;  // padding
    const int64_t page = table[row[t] * M + position[t] / P];
    std::memcpy(kv + (page * P + position[t] % P) * stride, kv_TKH.typed_data() + t * stride,
                stride * sizeof(float));
  }
  const Pages of_call{N, K, H, P, M, kv, table, row, position};
  const std::vector<Tile> tiles = make_tiles(of_call, T);
  for_each(pool, tiles.size() * K, [&](int64_t number) {
    const Tile& tile = tiles[number / K];
    if (position[tile.first] < 0) {  // padding
      float* out = out_TNH->typed_data() + tile.first * N * H;
      if (number % K == 0) std::fill(out, out + tile.count * N * H, 0.0f);
      return;
    }
    attend(of_call, tile, number % K, q_TNH.typed_data(), out_TNH->typed_data());
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(rome_paged_attention, run_attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
