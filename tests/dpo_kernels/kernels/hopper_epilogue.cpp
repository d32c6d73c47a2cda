// Runs csrc/hopper_epilogue.cuh on the CPU: threads of a warp in step, shuffles between them.
// Arguments: folder, T, V. Reads products [256, 512] fp32, labels and what else is there; writes what the mode fills.

#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <cstring>
#include <fstream>
#include <iterator>
#include <limits>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#define __device__
#define __forceinline__ inline

using std::min;

// Thirty-two threads that wait for each other.
struct Warp {
  std::mutex mutex;
  std::condition_variable turn;
  int arrived = 0;
  long round = 0;
  unsigned words[32];

  void wait() {
    std::unique_lock<std::mutex> lock(mutex);
    const long mine = round;
    if (++arrived == 32) {
      arrived = 0;
      ++round;
      turn.notify_all();
    } else {
      turn.wait(lock, [&] { return round != mine; });
    }
  }
};

thread_local Warp* warp;
thread_local int lane;

inline unsigned exchange_bits(unsigned word, int mask) {
  warp->words[lane] = word;
  warp->wait();
  const unsigned other = warp->words[lane ^ mask];
  warp->wait();
  return other;
}
inline unsigned __shfl_xor_sync(unsigned, unsigned word, int mask) { return exchange_bits(word, mask); }
inline float __shfl_xor_sync(unsigned, float x, int mask) {
  unsigned word;
  std::memcpy(&word, &x, 4);
  word = exchange_bits(word, mask);
  std::memcpy(&x, &word, 4);
  return x;
}

inline float infinity() { return std::numeric_limits<float>::infinity(); }
inline float from_bits(unsigned word) {
  float x;
  std::memcpy(&x, &word, 4);
  return x;
}
inline unsigned short round_bits(float x) {
  unsigned word;
  std::memcpy(&word, &x, 4);
  if (x != x) return 0x7fff;
  return (unsigned short)((word + 0x7fff + (word >> 16 & 1)) >> 16);
}
// The names of hopper_machine.cuh that the epilogue uses.
inline float power_of_2(float x) { return std::exp2(x); }
inline float widen(unsigned short bits) { return from_bits((unsigned)bits << 16); }
inline unsigned pack(float first, float second) { return round_bits(first) | (unsigned)round_bits(second) << 16; }
inline void store_16_bytes(unsigned short* target, const unsigned (&words)[4]) { std::memcpy(target, words, 16); }

#include "epilogue.h"

template <class X>
std::vector<X> read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  const std::vector<char> bytes((std::istreambuf_iterator<char>(file)), {});
  std::vector<X> values(bytes.size() / sizeof(X));
  if (!bytes.empty()) std::memcpy(values.data(), bytes.data(), bytes.size());
  return values;
}

template <class X>
void write(const std::string& path, const std::vector<X>& values) {
  std::ofstream(path, std::ios::binary).write((const char*)values.data(), values.size() * sizeof(X));
}

int main(int, char** given) {
  const std::string folder = std::string(given[1]) + "/";
  const int T = std::stoi(given[2]), V = std::stoi(given[3]), all_rows = 256, all_cols = 512;
  const auto products = read<float>(folder + "products");
  const auto labels = read<long long>(folder + "labels");
  const auto row_shift = read<float>(folder + "row_shift"), grad = read<float>(folder + "grad");
  const auto lse = read<double>(folder + "lse");
  const auto bias = read<u16>(folder + "bias");
  const float nan = std::numeric_limits<float>::quiet_NaN();
  std::vector<u16> out(all_rows * all_cols, 0x7fff);
  std::vector<float> tile_shift(4 * T, nan), tile_sum(4 * T, nan), label_logit(T, nan);
  Args args{};
  args.labels = labels.data();
  args.row_shift = row_shift.empty() ? nullptr : row_shift.data();
  args.tile_shift = tile_shift.data();
  args.tile_sum = tile_sum.data();
  args.label_logit = label_logit.data();
  args.lse = lse.data();
  args.grad = grad.data();
  args.out = out.data();
  args.bias = bias.empty() ? nullptr : bias.data();
  args.out_stride = all_cols;
  args.ignore_index = -100;
  args.T = T;
  args.V = V;
  args.scale = 0.75f;
  args.shift_slack = 2.0f;
  for (int start = 0; start < all_rows; start += 16)
    for (int col = 0; col < all_cols; col += COLS) {
      Warp shared;
      std::vector<std::thread> threads;
      for (int thread = 0; thread < 32; ++thread)
        threads.emplace_back([&, thread] {
          warp = &shared;
          lane = thread;
          const int row = start + thread / 4, quarter = thread % 4;
          const Rows rows = read_rows(args, row);
          float d[ACCUMULATORS];
          // Where wgmma leaves the elements of a tile of 64 rows: PTX, "D fragment layout of wgmma.mma_async.m64nNk16".
          for (int i = 0; i < ACCUMULATORS; ++i)
            d[i] = products[(row + 8 * (i % 4 / 2)) * all_cols + col + 8 * (i / 4) + 2 * quarter + i % 2];
          finish(d, args, rows, col, quarter);
        });
      for (auto& thread : threads) thread.join();
    }
  write(folder + "out", out);
  const size_t parts = MODE == EXPS ? 2 : 4;
  tile_shift.resize(parts * T);
  tile_sum.resize(parts * T);
  write(folder + "tile_shift", tile_shift);
  write(folder + "tile_sum", tile_sum);
  write(folder + "label_logit", label_logit);
}
