// Block-sparse attention on the CPU.
//
// Queries come packed [B, P, Tq, G, D]: P index planes, each of G query heads that share one list of blocks and one
// key/value head, so that a block of queries is one contiguous [n * G, D] matrix. Keys and values are read in place.
// Tasks never share an output, so the result does not depend on the number of workers. Matrix products go to the
// BLAS that PyTorch was built with; fp64, fp32, and bf16 with fp32 accumulation.

#include <torch/library.h>

#include "cpu_backward.h"
#include "cpu_forward.h"

namespace {

using namespace ltrain;

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
    backward_strips<T, A, O>(s, dout, q, keys, values, delta.const_data_ptr<A>(), lse.const_data_ptr<A>(), rows, cols,
                             qp, kp, scale, accumulate, dq.data_ptr<O>(), dk.data_ptr<O>(), dv.data_ptr<O>());
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
