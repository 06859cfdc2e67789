// Block-sparse attention on the CPU: forward, dQ by rows, dK and dV by columns.
//
// Queries come packed [B, P, Tq, G, D]: P index planes, each of G query heads that share one list of blocks and one
// key/value head, so that a block of queries is one contiguous [n * G, D] matrix. Keys and values are read in place.
// One task is one list (a row, or a column); tasks never share an output, so the result does not depend on the
// number of workers. Matrix products go to the BLAS that PyTorch was built with; fp64, fp32, and bf16 with fp32
// accumulation.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <tuple>
#include <type_traits>

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

namespace {

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
int64_t next_tile(const Lists& lists, int64_t& at, int64_t mid, int64_t end, int64_t block, int64_t tokens,
                  int64_t width, std::vector<Run>& runs) {
  runs.clear();
  int64_t columns = 0;
  while (at < end) {
    const int64_t first = lists.ids[at] * block, count = std::min(block, tokens - first);
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

// ---- forward ----

template <typename T, typename A, typename O>
void forward_task(int64_t task, const Shape& s, const Tensor& q, const Heads<T>& k, const Heads<T>& v,
                  const Lists& lists, const Positions& qp, const Positions& kp, double scale, O* out, A* lse) {
  const int64_t i = task / (s.batch * s.planes), b = task / s.planes % s.batch, plane = task % s.planes;
  const int64_t first = i * s.block_q, tokens = std::min(s.block_q, s.tq - first), m = tokens * s.group;
  const T* q_MD = q.const_data_ptr<T>() + ((b * s.planes + plane) * s.tq + first) * s.group * s.d;
  const int64_t kv = s.kv_head(plane);
  const int64_t width = std::max(s.block_k, kTile / m);
  Tensor buffer = scratch<A>(m * (width + s.dv + 2));
  A* scores = buffer.data_ptr<A>();
  A *acc = scores + m * width, *top = acc + m * s.dv, *total = top + m;
  Tensor copy = scratch<T>(std::is_same_v<T, A> ? 0 : m * width);
  std::fill(acc, acc + m * s.dv, A(0));
  std::fill(top, top + m, -std::numeric_limits<A>::infinity());
  std::fill(total, total + m, A(0));

  int64_t at = lists.ptr[s.offset(lists, b, plane, i)];
  const int64_t end = lists.ptr[s.offset(lists, b, plane, i) + 1], mid = lists.mid[s.list(lists, b, plane, i)];
  std::vector<Run> runs;
  while (at < end) {
    const int64_t n = next_tile(lists, at, mid, end, s.block_k, s.tk, width, runs);
    for (const Run& run : runs) {
      product_nt<T, A>(m, run.count, s.d, A(scale), q_MD, s.d, k.at(b, run.first, kv), k.token_stride, A(0),
                       scores + run.column, n);
      if (run.partial)
        mask_tile(scores + run.column, n, s.group, qp, first, tokens, kp, run.first, run.count, b, s.window);
    }
    for (int64_t r = 0; r < m; ++r) {
      A* row = scores + r * n;
      A high = top[r];
#pragma omp simd reduction(max : high)
      for (int64_t c = 0; c < n; ++c) high = row[c] > high ? row[c] : high;
      if (high == -std::numeric_limits<A>::infinity()) {
        std::fill(row, row + n, A(0));
        continue;
      }
      A sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t c = 0; c < n; ++c) {
        row[c] = exp_of(row[c] - high);
        sum += row[c];
      }
      if (high > top[r]) {
        const A old = exp_of(top[r] - high);
        total[r] *= old;
        for (int64_t c = 0; c < s.dv; ++c) acc[r * s.dv + c] *= old;
        top[r] = high;
      }
      total[r] += sum;
    }
    const T* weights = narrow<T, A>(scores, copy.data_ptr<T>(), m * n);
    for (const Run& run : runs)
      product_nn<T, A>(m, s.dv, run.count, A(1), weights + run.column, n, v.at(b, run.first, kv), v.token_stride,
                       A(1), acc, s.dv);
  }
  const int64_t heads = s.planes * s.group;
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t g = 0; g < s.group; ++g) {
      const int64_t r = t * s.group + g, h = plane * s.group + g;
      const bool seen = total[r] > 0;
      store(acc + r * s.dv, out + ((b * s.tq + first + t) * heads + h) * s.dv, s.dv, seen ? A(1) / total[r] : A(0),
            false);
      lse[(b * heads + h) * s.tq + first + t] =
          seen ? top[r] + std::log(total[r]) : -std::numeric_limits<A>::infinity();
    }
}

// ---- backward ----

// scores -> dS = P (dP - delta) in `dp`, and P in `scores`; lse is +inf for rows that see nothing.
template <typename A>
void score_gradients(A* scores, A* dp, const A* lse, const A* delta, int64_t m, int64_t n) {
  for (int64_t r = 0; r < m; ++r) {
    A *p = scores + r * n, *d = dp + r * n;
    const A norm = lse[r], mean = delta[r];
#pragma omp simd
    for (int64_t c = 0; c < n; ++c) {
      p[c] = exp_of(p[c] - norm);
      d[c] = p[c] * (d[c] - mean);
    }
  }
}

template <typename T, typename A, typename O>
void query_gradient_task(int64_t task, const Shape& s, const Tensor& q, const Tensor& dout, const Heads<T>& k,
                         const Heads<T>& v, const A* lse, const A* delta, const Lists& lists, const Positions& qp,
                         const Positions& kp, double scale, bool accumulate, O* dq) {
  const int64_t i = task / (s.batch * s.planes), b = task / s.planes % s.batch, plane = task % s.planes;
  const int64_t first = i * s.block_q, tokens = std::min(s.block_q, s.tq - first), m = tokens * s.group;
  const int64_t row0 = ((b * s.planes + plane) * s.tq + first) * s.group;
  const T *q_MD = q.const_data_ptr<T>() + row0 * s.d, *dout_MD = dout.const_data_ptr<T>() + row0 * s.dv;
  const int64_t kv = s.kv_head(plane);
  const int64_t width = std::max(s.block_k, kTile / m);
  Tensor buffer = scratch<A>(m * (2 * width + s.d));
  A *scores = buffer.data_ptr<A>(), *dp = scores + m * width, *acc = dp + m * width;
  Tensor copy = scratch<T>(std::is_same_v<T, A> ? 0 : m * width);
  std::fill(acc, acc + m * s.d, A(0));

  int64_t at = lists.ptr[s.offset(lists, b, plane, i)];
  const int64_t end = lists.ptr[s.offset(lists, b, plane, i) + 1], mid = lists.mid[s.list(lists, b, plane, i)];
  std::vector<Run> runs;
  while (at < end) {
    const int64_t n = next_tile(lists, at, mid, end, s.block_k, s.tk, width, runs);
    for (const Run& run : runs) {
      product_nt<T, A>(m, run.count, s.d, A(scale), q_MD, s.d, k.at(b, run.first, kv), k.token_stride, A(0),
                       scores + run.column, n);
      if (run.partial)
        mask_tile(scores + run.column, n, s.group, qp, first, tokens, kp, run.first, run.count, b, s.window);
      product_nt<T, A>(m, run.count, s.dv, A(1), dout_MD, s.dv, v.at(b, run.first, kv), v.token_stride, A(0),
                       dp + run.column, n);
    }
    score_gradients(scores, dp, lse + row0, delta + row0, m, n);
    const T* ds = narrow<T, A>(dp, copy.data_ptr<T>(), m * n);
    for (const Run& run : runs)
      product_nn<T, A>(m, s.d, run.count, A(1), ds + run.column, n, k.at(b, run.first, kv), k.token_stride, A(1), acc,
                       s.d);
  }
  const int64_t heads = s.planes * s.group;
  for (int64_t t = 0; t < tokens; ++t)
    store(acc + t * s.group * s.d, dq + ((b * s.tq + first + t) * heads + plane * s.group) * s.d, s.group * s.d,
          A(scale), accumulate);
}

// One task is one key block of one key/value head: it takes the planes that share the head one after the other.
template <typename T, typename A, typename O>
void key_gradient_task(int64_t task, const Shape& s, const Tensor& q, const Tensor& dout, const Heads<T>& k,
                       const Heads<T>& v, const A* lse, const A* delta, const Lists& lists, const Positions& qp,
                       const Positions& kp, double scale, bool accumulate, O* dk, O* dv) {
  const int64_t j = task / (s.batch * s.kv_heads), b = task / s.kv_heads % s.batch, kv = task % s.kv_heads;
  const int64_t first = j * s.block_k, n = std::min(s.block_k, s.tk - first);
  const int64_t sharing = s.planes / s.kv_heads;
  const int64_t height = std::max(s.block_q, kTile / (n * s.group));
  Tensor buffer = scratch<A>(2 * height * s.group * n + n * (s.d + s.dv));
  A *scores = buffer.data_ptr<A>(), *dp = scores + height * s.group * n;
  A *dk_ND = dp + height * s.group * n, *dv_ND = dk_ND + n * s.d;
  Tensor copy = scratch<T>(std::is_same_v<T, A> ? 0 : height * s.group * n);
  std::fill(dk_ND, dk_ND + n * (s.d + s.dv), A(0));
  const T *k_ND = k.at(b, first, kv), *v_ND = v.at(b, first, kv);

  std::vector<Run> runs;
  for (int64_t plane = kv * sharing; plane < (kv + 1) * sharing; ++plane) {
    int64_t at = lists.ptr[s.offset(lists, b, plane, j)];
    const int64_t end = lists.ptr[s.offset(lists, b, plane, j) + 1], mid = lists.mid[s.list(lists, b, plane, j)];
    while (at < end) {
      next_tile(lists, at, mid, end, s.block_q, s.tq, height, runs);
      for (const Run& run : runs) {
        const int64_t m = run.count * s.group, row0 = ((b * s.planes + plane) * s.tq + run.first) * s.group;
        const T *q_MD = q.const_data_ptr<T>() + row0 * s.d, *dout_MD = dout.const_data_ptr<T>() + row0 * s.dv;
        product_nt<T, A>(m, n, s.d, A(scale), q_MD, s.d, k_ND, k.token_stride, A(0), scores, n);
        if (run.partial) mask_tile(scores, n, s.group, qp, run.first, run.count, kp, first, n, b, s.window);
        product_nt<T, A>(m, n, s.dv, A(1), dout_MD, s.dv, v_ND, v.token_stride, A(0), dp, n);
        score_gradients(scores, dp, lse + row0, delta + row0, m, n);
        const T* weights = narrow<T, A>(scores, copy.data_ptr<T>(), m * n);
        product_tn<T, A>(n, s.dv, m, A(1), weights, n, dout_MD, s.dv, A(1), dv_ND, s.dv);
        const T* ds = narrow<T, A>(dp, copy.data_ptr<T>(), m * n);
        product_tn<T, A>(n, s.d, m, A(1), ds, n, q_MD, s.d, A(1), dk_ND, s.d);
      }
    }
  }
  for (int64_t t = 0; t < n; ++t) {
    const int64_t row = (b * s.tk + first + t) * s.kv_heads + kv;
    store(dk_ND + t * s.d, dk + row * s.d, s.d, A(scale), accumulate);
    store(dv_ND + t * s.dv, dv + row * s.dv, s.dv, A(1), accumulate);
  }
}

// ---- entry points ----

Shape shape_of(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& mid, int64_t block_q,
               int64_t block_k, int64_t window) {
  return {q.size(0), q.size(1), q.size(2), q.size(3), q.size(4), k.size(1), k.size(2), v.size(3),
          block_q,   block_k,   mid.size(0), mid.size(1), window};
}

// Calls body with the input type, the accumulator and the output type (which is one of the two).
template <typename F>
void with_types(at::ScalarType in, at::ScalarType out, const F& body) {
  if (in == at::kDouble) {
    TORCH_CHECK(out == in, "fp64 inputs give fp64 results");
    return body(double{}, double{}, double{});
  }
  const auto narrow_in = [&](auto t) {
    if (out == at::kFloat) return body(t, float{}, float{});
    TORCH_CHECK(out == in, "results are fp32 or of the inputs' type");
    body(t, float{}, t);
  };
  if (in == at::kFloat) return narrow_in(float{});
  TORCH_CHECK(in == at::kBFloat16 && gemm_bf16bf16f32, "unsupported type ", in);
  narrow_in(at::BFloat16{});
}

bool has_bf16() { return gemm_bf16bf16f32 != nullptr; }

void forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& ptr, const Tensor& mid,
             const Tensor& ids, const Tensor& q_pos, const Tensor& k_pos, const Tensor& q_doc, const Tensor& k_doc,
             int64_t block_q, int64_t block_k, int64_t window, double scale, const Tensor& out, const Tensor& lse) {
  const Shape s = shape_of(q, k, v, mid, block_q, block_k, window);
  const Lists rows(ptr, mid, ids);
  const Positions qp(q_pos, q_doc), kp(k_pos, k_doc);
  with_types(q.scalar_type(), out.scalar_type(), [&](auto t, auto a, auto o) {
    using T = decltype(t);
    using A = decltype(a);
    using O = decltype(o);
    const Heads<T> keys(k), values(v);
    each_task(rows.count * s.batch * s.planes, [&](int64_t task) {
      forward_task<T, A, O>(task, s, q, keys, values, rows, qp, kp, scale, out.data_ptr<O>(), lse.data_ptr<A>());
    });
  });
}

void backward(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& delta,
              const Tensor& lse, const Tensor& ptr, const Tensor& mid, const Tensor& ids, const Tensor& col_ptr,
              const Tensor& col_mid, const Tensor& col_ids, const Tensor& q_pos, const Tensor& k_pos,
              const Tensor& q_doc, const Tensor& k_doc, int64_t block_q, int64_t block_k, int64_t window,
              double scale, bool accumulate, const Tensor& dq, const Tensor& dk, const Tensor& dv) {
  const Shape s = shape_of(q, k, v, mid, block_q, block_k, window);
  const Lists rows(ptr, mid, ids), cols(col_ptr, col_mid, col_ids);
  const Positions qp(q_pos, q_doc), kp(k_pos, k_doc);
  with_types(q.scalar_type(), dq.scalar_type(), [&](auto t, auto a, auto o) {
    using T = decltype(t);
    using A = decltype(a);
    using O = decltype(o);
    const Heads<T> keys(k), values(v);
    const A *norms = lse.const_data_ptr<A>(), *deltas = delta.const_data_ptr<A>();
    each_task(rows.count * s.batch * s.planes, [&](int64_t task) {
      query_gradient_task<T, A, O>(task, s, q, dout, keys, values, norms, deltas, rows, qp, kp, scale, accumulate,
                                   dq.data_ptr<O>());
    });
    // Early columns have the longest lists: they come last in number, first in time.
    const int64_t tasks = cols.count * s.batch * s.kv_heads;
    each_task(tasks, [&](int64_t task) {
      key_gradient_task<T, A, O>(tasks - 1 - task, s, q, dout, keys, values, norms, deltas, cols, qp, kp, scale,
                                 accumulate, dk.data_ptr<O>(), dv.data_ptr<O>());
    });
  });
}

}  // namespace

TORCH_LIBRARY(ltrain_block_sparse, m) {
  m.def("has_bf16() -> bool", &has_bf16);
  m.def(
      "forward(Tensor q, Tensor k, Tensor v, Tensor ptr, Tensor mid, Tensor ids, Tensor q_pos, Tensor k_pos, "
      "Tensor q_doc, Tensor k_doc, int block_q, int block_k, int window, float scale, Tensor(a!) out, "
      "Tensor(b!) lse) -> ()",
      &forward);
  m.def(
      "backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor delta, Tensor lse, Tensor ptr, Tensor mid, "
      "Tensor ids, Tensor col_ptr, Tensor col_mid, Tensor col_ids, Tensor q_pos, Tensor k_pos, Tensor q_doc, "
      "Tensor k_doc, int block_q, int block_k, int window, float scale, bool accumulate, Tensor(a!) dq, "
      "Tensor(b!) dk, Tensor(c!) dv) -> ()",
      &backward);
}
