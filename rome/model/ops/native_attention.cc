// Attention of the engine over pages on a CPU; tests compare it with the XLA form.
//
// T tokens, N query heads, K key heads, H head dim, R rows of the block table, M pages of a row, P
// positions of a page.
//
// Every number of a token is computed in an order that depends on this token only: a sum over keys
// runs from the first to the last whatever else is in the call.

#include "native.h"

namespace {

// All heads of one token over the positions that it sees, each position's memory read in order.
//
// at[s] is where position s lies: the key of the first head, its value, the key of the second, ...
void attend(const std::vector<const float*>& at, const float* q, int64_t K, int64_t G, int64_t H,
            float* out) {
  thread_local std::vector<float> scores;
  const int64_t N = K * G, seen = at.size();
  const int64_t width = (seen + kLanes - 1) / kLanes * kLanes;
  const float scale = 1.0f / std::sqrt(static_cast<float>(H));
  scores.assign(N * width, -1e30f);
  for (int64_t s = 0; s < seen; ++s) {
    const float* key = at[s];
    float* score = scores.data() + s;
    const float* query = q;
    for (int64_t k = 0; k < K; ++k, key += 2 * H) {
      for (int64_t g = 0; g < G; ++g, query += H, score += width) {
        Vec sum = Vec{};
        for (int64_t h = 0; h < H; h += kLanes) sum += load(query + h) * load(key + h);
        *score = add_lanes<kLanes>(sum) * scale;
      }
    }
  }
  for (int64_t n = 0; n < N; ++n) {
    float* own = scores.data() + n * width;
    const float top = *std::max_element(own, own + seen);
    float total = 0.0f;
    for (int64_t s = 0; s < width; s += kLanes) store(own + s, exp_of(load(own + s) - top));
    for (int64_t s = 0; s < seen; ++s) total += own[s];
    for (int64_t s = 0; s < seen; ++s) own[s] /= total;
  }
  std::fill(out, out + N * H, 0.0f);
  for (int64_t s = 0; s < seen; ++s) {
    const float* value = at[s] + H;
    const float* score = scores.data() + s;
    float* own = out;
    for (int64_t k = 0; k < K; ++k, value += 2 * H) {
      for (int64_t g = 0; g < G; ++g, own += H, score += width) {
        const Vec weight = all(*score);
        for (int64_t h = 0; h < H; h += kLanes) {
          store(own + h, load(own + h) + weight * load(value + h));
        }
      }
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
  for_each(pool, T, [&](int64_t t) {
    float* out = out_TNH->typed_data() + t * N * H;
    if (position[t] < 0) {
      std::fill(out, out + N * H, 0.0f);
      return;
    }
    thread_local std::vector<const float*> at;
    at.clear();
    for (int64_t first = 0; first <= position[t]; first += P) {
      const float* page = kv + int64_t{table[row[t] * M + first / P]} * P * stride;
      const int64_t used = std::min<int64_t>(P, position[t] + 1 - first);
      for (int64_t s = 0; s < used; ++s) at.push_back(page + s * stride);
    }
    attend(at, q_TNH.typed_data() + t * N * H, K, N / K, H, out);
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
