// The Python functions of hpkernels._cuda. In one file, which no kernel is in: pybind11 takes seconds in each that has
// it, and nvcc reads a file once for every target.
#include <pybind11/pybind11.h>

#include <string>

#include "cuda/cluster_assign/cluster_assign.h"
#include "cuda/common/device.h"
#include "cuda/contrastive/contrastive.h"
#include "cuda/contrastive/groups.h"
#include "cuda/local_mix/local_mix.h"
#include "cuda/normalize/normalize.h"
#include "cuda/pair_bits/pair_bits.h"
#include "cuda/similarity_search/similarity_search.h"
#include "shared/source_hash.h"

#ifndef HPK_CUDA_ARCHS
#define HPK_CUDA_ARCHS ""
#endif

namespace py = pybind11;

namespace hpk::gpu {
namespace {

// What there is for each type of elements, as NAME_bf16, NAME_f16 and NAME_f32.
template <class T>
void bind_for(py::module_& m, const std::string& type) {
  const auto def = [&](const char* name, auto* function) { m.def((name + ("_" + type)).c_str(), function); };
  using Search = SearchLaunches<T>;
  def("pairs_above", &Search::pairs_above);
  def("max_similarity", &Search::max_similarity);
  def("topk_similarity", &Search::topk_similarity);
  def("ordered_keys", &Search::ordered_keys);
  using Contrastive = ContrastiveLaunches<T>;
  def("contrastive_stats", &Contrastive::contrastive_stats);
  def("contrastive_weights", &Contrastive::contrastive_weights);
  def("contrastive_listed_stats", &Contrastive::contrastive_listed_stats);
  def("contrastive_listed_grad", &Contrastive::contrastive_listed_grad);
  def("contrastive_column_side", &Contrastive::contrastive_column_side);
  def("contrastive_column_sum", &Contrastive::contrastive_column_sum);
  def("contrastive_group_lse", &GroupLaunches<T>::contrastive_group_lse);
  def("contrastive_group_grad", &GroupLaunches<T>::contrastive_group_grad);
  using LocalMix = LocalMixLaunches<T>;
  def("neighbor_weights", &LocalMix::neighbor_weights);
  def("mean_logits", &LocalMix::mean_logits);
  def("neighbor_mix", &LocalMix::neighbor_mix);
  def("neighbor_mix_grad_weights", &LocalMix::neighbor_mix_grad_weights);
  def("cluster_assign", &ClusterLaunches<T>::cluster_assign);
  def("cluster_sum", &ClusterLaunches<T>::cluster_sum);
  def("normalize_rows", &NormalizeLaunches<T>::normalize_rows);
  def("normalize_rows_grad", &NormalizeLaunches<T>::normalize_rows_grad);
}

void bind_contrastive(py::module_& m) {
  py::class_<ContrastiveMasks>(m, "ContrastiveMasks")
      .def(py::init([](uintptr_t positives, uintptr_t positives_t, uintptr_t extra, uintptr_t extra_t,
                       uintptr_t negatives, int64_t stride, int64_t period, int64_t first_row, int64_t anchors,
                       bool everything) {
        return ContrastiveMasks{pointer<const uint32_t>(positives),
                                pointer<const uint32_t>(positives_t),
                                pointer<const uint32_t>(extra),
                                pointer<const uint32_t>(extra_t),
                                pointer<const uint32_t>(negatives),
                                stride,
                                period,
                                first_row,
                                anchors,
                                everything};
      }));
  py::class_<ContrastiveTables>(m, "ContrastiveTables")
      .def(py::init([](uintptr_t lse, uintptr_t grad_lse, uintptr_t grad_pos, uintptr_t grad_ext) {
        return ContrastiveTables{pointer<const float>(lse), pointer<const float>(grad_lse),
                                 pointer<const float>(grad_pos), pointer<const float>(grad_ext)};
      }));
  py::class_<ColumnSlots>(m, "ColumnSlots")
      .def(py::init(
          [](uintptr_t turned, int64_t words, uintptr_t starts, uintptr_t window, int64_t columns, int64_t capacity) {
            return ColumnSlots{pointer<const uint32_t>(turned), words,   pointer<const int64_t>(starts),
                               pointer<const int>(window),      columns, capacity};
          }));
  py::enum_<Pairs>(m, "ContrastivePairs")
      .value("all", Pairs::kAll)
      .value("positives", Pairs::kPositives)
      .value("negatives", Pairs::kNegatives)
      .value("named_by_bits", Pairs::kNamedByBits);
  m.def("contrastive_turn_negatives", &contrastive_turn_negatives);
  m.attr("group_panel") = group_panel();
  m.attr("group_piece_bytes") = group_piece_bytes();
}

}  // namespace
}  // namespace hpk::gpu

PYBIND11_MODULE(_cuda, m) {
  using namespace hpk::gpu;
  m.attr("source_hash") = hpk::kSourceHash;
  m.attr("device_type") = device_type();
  m.attr("archs") = HPK_CUDA_ARCHS;  // "sm_80;compute_90": machine code and PTX
  m.attr("cuda_version") = cuda_version();
  m.def("driver_version", &driver_version);
  m.def("random_bits", &random_bits);
  m.def("count_bits", &count_bits);
  m.def("transpose_bits", &transpose_bits);
  m.def("join_transpose", &join_transpose);
  m.def("set_pairs", &set_pairs);
  m.attr("cluster_directions") = cluster_directions();
  m.attr("cluster_run") = cluster_run();
  m.def("cluster_total", &cluster_total);
  bind_contrastive(m);  // the types that functions below take
  bind_for<bf16>(m, "bf16");
  bind_for<fp16>(m, "f16");
  bind_for<float>(m, "f32");
}
