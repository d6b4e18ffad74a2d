// Python module fusedres._C: what was built, and what this CPU offers. Loads without torch.
#include <pybind11/pybind11.h>
#include <torch/headeronly/version.h>

#include <sstream>
#include <string>

#include "common/cpu_capability.h"
#include "common/launch_plan.h"
#include "common/pool_plan.h"

namespace py = pybind11;

namespace {

py::list words(const std::string& text) {
  py::list result;
  std::istringstream stream(text);
  for (std::string word; stream >> word;) result.append(word);
  return result;
}

py::dict build_info() {
  py::dict info;
  info["version"] = FUSEDRES_VERSION;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  info["flags"] = FUSEDRES_CXX_FLAGS;
  info["cpu_variants"] = words(FUSEDRES_ISAS);
  info["cuda"] = *FUSEDRES_CUDA_VERSION ? py::object(py::str(FUSEDRES_CUDA_VERSION)) : py::none();
  info["cuda_archs"] = words(FUSEDRES_CUDA_ARCHS);
  info["torch_headers"] = TORCH_VERSION;
  return info;
}

py::dict launch_plan(
    bool channels_last,
    int64_t batch,
    int64_t channels,
    int64_t area,
    int element_size,
    bool backward,
    int norms,
    bool may_one_pass,
    int sms,
    int64_t l2_bytes,
    int64_t shared_bytes) {
  using namespace fusedres;
  if (batch < 1 || channels < 1 || area < 1) throw py::value_error("the tensor must not be empty");
  if (element_size != 2 && element_size != 4 && element_size != 8) {
    throw py::value_error("element_size must be 2, 4 or 8");
  }
  if (norms != 1 && norms != 2) throw py::value_error("norms must be 1 or 2");
  if (sms < 1) throw py::value_error("sms must be positive");
  const PlanProblem problem{channels_last, batch, channels, area, element_size, norms, norms, backward};
  const LaunchPlan plan = plan_launches(problem, {sms, l2_bytes, shared_bytes}, may_one_pass);
  const Tiles& t = plan.tiles;
  const auto pass = [&](const Pass& p) {
    py::dict result;
    result["chunk"] = p.chunk;
    result["chunks"] = p.chunks;
    result["blocks"] = p.chunks * t.tiles;
    result["shared_bytes"] = p.shared_bytes;
    return result;
  };
  py::dict result;
  result["form"] = plan.one_pass ? "one_pass" : "two_pass";
  result["vector"] = t.vector;
  result["rows"] = t.rows;
  result["row_length"] = t.row_length;
  result["row_vectors"] = t.row_vectors;
  result["columns"] = t.columns;
  result["tiles"] = t.tiles;
  result["threads_x"] = t.threads_x;
  result["threads_y"] = t.threads_y;
  result["threads"] = t.threads();
  result["slab_vectors"] = plan.slab_vectors;
  result["reduce"] = pass(plan.reduce);
  result["finish_blocks"] = plan.one_pass ? 0 : finish_blocks(channels);
  result["finish_threads"] = plan.finish_threads;
  result["apply"] = pass(plan.apply);
  result["reverse"] = plan.reverse;
  result["fits_l2"] = plan.fits_l2;
  result["partial_bytes"] = plan.partial_bytes;
  result["workspace_bytes"] = plan.workspace_bytes;
  return result;
}

py::dict pool_plan(
    bool channels_last,
    int64_t batch,
    int64_t channels,
    int64_t height,
    int64_t width,
    int vector,
    int sms,
    int most_chunks_per_sm) {
  using namespace fusedres;
  if (batch < 1 || channels < 1 || height < 1 || width < 1) throw py::value_error("the tensor must not be empty");
  if (vector < 1 || channels % vector != 0) throw py::value_error("vector must divide channels");
  if (sms < 1 || most_chunks_per_sm < 1) throw py::value_error("sms and most_chunks_per_sm must be positive");
  const PoolPlan plan = plan_pool({channels_last, batch, channels, height, width, vector, 0}, sms, most_chunks_per_sm);
  const Patches& s = plan.patches;
  py::dict result;
  result["tiles"] = plan.tiles.tiles;
  result["threads_x"] = plan.tiles.threads_x;
  result["threads_y"] = plan.tiles.threads_y;
  result["threads_w"] = s.threads_w;
  result["threads_h"] = s.threads_h;
  result["rows"] = s.rows;
  result["columns"] = s.columns;
  result["across"] = s.across;
  result["per_image"] = s.per_image;
  result["patches"] = s.count;
  result["chunk"] = plan.pass.chunk;
  result["chunks"] = plan.pass.chunks;
  return result;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information, CPU capability and launch plans of fusedres.";
  m.def("build_info", &build_info, "How the native libraries were built.");
  m.def(
      "cpu_capability",
      [] { return fusedres::name(fusedres::cpu_capability()); },
      "Instruction set the CPU kernels use: 'baseline', 'avx2' or 'avx512'; FUSEDRES_CPU_CAPABILITY lowers it.");
  m.def(
      "launch_plan",
      &launch_plan,
      R"doc(How the CUDA kernels cut a batch normalisation, as csrc/common/launch_plan.h describes it.

Args:
    channels_last: memory format of the (batch, channels, height, width) tensor; area is height * width.
    element_size: bytes of an element: 2, 4 or 8.
    backward, norms: direction, and 2 for the sum of two normalisations, all of which train.
    may_one_pass: False where the form of three launches is needed.
    sms, l2_bytes, shared_bytes: of the device; the last is the most that one block may have.

Returns:
    dict: form is "one_pass" (one launch, slab_vectors vectors per thread and tensor in shared memory) or "two_pass"
    (reduce, finish_blocks blocks, apply). A tensor is `rows` rows of `row_length` elements, in `row_vectors` vectors of
    `vector` elements (contiguous: rows and tiles per channel); a block is threads_x vectors wide and takes a chunk of
    `chunk` rows (contiguous: of vectors) threads_y at a time. reverse: the second pass starts where the first ended.

Raises:
    ValueError: an empty tensor, or an impossible element size, number of norms or device.
)doc",
      py::arg("channels_last"),
      py::arg("batch"),
      py::arg("channels"),
      py::arg("area"),
      py::arg("element_size"),
      py::kw_only(),
      py::arg("backward") = false,
      py::arg("norms") = 1,
      py::arg("may_one_pass") = true,
      py::arg("sms") = 132,
      py::arg("l2_bytes") = int64_t{50} << 20,
      py::arg("shared_bytes") = int64_t{227} << 10);
  m.def(
      "pool_plan",
      &pool_plan,
      R"doc(How the CUDA kernels cut the windows or pixels of a pooling, as csrc/common/pool_plan.h describes it.

Args:
    channels_last: memory format; height and width: positions of an image; vector: channels per thread.
    sms: of the device; most_chunks_per_sm: from there on a chunk is more than one patch.

Returns:
    dict: tiles of threads_x vectors of channels; `patches` patches of rows x columns positions in all, per_image of
    each image and `across` of them side by side, in chunks of `chunk`; threads_y = threads_w * threads_h threads.

Raises:
    ValueError: an empty tensor, a vector that does not divide the channels, or an impossible device.
)doc",
      py::arg("channels_last"),
      py::arg("batch"),
      py::arg("channels"),
      py::arg("height"),
      py::arg("width"),
      py::kw_only(),
      py::arg("vector") = 1,
      py::arg("sms") = 132,
      py::arg("most_chunks_per_sm") = 12);
}
