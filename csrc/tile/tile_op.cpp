// One tile as a torch extension: gathers the kernels that tile.cu was compiled to, registers the tile's operator
// mxfp4_moe::grouped_gemm_<name>, and is importable, so that Python loads it once and hands `entry`, the address of
// its Mxfp4MoeTile (tile_abi.h), to the layer in csrc/moe.
//
// Compiled once per tile with -DTILE_NAME=m8n128_swap, the tile's macros, and '-DMXFP4_MOE_FOR_EACH_KERNEL(X)=X(90a,
// mxfp4_bf16) X(120f, mxfp4_mxfp8)': archs, and pairs of formats that kernels read.
#include <Python.h>
#include <climits>
#include <optional>
#include <string>

#include "emulation.h"
#include "shared/per_device.h"
#include "shared/schedule.cuh"
#include "shared/weight_layout.cuh"
#include "tile_abi.h"
#include "torch_args.h"

#define MXFP4_MOE_JOIN_(a, b) a##b
#define MXFP4_MOE_JOIN(a, b) MXFP4_MOE_JOIN_(a, b)
#define MXFP4_MOE_TEXT_(...) #__VA_ARGS__
#define MXFP4_MOE_TEXT(...) MXFP4_MOE_TEXT_(__VA_ARGS__)
#define MXFP4_MOE_FACTS(arch, pair) mxfp4_moe_tile_facts_##arch##_##pair
#define MXFP4_MOE_LAUNCH(arch, pair) mxfp4_moe_tile_launch_##arch##_##pair

extern "C" {
#define DECLARE(arch, pair)                                   \
  extern const Mxfp4MoeTileFacts MXFP4_MOE_FACTS(arch, pair); \
  const char* MXFP4_MOE_LAUNCH(arch, pair)(const Mxfp4MoeGemmArgs*);
MXFP4_MOE_FOR_EACH_KERNEL(DECLARE)
#undef DECLARE
}

namespace mxfp4_moe {
namespace {

struct Kernel {
  const Mxfp4MoeTileFacts* facts;
  const char* (*launch)(const Mxfp4MoeGemmArgs*);
  int major;  // of the GPUs that its machine code runs on: 90a needs exactly 9.x, 120f the whole 12.x family
};

constexpr int major_of(const char* arch) {  // "90a" -> 9, "120f" -> 12
  int number = 0;
  for (; *arch >= '0' && *arch <= '9'; ++arch) number = number * 10 + (*arch - '0');
  return number / 10;
}
constexpr int major_of_gpus(const char* arch) { return kEmulatesSm12x ? 9 : major_of(arch); }

const Kernel kKernels[] = {
#define ENTRY(arch, pair) {&MXFP4_MOE_FACTS(arch, pair), &MXFP4_MOE_LAUNCH(arch, pair), major_of_gpus(#arch)},
    MXFP4_MOE_FOR_EACH_KERNEL(ENTRY)
#undef ENTRY
};

// Whose machine code the device runs and who reads these formats, or nullptr.
const Kernel* kernel_of(int32_t device, int32_t weight_format, int32_t act_format) {
  const int major = compute_capability_major(device);
  for (const Kernel& kernel : kKernels)
    if (kernel.major == major && kernel.facts->weight_format == weight_format && kernel.facts->act_format == act_format)
      return &kernel;
  return nullptr;
}

const Mxfp4MoeTileFacts* facts_of(int32_t device, int32_t weight_format, int32_t act_format) {
  const Kernel* kernel = kernel_of(device, weight_format, act_format);
  return kernel ? kernel->facts : nullptr;
}

const char* launch(const Mxfp4MoeGemmArgs* args) {
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || compute_capability_major(device) == 0) {
    cudaGetLastError();
    return "no usable CUDA device";
  }
  if (const Kernel* kernel = kernel_of(device, args->weight_format, args->act_format)) return kernel->launch(args);
  static thread_local std::string reason;
  const int major = compute_capability_major(device);
  reason = "tile " MXFP4_MOE_TEXT(TILE_NAME) ": ";
  std::string archs, formats;
  for (const Kernel& kernel : kKernels) {
    if (archs.find(kernel.facts->arch) == std::string::npos) archs += std::string(" sm_") + kernel.facts->arch;
    if (kernel.major == major) formats += (formats.empty() ? "" : " or ") + std::string(kernel.facts->pair);
  }
  if (formats.empty())
    reason +=
        "this GPU has compute capability " + std::to_string(major) + ".x, this wheel has machine code for" + archs;
  else
    reason += "weight_format, act_format: expected those of " + formats + ", which its kernels read on this GPU, got " +
              std::to_string(args->weight_format) + " and " + std::to_string(args->act_format);
  return reason.c_str();
}

const Mxfp4MoeTile kTile = {
    MXFP4_MOE_TILE_ABI_VERSION, LOGICAL_TILE_M, LOGICAL_TILE_N, SWAP_AB, &facts_of, &launch,
};

// Whether bf16 rows may hold NVFP4 values with weights of a format.
bool holds_nvfp4(int32_t device, int32_t weight_format) {
  const Kernel* kernel = kernel_of(device, weight_format, MXFP4_MOE_ACT_BF16);
  return kernel && kernel->facts->folds && weight_format == MXFP4_MOE_WEIGHT_NVFP4;
}

// A factor of sums: float32 of a shape, where there is one.
const float* factor(const char* name, const std::optional<Tensor>& values, std::initializer_list<int64_t> shape,
                    int32_t device) {
  if (!values.has_value()) return nullptr;
  check_tensor(name, *values, ScalarType::Float, shape, device, 2 * sizeof(float));
  return static_cast<const float*>(values->data_ptr());
}

// out[r, :] = act[r, :] . weight[expert(r), :, :]^T for the rows of the m-tiles; layouts in tile_abi.h. act is uint8
// and has act_scale, or bfloat16 or float16 and has none. Without an act_format rows are MXFP8 or bf16, as the device's
// tile reads them. NVFP4 weights, and MXFP4 ones with float16, have weight_factors [experts, 2]; NVFP4 rows row_factors
// [rows], or input_factors [experts], also where bf16 rows hold their values.
void grouped_gemm(const Tensor& act, const std::optional<Tensor>& act_scale, const Tensor& weight,
                  const Tensor& m_tiles, const Tensor& num_m_tiles, const Tensor& out, int64_t weight_format,
                  int64_t act_format, const std::optional<Tensor>& weight_factors,
                  const std::optional<Tensor>& row_factors, const std::optional<Tensor>& input_factors) {
  const int32_t device = device_of("act", act);
  STD_TORCH_CHECK(act.dim() == 2, "act: expected uint8, bfloat16 or float16 [rows, k], got ", describe(act));
  STD_TORCH_CHECK(out.dim() == 2, "out: expected [rows, n], got ", describe(out));
  STD_TORCH_CHECK(weight.dim() == 2, "weight: expected uint8 [experts, bytes], got ", describe(weight));
  STD_TORCH_CHECK(m_tiles.dim() == 2, "m_tiles: expected int32 [max_m_tiles, 4], got ", describe(m_tiles));
  STD_TORCH_CHECK(weight_format == MXFP4_MOE_WEIGHT_MXFP4 || weight_format == MXFP4_MOE_WEIGHT_NVFP4,
                  "weight_format: expected 0 or 1, got ", weight_format);
  STD_TORCH_CHECK(act_format >= -1 && act_format <= MXFP4_MOE_ACT_FP16, "act_format: expected -1 to 4, got ",
                  act_format);
  const bool is_fp4 = act_format == MXFP4_MOE_ACT_MXFP4 || act_format == MXFP4_MOE_ACT_NVFP4;
  const int64_t rows = act.size(0), width = act.size(1), experts = weight.size(0), n = out.size(1);
  const int64_t k = is_fp4 ? 2 * width : width;
  STD_TORCH_CHECK(k > 0 && k % 32 == 0 && k <= INT_MAX, "k: expected a positive multiple of 32, got ", k);
  STD_TORCH_CHECK(n > 0 && n % 16 == 0 && n <= INT_MAX, "n: expected a positive multiple of 16, got ", n);
  STD_TORCH_CHECK(rows <= INT_MAX - 3, "rows: expected at most ", INT_MAX - 3, ", got ", rows);
  STD_TORCH_CHECK(experts > 0 && experts <= INT_MAX, "experts: expected at least 1, got ", experts);
  // Where the device has kernels for both, the rows say which; for neither, launch says why.
  const bool has_mxfp8 = kernel_of(device, weight_format, MXFP4_MOE_ACT_MXFP8);
  const bool has_bf16 = kernel_of(device, weight_format, MXFP4_MOE_ACT_BF16);
  const bool looks_bf16 = has_bf16 && (!has_mxfp8 || act.scalar_type() == ScalarType::BFloat16);
  const bool is_bf16 = act_format < 0 ? looks_bf16 : act_format == MXFP4_MOE_ACT_BF16;
  const bool is_fp16 = act_format == MXFP4_MOE_ACT_FP16, is_plain = is_bf16 || is_fp16;
  check_tensor("act", act,
               is_bf16   ? ScalarType::BFloat16
               : is_fp16 ? ScalarType::Half
                         : ScalarType::Byte,
               {rows, width}, device);
  STD_TORCH_CHECK(is_plain != act_scale.has_value(), "act_scale: expected ", is_plain ? "none" : "uint8",
                  " for the rows that this GPU's kernel reads, got ", is_plain ? "one" : "none");
  const int64_t act_words = act_format == MXFP4_MOE_ACT_NVFP4 ? 2 : 1;
  if (act_scale.has_value())
    check_tensor("act_scale", *act_scale, ScalarType::Byte, {act_words * scale_k_tiles(k), act_scale_rows(rows), 4},
                 device);
  const int scale_words = weight_format == MXFP4_MOE_WEIGHT_NVFP4 ? kNvfp4ScaleWords : kMxfp4ScaleWords;
  check_tensor("weight", weight, ScalarType::Byte, {experts, weight_bytes(n, k, scale_words)}, device);
  STD_TORCH_CHECK((weight_format == MXFP4_MOE_WEIGHT_NVFP4 || is_fp16) == weight_factors.has_value(),
                  "weight_factors: expected them with NVFP4 weights or float16 rows, and with no others");
  const int given = row_factors.has_value() + input_factors.has_value();
  const bool wanted = act_format == MXFP4_MOE_ACT_NVFP4;
  STD_TORCH_CHECK(given == wanted || (given == 1 && is_bf16 && holds_nvfp4(device, weight_format)),
                  "row_factors, input_factors: expected one of them with NVFP4 rows, and none with others");
  const Mxfp4MoeFactors factors = {factor("weight_factors", weight_factors, {experts, 2}, device),
                                   factor("row_factors", row_factors, {rows}, device),
                                   factor("input_factors", input_factors, {experts}, device)};
  check_tensor("m_tiles", m_tiles, ScalarType::Int, {m_tiles.size(0), 4}, device);
  check_tensor("num_m_tiles", num_m_tiles, ScalarType::Int, {1}, device, kElementAlignment);
  const ScalarType out_type = out.scalar_type();
  STD_TORCH_CHECK(out_type == ScalarType::Float || out_type == ScalarType::BFloat16 || out_type == ScalarType::Half,
                  "out: expected float32, bfloat16 or float16, got ", describe(out));
  check_tensor("out", out, out_type, {rows, n}, device);

  const DeviceGuard guard(device);
  const Mxfp4MoeGemmArgs args = {
      act.data_ptr(),
      act_scale.has_value() ? act_scale->data_ptr() : nullptr,
      weight.data_ptr(),
      out.data_ptr(),
      static_cast<const Mxfp4MoeMTile*>(m_tiles.data_ptr()),
      static_cast<const int32_t*>(num_m_tiles.data_ptr()),
      static_cast<int32_t>(m_tiles.size(0)),
      out_type == ScalarType::Float      ? MXFP4_MOE_OUT_FLOAT32
      : out_type == ScalarType::BFloat16 ? MXFP4_MOE_OUT_BFLOAT16
                                         : MXFP4_MOE_OUT_FLOAT16,
      static_cast<int32_t>(rows),
      static_cast<int32_t>(n),
      static_cast<int32_t>(k),
      static_cast<int32_t>(experts),
      /*m_tiles_are_ready=*/0,  // who knows which kernel made them
      act_format >= 0 ? static_cast<int32_t>(act_format)
      : is_bf16       ? MXFP4_MOE_ACT_BF16
                      : MXFP4_MOE_ACT_MXFP8,
      static_cast<int32_t>(weight_format),
      factors,
      /*activate=*/{},
      current_stream(device),
  };
  const char* refusal = launch(&args);
  STD_TORCH_CHECK(refusal == nullptr, refusal);
}

// Puts a new reference into a dict; false, and a Python error, where either could not be.
bool put(PyObject* dict, PyObject* key, PyObject* value) {
  const bool done = dict && key && value && PyDict_SetItem(dict, key, value) == 0;
  Py_XDECREF(key);
  Py_XDECREF(value);
  return done;
}

PyObject* facts(PyObject*, PyObject*) {
  PyObject* all = PyDict_New();
  for (const Kernel& kernel : kKernels) {
    const Mxfp4MoeTileFacts& f = *kernel.facts;
    PyObject* one =
        Py_BuildValue("{s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i}", "tile_m", f.tile_m, "tile_n", f.tile_n, "swap_ab",
                      f.swap_ab, "threads", f.threads, "stages", f.stages, "stage_bytes", f.stage_bytes, "smem_bytes",
                      f.smem_bytes, "blocks_per_sm", f.blocks_per_sm, "accumulator_registers", f.accumulator_registers);
    // By arch, then by pair.
    PyObject* key = PyUnicode_FromString(f.arch);
    PyObject* of_arch = all && key ? PyDict_GetItemWithError(all, key) : nullptr;  // borrowed
    if (key && !of_arch && !PyErr_Occurred()) {
      PyObject* empty = PyDict_New();
      Py_XINCREF(key);
      of_arch = put(all, key, empty) ? empty : nullptr;  // which `all` keeps alive
    }
    Py_XDECREF(key);
    if (!put(of_arch, PyUnicode_FromString(f.pair), one)) {
      Py_XDECREF(all);
      return nullptr;
    }
  }
  return all;
}

}  // namespace
}  // namespace mxfp4_moe

STABLE_TORCH_LIBRARY_FRAGMENT(mxfp4_moe, m) {
  m.def("grouped_gemm_" MXFP4_MOE_TEXT(
      TILE_NAME) "(Tensor act, Tensor? act_scale, Tensor weight, Tensor m_tiles, Tensor num_m_tiles, "
                 "Tensor(a!) out, int weight_format=0, int act_format=-1, Tensor? weight_factors=None, "
                 "Tensor? row_factors=None, Tensor? input_factors=None) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mxfp4_moe, CUDA, m) {
  m.impl("grouped_gemm_" MXFP4_MOE_TEXT(TILE_NAME), TORCH_BOX(&mxfp4_moe::grouped_gemm));
}

// `entry`: address of the tile's Mxfp4MoeTile. `facts()`: what each of its kernels is.
PyMODINIT_FUNC MXFP4_MOE_JOIN(PyInit_tile_, TILE_NAME)(void) {
  static PyMethodDef methods[] = {
      {"facts", mxfp4_moe::facts, METH_NOARGS, "dict: arch -> pair of formats -> what its kernel was compiled with"},
      {nullptr, nullptr, 0, nullptr}};
  static struct PyModuleDef module = {PyModuleDef_HEAD_INIT,
                                      "tile_" MXFP4_MOE_TEXT(TILE_NAME),
                                      nullptr,
                                      -1,
                                      methods,
                                      nullptr,
                                      nullptr,
                                      nullptr,
                                      nullptr};
  PyObject* m = PyModule_Create(&module);
  PyObject* entry = m ? PyLong_FromVoidPtr(const_cast<Mxfp4MoeTile*>(&mxfp4_moe::kTile)) : nullptr;
  if (!entry || PyModule_AddObject(m, "entry", entry) < 0) {
    Py_XDECREF(entry);
    Py_XDECREF(m);
    return nullptr;
  }
  return m;
}
