// The translation unit compiled once per tile, arch and pair of formats that its kernel reads, with -DLOGICAL_TILE_M,
// -DLOGICAL_TILE_N, -DSWAP_AB, -DMXFP4_MOE_ARCH and -DMXFP4_MOE_PAIR. Its object exports the kernel's facts and its
// launch function; tile_op.cpp gathers the kernels into one extension.
#include "tile/launcher.cuh"

#define MXFP4_MOE_JOIN_(a, b) a##b
#define MXFP4_MOE_JOIN(a, b) MXFP4_MOE_JOIN_(a, b)
#define MXFP4_MOE_TEXT_(a) #a
#define MXFP4_MOE_TEXT(a) MXFP4_MOE_TEXT_(a)

#define MXFP4_MOE_OF_KERNEL(prefix) \
  MXFP4_MOE_JOIN(MXFP4_MOE_JOIN(prefix, MXFP4_MOE_ARCH), MXFP4_MOE_JOIN(_, MXFP4_MOE_PAIR))

// A type per kernel: with one for two, their objects would define the same functions, and the linker would keep one of
// each.
namespace MXFP4_MOE_OF_KERNEL(sm_) {
struct Tile
    : mxfp4_moe::ShapeOf<LOGICAL_TILE_M, LOGICAL_TILE_N, SWAP_AB, mxfp4_moe::MXFP4_MOE_JOIN(Arch_, MXFP4_MOE_ARCH),
                         mxfp4_moe::MXFP4_MOE_JOIN(Pair_, MXFP4_MOE_PAIR)>::Type {};
}  // namespace MXFP4_MOE_OF_KERNEL(sm_)
using MXFP4_MOE_OF_KERNEL(sm_)::Tile;

extern "C" {

extern const Mxfp4MoeTileFacts MXFP4_MOE_OF_KERNEL(mxfp4_moe_tile_facts_) = {
    MXFP4_MOE_TEXT(MXFP4_MOE_ARCH),
    MXFP4_MOE_TEXT(MXFP4_MOE_PAIR),
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
    Tile::kActFormat,
    Tile::kWeightFormat,
    Tile::kFolds,
};

const char* MXFP4_MOE_OF_KERNEL(mxfp4_moe_tile_launch_)(const Mxfp4MoeGemmArgs* args) {
  return mxfp4_moe::launch_tile<Tile>(*args);
}

}  // extern "C"
