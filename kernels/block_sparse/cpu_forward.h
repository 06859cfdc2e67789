// Block-sparse attention on the CPU, forward: one task is one row of blocks.
#pragma once

#include "cpu_tiles.h"

namespace ltrain {

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
    const int64_t n = next_tile(lists.ids, at, mid, end, s.block_k, s.tk, width, runs);
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

}  // namespace ltrain
