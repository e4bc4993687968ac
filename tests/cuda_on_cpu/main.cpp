// Every kernel over a few shapes, for the sanitizers, which see each array's own bounds.
#include <cstdio>
#include <map>

#include "run.h"

#define KERNELS(X) X(small_forward) X(small_backward) X(tall_forward) X(tall_backward) X(bias_act) X(grad_z) X(sgd_step)
#define DECLARE(name) extern "C" const char* name##_on_cpu(const Problem*);
KERNELS(DECLARE)

int main() {
  using Kernel = const char* (*)(const Problem*);
#define ROW(name) {#name, name##_on_cpu},
  const std::map<std::string, Kernel> kernels{KERNELS(ROW)};
  const int64_t item_sizes[] = {4, 8, 2, 2};
  int runs = 0;
  for (const auto& [name, kernel] : kernels)
    for (const auto& [M, K, N] : {std::array<int64_t, 3>{1, 1, 1}, {33, 20, 17}, {70, 64, 24}})
      for (int32_t dtype = 0; dtype < 4; ++dtype)
        for (const char* activation : {"relu", "silu"}) {  // which save y and z
          std::vector<std::vector<unsigned char>> arrays;
          const auto array = [&](int64_t rows, int64_t columns) {
            arrays.emplace_back(rows * columns * item_sizes[dtype]);
            return Buffer{arrays.back().data(), rows * columns, columns};
          };
          const auto index = static_cast<int32_t>(mlp_ext::index_of(activation, mlp_ext::Activations{}));
          const Problem p{dtype,       index,       {},          M,           K,           N,           array(M, K),
                          array(N, K), array(1, N), array(M, N), array(M, N), array(M, N), array(M, N), array(M, K),
                          array(N, K), array(1, N), array(M, N), 2,           233472,      runs % 3,    runs};
          if (const char* fault = kernel(&p)) {
            std::printf("%s %ldx%ldx%ld dtype %d: %s\n", name.c_str(), long(M), long(K), long(N), dtype, fault);
            return 1;
          }
          ++runs;
        }
  std::printf("%d runs\n", runs);
}
