// Which instruction set's loops run, and the small functions of the ABI that describe the library.
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "kvrt.h"
#include "page_ops.h"

namespace kvrt {

#ifndef KVRT_HAVE_AVX2
const PageOps *avx2_ops() { return nullptr; }
#endif
#ifndef KVRT_HAVE_AVX512
const PageOps *avx512_ops() { return nullptr; }
#endif

namespace {

struct Variant {
  const char *name;
  const PageOps *ops;  // null: not compiled in
  const char *reason;  // null: this machine runs it
};

constexpr int kVariants = 3;

// __builtin_cpu_supports also asks whether the operating system saves the wide registers.
const char *avx512_reason() {
#if defined(__x86_64__)
  if (!avx512_ops()) return "not compiled in";
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                 __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni") &&
                 __builtin_cpu_supports("fma") && __builtin_cpu_supports("avx2")
             ? nullptr
             : "the processor or the operating system lacks AVX-512 F, BW, DQ, VL, VBMI or VNNI";
#else
  return "another architecture";
#endif
}

const char *avx2_reason() {
#if defined(__x86_64__)
  if (!avx2_ops()) return "not compiled in";
  __builtin_cpu_init();
  // every processor with AVX2 and FMA converts float16 as well
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")
             ? nullptr
             : "the processor or the operating system lacks AVX2 or FMA";
#else
  return "another architecture";
#endif
}

Variant variant(int i) {
  if (i == 0) return {"avx512", avx512_ops(), avx512_reason()};
  if (i == 1) return {"avx2", avx2_ops(), avx2_reason()};
  return {"portable", &portable_ops(), nullptr};
}

const PageOps *best() {
  for (int i = 0; i < kVariants; i++)
    if (!variant(i).reason) return variant(i).ops;
  return &portable_ops();
}

int find(const char *name, const PageOps **ops) {
  for (int i = 0; i < kVariants; i++) {
    const Variant v = variant(i);
    if (std::strcmp(v.name, name)) continue;
    *ops = v.ops;
    return v.reason ? KVRT_UNSUPPORTED : KVRT_OK;
  }
  return KVRT_INVALID;
}

// the choice is the same whoever makes it first, so a race is harmless
std::atomic<const PageOps *> chosen{nullptr};

const PageOps *choose() {
  const char *wanted = std::getenv("KVCLI_CPU_VARIANT");
  const PageOps *ops;
  return wanted && *wanted && find(wanted, &ops) == KVRT_OK ? ops : best();
}

}  // namespace

const PageOps &current_ops() {
  const PageOps *ops = chosen.load(std::memory_order_relaxed);
  if (!ops) {
    ops = choose();
    chosen.store(ops, std::memory_order_relaxed);
  }
  return *ops;
}

}  // namespace kvrt

extern "C" {

int kvrt_version(void) { return KVRT_VERSION; }

const char *kvrt_kind(void) { return "cpu"; }

const char *kvrt_status_text(int status) {
  switch (status) {
    case KVRT_OK: return "ok";
    case KVRT_INVALID: return "invalid argument";
    case KVRT_UNSUPPORTED: return "not supported by this library";
    case KVRT_NO_MEMORY: return "out of memory";
    case KVRT_DEVICE: return "device error";
    default: return "unknown status";
  }
}

const char *kvrt_variant(int i, const char **reason) {
  if (reason) *reason = nullptr;
  if (i < 0 || i >= kvrt::kVariants) return nullptr;
  const kvrt::Variant v = kvrt::variant(i);
  if (reason) *reason = v.reason;
  return v.name;
}

int kvrt_use_variant(const char *name) {
  const kvrt::PageOps *ops = kvrt::best();
  const int status = name ? kvrt::find(name, &ops) : static_cast<int>(KVRT_OK);
  if (status == KVRT_OK) kvrt::chosen.store(ops, std::memory_order_relaxed);
  return status;
}

const char *kvrt_current_variant(void) { return kvrt::current_ops().name; }

int kvrt_page_layout(const kv_layer *layer, kv_page_layout *out) {
  if (!layer || !out || layer->head_dim < 1 || layer->block_size < 1) return KVRT_INVALID;
  const kv_format *formats[] = {&layer->k, &layer->v};
  for (const kv_format *f : formats)
    if (f->bits < 1 || (!kv_is_exact(f) && f->group < 1)) return KVRT_INVALID;
  *out = kv_layout_of(layer);
  return KVRT_OK;
}

int64_t kvrt_boundary(const kv_layer *layer, int64_t n) {
  return layer && layer->block_size > 0 ? kv_boundary(layer, n) : -1;
}

}  // extern "C"
