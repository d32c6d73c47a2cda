// Calls functions of the native library for another process, which writes to standard input what they take and reads
// from standard output what they leave: the library of a processor that only an emulator runs.
//
// A call is its name (32 bytes), the size of its struct, a number of arrays (int64), the struct, and for every array
// where in the struct its address belongs, its size in bytes (int64), and its bytes. The answer is the struct and the
// arrays, without sizes. All arrays end at a page that nobody may touch.
#include <dlfcn.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

namespace {

constexpr int64_t kPage = 1 << 16;

[[noreturn]] void fail(const std::string& reason) {
  std::fprintf(stderr, "native_driver: %s\n", reason.c_str());
  std::exit(2);
}

// False at the end of the input, if that is where something may begin.
bool read(void* to, int64_t bytes, bool may_end = false) {
  const size_t got = std::fread(to, 1, size_t(bytes), stdin);
  if (got == 0 && bytes > 0 && may_end) return false;
  if (got != size_t(bytes)) fail("the input ends within a call");
  return true;
}

void write(const void* from, int64_t bytes) {
  if (std::fwrite(from, 1, size_t(bytes), stdout) != size_t(bytes)) fail("nobody reads the answer");
}

struct Array {
  int64_t bytes, room;
  char* begin;

  explicit Array(int64_t bytes) : bytes(bytes), room((bytes + kPage - 1) / kPage * kPage) {
    void* memory = mmap(nullptr, size_t(room + kPage), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) fail("no memory");
    begin = static_cast<char*>(memory) + room - bytes;
    if (mprotect(begin + bytes, size_t(kPage), PROT_NONE) != 0) fail("no page that nobody may touch");
  }
  void release() const { munmap(begin + bytes - room, size_t(room + kPage)); }
};

template <class Function>
Function find(void* library, const std::string& name) {
  void* found = dlsym(library, name.c_str());
  if (found == nullptr) fail("the library has no " + name);
  return reinterpret_cast<Function>(found);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) fail("expected the path of a library");
  void* library = dlopen(argv[1], RTLD_NOW);
  if (library == nullptr) fail(dlerror());
  const char* wanted = std::getenv("DPO_NATIVE_ISA");
  if (wanted != nullptr && !find<int (*)(const char*, int)>(library, "dpo_has_isa")(wanted, 1))
    fail(std::string("no instruction set ") + wanted);
  char runs[32] = {};
  std::strncpy(runs, find<const char* (*)()>(library, "dpo_isa")(), sizeof runs - 1);
  const int64_t interface = find<int (*)()>(library, "dpo_interface")();
  write(runs, sizeof runs);
  write(&interface, sizeof interface);
  std::fflush(stdout);
  for (char name[33] = {}; read(name, 32, true);) {
    int64_t sizes[2];
    read(sizes, sizeof sizes);
    std::vector<int64_t> args(size_t(sizes[0] + 7) / 8);
    read(args.data(), sizes[0]);
    std::vector<Array> arrays;
    for (int64_t i = 0; i < sizes[1]; ++i) {
      int64_t place[2];
      read(place, sizeof place);
      const Array& array = arrays.emplace_back(place[1]);
      read(array.begin, array.bytes);
      std::memcpy(reinterpret_cast<char*>(args.data()) + place[0], &array.begin, sizeof array.begin);
    }
    find<void (*)(void*)>(library, std::string("dpo_") + name)(args.data());
    write(args.data(), sizes[0]);
    for (const Array& array : arrays) {
      write(array.begin, array.bytes);
      array.release();
    }
    std::fflush(stdout);
  }
  return 0;
}
