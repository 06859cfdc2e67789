// Block-sparse attention on the CPU, backward, in five matrix products a tile.
//
// One task is the strip of one (batch, key/value head) over a range of query rows. It walks the strip's key blocks:
// dK and dV of a block are sums over the rows, dQ is added to row by row. Where there are few heads, rows are cut into
// several parts of equal work; each part then has its own partial dK and dV, which are added in the order of the parts.
#pragma once

#include <ATen/ops/zeros.h>

#include "cpu_tiles.h"

namespace ltrain {

// Tasks that a backward aims at. A constant, not the number of workers, so that sums don't depend on it.
constexpr int64_t kStripTasks = 16;

// Parts of each strip. Partial dK and dV take at most twice the space of dQ.
inline int64_t strip_parts(const Shape& s) {
  const int64_t strips = std::max<int64_t>(s.batch * s.kv_heads, 1);
  const int64_t queries = s.planes * s.group / std::max<int64_t>(s.kv_heads, 1);
  return std::clamp<int64_t>((kStripTasks + strips - 1) / strips, 1, std::max<int64_t>(2, queries));
}

// Row blocks at which part `part` of a strip begins: rows hold equal numbers of selected blocks, nearly.
inline int64_t first_row(const Shape& s, const Lists& rows, int64_t b, int64_t kv, int64_t part, int64_t parts) {
  if (part == 0) return 0;
  if (part == parts) return rows.count;
  const int64_t sharing = s.planes / s.kv_heads, plane0 = kv * sharing;
  const auto blocks_before = [&](int64_t row) {
    int64_t total = 0;
    for (int64_t plane = plane0; plane < plane0 + sharing; ++plane) {
      const int64_t* ptr = rows.ptr + s.offset(rows, b, plane, 0);
      total += ptr[row] - ptr[0];
    }
    return total;
  };
  const int64_t wanted = blocks_before(rows.count) * part / parts;
  int64_t low = 0, high = rows.count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (blocks_before(middle) < wanted)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// The blocks of list [at, end) that lie in [first, last), full ones before partial ones; returns how many are full.
// Both halves of a list are sorted.
inline int64_t within(const Lists& lists, int64_t at, int64_t mid, int64_t end, int64_t first, int64_t last,
                      std::vector<int32_t>& ids) {
  ids.clear();
  int64_t full = 0;
  for (const auto& [from, to] : {std::pair{at, mid}, std::pair{mid, end}}) {
    const int32_t *low = std::lower_bound(lists.ids + from, lists.ids + to, static_cast<int32_t>(first));
    ids.insert(ids.end(), low, std::lower_bound(low, lists.ids + to, static_cast<int32_t>(last)));
    if (to == mid) full = static_cast<int64_t>(ids.size());
  }
  return full;
}

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

// What every task of a backward reads; `dq` is packed like q and begins as zeros, `dk` and `dv` are
// [parts, B, Tk, Hkv, D].
template <typename T, typename A>
struct Strips {
  const Shape& s;
  const T *q, *dout;
  const Heads<T>&k, &v;
  const A *lse, *delta;
  const Lists &rows, &cols;
  const Positions &qp, &kp;
  int64_t parts;
  double scale;
  A *dq, *dk, *dv;

  void run(int64_t task) const {
    const int64_t part = task / (s.batch * s.kv_heads), b = task / s.kv_heads % s.batch, kv = task % s.kv_heads;
    const int64_t first = first_row(s, rows, b, kv, part, parts), last = first_row(s, rows, b, kv, part + 1, parts);
    const int64_t height = std::max(s.block_q, kTile / (s.block_k * s.group));
    const int64_t tile = height * s.group * s.block_k;
    Tensor buffer = scratch<A>(2 * tile + s.block_k * (s.d + s.dv));
    Tensor copy = scratch<T>(std::is_same_v<T, A> ? 0 : tile);
    A *scores = buffer.data_ptr<A>(), *dp = scores + tile, *dk_ND = dp + tile, *dv_ND = dk_ND + s.block_k * s.d;
    std::vector<int32_t> ids;
    std::vector<Run> runs;
    const int64_t sharing = s.planes / s.kv_heads;
    for (int64_t j = 0; j < cols.count; ++j) {
      const int64_t k_first = j * s.block_k, n = std::min(s.block_k, s.tk - k_first);
      std::fill(dk_ND, dk_ND + n * s.d, A(0));
      std::fill(dv_ND, dv_ND + n * s.dv, A(0));
      for (int64_t plane = kv * sharing; plane < (kv + 1) * sharing; ++plane) {
        const int64_t offset = s.offset(cols, b, plane, j);
        const int64_t full = within(cols, cols.ptr[offset], cols.mid[s.list(cols, b, plane, j)],
                                    cols.ptr[offset + 1], first, last, ids);
        int64_t at = 0;
        while (at < static_cast<int64_t>(ids.size())) {
          next_tile(ids.data(), at, full, ids.size(), s.block_q, s.tq, height, runs);
          for (const Run& run : runs)
            one_tile(run, b, plane, kv, k_first, n, scores, dp, copy.data_ptr<T>(), dk_ND, dv_ND);
        }
      }
      for (int64_t t = 0; t < n; ++t) {
        const int64_t row = ((part * s.batch + b) * s.tk + k_first + t) * s.kv_heads + kv;
        std::copy_n(dk_ND + t * s.d, s.d, dk + row * s.d);
        std::copy_n(dv_ND + t * s.dv, s.dv, dv + row * s.dv);
      }
    }
  }

  void one_tile(const Run& run, int64_t b, int64_t plane, int64_t kv, int64_t k_first, int64_t n, A* scores, A* dp,
                T* copy, A* dk_ND, A* dv_ND) const {
    const int64_t m = run.count * s.group, row0 = ((b * s.planes + plane) * s.tq + run.first) * s.group;
    const T *q_MD = q + row0 * s.d, *dout_MD = dout + row0 * s.dv;
    const T *k_ND = k.at(b, k_first, kv), *v_ND = v.at(b, k_first, kv);
    product_nt<T, A>(m, n, s.d, A(scale), q_MD, s.d, k_ND, k.token_stride, A(0), scores, n);
    if (run.partial) mask_tile(scores, n, s.group, qp, run.first, run.count, kp, k_first, n, b, s.window);
    product_nt<T, A>(m, n, s.dv, A(1), dout_MD, s.dv, v_ND, v.token_stride, A(0), dp, n);
    score_gradients(scores, dp, lse + row0, delta + row0, m, n);
    const T* weights = narrow<T, A>(scores, copy, m * n);
    product_tn<T, A>(n, s.dv, m, A(1), weights, n, dout_MD, s.dv, A(1), dv_ND, s.dv);
    const T* ds = narrow<T, A>(dp, copy, m * n);
    product_tn<T, A>(n, s.d, m, A(1), ds, n, q_MD, s.d, A(1), dk_ND, s.d);
    product_nn<T, A>(m, s.d, n, A(1), ds, n, k_ND, k.token_stride, A(1), dq + row0 * s.d, s.d);
  }
};

// Packed dQ [B, P, Tq, G, D] to rows [B, Tq, H, D].
template <typename A, typename O>
void unpack_queries(const Shape& s, const A* packed, double scale, bool accumulate, O* dq) {
  const int64_t width = s.group * s.d;
  at::parallel_for(0, s.batch * s.tq, 64, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t plane = 0; plane < s.planes; ++plane)
        store(packed + ((row / s.tq * s.planes + plane) * s.tq + row % s.tq) * width,
              dq + (row * s.planes + plane) * width, width, A(scale), accumulate);
  });
}

// The sum of the parts [parts, n], in their order.
template <typename A, typename O>
void add_parts(A* parts, int64_t count, int64_t n, double scale, bool accumulate, O* out) {
  at::parallel_for(0, n, 1 << 14, [&](int64_t begin, int64_t end) {
    for (int64_t part = 1; part < count; ++part)
      for (int64_t i = begin; i < end; ++i) parts[i] += parts[part * n + i];
    store(parts + begin, out + begin, end - begin, A(scale), accumulate);
  });
}

template <typename T, typename A, typename O>
void backward_strips(const Shape& s, const Tensor& dout, const Tensor& q, const Heads<T>& k, const Heads<T>& v,
                     const A* delta, const A* lse, const Lists& rows, const Lists& cols, const Positions& qp,
                     const Positions& kp, double scale, bool accumulate, O* dq, O* dk, O* dv) {
  const int64_t parts = strip_parts(s), keys = s.batch * s.tk * s.kv_heads;
  Tensor dq_packed = at::zeros(q.sizes(), q.options().dtype(c10::CppTypeToScalarType<A>::value));
  Tensor dk_parts = scratch<A>(parts * keys * s.d), dv_parts = scratch<A>(parts * keys * s.dv);
  const Strips<T, A> strips{s,    q.const_data_ptr<T>(),    dout.const_data_ptr<T>(), k,    v,  lse, delta,
                            rows, cols,                     qp,                       kp,   parts, scale,
                            dq_packed.data_ptr<A>(),        dk_parts.data_ptr<A>(),   dv_parts.data_ptr<A>()};
  each_task(parts * s.batch * s.kv_heads, [&](int64_t task) { strips.run(task); });
  unpack_queries(s, strips.dq, scale, accumulate, dq);
  add_parts(strips.dk, parts, keys * s.d, scale, accumulate, dk);
  add_parts(strips.dv, parts, keys * s.dv, 1.0, accumulate, dv);
}

}  // namespace ltrain
