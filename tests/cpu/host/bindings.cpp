// The host arithmetic of the tiles, and CuTe's word on the same things, for pytest. Test-only: never in the wheel.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cute/atom/mma_traits_sm120.hpp>
#include <cute/tensor.hpp>
#include <cutlass/detail/sm100_blockscaled_layout.hpp>
#include <tuple>
#include <vector>

#include "shared/scale_layout.cuh"
#include "shared/schedule.cuh"
#include "shared/weight_layout.cuh"
#include "tile/lane_maps.cuh"
#include "tile/sm12x/bf16_tile_shape.cuh"
#include "tile/sm12x/emulated_fp4_mma.cuh"
#include "tile/sm90/tile_shape.cuh"

namespace py = pybind11;
using namespace mxfp4_moe;

namespace {

using Atom = cute::SM120::BLOCKSCALED::SM120_16x8x32_TN_VS<cute::float_e4m3_t, cute::float_e2m1_t, float,
                                                           cute::float_ue8m0_t, 32>;
using SwappedAtom = cute::SM120::BLOCKSCALED::SM120_16x8x32_TN_VS<cute::float_e2m1_t, cute::float_e4m3_t, float,
                                                                  cute::float_ue8m0_t, 32>;
using Fp4Atom = cute::SM120::BLOCKSCALED::SM120_16x8x64_TN_VS<cute::float_e2m1_t, cute::float_e2m1_t, float,
                                                              cute::float_ue4m3_t, 16>;
using Bf16Atom = cute::SM80_16x8x16_F32BF16BF16F32_TN;
using Config = cutlass::detail::Sm1xxBlockScaledConfig<32>;

// (lane, value) -> linear index of a (thread, value) layout, as nested lists [32][values].
template <class Layout>
std::vector<std::vector<int>> table(Layout layout) {
  std::vector<std::vector<int>> all(32);
  for (int lane = 0; lane < 32; ++lane)
    for (int value = 0; value < int(cute::size<1>(layout)); ++value) all[lane].push_back(int(layout(lane, value)));
  return all;
}

template <class Traits>
py::dict cute_operand_tables() {
  py::dict tables;
  tables["a"] = table(typename Traits::ALayout{});
  tables["b"] = table(typename Traits::BLayout{});
  tables["c"] = table(typename Traits::CLayout{});
  return tables;
}

template <class Traits>
py::dict cute_tables() {
  py::dict tables = cute_operand_tables<Traits>();
  tables["sfa"] = table(typename Traits::SFALayout{});
  tables["sfb"] = table(typename Traits::SFBLayout{});
  return tables;
}

// What the kernel assumes, in CuTe's terms: index = row + rows * k (operands, scales) or row + rows * column (C).
template <int kK>
py::dict our_tables() {
  constexpr int kInRegister = kK / 8;
  std::vector<std::vector<int>> a(32), b(32), c(32), sfa(32), sfb(32);
  for (int lane = 0; lane < 32; ++lane) {
    for (int reg = 0; reg < 4; ++reg)
      for (int i = 0; i < kInRegister; ++i)
        a[lane].push_back(a_row(lane, reg) + 16 * (kK == 64 ? fp4_a_k : a_k)(lane, reg, i));
    for (int reg = 0; reg < 2; ++reg)
      for (int i = 0; i < kInRegister; ++i)
        b[lane].push_back(b_col(lane) + 8 * (kK == 64 ? fp4_b_k : b_k)(lane, reg, i));
    for (int reg = 0; reg < 4; ++reg) c[lane].push_back(c_row(lane, reg) + 16 * c_col(lane, reg));
    for (int k = 0; k < kK; ++k) {  // whose scales are in one word
      sfa[lane].push_back(scale_a_row(lane) + 16 * k);
      sfb[lane].push_back(scale_b_col(lane) + 8 * k);
    }
  }
  py::dict tables;
  tables["a"] = a;
  tables["b"] = b;
  tables["c"] = c;
  tables["sfa"] = sfa;
  tables["sfb"] = sfb;
  return tables;
}

// Offsets of every (row, k_block) as [rows][k_blocks].
template <class Offset>
std::vector<std::vector<int64_t>> offsets(int64_t rows, int64_t k, Offset offset) {
  std::vector<std::vector<int64_t>> all(rows);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t block = 0; block < k / 32; ++block) all[r].push_back(offset(r, block));
  return all;
}

template <int M, int N, bool kSwap, class Arch, class Pair>
void add_shape(py::list& shapes, const char* arch, const char* pair) {
  using S = typename ShapeOf<M, N, kSwap, Arch, Pair>::Type;
  py::dict d;
  d["arch"] = arch;
  d["pair"] = pair;
  d["m"] = M;
  d["n"] = N;
  d["swap_ab"] = kSwap;
  d["threads"] = S::kThreads;
  d["stages"] = S::kStages;
  d["stage_bytes"] = S::kStageBytes;
  d["smem_bytes"] = S::kSmemBytes;
  d["blocks_per_sm"] = S::kBlocksPerSm;
  d["accumulator_registers"] = S::kAccumulators;
  d["barrier_offset"] = S::Smem::kBarrier;
  shapes.append(d);
}

template <int M, int N, bool kSwap>
void add_shapes(py::list& shapes) {
  add_shape<M, N, kSwap, Arch_90a, Pair_mxfp4_bf16>(shapes, "90a", "mxfp4_bf16");
  add_shape<M, N, kSwap, Arch_120f, Pair_mxfp4_mxfp8>(shapes, "120f", "mxfp4_mxfp8");
  add_shape<M, N, kSwap, Arch_120f, Pair_mxfp4_mxfp4>(shapes, "120f", "mxfp4_mxfp4");
  add_shape<M, N, kSwap, Arch_120f, Pair_nvfp4_nvfp4>(shapes, "120f", "nvfp4_nvfp4");
  if constexpr (M < 256) add_shape<M, N, kSwap, Arch_120f, Pair_mxfp4_bf16>(shapes, "120f", "mxfp4_bf16");
}

template <int M>
void add_native(py::list& shapes) {
  add_shapes<M, 8, false>(shapes);
  add_shapes<M, 16, false>(shapes);
  add_shapes<M, 32, false>(shapes);
  add_shapes<M, 64, false>(shapes);
  add_shapes<M, 128, false>(shapes);
  if constexpr (M < 256) add_shapes<M, 256, false>(shapes);  // (256, 256) does not compile: that is the proof's verdict
}

template <int M>
void add_swapped(py::list& shapes) {
  add_shapes<M, 64, true>(shapes);
  add_shapes<M, 128, true>(shapes);
  add_shapes<M, 256, true>(shapes);
}

// A warp's registers, all lanes of one register side by side: a0 .. a3, b0, b1, the scale words of A and of B, c0 ..
// c3.
constexpr int kWarpRegisters = 12;

template <emulated::Code kA, emulated::Code kB>
struct Warp {
  const uint32_t* word;
  uint32_t at(int reg, int lane) const { return word[reg * 32 + lane]; }
  uint32_t a(int reg, int lane) const { return at(reg, lane); }
  uint32_t b(int reg, int lane) const { return at(4 + reg, lane); }
  uint32_t scale_a(int lane) const { return at(6, lane); }
  uint32_t scale_b(int lane) const { return at(7, lane); }
  uint32_t bit_a(int reg, int k, int lane) const { return emulated::exponent_bit<kA>(a(reg, lane), k); }
  uint32_t bit_b(int reg, int k, int lane) const { return emulated::exponent_bit<kB>(b(reg, lane), k); }
  int32_t value_a(int reg, int k, int lane) const { return emulated::fixed_point<kA>(a(reg, lane), k); }
  int32_t value_b(int reg, int k, int lane) const { return emulated::fixed_point<kB>(b(reg, lane), k); }
  emulated::Sums mma(int lane, int byte) const {
    return emulated::mma_of_lane<kA, kB>(*this, lane, byte, {{at(8, lane), at(9, lane), at(10, lane), at(11, lane)}});
  }
  template <bool kNvfp4>
  emulated::Sums fp4_mma(int lane, int byte) const {
    return emulated::fp4_mma_of_lane<kNvfp4>(*this, lane, byte,
                                             {{at(8, lane), at(9, lane), at(10, lane), at(11, lane)}});
  }
};

// d0 .. d3 of all lanes of many warps' emulated MMAs: uint32 [warps, 12, 32] -> [warps, 4, 32].
template <class OfLane>
py::array_t<uint32_t> of_warps(const py::array_t<uint32_t, py::array::c_style>& registers, const OfLane& of_lane) {
  const py::ssize_t warps = registers.size() / (kWarpRegisters * 32);
  py::array_t<uint32_t> out({warps, py::ssize_t{4}, py::ssize_t{32}});
  for (py::ssize_t warp = 0; warp < warps; ++warp) {
    const uint32_t* word = registers.data() + warp * kWarpRegisters * 32;
    for (int lane = 0; lane < 32; ++lane) {
      const emulated::Sums d = of_lane(word, lane);
      for (int reg = 0; reg < 4; ++reg) out.mutable_at(warp, reg, lane) = d.bits[reg];
    }
  }
  return out;
}

using Registers = py::array_t<uint32_t, py::array::c_style>;
using emulated::Code;
py::array_t<uint32_t> emulated_mma(const Registers& registers, bool fp4_is_a, int byte) {
  return of_warps(registers, [&](const uint32_t* word, int lane) {
    return fp4_is_a ? Warp<Code::kE2m1, Code::kE4m3>{word}.mma(lane, byte)
                    : Warp<Code::kE4m3, Code::kE2m1>{word}.mma(lane, byte);
  });
}
py::array_t<uint32_t> emulated_fp4_mma(const Registers& registers, bool is_nvfp4, int byte) {
  return of_warps(registers, [&](const uint32_t* word, int lane) {
    const Warp<Code::kE2m1, Code::kE2m1> warp{word};
    return is_nvfp4 ? warp.fp4_mma<true>(lane, byte) : warp.fp4_mma<false>(lane, byte);
  });
}

}  // namespace

PYBIND11_MODULE(mxfp4_moe_host, m) {
  m.def("cute_tables", &cute_tables<cute::MMA_Traits<Atom>>);
  m.def("cute_tables_swapped", &cute_tables<cute::MMA_Traits<SwappedAtom>>);
  m.def("cute_tables_fp4", &cute_tables<cute::MMA_Traits<Fp4Atom>>);
  m.def("cute_tables_bf16", &cute_operand_tables<cute::MMA_Traits<Bf16Atom>>);
  m.def("our_tables", &our_tables<32>);
  m.def("our_tables_fp4", &our_tables<64>);
  m.def("emulated_mma", &emulated_mma);
  m.def("emulated_fp4_mma", &emulated_fp4_mma);

  m.def("swizzled_scale_bytes", &swizzled_scale_bytes);
  m.def("swizzled_scale_offsets", [](int64_t n, int64_t k) {
    return offsets(n, k, [&](int64_t r, int64_t block) { return swizzled_scale_offset(r, block, k); });
  });
  m.def("cute_scale_offsets_a", [](int64_t n, int64_t k) {
    const auto layout = Config::tile_atom_to_shape_SFA(cute::make_shape(int(n), 128, int(k), 1));
    return offsets(n, k, [&](int64_t r, int64_t block) { return int64_t(layout(int(r), int(block * 32), 0)); });
  });
  m.def("cute_scale_offsets_b", [](int64_t n, int64_t k) {
    const auto layout = Config::tile_atom_to_shape_SFB(cute::make_shape(128, int(n), int(k), 1));
    return offsets(n, k, [&](int64_t r, int64_t block) { return int64_t(layout(int(r), int(block * 32), 0)); });
  });
  m.def("cute_scale_bytes", [](int64_t n, int64_t k) {
    return int64_t(
        cute::cosize(cute::filter_zeros(Config::tile_atom_to_shape_SFB(cute::make_shape(128, int(n), int(k), 1)))));
  });
  // scale_words: of a row in a K tile, 1 of MXFP4 and 2 of NVFP4
  m.def("weight_bytes", [](int64_t n, int64_t k, int scale_words) { return weight_bytes(n, k, scale_words); });
  m.def("arranged_scale_offsets", [](int64_t n, int k, int scale_words) {  // [rows][k / 32 * scale_words]
    return offsets(n, k * scale_words, [&](int64_t r, int64_t block) {
      const int64_t word = block / 4;
      return weight_block_offset(r / kWeightBlockRows, int(word / scale_words), n, k, scale_words) +
             word % scale_words * kWeightScaleSetBytes + weight_scale_word_in_block(int(r % kWeightBlockRows)) +
             block % 4;
    });
  });
  m.def("arranged_word_offsets", [](int64_t n, int k, int scale_words) {  // [rows][k / 8]
    return offsets(n, 4 * k, [&](int64_t r, int64_t word) {
      return weight_block_offset(r / kWeightBlockRows, int(word / 16), n, k, scale_words) +
             weight_word_in_block(int(r % kWeightBlockRows), int(word / 4 % 4), int(word % 4), scale_words);
    });
  });
  m.def("weight_unit", [] { return kWeightUnit; });
  m.def("weight_word_in_block", &weight_word_in_block);
  m.def("weight_scale_word_in_block", &weight_scale_word_in_block);
  m.def("weight_scale_position", &weight_scale_position);
  m.def("act_scale_bytes", &act_scale_bytes);
  m.def("act_scale_offsets", [](int64_t rows, int64_t k) {
    return offsets(rows, k, [&](int64_t r, int64_t block) { return act_scale_offset(r, block, rows); });
  });

  m.def("m_tiles_of", &m_tiles_of);
  m.def("max_m_tiles", &max_m_tiles);
  m.def("tile_coord", [](int32_t linear, int32_t num_n_tiles) {
    const TileCoord c = tile_coord(linear, num_n_tiles);
    return std::tuple(c.m, c.n);
  });

  m.def("tile_shapes", [] {
    py::list shapes;
    add_native<64>(shapes);
    add_native<128>(shapes);
    add_native<256>(shapes);
    add_swapped<8>(shapes);
    add_swapped<16>(shapes);
    add_swapped<32>(shapes);
    return shapes;
  });
}
