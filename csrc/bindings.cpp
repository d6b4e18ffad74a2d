// Python module fusedres._C: what was built, and what this CPU offers. Loads without torch.
#include <pybind11/pybind11.h>
#include <torch/headeronly/version.h>

#include <sstream>
#include <string>

#include "common/cpu_capability.h"

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

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information and CPU capability of fusedres.";
  m.def("build_info", &build_info, "How the native libraries were built.");
  m.def(
      "cpu_capability",
      [] { return fusedres::name(fusedres::cpu_capability()); },
      "Instruction set the CPU kernels use: 'baseline', 'avx2' or 'avx512'; FUSEDRES_CPU_CAPABILITY lowers it.");
}
