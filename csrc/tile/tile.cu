// The translation unit compiled once per tile and arch, with -DLOGICAL_TILE_M, -DLOGICAL_TILE_N, -DSWAP_AB and
// -DMXFP4_MOE_ARCH. Its object exports the tile's facts and its launch function for that arch; tile_op.cpp gathers
// the archs into one extension.
#include "tile/launcher.cuh"

#define MXFP4_MOE_JOIN_(a, b) a##b
#define MXFP4_MOE_JOIN(a, b) MXFP4_MOE_JOIN_(a, b)
#define MXFP4_MOE_TEXT_(a) #a
#define MXFP4_MOE_TEXT(a) MXFP4_MOE_TEXT_(a)

// A type per arch: with one for both, the objects of the two archs would define the same kernel, and the linker would
// keep the host stub of only one of them.
namespace MXFP4_MOE_JOIN(sm_, MXFP4_MOE_ARCH) {
struct Tile : mxfp4_moe::ShapeOf<LOGICAL_TILE_M, LOGICAL_TILE_N, SWAP_AB,
                                 mxfp4_moe::MXFP4_MOE_JOIN(Arch_, MXFP4_MOE_ARCH)>::Type {};
}  // namespace MXFP4_MOE_JOIN(sm_,MXFP4_MOE_ARCH)
using MXFP4_MOE_JOIN(sm_, MXFP4_MOE_ARCH)::Tile;

extern "C" {

extern const Mxfp4MoeTileFacts MXFP4_MOE_JOIN(mxfp4_moe_tile_facts_, MXFP4_MOE_ARCH) = {
    MXFP4_MOE_TEXT(MXFP4_MOE_ARCH),
    Tile::M,
    Tile::N,
    SWAP_AB,
    Tile::kThreads,
    Tile::kStages,
    Tile::kStageBytes,
    Tile::kSmemBytes,
    Tile::kBlocksPerSm,
    Tile::kAccumulators,
    Tile::kActivates,
    Tile::kReadsBf16 ? MXFP4_MOE_ACT_BF16 : MXFP4_MOE_ACT_MXFP8,
};

const char* MXFP4_MOE_JOIN(mxfp4_moe_tile_launch_, MXFP4_MOE_ARCH)(const Mxfp4MoeGemmArgs* args) {
  return mxfp4_moe::launch_tile<Tile>(*args);
}

}  // extern "C"
