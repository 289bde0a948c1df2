// Attention of the engine over pages on a CPU; tests compare it with the XLA form.
//
// T tokens, N query heads, K key heads, H head dim, R rows of the block table, M pages of a row, P
// positions of a page.
//
// Every number of a token is computed in an order that depends on this token only: a sum over keys
// runs from the first to the last whatever else is in the call.

#include "native.h"

namespace {

// Sums of two lanes that are W apart: of `a` in lanes whose bit W is 0, of `b` in the others.
template <int W>
inline Vec add_pairs(Vec a, Vec b) {
#ifdef __clang__
  return [&]<int... J>(std::integer_sequence<int, J...>) {
    return __builtin_shufflevector(a, b, ((J & W) ? kLanes + J : J)...) +
           __builtin_shufflevector(a, b, ((J & W) ? kLanes + J - W : J + W)...);
  }(std::make_integer_sequence<int, kLanes>{});
#else
  IntVec own, other;
  for (int j = 0; j < kLanes; ++j) {  // constants once they are unrolled
    own[j] = (j & W) ? kLanes + j : j;
    other[j] = (j & W) ? kLanes + j - W : j + W;
  }
  return __builtin_shuffle(a, b, own) + __builtin_shuffle(a, b, other);
#endif
}

template <int W>
inline __attribute__((always_inline)) void add_blocks(Vec rows[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; i += 2 * W) rows[i] = add_pairs<W>(rows[i], rows[i + W]);
}

// Lane i of the result is the sum of the lanes of rows[i], neighbours first.
inline __attribute__((always_inline)) Vec add_each(Vec rows[kLanes]) {
  add_blocks<1>(rows);
  add_blocks<2>(rows);
  add_blocks<4>(rows);
  if constexpr (kLanes == 16) add_blocks<8>(rows);
  return rows[0];
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

// Key heads [begin, end) of a tile, which one thread computes.
struct Unit {
  Tile tile;
  int64_t begin, end;
};

// All heads of one token stay together, as they lie side by side in memory, unless that leaves
// threads without work. Tiles of more tokens are split, or their scores would not fit a cache.
std::vector<Unit> make_units(const std::vector<Tile>& tiles, int64_t K, int64_t threads) {
  std::vector<Unit> units;
  for (const Tile& tile : tiles) {
    const int64_t busy = 2 * threads / static_cast<int64_t>(tiles.size());
    const int64_t parts = std::clamp<int64_t>(std::max(busy, tile.count), 1, K);
    for (int64_t part = 0; part < parts; ++part) {
      units.push_back({tile, K * part / parts, K * (part + 1) / parts});
    }
  }
  return units;
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

// A line of the cache: a vector that lies across two of them is read twice.
struct alignas(64) Line {
  float of[16];
};

// Copy one head's keys of kLanes places, so that following vectors lie side by side.
void pack_keys(const float* const* key, int64_t H, float* to) {
  for (int64_t h = 0; h < H; h += kLanes) {
#pragma GCC unroll 16
    for (int lane = 0; lane < kLanes; ++lane, to += kLanes) store(to, load(key[lane] + h));
  }
}

// The products of a query with the keys of kLanes places; part_of(lane, h) is a vector of a key.
template <typename Part>
inline __attribute__((always_inline)) Vec multiply_keys(const float* query, int64_t H,
                                                        const Part& part_of) {
  Vec sum[kLanes];  // in registers
#pragma GCC unroll 16
  for (int lane = 0; lane < kLanes; ++lane) sum[lane] = Vec{};
  for (int64_t h = 0; h < H; h += kLanes) {
    const Vec part = load(query + h);
#pragma GCC unroll 16
    for (int lane = 0; lane < kLanes; ++lane) sum[lane] = fused(part, part_of(lane, h), sum[lane]);
  }
  return add_each(sum);
}

// Keys and values are read once for all tokens of a unit, the heads of a place one after another.
// What is summed for a token, and in which order, depends neither on its tile nor on its unit.
void attend(const Pages& pages, const Unit& unit, const float* q_TNH, float* out_TNH) {
  thread_local std::vector<float> scores, totals;
  thread_local std::vector<Line> lines;
  const Tile& tile = unit.tile;
  const int64_t G = pages.N / pages.K, H = pages.H, P = pages.P;
  const int64_t rows = tile.count * G;  // of a key head
  const int64_t begin = pages.position[tile.first] + 1;  // places that the first token sees
  const int64_t seen = begin + tile.count - 1;
  const int64_t width = (seen + kLanes - 1) / kLanes * kLanes;
  const float scale = 1.0f / std::sqrt(static_cast<float>(H));
  scores.resize((unit.end - unit.begin) * rows * width);
  totals.resize((unit.end - unit.begin) * rows);
  lines.resize(H * kLanes * sizeof(float) / sizeof(Line));
  float* keys = lines.data()->of;
  const auto offset = [&](int64_t k, int64_t r) {
    return ((tile.first + r / G) * pages.N + k * G + r % G) * H;
  };
  const auto scores_of = [&](int64_t k, int64_t r) {
    return scores.data() + ((k - unit.begin) * rows + r) * width;
  };
  for (int64_t s = 0; s < seen; s += kLanes) {
    const float* key[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      key[lane] = pages.key(tile.first, std::min(s + lane, seen - 1), unit.begin);
    }
    const auto of_page = [&](int lane, int64_t h) { return load(key[lane] + h); };
    const auto of_packed = [keys](int lane, int64_t h) { return load(keys + (h + lane) * kLanes); };
    for (int64_t k = unit.begin; k < unit.end; ++k) {
      const bool packed = rows > 2;  // or the copy costs more than it saves
      if (packed) pack_keys(key, H, keys);
      for (int64_t r = 0; r < rows; ++r) {
        const float* query = q_TNH + offset(k, r);
        const Vec products =
            packed ? multiply_keys(query, H, of_packed) : multiply_keys(query, H, of_page);
        store(scores_of(k, r) + s, products * scale);
      }
      for (int lane = 0; lane < kLanes; ++lane) key[lane] += 2 * H;
    }
  }
  for (int64_t k = unit.begin; k < unit.end; ++k) {
    for (int64_t r = 0; r < rows; ++r) {
      totals[(k - unit.begin) * rows + r] = soften(scores_of(k, r), begin + r / G);
      std::fill(out_TNH + offset(k, r), out_TNH + offset(k, r) + H, 0.0f);
    }
  }
  for (int64_t page = 0; page < seen; page += P) {
    // rows before `whole` see a part of this page, or nothing
    const int64_t whole = std::clamp<int64_t>(page + P - begin, 0, tile.count) * G;
    const float* values = pages.key(tile.first, page, unit.begin) + H;
    for (int64_t k = unit.begin; k < unit.end; ++k, values += 2 * H) {
      const auto add = [&](auto some, int64_t first, int64_t depth) {
        constexpr int Rows = decltype(some)::value;
        const float* weights[Rows];
        for (int r = 0; r < Rows; ++r) weights[r] = scores_of(k, first + r) + page;
        over_columns<Rows>(0, H, [&](auto wide, int64_t at) {
          constexpr int Wide = decltype(wide)::value;
          Vec sum[Rows][Wide];  // of the pages before, so that a sum does not depend on P
          for (int r = 0; r < Rows; ++r) {
            const float* out = out_TNH + offset(k, first + r) + at;
            for (int v = 0; v < Wide; ++v) sum[r][v] = load(out + v * kLanes);
          }
          multiply_block<Rows, Wide, true>(weights, values + at, depth, pages.stride(), sum);
          for (int r = 0; r < Rows; ++r) {
            float* out = out_TNH + offset(k, first + r) + at;
            for (int v = 0; v < Wide; ++v) store(out + v * kLanes, sum[r][v]);
          }
        });
      };
      for (int64_t r = 0; r < whole; ++r) {
        const int64_t depth = begin + r / G - page;
        if (depth > 0) add(std::integral_constant<int, 1>{}, r, depth);
      }
      over_rows(rows - whole, [&](auto some, int64_t first) { add(some, whole + first, P); });
    }
  }
  for (int64_t k = unit.begin; k < unit.end; ++k) {
    for (int64_t r = 0; r < rows; ++r) {
      float* out = out_TNH + offset(k, r);
      const float total = totals[(k - unit.begin) * rows + r];
      for (int64_t h = 0; h < H; h += kLanes) store(out + h, load(out + h) / total);
    }
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
  const std::vector<Unit> units = make_units(make_tiles(of_call, T), K, pool.num_threads());
  for_each(pool, units.size(), [&](int64_t number) {
    const Unit& unit = units[number];
    const Tile& tile = unit.tile;
    if (position[tile.first] < 0) {  // padding
      float* out = out_TNH->typed_data() + tile.first * N * H;
      if (unit.begin == 0) std::fill(out, out + tile.count * N * H, 0.0f);
      return;
    }
    attend(of_call, unit, q_TNH.typed_data(), out_TNH->typed_data());
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
