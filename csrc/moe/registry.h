// The tiles loaded so far. A tile extension is imported by Python, which hands over the address of its Mxfp4MoeTile.
//
// Append-only: a reader takes no lock, because an entry is complete before the count that shows it.
#pragma once

#include <atomic>
#include <mutex>
#include <string>

#include "tile_abi.h"

namespace mxfp4_moe {

class TileRegistry {
 public:
  // Empty when the tile is registered (again), else why not.
  std::string add(const Mxfp4MoeTile* tile) {
    if (tile == nullptr) {
      return "entry: expected the address of a tile, got 0";
    }
    if (tile->abi_version != MXFP4_MOE_TILE_ABI_VERSION) {
      return "entry: expected a tile of ABI version " + std::to_string(MXFP4_MOE_TILE_ABI_VERSION) + ", got version " +
             std::to_string(tile->abi_version) + "; the extensions come from different builds, reinstall the wheel";
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    const Mxfp4MoeTile* known = find(tile->tile_m, tile->tile_n);
    if (known == tile) {
      return "";
    }
    const std::string name = "(" + std::to_string(tile->tile_m) + ", " + std::to_string(tile->tile_n) + ")";
    if (known != nullptr) {
      return "entry: expected each tile once, got a second tile " + name;
    }
    const int count = count_.load(std::memory_order_relaxed);
    if (count == kCapacity) {
      return "entry: expected at most " + std::to_string(kCapacity) + " tiles, got one more: " + name;
    }
    tiles_[count] = tile;
    count_.store(count + 1, std::memory_order_release);
    return "";
  }

  // nullptr when no such tile was registered.
  const Mxfp4MoeTile* find(int64_t tile_m, int64_t tile_n) const {
    const int count = count_.load(std::memory_order_acquire);
    for (int i = 0; i < count; ++i) {
      if (tiles_[i]->tile_m == tile_m && tiles_[i]->tile_n == tile_n) {
        return tiles_[i];
      }
    }
    return nullptr;
  }

 private:
  static constexpr int kCapacity = 256;
  const Mxfp4MoeTile* tiles_[kCapacity] = {};
  std::atomic<int> count_{0};
  std::mutex mutex_;
};

// Those of this process.
inline TileRegistry& tiles() {
  static TileRegistry registry;
  return registry;
}

}  // namespace mxfp4_moe
