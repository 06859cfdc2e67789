// What the CPU kernels share: matrix products, exponentials, masks, and lists of blocks cut into tiles.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <tuple>
#include <type_traits>
#include <vector>

// The BLAS inside PyTorch's own library. The bf16 product is MKL's, absent where PyTorch has another BLAS.
extern "C" {
void sgemm_(const char* ta, const char* tb, const int* m, const int* n, const int* k, const float* alpha,
            const float* a, const int* lda, const float* b, const int* ldb, const float* beta, float* c,
            const int* ldc);
void dgemm_(const char* ta, const char* tb, const int* m, const int* n, const int* k, const double* alpha,
            const double* a, const int* lda, const double* b, const int* ldb, const double* beta, double* c,
            const int* ldc);
__attribute__((weak)) void gemm_bf16bf16f32(const char* ta, const char* tb, const int* m, const int* n,
                                            const int* k, const float* alpha, const at::BFloat16* a,
                                            const int* lda, const at::BFloat16* b, const int* ldb,
                                            const float* beta, float* c, const int* ldc);
}

namespace ltrain {

using at::Tensor;

// Score columns held at a time, in elements of a tile: large enough for the matrix product, small beside L2.
constexpr int64_t kTile = 128 * 1024;

// ---- exponentials ----

// Relative error below 2e-7 for x <= 0; exactly 0 below -87 and at -inf. Branch-free, so that it vectorises.
inline float exp_of(float x) {
  const float clipped = x < -87.0f ? -87.0f : x;
  const float n = (clipped * 1.44269504088896341f + 12582912.0f) - 12582912.0f;
  const float f = (clipped - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * f * f + f + 1.0f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof(power));
  return x < -87.0f ? 0.0f : p * power;
}

inline double exp_of(double x) { return std::exp(x); }

// ---- matrix products ----

// Column-major C[m, n] = alpha op(A) op(B) + beta C.
template <typename T, typename A>
void product(char ta, char tb, int64_t m64, int64_t n64, int64_t k64, A alpha, const T* a, int64_t lda64, const T* b,
             int64_t ldb64, A beta, A* c, int64_t ldc64) {
  const int m = m64, n = n64, k = k64, lda = lda64, ldb = ldb64, ldc = ldc64;
  if constexpr (std::is_same_v<T, double>)
    dgemm_(&ta, &tb, &m, &n, &k, &alpha, a, &lda, b, &ldb, &beta, c, &ldc);
  else if constexpr (std::is_same_v<T, float>)
    sgemm_(&ta, &tb, &m, &n, &k, &alpha, a, &lda, b, &ldb, &beta, c, &ldc);
  else
    gemm_bf16bf16f32(&ta, &tb, &m, &n, &k, &alpha, a, &lda, b, &ldb, &beta, c, &ldc);
}

// Row-major C[m, n] = alpha A[m, k] B[n, k]' + beta C.
template <typename T, typename A>
void product_nt(int64_t m, int64_t n, int64_t k, A alpha, const T* a, int64_t lda, const T* b, int64_t ldb, A beta,
                A* c, int64_t ldc) {
  product<T, A>('T', 'N', n, m, k, alpha, b, ldb, a, lda, beta, c, ldc);
}

// Row-major C[m, n] = alpha A[m, k] B[k, n] + beta C.
template <typename T, typename A>
void product_nn(int64_t m, int64_t n, int64_t k, A alpha, const T* a, int64_t lda, const T* b, int64_t ldb, A beta,
                A* c, int64_t ldc) {
  product<T, A>('N', 'N', n, m, k, alpha, b, ldb, a, lda, beta, c, ldc);
}

// Row-major C[m, n] = alpha A[k, m]' B[k, n] + beta C.
template <typename T, typename A>
void product_tn(int64_t m, int64_t n, int64_t k, A alpha, const T* a, int64_t lda, const T* b, int64_t ldb, A beta,
                A* c, int64_t ldc) {
  product<T, A>('N', 'T', n, m, k, alpha, b, ldb, a, lda, beta, c, ldc);
}

// ---- what a call works on ----

struct Lists {
  const int64_t *ptr, *mid;
  const int32_t* ids;
  int64_t count;  // lists of one plane

  Lists(const Tensor& p, const Tensor& m, const Tensor& i)
      : ptr(p.const_data_ptr<int64_t>()),
        mid(m.const_data_ptr<int64_t>()),
        ids(i.const_data_ptr<int32_t>()),
        count(m.size(2)) {}
};

struct Positions {
  const int32_t *pos, *doc;
  int64_t pos_stride, doc_stride;  // between batches, 0 when shared

  Positions(const Tensor& p, const Tensor& d)
      : pos(p.const_data_ptr<int32_t>()),
        doc(d.const_data_ptr<int32_t>()),
        pos_stride(p.size(0) > 1 ? p.size(1) : 0),
        doc_stride(d.size(0) > 1 ? d.size(1) : 0) {}
};

struct Shape {
  int64_t batch, planes, tq, group, d, tk, kv_heads, dv, block_q, block_k, plan_batch, index_heads, window;

  int64_t kv_head(int64_t plane) const { return plane * kv_heads / planes; }
  int64_t list(const Lists& lists, int64_t b, int64_t plane, int64_t i) const {
    const int64_t head = plane * index_heads / planes;
    return ((plan_batch > 1 ? b : 0) * index_heads + head) * lists.count + i;
  }
  // Offsets have one more entry a plane than there are lists.
  int64_t offset(const Lists& lists, int64_t b, int64_t plane, int64_t i) const {
    const int64_t head = plane * index_heads / planes;
    return ((plan_batch > 1 ? b : 0) * index_heads + head) * (lists.count + 1) + i;
  }
};

// Keys or values of one (batch, head), read where they are.
template <typename T>
struct Heads {
  const T* data;
  int64_t batch_stride, token_stride, head_stride;

  explicit Heads(const Tensor& x)
      : data(x.const_data_ptr<T>()),
        batch_stride(x.stride(0)),
        token_stride(x.stride(1)),
        head_stride(x.stride(2)) {}
  const T* at(int64_t b, int64_t token, int64_t head) const {
    return data + b * batch_stride + token * token_stride + head * head_stride;
  }
};

// Runs body(task, scratch) for every task, longest lists first where lists grow with their number.
template <typename F>
void each_task(int64_t tasks, const F& body) {
  std::atomic<int64_t> next{tasks};
  at::parallel_for(0, std::min<int64_t>(at::get_num_threads(), tasks), 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker)
      for (int64_t task = --next; task >= 0; task = --next) body(task);
  });
}

// -inf where a pair is not visible; rows are (token, head of the group), G rows a token.
template <typename A>
void mask_tile(A* scores, int64_t ld, int64_t group, const Positions& q, int64_t q_first, int64_t q_count,
               const Positions& k, int64_t k_first, int64_t k_count, int64_t b, int64_t window) {
  const int32_t *q_pos = q.pos + b * q.pos_stride + q_first, *q_doc = q.doc + b * q.doc_stride + q_first;
  const int32_t *k_pos = k.pos + b * k.pos_stride + k_first, *k_doc = k.doc + b * k.doc_stride + k_first;
  constexpr int64_t lowest = std::numeric_limits<int32_t>::min();
  for (int64_t t = 0; t < q_count; ++t) {
    const int32_t high = q_pos[t], doc = q_doc[t];
    const int64_t oldest = window > 0 ? high - window + 1 : lowest;
    const int32_t low = static_cast<int32_t>(std::max(oldest, lowest));
    for (int64_t g = 0; g < group; ++g) {
      A* row = scores + (t * group + g) * ld;
#pragma omp simd
      for (int64_t n = 0; n < k_count; ++n) {
        const bool seen = (k_pos[n] <= high) & (k_pos[n] >= low) & (k_doc[n] == doc);
        row[n] = seen ? row[n] : -std::numeric_limits<A>::infinity();
      }
    }
  }
}

// A run of consecutive blocks of one list: one matrix product.
struct Run {
  int64_t first, count, column;  // first token, tokens, first column in the tile
  bool partial;
};

// Cuts the list [at, end) into tiles of at most `width` tokens (but at least one block); returns the runs of the
// next tile and moves `at`. Partial blocks stand alone, so that only they are masked.
inline int64_t next_tile(const int32_t* ids, int64_t& at, int64_t mid, int64_t end, int64_t block, int64_t tokens,
                  int64_t width, std::vector<Run>& runs) {
  runs.clear();
  int64_t columns = 0;
  while (at < end) {
    const int64_t first = ids[at] * block, count = std::min(block, tokens - first);
    if (columns > 0 && columns + count > width) break;
    const bool partial = at >= mid;
    if (!partial && !runs.empty() && runs.back().first + runs.back().count == first)
      runs.back().count += count;
    else
      runs.push_back({first, count, columns, partial});
    columns += count;
    ++at;
  }
  return columns;
}

// dst = scale * src, or dst += scale * src.
template <typename A, typename O>
void store(const A* src, O* dst, int64_t n, A scale, bool accumulate) {
  if (accumulate)
    for (int64_t i = 0; i < n; ++i) dst[i] = static_cast<O>(static_cast<A>(dst[i]) + scale * src[i]);
  else
    for (int64_t i = 0; i < n; ++i) dst[i] = static_cast<O>(scale * src[i]);
}

// The left operand of a second product: the scores themselves, or their copy in the input type.
template <typename T, typename A>
const T* narrow(const A* src, T* copy, int64_t n) {
  if constexpr (std::is_same_v<T, A>) {
    return src;
  } else {
    for (int64_t i = 0; i < n; ++i) copy[i] = static_cast<T>(src[i]);
    return copy;
  }
}

template <typename X>
Tensor scratch(int64_t n) {
  return at::empty({std::max<int64_t>(n, 1)}, at::TensorOptions().dtype(c10::CppTypeToScalarType<X>::value));
}

}  // namespace ltrain
